"""The micro-batch that fits: by the plan, by trying, and by what steps take. Memory is told by the tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moai_llm import recipe as recipes
from moai_llm.planning.layouts import Layout, memory
from moai_llm.planning.plan import Options, setting
from moai_llm.runtime import MoaiError
from moai_llm.training import fitting, loop
from moai_llm.training.fitting import largest, planned_rows, this_machine, tried_rows
from moai_llm.training.objective import NextToken
from moai_llm.training.run import Run
from tests.training.conftest import MakeRecipe, train

CPU = torch.device("cpu")
SHORT = ("data.seq_len=16", "train.batch_tokens=256", "checkpoint.every=2")


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each forward of a training step."""
    found: list[int] = []
    real = NextToken.forward

    def forward(objective: NextToken, model: Any, batch: Any, *given: Any, **more: Any) -> Any:
        found.append(batch["input_ids"].shape[0])
        return real(objective, model, batch, *given, **more)

    monkeypatch.setattr(NextToken, "forward", forward)
    return found


@pytest.mark.parametrize(("most", "found"), [(64, 8), (8, 8), (7, 7), (3, 3), (1, 1)])
def test_the_largest_power_of_two(most: int, found: int) -> None:
    assert largest(lambda rows: 0.1 * rows, most) == found
    assert largest(lambda rows: 0.1 * rows if rows < 9 else None, most) == found
    assert largest(lambda rows: 0.9, most) == 1


def test_trying_stops_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The states that are not there yet are reckoned with."""
    tried: list[int] = []

    def accumulate(rows: int) -> None:
        tried.append(rows)
        if rows > 16:
            raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(fitting, "room", lambda device: 1000.0)
    monkeypatch.setattr(fitting, "share_taken", lambda device: 0.04 * tried[-1])
    assert tried_rows(accumulate, CPU, 0.0, 64) == 16 and tried == [2, 4, 8, 16, 32]
    assert tried_rows(accumulate, CPU, 300.0, 64) == 8


def test_trying_leaves_nothing(make_recipe: MakeRecipe, sizes: list[int]) -> None:
    run = Run.begin(make_recipe(*SHORT), resume=False, fresh=False, quiet=True)
    before = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    loop._try_rows(run, 4)
    assert sizes == [4, 4]
    assert all(weight.grad is None for weight in run.model.parameters()) and not run.optimizer.state
    assert all(torch.equal(weight, before[name]) for name, weight in run.model.state_dict().items())
    assert not run.model.model.expert_counts.any()


def test_auto_on_a_cpu_is_what_the_plan_says(
    make_recipe: MakeRecipe, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it stays when the run is resumed where there is less memory."""
    recipe = make_recipe(*SHORT, "train.micro_batch_size=auto", "train.steps=2")

    def planned(rows: int) -> float:
        return memory(recipe, Layout("one device"), setting(recipe, this_machine(CPU), rows, Options()), 2).total

    monkeypatch.setattr(fitting, "room", lambda device: 1.05 * planned(4) / 0.85)
    assert planned(4) < 1.05 * planned(4) < planned(8)
    assert planned_rows(recipe, CPU) == 4
    train(recipe, quiet=True)
    assert sizes == [4] * 8
    monkeypatch.setattr(fitting, "room", lambda device: 1.0)
    sizes.clear()
    train(make_recipe(*SHORT, "train.micro_batch_size=auto", "train.steps=3"), resume=True, quiet=True)
    assert sizes == [4] * 4


def test_dynamic_micro_batches_follow_the_memory(
    make_recipe: MakeRecipe, sizes: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Down above 0.85, up below 0.65, never back to what was too much, and the steps are those of a fixed size."""
    taken = iter([0.5, 0.9, 0.86, 0.7, 0.6, 0.6])
    monkeypatch.setattr(loop, "share_taken", lambda device: next(taken))
    keys = (*SHORT, "train.steps=6", "model.router_noise=true", "train.micro_batch_size=8")
    found = load_file(train(make_recipe(*keys, "train.dynamic_micro_batch=true", out="dynamic")) / "model.safetensors")
    assert sizes == [8] * 2 + [16] + [8] * 2 + [4] * 4 + [4] * 4 + [4] * 4
    assert "90% of the memory was taken: micro-batches of 8 rows instead of 16" in capsys.readouterr().out
    fixed = load_file(train(make_recipe(*keys, out="fixed"), quiet=True) / "model.safetensors")
    assert all((found[name] - fixed[name]).abs().max() < 1e-5 for name in fixed)


def test_what_contradicts_itself() -> None:
    with pytest.raises(MoaiError, match="leave one of them out, or set train.micro_batch_size=auto"):
        recipes.load("moai-3b-tiny", ["train.dynamic_micro_batch=true", "train.compile=true"])
    with pytest.raises(MoaiError, match=r"  train\.micro_batch_size: input .* integer.*, or 'auto', got 'many'$"):
        recipes.load("moai-3b-tiny", ["train.micro_batch_size=many"])
