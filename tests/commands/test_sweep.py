"""`moai sweep`: every combination is run once, what was stopped goes on, what fails is counted and does not end it."""

from __future__ import annotations

import csv
import signal
from pathlib import Path

import pytest

from moai_llm.commands.sweep import _split, make_trials
from moai_llm.data.prepare import prepare
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from moai_llm.training import loop
from tests.commands.conftest import Moai

BASE = (
    "moai-mamba-2b-tiny", "data.seq_len=32", "train.steps=2", "train.batch_tokens=64", "train.micro_batch_size=2",
    "train.precision=fp32", "train.device=cpu", "log.every=1", "model.num_hidden_layers=1",
)  # fmt: skip


@pytest.fixture
def command(tmp_path: Path, tokenizer: Tokenizer, text_file: Path) -> tuple[object, ...]:
    prepare([text_file], tokenizer, tmp_path / "store")
    store = tmp_path / "store"
    return ("sweep", *BASE, f"data.train={store}", f"data.valid={store}", "eval.rows=2", "--out", tmp_path / "out")


def table(out: Path) -> list[dict[str, str]]:
    with (out / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_sweep_runs_once_and_sorts(moai: Moai, command: tuple[object, ...], tmp_path: Path) -> None:
    over, out = ("--over", "optim.lr=1e-2,1e-9", "--over", "train.seed=0,1"), tmp_path / "out"
    assert moai(*command, *over, "--show").count(" new ") == 4 and not out.exists()
    said = moai(*command, *over)
    assert "4/4" in said and "already finished" not in said
    rows = table(out)
    assert [row["state"] for row in rows] == ["finished"] * 4 and {row["step"] for row in rows} == {"2"}
    losses = [float(row["eval_loss"]) for row in rows]
    assert losses == sorted(losses) and [row["optim.lr"] for row in rows] == ["1e-2", "1e-2", "1e-9", "1e-9"]
    assert {row["train.seed"] for row in rows[:2]} == {"0", "1"}
    assert (out / "optim.lr=1e-2,train.seed=0" / "checkpoints" / "step-00000002").is_dir()
    more = moai(*command, "--over", "optim.lr=1e-2,1e-9", "--over", "train.seed=0,1,2")
    assert more.count("already finished") == 4 and table(out)[0]["state"] == "finished" and len(table(out)) == 6
    assert moai(*command, "train.steps=3", *over, "--show").count(" begun ") == 4  # not the run that was finished


def test_a_stopped_sweep_goes_on(
    moai: Moai, fails: Moai, command: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = ("--over", "train.seed=0,1")
    step, taken = loop.train_step, []

    def interrupted(*arguments: object, **options: object):  # type: ignore[no-untyped-def]
        taken.append(1)
        if len(taken) == 3:
            signal.raise_signal(signal.SIGTERM)
        return step(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "train_step", interrupted)
    assert "stopped; the same command goes on" in fails(*command, *over)
    assert sorted(row["state"] for row in table(tmp_path / "out")) == ["begun", "finished"]
    said = moai(*command, *over)
    assert said.count("already finished") == 1 and "resumed from" in said and len(taken) == 4
    assert [row["state"] for row in table(tmp_path / "out")] == ["finished"] * 2


def test_a_failed_run_does_not_end_the_sweep(
    moai: Moai, fails: Moai, command: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = loop.train_step

    def breaks(*arguments: object, noise_seed: tuple[int, int], **options: object):  # type: ignore[no-untyped-def]
        if noise_seed[0] == 0:
            raise RuntimeError("out of memory")
        return step(*arguments, noise_seed=noise_seed, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "train_step", breaks)
    assert "1 of 2 runs failed; the same command tries them again" in fails(*command, "--over", "train.seed=0,1")
    rows = table(tmp_path / "out")
    assert [(row["train.seed"], row["state"], row["message"]) for row in rows] == [
        ("1", "finished", ""), ("0", "failed", "RuntimeError: out of memory"),
    ]  # fmt: skip
    monkeypatch.undo()
    assert moai(*command, "--over", "train.seed=0,1").count("already finished") == 1
    assert {row["state"] for row in table(tmp_path / "out")} == {"finished"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--over", "optim.lrr=1,2"], "optim.lrr: unknown key .did you mean 'lr'"),
        (["--over", "optim.lr=1e-3,1e-3"], "has a value twice"),
        (["--over", "optim.lr="], "write a key and its values"),
        (["--over", "optim.lr=1", "--over", "optim.lr=2"], "names a key twice"),
        (["--over", "train.out=a,b"], "leave out train.out and set --out"),
        (["optim.lr=1", "--over", "optim.lr=1,2"], "leave one of them out"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: list[str], message: str) -> None:
    import argparse

    from moai_llm.commands.sweep import configure, run

    parser = argparse.ArgumentParser()
    configure(parser)
    with pytest.raises(MoaiError, match=message):
        run(parser.parse_intermixed_args(["quickstart", "train.steps=1", *arguments]))


def test_values_and_folders() -> None:
    assert _split("[0.9, 0.95],{a: [1,2]},x") == ["[0.9, 0.95]", "{a: [1,2]}", "x"]
    trials = make_trials("quickstart", [], ["optim.betas=[0.9, 0.95],[0.9, 0.99]", "data.train=a/b,a_b"], Path("out"))
    assert len({trial.out for trial in trials}) == 4 and all(trial.out.parent == Path("out") for trial in trials)
    assert trials[3].recipe.optim.betas == (0.9, 0.99) and trials[3].recipe.data.train == "a_b"
