"""Trackers that hear the numbers of a run too: TensorBoard, Weights & Biases, Trackio (`log.to`).

Each is imported only where a recipe names it. A tracker never ends a run: one that fails after the beginning is left
out from there on, and metrics.jsonl goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from moai_llm import recipe as recipes
from moai_llm.recipe import Recipe
from moai_llm.runtime import MoaiError, require

logger = logging.getLogger("moai_llm")


class Sink(Protocol):
    def log(self, step: int, numbers: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN/tensorboard; look at them with `tensorboard --logdir RUN`."""

    def __init__(self, recipe: Recipe, run_id: str, start: int) -> None:
        require("tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        # on resume what lies behind the resumed step is hidden
        purge = start + 1 if start else None
        self._writer = SummaryWriter(str(Path(recipe.train.out) / "tensorboard"), purge_step=purge, flush_secs=10)
        if not start:
            self._writer.add_text("recipe", f"```yaml\n{recipes.dump(recipe)}```")

    def log(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """Weights & Biases. Offline with WANDB_MODE=offline; a resumed run goes on under the same id."""

    def __init__(self, recipe: Recipe, run_id: str, start: int) -> None:
        wandb = require("wandb", "wandb")
        out = Path(recipe.train.out)
        self._run = wandb.init(
            project=recipe.log.project, name=out.name, id=run_id, dir=str(out), resume="allow",
            config=recipes.to_tree(recipe), settings=wandb.Settings(console="off"),
        )  # fmt: skip

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """Trackio, whose numbers stay on this machine; look at them with `trackio show`."""

    def __init__(self, recipe: Recipe, run_id: str, start: int) -> None:
        self._trackio = require("trackio", "trackio")
        name = f"{Path(recipe.train.out).name}-{run_id[:6]}"
        self._run = self._trackio.init(
            project=recipe.log.project, name=name, resume="allow", config=recipes.to_tree(recipe), embed=False
        )

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()


SINKS: dict[str, Callable[[Recipe, str, int], Sink]] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


def require_sinks(recipe: Recipe) -> None:
    """Raises `MoaiError` where a tracker of `log.to` is not installed."""
    for name in recipe.log.to:
        require(name, name)


class Sinks:
    """Those a recipe asks for, as one.

    Args:
        run_id: the same for every session of a run.
        start: steps that stand already.

    Raises:
        MoaiError: one of them is not installed or does not begin.
    """

    def __init__(self, recipe: Recipe, run_id: str, start: int) -> None:
        self._open: dict[str, Sink] = {}
        for name in dict.fromkeys(recipe.log.to):
            try:
                self._open[name] = SINKS[name](recipe, run_id, start)
            except MoaiError:
                self.close()
                raise
            except Exception as error:  # whatever a tracker raises where it has no account, server or disk
                self.close()
                raise MoaiError(f"{name} does not begin: {error}. Leave it out of log.to to train without") from error

    def log(self, step: int, row: dict[str, Any]) -> None:
        """The plain numbers of a row; lists stay in metrics.jsonl."""
        numbers = {name: float(value) for name, value in row.items() if isinstance(value, (int, float))}
        self._each(lambda sink: sink.log(step, numbers), list(self._open))

    def close(self) -> None:
        self._each(lambda sink: sink.close(), list(self._open))
        self._open.clear()

    def _each(self, what: Callable[[Sink], None], names: Sequence[str]) -> None:
        for name in names:
            try:
                what(self._open[name])
            except Exception as error:  # a tracker must not cost the run
                logger.warning("%s failed (%s) and is left out from here; metrics.jsonl has every number", name, error)
                del self._open[name]
