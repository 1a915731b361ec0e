"""Each check passes a sound model of every kind and fails one that is broken in just its way: the controls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moai_llm import recipe as recipes
from moai_llm.modeling.model import MoaiForCausalLM
from moai_llm.training import environment
from moai_llm.training.doctor import Finding, examine, history, laws, learning, machine, worst
from tests.conftest import PAIRS, tiny_config
from tests.training.conftest import MakeRecipe, train
from tests.training.test_checkpoint import flip

CPU = torch.device("cpu")


def fresh(mixer: str = "full_attention", mlp: str = "dense", **changes: object) -> MoaiForCausalLM:
    """As training begins: fp32, initial weights."""
    torch.manual_seed(0)
    return MoaiForCausalLM(tiny_config(mixer, mlp, **changes))


def ids(rows: int = 3, length: int = 23) -> torch.Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(1))


def batch(rows: int = 3, length: int = 23) -> dict[str, torch.Tensor]:
    return {"input_ids": ids(rows, length), "labels": ids(rows, length)}


@pytest.mark.parametrize(("mixer", "mlp"), PAIRS)
def test_a_sound_model_passes(mixer: str, mlp: str) -> None:
    model = fresh(mixer, mlp, router_noise=mlp == "sparse")
    weights = [p.detach().clone() for p in model.parameters()]
    found = [laws.causality(model, ids()), laws.packing(model, ids()), laws.initial_loss(model, ids()),
             laws.accumulation(model, batch()), learning.gradient_flow(model, batch())]  # fmt: skip
    used = learning.expert_use(model, ids(8, 64))
    assert (used is None) == (mlp != "sparse")
    assert [f.seen for f in [*found, *[used] * (used is not None)] if f.verdict != "ok"] == []
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters()))  # none of these changes the model


class SeesTheFuture(nn.Module):
    """A brick whose output at every place depends on the whole row."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor, **where: Any) -> torch.Tensor:
        return self.inner(x, **where) + x.mean(1, keepdim=True)


class ForgetsBorders(nn.Module):
    """A brick that does not respect seq_idx."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor, *, seq_idx: torch.Tensor | None = None, **where: Any) -> torch.Tensor:
        return self.inner(x, seq_idx=None, **where)


def test_an_acausal_layer_is_found_and_named() -> None:
    model = fresh()
    model.model.layers[1].mixer = SeesTheFuture(model.model.layers[1].mixer)
    found = laws.causality(model, ids())
    assert (
        found.verdict == "fail" and "changes logits before it" in found.seen and "layer 2 (SeesTheFuture)" in found.seen
    )
    assert "mask" in found.advice


@pytest.mark.parametrize("mixer", ["full_attention", "linear_attention"])
def test_an_attention_without_its_causal_mask(mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault of old: attention called without its mask. A model of Mamba alone does not call it."""
    from moai_llm.modeling import attention as module

    def full(q: Any, k: Any, v: Any, *, mask: Any = None, seq_idx: Any = None, window: Any = None) -> torch.Tensor:
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    monkeypatch.setattr(module, "attention", full)
    assert laws.causality(fresh(mixer), ids()).verdict == ("fail" if mixer == "full_attention" else "ok")


@pytest.mark.parametrize("mixer", ["full_attention", "linear_attention"])
def test_documents_that_leak(mixer: str) -> None:
    model = fresh(mixer)
    model.model.layers[0].mixer = ForgetsBorders(model.model.layers[0].mixer)
    found = laws.packing(model, ids())
    assert found.verdict == "fail" and "changes the next one" in found.seen and "layer 1" in found.seen
    assert "seq_idx" in found.advice and laws.causality(model, ids()).verdict == "ok"


def test_positions_that_do_not_begin_anew() -> None:
    model = fresh(position_embedding="learned")
    inner = model.model.forward

    def forward(*args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        return inner(*args, position_ids=None, **kwargs)

    model.model.forward = forward  # type: ignore[method-assign]
    found = laws.packing(model, ids())
    assert found.verdict == "fail" and "than alone" in found.seen and "position_ids" in found.advice


@pytest.mark.parametrize(("scale", "verdict"), [(1.0, "ok"), (12.0, "warn"), (60.0, "fail")])
def test_initial_weights_of_a_wrong_scale(scale: float, verdict: str) -> None:
    model = fresh()
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    found = laws.initial_loss(model, ids())
    assert found.verdict == verdict, found.seen
    assert (verdict == "ok") == (not found.advice)


def test_an_untrained_model_that_knows_random_tokens() -> None:
    """Its logits are those of the next token: the crystal ball as the loss shows it."""
    model = fresh()
    wanted = ids()
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.eye(61, 32))
    model.model.forward = lambda **_: type(  # type: ignore[method-assign]
        "Out", (), {"last_hidden_state": 9.0 * torch.nn.functional.one_hot(wanted.roll(-1, 1), 61)[..., :32].float(),
                    "past_key_values": None, "hidden_states": None, "router": None}
    )()  # fmt: skip
    found = laws.initial_loss(model, wanted)
    assert found.verdict == "fail" and "labels are not shifted" in found.advice


def test_micro_batches_that_are_means_of_their_own() -> None:
    model = fresh()
    inner = model.forward
    model.forward = lambda *a, num_items_in_batch=None, **k: inner(*a, **k)  # type: ignore[method-assign]
    found = laws.accumulation(model, batch())
    assert found.verdict == "fail" and "num_items_in_batch" in found.advice


def test_frozen_and_detached_layers() -> None:
    model = fresh()
    model.model.layers[1].requires_grad_(False)
    found = learning.gradient_flow(model, batch())
    assert found.verdict == "fail" and "frozen: model.layers.1" in found.seen
    model = fresh()
    inner = model.model.layers[0].mixer.forward
    model.model.layers[0].mixer.forward = lambda *a, **k: inner(*a, **k).detach()  # type: ignore[method-assign]
    found = learning.gradient_flow(model, batch())
    assert found.verdict == "fail" and "no gradient reaches model.layers.0.mixer" in found.seen
    model = fresh()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf
    assert "no numbers" in learning.gradient_flow(model, batch()).seen


def test_gradients_that_vanish() -> None:
    model = fresh()
    inner = model.model.layers[1].forward
    faint = lambda x, **k: (x + 1e-6 * (inner(x, **k)[0] - x), None)  # noqa: E731
    model.model.layers[1].forward = faint  # type: ignore[method-assign]
    assert learning.gradient_flow(model, batch()).verdict == "warn"


def test_a_dead_expert() -> None:
    model = fresh("full_attention", "sparse", router_bias=True)
    with torch.no_grad():
        model.model.layers[1].mlp.router.bias[2] = -1e4
    found = learning.expert_use(model, ids(8, 64))
    assert found is not None and found.verdict == "fail" and "1 in sparse layer 2" in found.seen
    few = learning.expert_use(model, ids(1, 8))
    assert few is not None and few.verdict == "warn" and "too few tokens" in few.advice
    assert int(model.model.expert_counts.sum()) == 0  # the run that follows does not inherit the counts


def test_learning_by_heart() -> None:
    assert learning.overfit(fresh(), batch()).verdict == "ok"
    model = fresh()
    for layer in (model.model, model.lm_head):
        layer.requires_grad_(False)
    assert learning.overfit(model, batch()).verdict == "fail"
    model.model.norm.requires_grad_(True)  # learns a little, and not enough
    assert learning.overfit(model, batch(), steps=20).verdict == "fail"


# ---------------------------------------------------------------- runs


def rows(losses: list[float], **more: Any) -> list[dict[str, Any]]:
    return [{"step": i + 1, "loss": loss, "tokens_per_second": 100.0, **more} for i, loss in enumerate(losses)]


def test_losses_of_a_run() -> None:
    falling = [6.0 - 0.05 * i for i in range(60)]
    assert history.losses(rows(falling)).verdict == "ok"
    assert history.losses([]).verdict == "warn"
    spiked = [loss + 3.0 * (i in (40, 41)) for i, loss in enumerate(falling)]
    found = history.losses(rows(spiked))
    assert found.verdict == "warn" and found.numbers["spikes"] == [41] and "a spike 2.4" in found.seen
    found = history.losses(rows([*falling[:30], float("nan"), *falling[31:]]))
    assert found.verdict == "fail" and "step 31" in found.seen and "optim.lr" in found.advice
    assert "does not fall" in history.losses(rows(falling[::-1])).seen


def test_speed_of_a_run() -> None:
    steady = rows([5.0] * 40)
    assert history.throughput(steady).verdict == "ok"
    for row in steady[34:]:
        row["tokens_per_second"] = 50.0
    assert history.throughput(steady).verdict == "warn"


def test_experts_of_a_run() -> None:
    even = [[0.25] * 4, [0.25] * 4]
    assert history.experts(rows([5.0] * 9)) is None
    good, bad = (history.experts(rows([5.0] * 9, expert_load=load)) for load in (even, [[0.25] * 4, [0.5, 0.5, 0, 0]]))
    assert good is not None and good.verdict == "ok"
    assert bad is not None and bad.verdict == "fail" and "2 in sparse layer 2" in bad.seen


def test_a_run_and_its_damaged_checkpoint(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("train.steps=12", "optim.lr=1e-2")
    last = train(recipe, quiet=True)
    run = Path(recipe.train.out)
    found = {finding.check: finding for finding in examine.of_run(run)}
    assert set(found) == {"loss", "throughput", "experts", "checkpoints"} and found["checkpoints"].verdict == "ok"
    flip(last / "model.safetensors")
    assert history.checkpoints(run).verdict == "fail" and "does not match its digest" in history.checkpoints(run).seen
    last.rename(last.with_name(f"damaged-{last.name}"))
    assert history.checkpoints(run).verdict == "warn"


# ---------------------------------------------------------------- recipes and the machine


@pytest.mark.parametrize(
    "name", ["moai-hybrid-moe-0.8b-tiny", "blues-01-tiny", "khanh-692m-tiny", "moai-mamba-pure-0.9b-tiny"]
)
def test_presets_are_sound(name: str) -> None:
    recipe = recipes.load(name)
    recipe.model.num_hidden_layers = 2
    recipe.model.resolve()
    found = list(examine.of_recipe(recipe, name, CPU))
    assert [f"{f.check}: {f.seen}" for f in found if f.verdict != "ok"] == []
    assert len(found) >= 7


def test_a_recipe_is_checked_on_its_data(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    found = list(examine.of_recipe(recipe, "mine", CPU))
    assert worst(found) == "ok"
    assert recipe.model.vocab_size == 512  # the tokenizer's


def test_a_model_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not even built."""
    monkeypatch.setattr(examine, "MoaiForCausalLM", None)
    (found,) = examine.of_recipe(recipes.load("moai-mamba-16b"), "moai-mamba-16b", CPU)
    assert found.verdict == "fail" and "GB" in found.seen and "model.num_hidden_layers=2" in found.advice


def test_the_machine(tmp_path: Path) -> None:
    found = {finding.check: finding for finding in machine.machine(CPU, tmp_path / "not" / "there")}
    assert list(found) == ["versions", "processor", "accelerator", "memory", "disk", "kernels", "extras"]
    assert found["memory"].numbers["free_bytes"] > 1e8 and "selective_scan" in found["kernels"].seen
    assert json.dumps([finding.to_dict() for finding in found.values()])
    assert machine.disk(tmp_path, needed=1e18).verdict == "warn"


def test_too_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "usable_cores", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    found = machine.processor()
    assert found.verdict == "warn" and "OMP_NUM_THREADS=2" in found.advice


def test_a_kernel_that_cannot_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from moai_llm.ops.choices import Choice

    slow = Choice("scan", "torch", "torch", ["native", "torch"], {"native": "no compiler"}, {"native": "no compiler"})
    monkeypatch.setattr(machine, "choices", lambda device: iter([slow]))
    found = machine.kernels(CPU)
    assert found.verdict == "warn" and "native (no compiler)" in found.advice


def test_choices_say_what_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    from moai_llm.ops import choices as module
    from moai_llm.ops.dispatch import Implementation, Op, Unavailable

    class Missing(Implementation):
        def load(self) -> Any:
            raise Unavailable("no compiler")

    op = Op(
        "scan", {"reference": Implementation(torch.relu), "fast": Missing("nowhere:it")}, {"any": ["fast", "reference"]}
    )
    monkeypatch.setattr(module, "all_ops", lambda: {"scan": op})
    (found,) = module.choices(CPU)
    assert found.fp32 == "reference" and found.faster_missing == {"fast": "no compiler"}


def test_a_complaint_without_advice_is_ours() -> None:
    with pytest.raises(AssertionError):
        Finding("x", "fail", "seen")
    assert worst([Finding("a", "ok", "x"), Finding("b", "warn", "x", "do"), Finding("c", "ok", "x")]) == "warn"
