"""What counts as the same answer."""

from __future__ import annotations

import pytest
import torch

from moai_llm.export.probe import TOLERANCE, Difference, difference, inputs, require_equal
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer

ASKED = [torch.zeros(1, 64, dtype=torch.long), torch.zeros(1, 300, dtype=torch.long)]


def pair(change: float, positions: int) -> Difference:
    """Two inputs of 64 positions; the first so many of them differ in one logit."""
    torch.manual_seed(0)
    ours = [torch.randn(64, 50) for _ in ASKED]
    theirs = [logits.clone() for logits in ours]
    theirs[0][:positions, 7] += change
    return difference(ours, theirs, ASKED)


def test_differences_are_measured() -> None:
    none, some = pair(0, 0), pair(0.5, 3)
    assert none.largest == none.divergence == none.beyond == 0 and none.agree == 1
    assert some.largest == pytest.approx(0.5) and some.beyond == 3 and some.positions == 128 and some.longest == 300
    assert 0 < some.divergence < 0.1 and some.allowed == pytest.approx(TOLERANCE * some.scale)
    assert pair(float("nan"), 1).beyond == pair(float("inf"), 1).beyond == 1


def test_only_a_router_is_forgiven_a_position() -> None:
    assert require_equal(pair(1e-5, 64), "x", experts=False) == []
    with pytest.raises(MoaiError, match="x does not compute what the model computes"):
        require_equal(pair(0.1, 1), "x", experts=False)
    assert "at 1 of 128 positions a router" in require_equal(pair(0.1, 1), "x", experts=True)[0]
    with pytest.raises(MoaiError):
        require_equal(pair(0.1, 2), "x", experts=True)
    with pytest.raises(MoaiError):
        require_equal(pair(float("nan"), 1), "x", experts=False)


def test_the_inputs_are_many_and_one_is_long(tokenizer: Tokenizer) -> None:
    found = inputs(tokenizer, tokenizer.vocab_size, 700)
    assert len(found) > 6 and max(ids.shape[1] for ids in found) == 700
    assert all(int(ids.max()) < tokenizer.vocab_size for ids in found)
    assert max(ids.shape[1] for ids in inputs(tokenizer, tokenizer.vocab_size, 1 << 20)) == 1024
