"""Learning from a teacher: numbers of a step by hand, laws of the step, whole runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from moai_llm.losses import create_loss_function
from moai_llm.recipe import OptimConfig
from moai_llm.runtime import MoaiError
from moai_llm.training.clipping import Clip
from moai_llm.training.distillation import Distillation
from moai_llm.training.events import read_metrics
from moai_llm.training.loop import train_step
from moai_llm.training.optim import make_optimizer
from moai_llm.training.precision import make_precision
from tests.conftest import tiny_model
from tests.training.conftest import MakeRecipe, train
from tests.training.test_run import Stop, same, stop_at
from tests.training.test_step import CPU, batch, split

TOKENS = 55


def packed() -> dict[str, torch.Tensor]:
    """Rows of two documents; tokens from the part of the vocabulary that both models have."""
    made = {key: tensor % TOKENS if key == "input_ids" else tensor for key, tensor in batch().items()}
    made["labels"] = torch.where(made["labels"] == -100, -100, made["input_ids"])
    rows, length = made["input_ids"].shape
    made["labels"][:, 6] = -100
    made["position_ids"] = torch.cat([torch.arange(6), torch.arange(length - 6)]).repeat(rows, 1)
    made["seq_idx"] = (torch.arange(length) >= 6).int().repeat(rows, 1)
    return made


def objective(**params: float) -> Distillation:
    loss = create_loss_function({"type": "distillation", "params": params})
    made = Distillation(loss, TOKENS, Path(), lambda: None)  # type: ignore[arg-type, return-value]
    teacher = tiny_model("linear_attention", seed=7, vocab_size=70, hidden_size=24, num_attention_heads=3,
                         num_key_value_heads=1)  # fmt: skip
    made.teacher = teacher.requires_grad_(False)
    return made


def test_the_numbers_of_a_step() -> None:
    """Against both models' logits, in fp64: other width, other bricks, other padding of the vocabulary."""
    student, made, rows = tiny_model(vocab_size=61), objective(temperature=2.0, kl_weight=0.7, ce_weight=0.4), packed()
    assert made.teacher is not None
    inputs = {key: tensor for key, tensor in rows.items() if key != "labels"}
    z, t = (model(**inputs).logits[:, :-1].flatten(0, 1) for model in (student, made.teacher))
    labels = rows["labels"][:, 1:].flatten()
    keep = labels != -100
    p = torch.log_softmax(t[keep][:, :TOKENS] / 2, -1)
    kl = F.kl_div(torch.log_softmax(z[keep] / 2, -1)[:, :TOKENS], p, reduction="sum", log_target=True) / keep.sum()
    plain = F.cross_entropy(z, labels)
    right = 0.7 * 4 * kl + 0.4 * plain
    expected = torch.autograd.grad(right, list(student.parameters()))
    part = made.forward(student, rows, made.count([rows]))
    assert torch.isclose(part.loss, right) and torch.isclose(part.numbers["loss"], plain)
    assert torch.isclose(part.numbers["kl"], kl) and "reverse_kl" not in part.numbers
    for ours, exact in zip(torch.autograd.grad(part.loss, list(student.parameters())), expected):
        assert (ours - exact).norm() <= 1e-8 * exact.norm()


@pytest.mark.parametrize("mlp", ["dense", "sparse"])
def test_accumulated_equals_the_big_batch(mlp: str) -> None:
    made, weights = objective(reverse_kl_weight=0.5), []
    for size in (6, 2):
        model = tiny_model("full_attention", mlp)
        optimizer, load = make_optimizer(model, OptimConfig(lr=1e-2)), None
        for _ in range(2):
            result = train_step(
                model.train(), optimizer, make_precision("fp32", CPU), split(packed(), size), made, lr=1e-2,
                clip=Clip(model, max_norm=1.0), router_load=load,
            )  # fmt: skip
            load = result.expert_load
        assert {"loss", "kl", "reverse_kl", "objective"} <= set(result.numbers)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert (weights[0] - weights[1]).abs().max() < 1e-10
    parts = [made.forward(model, part, made.count([part])).loss / 3 for part in split(packed(), 2)]  # means of means
    assert not torch.isclose(sum(parts), made.forward(model, packed(), made.count([packed()])).loss, rtol=1e-3)


def test_a_run_learns_from_its_teacher(make_recipe: MakeRecipe) -> None:
    teacher = train(make_recipe("train.steps=12", "optim.lr=1e-2", name="khanh-692m-tiny", out="teacher"), quiet=True)
    options = ("loss.type=distillation", f"loss.teacher={teacher}", "optim.lr=1e-2", "loss.params.temperature=2")
    recipe = make_recipe("train.steps=12", *options, out="student")
    whole = train(recipe, quiet=True)
    rows = read_metrics(Path(recipe.train.out) / "metrics.jsonl")
    assert rows[-1]["kl"] < 0.5 * rows[0]["kl"] and rows[-1]["loss"] < rows[0]["loss"] - 0.5
    broken = make_recipe("train.steps=12", *options, "eval.every=1", out="broken")
    with pytest.raises(Stop):
        train(broken, hooks=[stop_at(7)], quiet=True)
    assert same(whole, train(broken, resume=True, quiet=True))
    (teacher / "config.json").write_text((teacher / "config.json").read_text() + "\n")
    with pytest.raises(MoaiError, match="was trained on other data"):
        train(recipe, resume=True, quiet=True)


def test_teachers_that_do_not_fit(make_recipe: MakeRecipe) -> None:
    from moai_llm.tokenizer.train import train_tokenizer

    with pytest.raises(MoaiError, match="loss.type=distillation needs a model to learn from: set loss.teacher"):
        make_recipe("loss.type=distillation")
    with pytest.raises(MoaiError, match="loss.teacher does nothing with loss.type=focal"):
        make_recipe("loss.type=focal", "loss.teacher=runs/x")
    with pytest.raises(MoaiError, match="loss.teacher: /nowhere is not a model directory"):
        train(make_recipe("loss.type=distillation", "loss.teacher=/nowhere"), quiet=True)
    short = ("train.steps=1", "model.max_position_embeddings=32")
    teacher = train(make_recipe(*short, name="khanh-692m-tiny", out="teacher"), quiet=True)
    with pytest.raises(MoaiError, match="64 is more than the 32 learned positions of loss.teacher"):
        train(make_recipe("loss.type=distillation", f"loss.teacher={teacher}", "data.seq_len=64", out="x"), quiet=True)
    train_tokenizer(["another text with other words " * 9], 270).save(teacher)
    with pytest.raises(MoaiError, match="prepared with another tokenizer than .*step-00000001"):
        train(make_recipe("loss.type=distillation", f"loss.teacher={teacher}", out="x"), quiet=True)
    assert not Path(make_recipe(out="x").train.out).exists()
