"""Micro-batches follow the memory there is, and the step stays the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moai_llm.ops.moe import counter_normal
from moai_llm.runtime import MoaiError
from moai_llm.training.objective import NextToken
from tests.training.conftest import MakeRecipe, train

NOISY = ("data.seq_len=16", "train.batch_tokens=128", "train.micro_batch_size=8", "train.steps=4", "checkpoint.every=2")


class Device:
    """A device that does not hold more than `most` rows, and notices at the second micro-batch if there is one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
        self.sizes: list[int] = []
        real, of_step = NextToken.forward, [0]

        def forward(objective: NextToken, model: Any, batch: Any, counts: Any, **given: Any) -> Any:
            rows = batch["input_ids"].shape[0]
            self.sizes.append(rows)
            of_step[0] = (of_step[0] + rows) % 8
            if rows > most and of_step[0] == 0:
                raise torch.OutOfMemoryError("injected")
            return real(objective, model, batch, counts, **given)

        monkeypatch.setattr(NextToken, "forward", forward)


def test_out_of_memory_halves_the_micro_batch_and_repeats_the_step(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if it had run so from the start, with routing noise; and what was learned stays, also in a resumed run."""
    keys = (*NOISY, "model.router_noise=true")
    right = load_file(
        train(make_recipe(*keys, "train.micro_batch_size=2", out="small"), quiet=True) / "model.safetensors"
    )
    device = Device(monkeypatch, most=2)
    found = load_file(train(make_recipe(*keys, out="large"), title="") / "model.safetensors")
    assert device.sizes == [8, 4, 4, *[2] * 16]
    assert all((found[name] - right[name]).abs().max() <= 1e-6 for name in right)
    assert (
        "out of memory: micro-batches of 4 rows instead of 8, 2 a step; the step stays the same"
        in capsys.readouterr().out
    )
    device.sizes.clear()
    train(make_recipe(*keys, "train.steps=5", out="large"), resume=True, quiet=True)
    assert device.sizes == [2] * 4


def test_a_row_that_does_not_fit(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, most=0)
    with pytest.raises(MoaiError, match="does not hold a single row: set train.activation_checkpointing=full"):
        train(make_recipe(*NOISY), quiet=True)
    assert device.sizes == [8, 4, 4, *[2] * 4, *[1] * 8]


def test_noise_of_a_row_does_not_depend_on_its_neighbours() -> None:
    keys = torch.tensor([5, 9, 2])
    whole = counter_normal(keys, (3 * 7, 4)).view(3, 7, 4)
    for row, key in zip(whole, keys):
        assert torch.equal(row, counter_normal(key, (7, 4))) and torch.equal(row, counter_normal(key[None], (7, 4)))
    assert not torch.equal(whole[0], whole[1])
