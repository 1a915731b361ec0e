"""Operations of every pair of bricks are those that torch counts."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moai_llm import recipe as recipes
from moai_llm.ops.attention import visible
from moai_llm.ops.dispatch import use
from tests.conftest import PAIRS, tiny_config, tiny_model

LENGTH, ROWS = 13, 3


def counted(mixer: str, mlp: str, **changes: object) -> tuple[int, int]:
    """Operations of the forward, and of forward and backward. The reference computes every score of a row, also those
    that nobody may see; the scan has no matrix product and is not counted by torch.
    """
    model = tiny_model(mixer, mlp, **changes).train()
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    implementations = use(attention="reference", experts="loop", selective_scan="torch")
    with implementations, FlopCounterMode(display=False) as counter:
        logits = model(ids, noise_key=torch.tensor(1)).logits
        forward = counter.get_total_flops()
        logits.sum().backward()
        return forward, counter.get_total_flops()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("mixer", "mlp"), PAIRS)
def test_every_pair_of_bricks(mixer: str, mlp: str, gated: bool) -> None:
    changes: dict[str, object] = {"mlp_gated": gated, "router_noise": True}
    forward, both = counted(mixer, mlp, **changes)
    config = tiny_config(mixer, mlp, **changes)
    flops = config.flops(LENGTH)
    every_score = 2 * 4 * 4 * 8 * LENGTH if mixer != "linear_attention" else 0  # layers x (2 + 2) x heads x dims x keys
    products = flops["total"] - flops["attention"] - flops["scan"] + every_score
    assert forward == pytest.approx(ROWS * LENGTH * products, abs=1e-6)
    assert both == 3 * forward
    assert (flops["scan"] > 0) == (mixer == "linear_attention")


@pytest.mark.parametrize("window", [None, 1, 5, LENGTH, 40])
def test_scores_are_those_that_may_be_seen(window: int | None) -> None:
    mixer = "full_attention" if window is None else "sliding_attention"
    flops = tiny_config(mixer, "none", sliding_window=window).flops(LENGTH)
    pairs = int(visible(LENGTH, LENGTH, None, window, torch.device("cpu")).sum())
    assert flops["attention"] * LENGTH == pytest.approx(2 * 4 * 4 * 8 * pairs)


def test_documents_see_only_themselves() -> None:
    config = tiny_config()
    assert config.flops(64, 16)["attention"] == config.flops(16)["attention"] < config.flops(64)["attention"]
    assert config.flops(64, 500) == config.flops(64)


def test_the_scan_as_it_is_written() -> None:
    """Two layers of 64 channels and 5 states: exp(delta A), times h, plus (delta x) B, C h and D x; four taps."""
    per_state, per_channel = 2 + 1 + 1 + 1 + 2, 3
    flops = tiny_config("linear_attention", "none").flops(9)
    assert flops["scan"] == 2 * 64 * (5 * per_state + per_channel + 2 * 4)


def test_beside_the_6n_rule() -> None:
    """Without attention over the row and with a tied head, training takes 6 operations a parameter and token."""
    model = recipes.load("moai-3b").model
    flops, counts = model.flops(1), model.parameters()
    assert 3 * flops["total"] / (6 * counts["active"]) == pytest.approx(1, rel=1e-3)
    assert 3 * model.flops(4096)["total"] / (6 * counts["active"]) > 1.1


def test_parts_add_up() -> None:
    flops = recipes.load("moai-hybrid-moe-0.8b").model.flops(2048)
    parts = sum(flops[part] for part in ("token_mixers", "attention", "scan", "channel_mixers"))
    assert flops["layers"] == parts and flops["total"] == parts + flops["head"]
