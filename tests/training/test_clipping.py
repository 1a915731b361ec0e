"""Clipping against its papers, its memory across a resume, and gradients that are not finite."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from moai_llm.optimization import ClipConfig
from moai_llm.training import run
from moai_llm.training.clipping import Clip, clip_units_
from moai_llm.training.events import read_metrics
from tests.conftest import tiny_model
from tests.training.conftest import MakeRecipe, train
from tests.training.test_run import Stop, same, stop_at


def with_gradients(model: nn.Module, size: float = 1.0) -> torch.Tensor:
    for parameter in model.parameters():
        parameter.grad = size * torch.randn_like(parameter)
    return gradient(model)


def gradient(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def test_norm_is_torchs_to_the_bit() -> None:
    ours, theirs = tiny_model().float(), tiny_model().float()
    for limit in (0.5, 1e6):
        with_gradients(ours)
        for a, b in zip(ours.parameters(), theirs.parameters()):
            b.grad = a.grad.clone() if a.grad is not None else None
        clipped = Clip(ours, max_norm=limit)()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), limit)
        assert torch.equal(gradient(ours), gradient(theirs)) and torch.equal(clipped.norm, norm)
        assert float(clipped.kept) == pytest.approx(min(1.0, limit / float(norm)))


def test_percentile_is_autoclip() -> None:
    """numpy's percentile of all norms so far, this one included (arXiv 2007.14469)."""
    model = nn.Linear(5, 3)
    clip = Clip(model, ClipConfig(name="percentile", percentile=30), max_norm=1e9)
    norms: list[float] = []
    for size in (1.0, 5.0, 0.2, 3.0, 8.0, 0.1):
        before = with_gradients(model, size)
        norms.append(float(before.norm()))
        clipped = clip()
        limit = float(np.percentile(norms, 30))
        assert torch.allclose(gradient(model), before * min(1.0, limit / (norms[-1] + 1e-6)), rtol=1e-5)
        assert float(clipped.kept) == pytest.approx(min(1.0, limit / norms[-1]), rel=1e-4)
    assert limit < max(norms) / 2  # control: it did limit something


def test_percentile_forgets_and_stays_under_the_fixed_norm() -> None:
    model = nn.Linear(5, 3)
    clip = Clip(model, ClipConfig(name="percentile", percentile=50, history=3), max_norm=2.0)
    for size in (100.0, 100.0, 100.0):
        with_gradients(model, size)
        clip()
        assert float(gradient(model).norm()) == pytest.approx(2.0, rel=1e-5)
    for size in (0.1, 0.1, 0.1):
        with_gradients(model, size)
        clip()
    assert len(clip.norms) == 3 and max(clip.norms) < 1
    with_gradients(model, 100.0)
    clip()
    assert float(gradient(model).norm()) == pytest.approx(float(np.median(clip.norms)), rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_not_remembered(bad: float) -> None:
    model = nn.Linear(5, 3)
    clip = Clip(model, ClipConfig(name="percentile"), max_norm=1.0)
    for spoilt in (True, False, True):
        with_gradients(model)
        if spoilt:
            assert model.weight.grad is not None
            model.weight.grad[0, 0] = bad
        clip()
    assert len(clip.norms) == 1 and math.isfinite(clip.norms[0])


def test_agc_is_the_formula_for_each_unit() -> None:
    """arXiv 2102.06171, equation 3, unit by unit; eps holds where weights are small."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(2, 3, 5)), nn.Parameter(torch.zeros(3, 4))]
    for weight in weights:
        weight.grad = torch.randn_like(weight) * torch.tensor([[1e-4], [1.0], [10.0], [0.0]])[: weight.shape[-2]]
    before = [weight.grad.clone() for weight in weights if weight.grad is not None]
    clip_units_(weights, ratio=0.01, eps=1e-3)
    changed = 0
    for weight, old in zip(weights, before):
        assert weight.grad is not None
        rows = zip(weight.detach().flatten(0, -2), old.flatten(0, -2), weight.grad.flatten(0, -2))
        for unit, was, now in rows:
            most = 0.01 * max(float(unit.norm()), 1e-3)
            expected = was * (most / float(was.norm())) if float(was.norm()) > most else was
            assert torch.allclose(now, expected, rtol=1e-5, atol=1e-12)
            changed += not torch.equal(now, was)
    assert 0 < changed < 4 + 6 + 3


@pytest.mark.parametrize("tied", [False, True])
def test_agc_leaves_the_output_layer_norms_and_the_recurrence_alone(tied: bool) -> None:
    model = tiny_model("linear_attention", "dense", tie_word_embeddings=tied).float()
    before = {}
    for name, parameter in model.named_parameters():
        parameter.grad = torch.ones_like(parameter)
        before[name] = parameter.grad.clone()
    Clip(model, ClipConfig(name="agc", ratio=1e-4), max_norm=1e9)()
    kept = {name for name, p in model.named_parameters() if p.grad is not None and torch.equal(p.grad, before[name])}
    assert ("model.embed_tokens.weight" if tied else "lm_head.weight") in kept
    assert {"model.norm.weight", "model.layers.0.mixer.A_log", "model.layers.0.mixer.conv_bias"} <= kept
    assert "model.layers.0.mixer.in_proj_x.weight" not in kept and "model.layers.0.mlp.up_proj.weight" not in kept


def test_agc_stays_under_the_fixed_norm() -> None:
    model = tiny_model().float()
    before = with_gradients(model, 10.0)
    clipped = Clip(model, ClipConfig(name="agc", ratio=0.1), max_norm=0.5)()
    assert float(gradient(model).norm()) == pytest.approx(0.5, rel=1e-4)
    assert float(clipped.norm) == pytest.approx(float(before.norm()))
    assert float(clipped.kept) == pytest.approx(0.5 / float(before.norm()), rel=1e-4)


@pytest.mark.parametrize("name", ["percentile", "agc"])
def test_resumed_equals_uninterrupted_bit_for_bit(
    name: str, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [f"clip.name={name}", "clip.percentile=0", "clip.history=4", "train.steps=6", "optim.lr=3e-2"]
    wanted += ["train.max_grad_norm=1e9", "schedule.warmup=0", "checkpoint.every=2"]
    whole = train(make_recipe(*wanted, out="whole"), quiet=True)
    broken = make_recipe(*wanted, "eval.every=1", out="broken")
    with pytest.raises(Stop):
        train(broken, hooks=[stop_at(3)], quiet=True)
    assert same(whole, train(broken, resume=True, quiet=True))
    rows = [row for row in read_metrics(Path(broken.train.out) / "metrics.jsonl") if "clip" in row]
    assert len(rows) == 6 and all(0 < row["clip"] <= 1 for row in rows) and min(row["clip"] for row in rows) < 1
    if name == "percentile":  # control: without the norms it would not be the same run
        again = make_recipe(*wanted, "eval.every=1", out="again")
        with pytest.raises(Stop):
            train(again, hooks=[stop_at(3)], quiet=True)
        restore = run.restore
        monkeypatch.setattr(run, "restore", lambda *arguments: {**restore(*arguments), "norms": []})
        assert not same(whole, train(again, resume=True, quiet=True))
