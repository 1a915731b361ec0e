"""What a run is made of, and how it begins, is saved, goes on and goes back. `loop.py` is what it does."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from moai_llm import recipe as recipes
from moai_llm.data.ahead import Ahead
from moai_llm.data.embedding_loader import EmbeddingLoader
from moai_llm.data.loader import Batch, Loader, open_stages
from moai_llm.data.pair_loader import PairLoader
from moai_llm.modeling.model import MoaiForCausalLM
from moai_llm.recipe import Recipe
from moai_llm.runtime import MoaiError, keep_freed_memory, pick_device, seed_everything, write_atomically
from moai_llm.tokenizer import Tokenizer
from moai_llm.training import fp8, lora, quantize, rollback
from moai_llm.training.build import active_parameters, build_model, build_objective
from moai_llm.training.checkpoint import Checkpoints
from moai_llm.training.clipping import Clip
from moai_llm.training.feed import describe, open_data
from moai_llm.training.fitting import rows_of
from moai_llm.training.health import Health
from moai_llm.training.lr_guide import advice, kind_of_run
from moai_llm.training.micro_batches import MicroBatchSize
from moai_llm.training.objective import Objective
from moai_llm.training.offload import HostActivations, require_host
from moai_llm.training.optim import make_optimizer
from moai_llm.training.precision import Precision, make_precision
from moai_llm.training.profile import ProfileOptions
from moai_llm.training.sinks import require_sinks
from moai_llm.training.start import discard, find_start, total_steps, with_model_of
from moai_llm.training.state import restore

logger = logging.getLogger("moai_llm")


@dataclass
class Run:
    """The parts of a run, and how far it is.

    Attributes:
        rows: of a step.
        done: steps taken or skipped so far.
        ahead: steps that the data is ahead of `done`, see `rollback.py`.
        targets: tokens learned so far.
        router_load: (sparse layers, E) of the last step, which the balance loss of the next multiplies with.
        eval_losses: of the evaluations so far, for a schedule that follows them.
        latest: the newest checkpoint, which an asynchronous write may still be making.
        waited: seconds spent waiting for data so far.
        base: the digest of the model below the adapters, where there are any.

    Leave it as a context: what reads data and writes checkpoints is then ended.
    """

    recipe: Recipe
    out: Path
    tokenizer: Tokenizer
    objective: Objective
    loader: Loader | PairLoader | EmbeddingLoader
    rows: int
    total: int
    model: MoaiForCausalLM
    optimizer: torch.optim.Optimizer
    precision: Precision
    clip: Clip
    health: Health
    micro_batch: MicroBatchSize
    checkpoints: Checkpoints
    notes: list[str] = field(default_factory=list)
    done: int = 0
    ahead: int = 0
    targets: int = 0
    router_load: Tensor | None = None
    eval_losses: list[float] = field(default_factory=list)
    latest: Path | None = None
    waited: float = 0.0
    base: dict[str, str] = field(default_factory=dict)
    _batches: Ahead | None = field(default=None, repr=False)

    @classmethod
    def begin(
        cls, recipe: Recipe, *, resume: bool, fresh: bool, quiet: bool = False, profile: ProfileOptions | None = None
    ) -> Run:
        """Set up a run in `train.out`; see `loop.train`. Nothing is written before all else is known to be in order."""
        require_sinks(recipe)
        saving, out = recipe.checkpoint, Path(recipe.train.out)
        checkpoints = Checkpoints(
            out / "checkpoints", saving.keep_last, saving.permanent_every, asynchronous=saving.asynchronous
        )
        latest, begun = find_start(recipe, checkpoints, resume=resume, fresh=fresh)
        device = pick_device(recipe.train.device)
        require_host(recipe, device)
        precision = make_precision(recipe.train.precision, device, recipe.train.tf32)
        if device.type == "cpu":
            keep_freed_memory()
        seed_everything(recipe.train.seed)
        rows = max(1, recipe.train.batch_tokens // recipe.data.seq_len)
        tokenizer = open_stages(recipe.data)[0].sources[0].store.tokenizer()
        objective = build_objective(recipe, tokenizer)
        loader = open_data(recipe, rows, device, reads=objective.reads)
        model = build_model(recipe, tokenizer, device, latest)
        if recipe.train.init_from:
            recipe = with_model_of(recipe, model.config)
        if recipe.train.host_activations:
            precision = replace(precision, saving=HostActivations(model).hooks)
        micro_batch = MicroBatchSize(rows_of(with_model_of(recipe, model.config)), rows)
        run = cls(
            recipe, out, tokenizer, objective, loader, rows, total_steps(recipe, loader, rows), model,
            make_optimizer(model, recipe.optim, on_host=recipe.train.host_optimizer), precision,
            Clip(model, recipe.clip, recipe.train.max_grad_norm), Health(recipe.health), micro_batch, checkpoints,
            base=lora.base_identity(recipe),
        )  # fmt: skip
        kind = kind_of_run(loader.sources[-1].store.manifest.kind, recipe.train.init_from, lora=recipe.lora.rank > 0)
        if warning := advice(recipe.optim.lr, kind, active_parameters(model), recipe.optim.name):
            logger.warning(warning)
        run.notes += describe(recipe, loader, run.total)
        if precision.name == "fp8":
            run.notes.append(fp8.describe(model))
        if run.base:
            run.notes.append(lora.describe(model))
        if recipe.lora.quantize:
            run.notes += quantize.describe(model)
        if latest is not None:
            run._restore(latest)
            run.ahead = rollback.steps_ahead(out, run.done)
            run.notes.append(f"resumed from {latest}")
        if run.total != (planned := total_steps(begun, loader, rows)):
            run.notes.append(f"continues to {run.total} steps, was {planned}")
        if profile is not None:
            profile.check(run.total - run.done)
        if fresh:
            discard(out)
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "recipe.yaml", recipes.dump(recipe))
        store = loader.sources[0].store
        objective.prepare(model, store, precision, resumed=latest is not None, quiet=quiet)
        return run

    def batch(self) -> Batch:
        """The rows of the next step, which may have been read ahead."""
        if self._batches is None:
            data = self.recipe.data
            first, last = self.done + self.ahead, self.total + self.ahead
            self._batches = Ahead(self._read, first, last, workers=data.workers, prefetch=data.prefetch)
        began = time.perf_counter()
        batch = next(self._batches)
        self.waited += time.perf_counter() - began
        return batch

    def _read(self, step: int) -> Batch:
        # where stages end, what a rollback left out is made up for from the beginning
        end = self.loader.end
        return self.loader.step(step if end is None else step % (end // self.rows))

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_data()
        self.checkpoints.close(quiet=kind is not None)

    def _close_data(self) -> None:
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def stage(self) -> dict[str, int]:
        """The stage of the last step, counted from 1, where there are several."""
        step = self.done + self.ahead - 1
        return {"stage": self.loader.stage(step) + 1} if len(self.loader.stages) > 1 else {}

    def count(self, targets: int, router_load: Tensor | None) -> None:
        """A step is done; `router_load` is None where it was skipped."""
        self.done, self.targets = self.done + 1, self.targets + targets
        self.router_load = self.router_load if router_load is None else router_load

    def save(self) -> None:
        state = {
            "targets": self.targets,
            "position": self._position(),
            "scaler": self.precision.scaler.state_dict(),
            "router_load": None if self.router_load is None else self.router_load.tolist(),
            "health": self.health.state_dict(),
            "norms": list(self.clip.norms),
            "eval_losses": list(self.eval_losses),
            "micro_batch": self.micro_batch.state_dict(),
        }
        yaml = recipes.dump(self.recipe)
        self.latest = self.checkpoints.save(self.done, self.model, self.tokenizer, yaml, self.optimizer, state)

    def roll_back(self, reason: str) -> None:
        """Go back to the newest sound checkpoint and leave out the data from there to here.

        Raises:
            MoaiError: there is none, or it was done too often.
        """
        bad, times = self.done, len(rollback.read(self.out))
        self._close_data()
        self.checkpoints.wait()
        good = self.checkpoints.latest(before=bad)
        if good is None:
            raise MoaiError(
                f"step {bad + 1} cannot be taken ({reason}), and there is no checkpoint to go back to: lower "
                "optim.lr, raise schedule.warmup, or save earlier with checkpoint.every"
            )
        if times >= self.recipe.health.max_rollbacks:
            raise MoaiError(
                f"step {bad + 1} cannot be taken ({reason}), and the run was rolled back {times} times already: lower "
                f"optim.lr or look at the data; health.max_rollbacks allows more. The last checkpoint is {good}"
            )
        ahead = self.ahead
        self._restore(good)
        self.ahead = rollback.record(self.out, to=self.done, bad=bad, ahead=ahead)
        self.checkpoints.forget_after(self.done)
        self.notes.append(
            f"rolled back from step {bad + 1} to {good} ({reason}); the data of {self.ahead - ahead} steps is left out"
        )

    def _restore(self, checkpoint: Path) -> None:
        state = restore(checkpoint, self.model, self.optimizer)
        if state["position"] != self._position():
            raise MoaiError(
                f"{checkpoint} was trained on other data, batches or weights: {state['position']} is not "
                f"{self._position()}"
            )
        load: Any = state["router_load"]
        self.done, self.targets, self.latest = state["step"], state["targets"], checkpoint
        self.router_load = None if load is None else torch.tensor(load, device=self.precision.device)
        self.precision.scaler.load_state_dict(state["scaler"])
        self.health.load_state_dict(state["health"])
        self.clip.remember(state["norms"])
        self.eval_losses[:] = state["eval_losses"]
        self.micro_batch.load_state_dict(state["micro_batch"])
        if self.total < self.done:
            raise MoaiError(
                f"{checkpoint} has done {self.done} steps, so this run cannot end after {self.total}: make it longer"
            )

    def _position(self) -> dict[str, Any]:
        """What must not change for the data to be the same."""
        return {
            "data": self.loader.identity,
            "seq_len": self.recipe.data.seq_len,
            "rows": self.rows,
            "seed": self.recipe.train.seed,
            **self.objective.identity(),
            **self.base,
        }
