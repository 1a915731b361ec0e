"""How a run begins: in a new directory, at the newest checkpoint of one that is there, or in place of one."""

from __future__ import annotations

import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

from moai_llm import recipe as recipes
from moai_llm.architecture import Architecture
from moai_llm.config import MoaiConfig
from moai_llm.data.embedding_loader import EmbeddingLoader
from moai_llm.data.loader import Loader
from moai_llm.data.pair_loader import PairLoader
from moai_llm.recipe import LENGTHS, MAY_CHANGE, Recipe
from moai_llm.runtime import MoaiError
from moai_llm.training.checkpoint import Checkpoints

RESUMABLE = ("description", "log", "eval", "checkpoint", "health")  # sections that may change when a run is resumed
# what a run leaves
WRITTEN = (
    "recipe.yaml", "environment.json", "metrics.jsonl", "training_log.csv", "samples.txt", "rollbacks.json", "hang.txt",
    "checkpoints", "tensorboard", "wandb", "profile.txt", "memory_snapshot.pickle", "finished.json",
)  # fmt: skip
LR_TEST = "lr_finder.csv"  # what `moai train ... --find-lr` leaves in the directory of a run that may not have begun


class Start(NamedTuple):
    """Where a run goes on, if it does, and the recipe it was begun with."""

    checkpoint: Path | None
    begun: Recipe


def find_start(recipe: Recipe, checkpoints: Checkpoints, *, resume: bool, fresh: bool) -> Start:
    """Look at `train.out`; nothing is changed but for damaged checkpoints, which are set aside.

    Raises:
        MoaiError: two runs would be mixed, the recipe differs from that of the run to resume, or `fresh` would delete
            what is not a run or what is still needed.
    """
    out = Path(recipe.train.out)
    if resume and fresh:
        raise MoaiError("--resume goes on with a run and --fresh deletes it: pass one of them")
    if fresh:
        _may_discard(recipe)
    if not resume:
        if not fresh and ((out / "recipe.yaml").is_file() or checkpoints.steps()):
            raise MoaiError(
                f"{out} already holds a run: pass --resume to go on with it, --fresh to delete it, or set train.out"
            )
        return Start(None, recipe)
    begun = recipes.load(out / "recipe.yaml") if (out / "recipe.yaml").is_file() else recipe
    changed = _differences(begun, recipe)
    if changed:
        raise MoaiError(f"{out} was started with another recipe; these differ: {', '.join(changed)}")
    return Start(checkpoints.latest(), begun)


def discard(out: Path) -> None:
    """Delete what a run wrote into its directory."""
    for name in WRITTEN:
        target = out / name
        shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)


def total_steps(recipe: Recipe, loader: Loader | PairLoader | EmbeddingLoader, rows: int) -> int:
    """Steps of the run from whichever of steps, tokens, epochs is given."""
    given = {name: getattr(recipe.train, name) for name in LENGTHS if getattr(recipe.train, name) is not None}
    if len(given) != 1:
        raise MoaiError(f"set exactly one of train.steps, train.tokens and train.epochs, got {given or 'none of them'}")
    name, value = next(iter(given.items()))
    if name == "epochs" and len(loader.stages) > 1 and loader.end is None:
        raise MoaiError(
            "train.epochs counts passes over all stages, and the last of data.stages has no end: give it `epochs` or "
            "`until`, or set train.steps or train.tokens"
        )
    rows_wanted = {"steps": value * rows, "tokens": value / recipe.data.seq_len, "epochs": value * len(loader)}[name]
    steps = max(1, round(rows_wanted / rows))
    if loader.end is not None and steps * rows > loader.end:
        raise MoaiError(
            f"data.stages end after step {loader.end // rows:,}, and the run after step {steps:,}: leave out the end "
            "of the last stage, or set train.epochs=1 to end with it"
        )
    return steps


def with_model_of(recipe: Recipe, config: MoaiConfig) -> Recipe:
    """The recipe with the model section that says this model."""
    return replace(recipe, model=Architecture(**{f.name: getattr(config, f.name) for f in fields(Architecture)}))


def _may_discard(recipe: Recipe) -> None:
    out = Path(recipe.train.out)
    if not out.exists() or out.is_dir() and all(path.name == LR_TEST for path in out.iterdir()):
        return
    ran = (out / "recipe.yaml").is_file() and (out / "metrics.jsonl").is_file()
    if not ran and not any(out.glob("checkpoints/step-*/MANIFEST.json")):
        raise MoaiError(f"{out} is not empty and not a run, so --fresh does not delete it: set another train.out")
    if recipe.train.init_from and Path(recipe.train.init_from).resolve().is_relative_to(out.resolve()):
        raise MoaiError(
            f"--fresh would delete {recipe.train.init_from}, which train.init_from goes on from: set another train.out"
        )


def _differences(begun: Recipe, now: Recipe) -> list[str]:
    """Keys that must not change within a run but do. Its length and its place may, and how data is read but not what;
    the model of init_from is the one found there.
    """
    old, new = recipes.to_tree(begun), recipes.to_tree(now)
    sections = [name for name in new if name not in RESUMABLE and not (name == "model" and now.train.init_from)]
    free = {*(("train", key) for key in (*LENGTHS, "out")), *(("data", key) for key in MAY_CHANGE)}
    keys = [(name, key) for name in sections for key in new[name] if (name, key) not in free]
    return [f"{name}.{key}" for name, key in keys if new[name][key] != old[name].get(key)]
