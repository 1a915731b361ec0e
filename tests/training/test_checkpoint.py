"""Checkpoints under damage and a full disk: every corruption is found, nothing good is lost."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

import pytest

from moai_llm.runtime import MoaiError
from moai_llm.training.checkpoint import Checkpoints, problems
from moai_llm.training.state import STATE
from tests.training.conftest import MakeRecipe, train


@pytest.fixture
def run(make_recipe: MakeRecipe) -> Path:
    train(make_recipe(), quiet=True)
    return Path(make_recipe().train.out)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def zero_tail(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


def delete(file: Path) -> None:
    file.unlink()


FILES = (
    "model.safetensors", f"{STATE}/optimizer.safetensors", f"{STATE}/state.json", "MANIFEST.json", "MANIFEST.sha256",
)  # fmt: skip


@pytest.mark.parametrize("damage", [flip, truncate, zero_tail, delete])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_and_the_checkpoint_before_is_used(run: Path, damage, name: str) -> None:  # type: ignore[no-untyped-def]
    checkpoints = Checkpoints(run / "checkpoints")
    newest, before = (run / "checkpoints" / f"step-0000000{n}" for n in (8, 6))
    assert checkpoints.latest() == newest and not list(problems(newest))
    damage(newest / name)
    assert list(problems(newest))
    assert checkpoints.latest() == before
    assert (run / "checkpoints" / "damaged-step-00000008").is_dir() and not newest.exists()  # set aside, not deleted


def test_resuming_past_a_damaged_checkpoint_ends_the_same(run: Path, make_recipe: MakeRecipe) -> None:
    good = (run / "checkpoints" / "step-00000008" / "model.safetensors").read_bytes()
    flip(run / "checkpoints" / "step-00000008" / "model.safetensors")
    assert (train(make_recipe(), resume=True, quiet=True) / "model.safetensors").read_bytes() == good


def test_when_all_are_damaged_the_run_begins_again(run: Path, make_recipe: MakeRecipe) -> None:
    good = (run / "checkpoints" / "step-00000008" / "model.safetensors").read_bytes()
    for checkpoint in (run / "checkpoints").iterdir():
        flip(checkpoint / "model.safetensors")
    assert (train(make_recipe(), resume=True, quiet=True) / "model.safetensors").read_bytes() == good
    assert len(list((run / "checkpoints").glob("damaged-*"))) == 2


def test_half_written_checkpoints_are_not_seen(run: Path) -> None:
    shutil.copytree(run / "checkpoints" / "step-00000008", run / "checkpoints" / ".tmp-step-00000009")
    checkpoints = Checkpoints(run / "checkpoints")
    assert checkpoints.steps() == [6, 8] and checkpoints.latest().name == "step-00000008"


@pytest.mark.parametrize("limit", [3_000, 100_000, 1_500_000])
def test_a_disk_that_fills_up_while_saving(make_recipe: MakeRecipe, limit: int) -> None:
    """RLIMIT_FSIZE makes a write fail in the middle of a file, at several places in the save."""
    train(make_recipe("train.steps=3"), quiet=True)
    run = Path(make_recipe().train.out)
    before = {p: p.read_bytes() for p in sorted((run / "checkpoints").rglob("*")) if p.is_file()}
    shutil.copyfile(run / "recipe.yaml", run / "kept.yaml")
    (run / "recipe.yaml").unlink()  # the same run, made longer
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(
            MoaiError, match=r"cannot write checkpoint .*Nothing was lost: the last good checkpoint is .*step-00000003"
        ):
            train(make_recipe("train.steps=6"), resume=True, quiet=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    after = {p: p.read_bytes() for p in sorted((run / "checkpoints").rglob("*")) if p.is_file()}
    assert after == before
    assert train(make_recipe("train.steps=6"), resume=True, quiet=True).name == "step-00000006"


def test_a_checkpoint_of_another_model(run: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("train.steps=9", name="moai-hybrid-1.7b-tiny")
    (run / "recipe.yaml").unlink()
    with pytest.raises(MoaiError, match="checkpoint of another model"):
        train(recipe, resume=True, quiet=True)
