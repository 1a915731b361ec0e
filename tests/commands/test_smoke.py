"""`moai train RECIPE --test`: every preset goes the whole way, and what breaks is said."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest

from moai_llm import recipe as recipes
from tests.commands.conftest import Moai

PRESETS = [name for name in recipes.list_recipes() if not name.endswith("-tiny")]
FAST = ("moai-hybrid-moe-0.8b", "moai-embed-0.1b")  # Mamba, attention and experts; vectors of texts
CHECKS = ["data", "trains", "saves", "resumes", "evaluates", "generates"]


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in PRESETS])
def test_every_preset_passes(moai: Moai, temporary: Path, name: str) -> None:
    said = moai("train", name, "--test")
    last = "embeds" if recipes.load(name).loss.type == "info_nce" else "generates"
    assert re.findall(r"^  ok  (\w+)", said, re.MULTILINE) == [*CHECKS[:-1], last]
    assert "gone on: the same to the bit" in said and f"{name}" in said.splitlines()[-1]
    assert not list(temporary.iterdir())  # nothing is left behind


def test_adapters_are_tested_on_a_model_below_them(moai: Moai) -> None:
    pytest.importorskip("peft")
    said = moai("train", "moai-hybrid-1.7b", "lora.rank=2", "train.init_from=nowhere", "--test")
    assert re.findall(r"^  ok  (\w+)", said, re.MULTILINE) == CHECKS


def test_what_cannot_be_tested_is_said(fails: Moai, tmp_path: Path) -> None:
    assert "--test begins and ends by itself: leave out --find-lr" in fails("train", "moai-3b", "--test", "--find-lr")
    assert "loss.type=simpo needs more" in fails("train", "moai-3b", "--test", "loss.type=simpo")
    large = tmp_path / "large.yaml"
    large.write_text("model: moai-3b\n")
    assert "too many for --test: make it smaller" in fails("train", large, "--test")
    assert "did you mean 'lr'" in fails("train", "moai-3b", "--test", "optim.lrr=1")


def test_a_resume_that_goes_wrong_is_found(fails: Moai, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: the optimizer's state is not restored."""
    from moai_llm.training import state

    monkeypatch.setattr(state, "_load_optimizer", lambda *_: None)
    assert "has other weights than one that did not" in fails("train", "moai-hybrid-moe-0.8b", "--test")
    assert not list(temporary.iterdir())
