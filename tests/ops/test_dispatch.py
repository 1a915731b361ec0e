"""Choosing implementations: order, dtype, force, and what happens when one cannot run."""

from __future__ import annotations

import pytest
import torch

from moai_llm.ops.dispatch import Implementation, Op, Unavailable, parse_choice, use


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
    with use(attention="nonsense"), pytest.raises(ValueError, match="no implementation 'nonsense'; there are"):
        attention(q, q, q)
    with pytest.raises(ValueError, match="unknown ops"), use(atention="reference"):
        pass
    assert torch.equal(attention(q, q, q), plain)


def test_a_forced_implementation_that_cannot_run_raises() -> None:
    from moai_llm.ops import moe

    x, ids, weights = torch.randn(4, 6, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 1)
    experts = moe.Experts(torch.randn(2, 6, 6).double(), torch.randn(2, 6, 6).double(), gated=False)
    with use(experts="grouped"), pytest.raises(RuntimeError, match="forced implementation 'grouped'.*float64"):
        moe.experts_forward(x, ids, weights, experts, torch.relu)


def test_environment_grammar() -> None:
    assert parse_choice("a=b, c=d") == {"a": "b", "c": "d"}
    assert parse_choice("") == {}
    with pytest.raises(ValueError, match="op=implementation"):
        parse_choice("a")
