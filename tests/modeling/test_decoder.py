"""Bricks from outside the package."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moai_llm import architecture
from moai_llm.modeling import decoder
from moai_llm.modeling.model import MoaiForCausalLM
from tests.conftest import tiny_config


class Shift(nn.Module):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return torch.nn.functional.pad(x, (0, 0, 1, -1))


class Double(Shift):
    def forward(self, x: Tensor, **_: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        return 2 * x, None


@pytest.fixture(autouse=True)
def registries_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    for table in ("TOKEN_MIXERS", "CHANNEL_MIXERS"):
        monkeypatch.setattr(decoder, table, dict(getattr(decoder, table)))
    for names in ("TOKEN_MIXER_TYPES", "CHANNEL_MIXER_TYPES"):
        monkeypatch.setattr(architecture, names, list(getattr(architecture, names)))


def test_one_call_registers_a_brick() -> None:
    with pytest.raises(ValueError, match="'shift' is not one of"):
        tiny_config("shift")
    decoder.register_token_mixer("shift", Shift)
    decoder.register_channel_mixer("double", Double)
    decoder.register_channel_mixer("double", Double)  # again, as when a notebook cell is run twice
    assert architecture.CHANNEL_MIXER_TYPES.count("double") == 1
    config = tiny_config("shift", "double")
    model = MoaiForCausalLM(config)
    assert isinstance(model.model.layers[0].mixer, Shift) and isinstance(model.model.layers[1].mlp, Double)
    ids = torch.randint(0, 61, (1, 5))
    assert torch.isfinite(model(ids, labels=ids).loss)
    with pytest.raises(ValueError, match="the parameters of 'shift' are not known here"):
        config.parameters()
