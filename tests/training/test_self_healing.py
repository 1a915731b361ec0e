"""Whole runs with something wrong in them: bad steps, rollbacks, kills right after them, signals, hangs, slow disks."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
import torch

from moai_llm.modeling.model import MoaiForCausalLM
from moai_llm.recipe import Recipe
from moai_llm.runtime import MoaiError
from moai_llm.training import loop
from moai_llm.training.checkpoint import Checkpoints
from moai_llm.training.clipping import Clip
from moai_llm.training.events import read_metrics
from moai_llm.training.rollback import record, steps_ahead
from moai_llm.training.run import Run
from moai_llm.training.watchdog import EXIT_CODE
from tests.training.conftest import MakeRecipe, train
from tests.training.test_run import Stop, same, stop_at

Poison = Callable[[Collection[int]], None]


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Poison:
    """The data of these steps makes a loss that is not a number."""
    bad: set[int] = set()
    forward, batch, now = MoaiForCausalLM.forward, Run.batch, [0]

    def poisoned_batch(run: Run):  # type: ignore[no-untyped-def]
        now[0] = run.done + run.ahead
        return batch(run)

    def poisoned_forward(model: MoaiForCausalLM, *args, **options):  # type: ignore[no-untyped-def]
        output = forward(model, *args, **options)
        if now[0] in bad and output.loss is not None:
            output.loss = output.loss * torch.nan
        return output

    monkeypatch.setattr(Run, "batch", poisoned_batch)
    monkeypatch.setattr(MoaiForCausalLM, "forward", poisoned_forward)
    return bad.update


@pytest.fixture
def make(make_recipe: MakeRecipe) -> MakeRecipe:
    def small(*overrides: str, out: str = "run") -> Recipe:
        return make_recipe("train.steps=12", "checkpoint.every=4", *overrides, name="moai-3b-tiny", out=out)

    return small


def rows_of(recipe: Recipe) -> list[dict[str, float]]:
    return read_metrics(Path(recipe.train.out) / "metrics.jsonl")


def test_a_bad_step_changes_no_weights_and_is_counted(make: MakeRecipe, poison: Poison, capsys) -> None:  # type: ignore[no-untyped-def]
    poison([3, 4])
    recipe = make("train.steps=5", "checkpoint.every=1", "checkpoint.keep_last=9")
    train(recipe)
    assert "step 4: skip, loss nan" in capsys.readouterr().out
    third, fourth, fifth = (Path(recipe.train.out) / f"checkpoints/step-{n:08d}" for n in (3, 4, 5))
    assert same(third, fifth) and not same(third, third.with_name("step-00000002"))
    assert [row["skipped"] for row in rows_of(recipe)] == [0, 0, 0, 1, 2]
    states = [json.loads((c / "training_state/state.json").read_text()) for c in (fourth, fifth)]
    assert [state["health"]["skipped"] for state in states] == [1, 2]


@pytest.mark.parametrize("where", ["gradient", "spike"])
def test_bad_gradients_and_spikes_are_skipped(make: MakeRecipe, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clip, calls = Clip.__call__, []

    def damaged(self: Clip):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == 10:
            self.parameters[0].grad[0] *= torch.nan if where == "gradient" else 1e6
        return clip(self)

    monkeypatch.setattr(Clip, "__call__", damaged)
    recipe = make("health.spike_window=8")
    train(recipe, quiet=True)
    assert [row["skipped"] for row in rows_of(recipe)] == [0] * 9 + [1] * 3


def test_a_rollback_goes_past_the_bad_data(make: MakeRecipe, poison: Poison, capsys) -> None:  # type: ignore[no-untyped-def]
    poison(range(9, 14))
    recipe = make("health.patience=2", "health.rollback=true")
    whole = train(recipe)
    said = capsys.readouterr().out
    assert "rolled back from step 12 to" in said and "the data of 4 steps is left out" in said
    out = Path(recipe.train.out)
    assert json.loads((out / "rollbacks.json").read_text()) == [{"to": 8, "from": 11, "ahead": 4}]
    rows = rows_of(recipe)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))  # each once
    assert sum("event" in row for row in rows) == 1
    # data 12 and 13 are still bad and skipped, 14 and 15 are taken
    assert [row["skipped"] for row in rows if "loss" in row][-5:] == [0, 1, 2, 2, 2]

    broken = make("health.patience=2", "health.rollback=true", "eval.every=1", out="broken")
    with pytest.raises(Stop):
        train(broken, hooks=[stop_at(10)], quiet=True)  # after the first bad step
    with pytest.raises(Stop):
        train(broken, hooks=[stop_at(9)], resume=True, quiet=True)
    killed = make("health.patience=2", "health.rollback=true", "eval.every=1", out="killed")
    with pytest.raises(Stop):
        train(killed, hooks=[stop_after_rollback(Path(killed.train.out))], quiet=True)
    for run in (broken, killed):  # before the rollback, and right after it, before anything was saved
        assert same(whole, train(run, resume=True, quiet=True))
    assert not same(whole, train(make("health.patience=9", out="other"), quiet=True))  # control


def stop_after_rollback(out: Path):  # type: ignore[no-untyped-def]
    def hook(now: int, model: object) -> dict[str, float]:
        if (out / "rollbacks.json").is_file():
            raise Stop
        return {}

    return hook


def test_rollbacks_end(make: MakeRecipe, poison: Poison) -> None:
    poison(range(6, 99))
    with pytest.raises(MoaiError, match=r"step 6 cannot be taken .* was rolled back 2 times already.*step-00000004"):
        train(make("health.patience=1", "health.rollback=true", "health.max_rollbacks=2"), quiet=True)
    with pytest.raises(MoaiError, match=r"no checkpoint to go back to"):
        train(make("health.patience=1", "health.rollback=true", "checkpoint.every=50", out="early"), quiet=True)
    with pytest.raises(MoaiError, match=r"step 8 cannot be taken.*health.rollback=true"):
        train(make("health.patience=1", out="no"), quiet=True)


def test_how_far_the_data_is_ahead(tmp_path: Path) -> None:
    assert steps_ahead(tmp_path, 5) == 0
    assert record(tmp_path, to=8, bad=11, ahead=0) == 4
    assert record(tmp_path, to=12, bad=13, ahead=4) == 6
    assert [steps_ahead(tmp_path, step) for step in (7, 8, 11, 12, 50)] == [0, 4, 4, 6, 6]
    record(tmp_path, to=4, bad=20, ahead=6)  # further back: the two before are of a future that is given up
    assert [steps_ahead(tmp_path, step) for step in (3, 4, 8, 50)] == [0, 23, 23, 23]


def test_an_asynchronous_save_is_of_its_step(make: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = ["checkpoint.every=1", "checkpoint.keep_last=20"]
    train(make(*keep, out="plain"), quiet=True)
    write, slow = Checkpoints._write, []

    def slowly(self, *args):  # type: ignore[no-untyped-def]
        slow.append(threading.current_thread() is not threading.main_thread())
        time.sleep(0.05)  # training goes on and changes the weights
        write(self, *args)

    monkeypatch.setattr(Checkpoints, "_write", slowly)
    recipe = make(*keep, "checkpoint.asynchronous=true", out="later")
    last = train(recipe, quiet=True)
    assert slow == [True] * 12
    for step in range(1, 13):
        name = f"checkpoints/step-{step:08d}"
        assert same(last.parents[2] / "plain" / name, last.parents[2] / "later" / name)


def test_what_an_asynchronous_save_could_not_write_is_said(make: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moai_llm.training.checkpoint._write_manifest", full)
    with pytest.raises(MoaiError, match="cannot write checkpoint .*No space left.*there is no earlier checkpoint"):
        train(make("checkpoint.asynchronous=true"), quiet=True)


def test_permanent_checkpoints_stay(make: MakeRecipe) -> None:
    recipe = make("checkpoint.every=2", "checkpoint.permanent_every=4", "checkpoint.keep_last=1")
    train(recipe, quiet=True)
    assert Checkpoints(Path(recipe.train.out) / "checkpoints").steps() == [4, 8, 12]


def test_a_kill_while_a_checkpoint_is_replaced_loses_neither(make: MakeRecipe) -> None:
    recipe = make()
    folder = train(recipe, quiet=True).parent
    (folder / "step-00000012").rename(folder / ".old-step-00000012")
    (folder / ".tmp-step-00000012").mkdir()
    checkpoints = Checkpoints(folder)
    assert checkpoints.steps() == [8] and checkpoints.latest() == folder / "step-00000012"
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000008", "step-00000012"]


def test_sigusr1_saves_and_goes_on(make: MakeRecipe) -> None:
    def raise_it(now: int, model: object) -> dict[str, float]:
        if now == 5:
            signal.raise_signal(signal.SIGUSR1)
        return {}

    recipe = make("eval.every=1", "checkpoint.every=50", "checkpoint.keep_last=9")
    assert loop.train(recipe, hooks=[raise_it], quiet=True).finished
    assert Checkpoints(Path(recipe.train.out) / "checkpoints").steps() == [6, 12]
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_a_hang_ends_the_process_and_says_where(tmp_path: Path) -> None:
    code = f"""
import time
from moai_llm.training.watchdog import Watchdog
from pathlib import Path
with Watchdog(0.3, Path({str(tmp_path)!r})) as watchdog:
    for _ in range(10):
        watchdog.beat()
        time.sleep(0.1)
    with watchdog.paused():
        time.sleep(0.8)
    print("alive", flush=True)
    def stuck_in_here():
        time.sleep(60)
    stuck_in_here()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == EXIT_CODE and done.stdout == "alive\n"
    report = (tmp_path / "hang.txt").read_text()
    assert "no step for 0 seconds (health.hang_seconds = 0.3)" in report and "stuck_in_here" in report
    assert "stuck_in_here" in done.stderr
