"""moai doctor and moai report as they are typed, and the flags of profiling."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moai_llm.tokenizer import Tokenizer
from tests.commands.conftest import Moai
from tests.training.conftest import MakeRecipe, make_recipe, store, train  # noqa: F401 - fixtures
from tests.training.test_checkpoint import flip

SMALL = ("model.num_hidden_layers=2", "model.hidden_size=32")


@pytest.fixture
def run(make_recipe: MakeRecipe, tokenizer: Tokenizer) -> Path:  # noqa: F811
    recipe = make_recipe("train.steps=4", "eval.prompts=[Document]")
    train(recipe, quiet=True)
    return Path(recipe.train.out)


def test_the_machine(moai: Moai) -> None:
    said = moai("doctor", "--device", "cpu")
    assert "the machine" in said and "kernels" in said and "0 failed" in said
    assert all(line == line.rstrip() for line in said.splitlines())


def test_a_recipe(moai: Moai) -> None:
    said = moai("doctor", "moai-3b-tiny", *SMALL, "--device", "cpu")
    for check in ("size", "causality", "packing", "initial loss", "accumulation", "gradient flow", "overfit one batch"):
        assert f"ok    {check}" in said
    found = json.loads(moai("doctor", "moai-3b-tiny", *SMALL, "--device", "cpu", "--json"))
    assert found["verdict"] in ("ok", "warn") and found["target"] == "moai-3b-tiny"
    checks = {finding["check"]: finding for finding in found["findings"]}
    assert checks["initial loss"]["numbers"]["loss"] > 1 and set(checks["causality"]) == {
        "check", "verdict", "seen", "advice", "numbers",
    }  # fmt: skip


def test_a_bad_recipe_exits_with_1(moai: Moai, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        moai("doctor", "moai-3b-tiny", *SMALL, "model.initializer_range=5.0", "--device", "cpu")
    said = capsys.readouterr().out
    assert left.value.code == 1 and "fail  initial loss" in said and "-> the initial logits are too large" in said
    with pytest.raises(SystemExit) as left:
        moai("doctor", "moai-mamba-16b", "--device", "cpu")
    said = capsys.readouterr().out
    assert left.value.code == 1 and "fail  size" in said and "causality" not in said and "1 failed" in said


def test_a_run_and_its_weights(moai: Moai, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = moai("doctor", run, "--device", "cpu")
    for part in ("the run ", "checkpoints", "its weights", "causality", "experts", "overfit one batch"):
        assert part in said
    assert "initial loss" not in said  # it is trained
    checkpoint = max((run / "checkpoints").iterdir())
    before = (checkpoint / "model.safetensors").read_bytes()
    assert "the model " in moai("doctor", checkpoint, "--device", "cpu")
    assert (checkpoint / "model.safetensors").read_bytes() == before
    flip(checkpoint / "training_state" / "state.json")
    with pytest.raises(SystemExit) as left:
        moai("doctor", run, "--device", "cpu")
    assert left.value.code == 1 and "state.json does not match its digest" in capsys.readouterr().out


def test_targets_that_are_not_there(fails: Moai, tmp_path: Path, run: Path) -> None:
    assert "no recipe 'moai-3b-tini' (did you mean 'moai-3b-tiny'?)" in fails("doctor", "moai-3b-tini")
    (tmp_path / "empty").mkdir()
    assert "no model in it" in fails("doctor", tmp_path / "empty", "--device", "cpu")
    assert "is no recipe, so train.steps=3 changes nothing" in fails("doctor", run, "train.steps=3")


def test_a_report(moai: Moai, fails: Moai, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "page.html"
    said = moai("report", run, "--out", out)
    assert f"written to {out}" in said and "tokens/s" in said
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>\n")
    assert "no run in it" in fails("report", tmp_path / "deep")
    assert "name a file to write" in fails("report", run, "--out", tmp_path)


def test_flags_that_would_do_nothing(fails: Moai) -> None:
    for flags, message in (
        (("--trace-export", "t.json"), "writes what --profile traces: pass both"),
        (("--report-interval", "5"), "says how often --memory-profile reports: pass both"),
        (("--memory-profile", "--report-interval", "0"), "at least 1, got 0"),
    ):
        assert message in fails("train", "moai-3b-tiny", "data.train=x", *flags)


def test_training_with_profiles(moai: Moai, store: Path, tmp_path: Path) -> None:  # noqa: F811
    said = moai(
        "train", "moai-3b-tiny", f"data.train={store}", "train.steps=3", f"train.out={tmp_path / 'run'}",
        "data.seq_len=32", "train.batch_tokens=64", "train.device=cpu", "--profile", "--trace-export",
        tmp_path / "timeline.json", "--memory-profile", "--report-interval", 2,
    )  # fmt: skip
    assert "aten::" in said and "step 2 memory:" in said
    assert json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
