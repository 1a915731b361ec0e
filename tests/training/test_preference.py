"""Training on pairs: numbers of a step by hand, laws of the step, the reference and its file, whole runs."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from moai_llm.cli import main
from moai_llm.commands.train import make_hooks
from moai_llm.data.pair_loader import PairLoader
from moai_llm.data.preference import Pairs
from moai_llm.data.shards import Store
from moai_llm.losses import create_loss_function
from moai_llm.modeling.model import MoaiForCausalLM
from moai_llm.recipe import OptimConfig, Recipe
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from moai_llm.training import reference
from moai_llm.training.clipping import Clip
from moai_llm.training.events import read_metrics
from moai_llm.training.loop import train_step
from moai_llm.training.optim import make_optimizer
from moai_llm.training.precision import make_precision
from moai_llm.training.preference import Preference
from tests.conftest import PAIRS, tiny_model
from tests.data.test_pair_loader import prepare_pairs
from tests.training.conftest import MakeRecipe, train
from tests.training.test_run import Stop, same, stop_at
from tests.training.test_step import CPU, split

PairRecipe = Callable[..., Recipe]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Store:
    return prepare_pairs(tmp_path_factory.mktemp("pairs"), tokenizer)


def objective(pairs: Store, kind: str = "dpo", **params: float) -> Preference:
    made = Preference(create_loss_function({"type": kind, "params": params}), Recipe(), lambda: None)  # type: ignore
    made.reference = -20 - 10 * torch.rand(len(pairs) // 2, 2, generator=torch.Generator().manual_seed(1))
    return made


def document_log_prob(model: MoaiForCausalLM, ids: torch.Tensor, learn: torch.Tensor) -> torch.Tensor:
    """One answer alone in its row, from all logits."""
    log_p = F.log_softmax(model(ids[None]).logits[0, :-1], -1).gather(1, ids[1:, None]).squeeze(1)
    return (log_p * learn[1:]).sum()


@pytest.mark.parametrize("mixer", ["full_attention", "linear_attention"])
def test_the_numbers_of_a_step(pairs: Store, mixer: str) -> None:
    """Packed rows against every answer alone, in fp64, gradients too; the router's losses are zero without a router."""
    model, made = tiny_model(mixer, vocab_size=512), objective(pairs, beta=0.3, sft_weight=0.2)
    batch = PairLoader(pairs, 256).rows(0, 3)
    numbers = batch["pairs"][batch["pairs"] >= 0].tolist()
    losses, rewards = [], []
    for number in numbers:
        pair, known = Pairs(pairs)[number], made.reference[number].double()  # type: ignore[index]
        sides = ((pair.chosen, pair.chosen_learn), (pair.rejected, pair.rejected_learn))
        found = [
            document_log_prob(model, torch.from_numpy(ids.astype("int64")), torch.from_numpy(learn))
            for ids, learn in sides
        ]
        margin = 0.3 * ((found[0] - known[0]) - (found[1] - known[1]))
        losses.append(-F.logsigmoid(margin) - 0.2 * found[0] / int(pair.chosen_learn.sum()))
        rewards.append(float(margin.detach()))
    right = torch.stack(losses).mean()
    expected = torch.autograd.grad(right, list(model.parameters()))
    counts = made.count([batch])
    assert counts.targets == len(numbers) and counts.tokens == int((batch["labels"] != -100).sum())
    part = made.forward(model, batch, counts)
    assert torch.isclose(part.loss, right, rtol=1e-9) and torch.equal(part.numbers["objective"], part.loss.detach())
    for ours, exact in zip(torch.autograd.grad(part.loss, list(model.parameters())), expected):
        assert (ours - exact).norm() <= 1e-8 * exact.norm()
    assert math.isclose(float(part.numbers["reward_margin"]), sum(rewards) / len(rewards), rel_tol=1e-9)
    assert float(part.numbers["reward_accuracy"]) == sum(r > 0 for r in rewards) / len(rewards)
    assert part.numbers["loss"] < part.loss


@pytest.mark.parametrize(("mixer", "mlp"), [PAIRS[0], PAIRS[1], PAIRS[7]])
@pytest.mark.parametrize("kind", ["dpo", "simpo"])
def test_accumulated_equals_the_big_batch(pairs: Store, mixer: str, mlp: str, kind: str) -> None:
    """In fp64, with the balance loss on; the control is the mean of micro-batch means."""
    made, whole = objective(pairs, kind), PairLoader(pairs, 256).rows(0, 6)
    held = (whole["pairs"] >= 0).sum(1).tolist()
    assert len(set(held)) > 1  # rows that hold different numbers of pairs
    weights = []
    for size in (6, 1, 4):
        model = tiny_model(mixer, mlp, vocab_size=512, router_z_loss_coef=0.01)
        optimizer = make_optimizer(model, OptimConfig(lr=1e-2))
        precision, load = make_precision("fp32", CPU), None
        for _ in range(2):
            result = train_step(
                model.train(), optimizer, precision, split(whole, size), made, lr=1e-2, clip=Clip(model),
                router_load=load,
            )  # fmt: skip
            load = result.expert_load
        assert result.targets == sum(held) and ("aux_loss" in result.numbers) == (mlp == "sparse")
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert all((weights[0] - other).abs().max() < 1e-10 for other in weights[1:])
    model = tiny_model(mixer, mlp, vocab_size=512)

    def gradient(parts: list[dict[str, torch.Tensor]], mean_of_means: bool) -> torch.Tensor:
        model.zero_grad()
        for part in parts:
            counts = made.count([part] if mean_of_means else parts)
            (made.forward(model, part, counts).loss / (len(parts) if mean_of_means else 1)).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    right, wrong = (gradient(split(whole, 1), means) for means in (False, True))
    assert (wrong - right).norm() > 1e-2 * right.norm()


@pytest.fixture
def make(make_recipe: MakeRecipe, pairs: Store) -> PairRecipe:
    """A short run on the pairs, from a model that has seen nothing."""
    start = train(make_recipe("train.steps=1", "optim.lr=0", out="start"), quiet=True)

    def made(*overrides: str, **options: str) -> Recipe:
        return make_recipe(
            f"data.train={pairs.path}", f"train.init_from={start}", "loss.type=dpo", "data.seq_len=256",
            "train.batch_tokens=512", "train.micro_batch_size=1", "train.steps=4", "checkpoint.every=2", *overrides,
            **options,
        )  # fmt: skip

    return made


def test_a_run_learns_to_tell_answers_apart(make: PairRecipe, pairs: Store) -> None:
    recipe = make(f"data.valid={pairs.path}", "train.steps=12", "optim.lr=1e-2", "eval.every=6", "eval.rows=null")
    train(recipe, hooks=make_hooks(recipe), quiet=True)
    rows = read_metrics(Path(recipe.train.out) / "metrics.jsonl")
    steps, evaluations = ([row for row in rows if key in row] for key in ("loss", "eval_loss"))
    assert math.isclose(steps[0]["loss"], math.log(2), abs_tol=1e-5)  # the model is its own reference
    assert abs(steps[0]["reward_margin"]) < 1e-4
    assert evaluations[-1]["eval_loss"] < 0.3 and evaluations[-1]["eval_reward_accuracy"] > 0.9
    assert evaluations[-1]["eval_reward_margin"] > 1
    last = steps[-1]
    assert math.isclose(last["reward_margin"], last["reward_chosen"] - last["reward_rejected"], abs_tol=1e-4)
    assert {"objective", "aux_loss", "expert_cv", "grad_norm"} <= set(last)


def test_resumed_equals_uninterrupted_bit_for_bit(make: PairRecipe, pairs: Store, monkeypatch) -> None:  # type: ignore
    whole = train(make(out="whole"), quiet=True)
    broken = make("eval.every=1", f"data.valid={pairs.path}", out="broken")
    with pytest.raises(Stop):
        train(broken, hooks=[stop_at(3)], quiet=True)
    shutil.rmtree(Path(broken.train.init_from or "").parent.parent)  # what a resumed run needs lies in its folder
    monkeypatch.setattr(reference, "compute", None)
    resumed = train(broken, hooks=make_hooks(broken), resume=True, quiet=True)
    assert same(whole, resumed)


def test_the_reference_is_computed_once_and_never_mistaken(
    make: PairRecipe, make_recipe: MakeRecipe, pairs: Store, caplog: pytest.LogCaptureFixture, monkeypatch  # type: ignore
) -> None:  # fmt: skip
    computed: list[int] = []
    real = reference.compute
    monkeypatch.setattr(reference, "compute", lambda *a, **k: (computed.append(1), real(*a, **k))[1])
    recipe = make("train.steps=2")
    first = train(recipe, quiet=True)
    file = reference.file_of(Path(recipe.train.out), pairs.fingerprint)
    kept = load_file(file)["log_probs"]
    assert len(computed) == 1 and kept.shape == (24, 2) and (kept < 0).all()
    assert same(train(recipe, fresh=True, quiet=True), first) and len(computed) == 1 and not caplog.records

    def damaged() -> None:
        save_file({"log_probs": kept + 1}, file, metadata=reference.origin_of(file))

    def truncated() -> None:
        file.write_bytes(file.read_bytes()[:100])

    for damage, message in ((damaged, "is damaged (its digest"), (truncated, "is damaged")):
        damage()
        assert same(train(recipe, fresh=True, quiet=True), first)
        assert message in caplog.text and "computed again" in caplog.text
        caplog.clear()
    assert len(computed) == 3 and torch.equal(load_file(file)["log_probs"], kept)
    recipe.data.seq_len = 300
    train(recipe, fresh=True, quiet=True)
    assert "is of another seq_len" in caplog.text and len(computed) == 4
    caplog.clear()
    other = train(make_recipe("train.steps=1", "optim.lr=0", "train.seed=5", out="other"), quiet=True)
    train(make("train.steps=2", f"train.init_from={other}"), fresh=True, quiet=True)
    assert "is of another model and seq_len" in caplog.text and len(computed) == 5


def test_a_pass_that_was_cut_off_goes_on(make: PairRecipe, pairs: Store, monkeypatch) -> None:  # type: ignore
    recipe, real = make("train.steps=1", "train.micro_batch_size=1"), Preference._log_probs_of
    calls: list[int] = []

    def counted(self, model, batch):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == 3:
            raise Stop
        return real(self, model, batch)

    monkeypatch.setattr(reference, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(Preference, "_log_probs_of", counted)
    with pytest.raises(Stop):
        train(recipe, quiet=True)
    rows = len(PairLoader(pairs, 256))
    train(recipe, resume=True, quiet=True)
    assert len(calls) == 3 + rows - 2
    values = load_file(reference.file_of(Path(recipe.train.out), pairs.fingerprint))["log_probs"]
    assert not values.isnan().any()


def test_a_lost_reference(make: PairRecipe, pairs: Store) -> None:
    recipe = make("train.steps=2")
    train(recipe, quiet=True)
    longer, folder = make("train.steps=3"), Path(recipe.train.out) / "reference"
    shutil.rmtree(folder)
    train(longer, resume=True, quiet=True)  # computed again, by the model of train.init_from
    values = load_file(reference.file_of(Path(recipe.train.out), pairs.fingerprint))["log_probs"]
    shutil.rmtree(Path(recipe.train.out))
    train(recipe, quiet=True)
    assert torch.equal(load_file(reference.file_of(Path(recipe.train.out), pairs.fingerprint))["log_probs"], values)
    shutil.rmtree(folder)
    shutil.rmtree(Path(recipe.train.init_from or "").parent.parent)
    with pytest.raises(MoaiError, match="are gone or damaged, and so is train.init_from"):
        train(longer, resume=True, quiet=True)


def test_another_starting_model_under_the_same_name(make: PairRecipe) -> None:
    recipe = make("train.steps=2")
    train(recipe, quiet=True)
    file = Path(recipe.train.init_from or "") / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "model.norm.weight": weights["model.norm.weight"] + 1}, file, metadata={"format": "pt"})
    with pytest.raises(MoaiError, match="was trained on other data"):
        train(make("train.steps=3"), resume=True, quiet=True)


def test_losses_and_stores_that_do_not_fit(
    make: PairRecipe, make_recipe: MakeRecipe, store: Path, pairs: Store
) -> None:
    for recipe, message in (
        (make_recipe(f"data.train={pairs.path}"), "holds preference pairs: .* Compare them: loss.type=dpo"),
        (make(f"data.train={store}"), "holds text, not preference pairs: prepare chosen and rejected answers"),
        (make("data.packing=concat"), "data.packing=concat would cut pairs"),
        (make("loss.params.beta=0"), "'dpo': beta 0.0 is not above 0"),
    ):
        with pytest.raises(MoaiError, match=message):
            train(recipe, quiet=True)
        assert not Path(recipe.train.out).exists()
    with pytest.raises(MoaiError, match="loss.type=ipo compares with the model it starts from: set train.init_from"):
        make_recipe("loss.type=ipo")
    assert make_recipe("loss.type=simpo").train.init_from is None
    with pytest.raises(MoaiError, match="holds preference pairs, and loss.type=cross_entropy compares no answers"):
        make_hooks(make_recipe(f"data.valid={pairs.path}"))


def test_the_commands(tmp_path: Path, make: PairRecipe, pairs: Store, capsys: pytest.CaptureFixture[str]) -> None:
    source, recipe = pairs.path.with_suffix(".jsonl"), make()
    main(["data", "prepare", str(source), "--preference", "--tokenizer", str(pairs.path / "tokenizer"),
          "--out", str(tmp_path / "p"), "--valid", str(tmp_path / "v"), "--valid-share", "0.2"])  # fmt: skip
    assert re.search(r"Next: moai train .*data.valid=\S+ loss.type=dpo train.init_from=MODEL", capsys.readouterr().out)
    main(["data", "info", str(tmp_path / "p"), "--seq-len", "256"])
    said = capsys.readouterr().out
    assert "rows of 256" in said and "pairs cut" in said
    main(["train", "moai-hybrid-moe-0.8b-tiny", f"data.train={tmp_path / 'p'}", f"data.valid={tmp_path / 'v'}",
          f"train.init_from={recipe.train.init_from}", "loss.type=dpo", "data.seq_len=256", "train.batch_tokens=512",
          "train.steps=2", f"train.out={tmp_path / 'dpo'}", "train.device=cpu", "log.every=1"])  # fmt: skip
    said = capsys.readouterr().out
    assert re.search(r"train 1/2  loss 0.693  accuracy \d+%", said)
    assert re.search(r"step 2:  eval_loss 0\.\d+  eval_reward_margin -?\d\.\d+  eval_reward_accuracy \d\.\d+", said)
    assert f"Next: moai chat {tmp_path / 'dpo'}" in said
    written = json.loads((tmp_path / "dpo" / "checkpoints" / "step-00000002" / "config.json").read_text())
    assert written["model_type"] == "moai"


def test_dpo_trains_adapters_beside_its_reference(make: PairRecipe) -> None:
    pytest.importorskip("peft")
    keys = ("lora.rank=4", "lora.experts=true", "optim.lr=1e-2")
    whole = make(*keys, out="whole")
    last = train(whole, quiet=True)
    rows = read_metrics(Path(whole.train.out) / "metrics.jsonl")
    assert rows[0]["reward_margin"] == pytest.approx(0, abs=1e-4) and rows[0]["loss"] == pytest.approx(
        math.log(2), abs=1e-4
    )
    assert max(row["reward_margin"] for row in rows) > 0.01
    broken = make(*keys, "eval.every=1", out="broken")
    with pytest.raises(Stop):
        train(broken, hooks=[stop_at(4)], quiet=True)
    assert same(last, train(broken, resume=True, quiet=True))


@pytest.mark.parametrize("quantize", ["null", "nf4"])
def test_the_reference_of_adapters_is_the_model_without_them(
    make: PairRecipe, pairs: Store, quantize: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    keys = ("lora.rank=4", "lora.experts=true", "optim.lr=1e-2", f"lora.quantize={quantize}")
    recipe = make("train.steps=2", *keys, out="adapted")
    train(recipe, quiet=True)
    file = reference.file_of(Path(recipe.train.out), pairs.fingerprint)
    begun = load_file(file)["log_probs"]
    file.unlink()
    monkeypatch.setattr(Preference, "start", None, raising=False)  # no second model is read
    train(make("train.steps=3", *keys, out="adapted"), resume=True, quiet=True)
    assert torch.equal(load_file(file)["log_probs"], begun)  # after training, adapters off
    other = make("train.steps=1", out="whole")
    train(other, quiet=True)  # the model itself, without adapters
    separate = load_file(reference.file_of(Path(other.train.out), pairs.fingerprint))["log_probs"]
    if quantize == "null":
        torch.testing.assert_close(begun, separate, atol=1e-3, rtol=1e-5)
    else:  # control: what it is compared with is in 4 bits, as it is itself
        assert (begun - separate).abs().max() > 0.05
        assert reference.origin_of(file)["model"].endswith(":nf4")
