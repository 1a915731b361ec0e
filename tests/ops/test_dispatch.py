"""Choosing implementations: order, dtype, force, and what happens when one cannot run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moai_llm.ops import dispatch
from moai_llm.ops.dispatch import Implementation, Op, Unavailable, parse_choice, use
from moai_llm.runtime import MoaiError


def missing() -> None:
    raise Unavailable("no such machine")


def make(order: list[str]) -> Op:
    def slow(x: torch.Tensor) -> str:
        return "reference"

    def fast(x: torch.Tensor) -> str:
        return "fast"

    implementations = {
        "reference": Implementation(slow),
        "fast": Implementation(fast, dtypes=(torch.float32,)),
        "absent": Implementation("moai_llm.ops.no_such_module:f"),
        "broken": Implementation("tests.ops.broken_kernel:kernel"),
    }
    return Op("test", implementations, {"any": order})


def test_the_first_that_can_run_is_taken_and_remembered() -> None:
    op = make(["absent", "broken", "fast", "reference"])
    assert op(torch.zeros(1)) == "fast"
    assert op(torch.zeros(1, dtype=torch.float64)) == "reference"
    assert op.pick("cpu") == "fast"


def test_nothing_can_run() -> None:
    with pytest.raises(RuntimeError, match=r"cannot run on cpu: absent: .*no_such_module"):
        make(["absent"])(torch.zeros(1))


def test_forcing() -> None:
    from moai_llm.ops.attention import attention

    q = torch.randn(1, 2, 4, 8)
    plain = attention(q, q, q)
    with use(attention="reference"):
        assert torch.allclose(attention(q, q, q), plain, atol=1e-6)
    with pytest.raises(MoaiError, match="no implementation 'refrence' .did you mean 'reference'.*it has"):
        with use(attention="refrence"):
            pass
    with pytest.raises(MoaiError, match="no op 'atention' .did you mean 'attention'.*ops are attention, "):
        with use(atention="reference"):
            pass
    assert torch.equal(attention(q, q, q), plain)


def test_a_forced_implementation_that_cannot_run_raises() -> None:
    from moai_llm.ops import moe

    x, ids, weights = torch.randn(4, 6, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 1)
    experts = moe.Experts(torch.randn(2, 6, 6).double(), torch.randn(2, 6, 6).double(), gated=False)
    with use(experts="grouped"), pytest.raises(MoaiError, match="forced implementation 'grouped'.*float64"):
        moe.experts_forward(x, ids, weights, experts, torch.relu)


def test_environment_grammar() -> None:
    assert parse_choice("a=b, c=d") == {"a": "b", "c": "d"}
    assert parse_choice("") == {}
    with pytest.raises(MoaiError, match="op=implementation"):
        parse_choice("a")


def test_every_module_of_ops_is_listed() -> None:
    """So that a name can be checked before anything has used its op."""
    folder = Path(dispatch.__file__).parent
    defining = {path.stem for path in folder.glob("*.py") if re.search(r"^\w+ = define\(", path.read_text(), re.M)}
    assert set(dispatch.MODULES) == defining


WRONG = {
    "atention=reference": "no op 'atention' (did you mean 'attention'?); ops are",
    "attention=split,selective_scan=nativ": "no implementation 'nativ' (did you mean 'native'?); it has",
    "attention": "MOAI_OPS is a list of op=implementation, got 'attention'",
}


@pytest.mark.parametrize(("choice", "message"), WRONG.items())
def test_a_wrong_choice_is_told(choice: str, message: str) -> None:
    with pytest.raises(MoaiError, match=re.escape(message)):
        dispatch.check(parse_choice(choice))


def test_a_wrong_environment_stops_every_command() -> None:
    choice, message = next(iter(WRONG.items()))
    environment = {**os.environ, "MOAI_OPS": choice}
    for command in (["ops"], ["recipes", "moai-3b-tiny"]):
        done = subprocess.run(
            [sys.executable, "-m", "moai_llm", *command], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    code = "import torch; from moai_llm.ops.attention import attention as a; a(*[torch.randn(1, 2, 4, 8)] * 3)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "MoaiError" in done.stderr and message in done.stderr
