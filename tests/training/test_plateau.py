"""The schedule that follows the evaluations: exact on resume, also where a step was saved but not evaluated."""

from __future__ import annotations

from pathlib import Path

import pytest

from moai_llm.modeling.model import MoaiForCausalLM
from moai_llm.runtime import MoaiError
from moai_llm.training import run
from moai_llm.training.events import read_metrics
from moai_llm.training.loop import Hook
from tests.training.conftest import MakeRecipe, train
from tests.training.test_run import Stop, same

PLATEAU = ["schedule.name=plateau", "schedule.warmup=0", "schedule.plateau_patience=0", "eval.every=2"]


def evaluation(stop: int | None = None, before: bool = False) -> Hook:
    """A loss that depends on the weights, and gets worse; a run that is killed after, or before, it is known."""

    def hook(step: int, model: MoaiForCausalLM) -> dict[str, float]:
        if step == stop and before:
            raise Stop
        loss = step + float(model.get_input_embeddings().weight.detach().mean())
        if step == stop:
            raise Stop
        return {"eval_loss": loss}

    return hook


def rates(out: Path) -> list[float]:
    return [row["lr"] for row in read_metrics(out / "metrics.jsonl") if "lr" in row]


def test_it_falls_when_evaluations_do_not_get_better(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(*PLATEAU, "optim.lr=1e-3", "train.steps=7", out="run")
    train(recipe, hooks=[evaluation()], quiet=True)
    assert rates(Path(recipe.train.out)) == pytest.approx([1e-3] * 4 + [5e-4] * 2 + [2.5e-4])


@pytest.mark.parametrize(("every", "stop"), [(2, 4), (3, 4), (2, 6)])
def test_resumed_equals_uninterrupted_bit_for_bit(every: int, stop: int, make_recipe: MakeRecipe) -> None:
    """With every=2 the run dies between a checkpoint and the evaluation of its step."""
    wanted = [*PLATEAU, f"checkpoint.every={every}"]
    whole = train(make_recipe(*wanted, out="whole"), hooks=[evaluation()], quiet=True)
    broken = make_recipe(*wanted, out="broken")
    with pytest.raises(Stop):
        train(broken, hooks=[evaluation(stop, before=True)], quiet=True)
    assert same(whole, train(broken, hooks=[evaluation()], resume=True, quiet=True))
    assert rates(Path(broken.train.out)) == rates(whole.parents[1])


def test_control_without_its_evaluations_it_is_another_run(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(make_recipe(*PLATEAU, out="whole"), hooks=[evaluation()], quiet=True)
    broken = make_recipe(*PLATEAU, out="broken")
    with pytest.raises(Stop):
        train(broken, hooks=[evaluation(6)], quiet=True)
    restore = run.restore
    monkeypatch.setattr(run, "restore", lambda *arguments: {**restore(*arguments), "eval_losses": []})
    assert not same(whole, train(broken, hooks=[evaluation()], resume=True, quiet=True))


def test_it_needs_evaluations(make_recipe: MakeRecipe) -> None:
    with pytest.raises(MoaiError, match="schedule.name=plateau follows the evaluations: set eval.every"):
        make_recipe("schedule.name=plateau")
    with pytest.raises(MoaiError, match="follows the evaluations and there are none: set data.valid"):
        train(make_recipe(*PLATEAU), quiet=True)
    with pytest.raises(MoaiError, match="no hook says it: set data.valid"):
        train(make_recipe(*PLATEAU, out="other"), hooks=[lambda step, model: {}], quiet=True)
