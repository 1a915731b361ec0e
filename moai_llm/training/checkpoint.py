"""Checkpoints that survive a kill at any moment, and say so when they are damaged.

    checkpoints/step-00000100/
      config.json, model.safetensors, tokenizer.json, recipe.yaml, ...   a model directory like any other
      training_state/optimizer.safetensors, state.json                    what only a resumed run needs
      adapter/                                                            with `lora`: what peft reads; the weights
                                                                          above are then the sum of model and adapters
      MANIFEST.json                                                       sha256 of every file, written last
      MANIFEST.sha256                                                     its own, as sha256sum writes it

Everything goes to `.tmp-step-N` first, is forced to disk, and becomes `step-N` by one rename. Only JSON and
safetensors: nothing in here can run code.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from moai_llm.data.shards import sha256_of
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from moai_llm.training import lora
from moai_llm.training.state import STATE, Tensors, optimizer_tensors, rng_state

logger = logging.getLogger("moai_llm")
WRITING, REPLACED, GONE = ".tmp-step-", ".old-step-", ".gone-step-"
_Adapter = tuple[Tensors, dict[str, Any]]  # its weights and its config


@dataclass
class Checkpoints:
    """The checkpoints of one run.

    Args:
        keep_last: how many of the newest stay.
        permanent_every: those whose step is a multiple of it stay, too.
        asynchronous: `save` copies what it is given and returns; a thread writes. One write at a time: the next save,
            and `wait`, wait for it and raise what went wrong.
    """

    directory: Path
    keep_last: int = 2
    permanent_every: int | None = None
    asynchronous: bool = False

    def __post_init__(self) -> None:
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self, step: int, model: Any, tokenizer: Tokenizer, recipe_yaml: str, optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
    ) -> Path:  # fmt: skip
        """Write checkpoint `step` and forget the oldest beyond `keep_last`.

        Returns:
            Where it is; with `asynchronous` where it will be, see `wait`.

        Raises:
            MoaiError: the disk is full or cannot be written; earlier checkpoints are untouched. With `asynchronous` it
                may be the one before that could not be written.
        """
        self.wait()
        adapter: _Adapter | None = None
        if lora.has_adapters(model):
            adapter = lora.adapter_tensors(model), lora.adapter_config(model)
            weights, plain = lora.summed_weights(model), lora.plain_twin(model)
        else:
            weights, plain = {name: tensor.detach() for name, tensor in model.state_dict().items()}, model
        states, content = optimizer_tensors(model, optimizer), {**state, "step": step, "rng": rng_state()}
        if self.asynchronous:
            weights, states = _copied(weights), _copied(states)
            adapter = adapter and (_copied(adapter[0]), adapter[1])

        def write() -> None:
            self._write(step, plain, weights, tokenizer, recipe_yaml, states, content, adapter)

        if not self.asynchronous:
            write()
        else:
            self._writer = threading.Thread(target=self._guarded, args=(write,), name=f"checkpoint {step}")
            self._writer.start()
        return self._path(step)

    def close(self, *, quiet: bool = False) -> None:
        """Let what is being written finish. With `quiet` nothing is raised: something else went wrong before."""
        if not quiet:
            self.wait()
        elif self._writer is not None:
            self._writer.join()

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            MoaiError: what was being written could not be.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _guarded(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as error:  # raised where somebody waits
            self._error = error

    def _write(
        self, step: int, model: Any, weights: Tensors, tokenizer: Tokenizer, recipe_yaml: str, states: Tensors,
        content: dict[str, Any], adapter: _Adapter | None,
    ) -> None:  # fmt: skip
        final, tmp = self._path(step), self.directory / f"{WRITING}{step:08d}"
        shutil.rmtree(tmp, ignore_errors=True)
        try:
            (tmp / STATE).mkdir(parents=True)
            model.save_pretrained(tmp, state_dict=weights)
            if adapter is not None:
                lora.write_adapter(tmp / lora.FOLDER, *adapter)
            tokenizer.save(tmp)
            (tmp / "recipe.yaml").write_text(recipe_yaml, encoding="utf-8")
            save_file(states, tmp / STATE / "optimizer.safetensors")
            (tmp / STATE / "state.json").write_text(json.dumps(content), encoding="utf-8")
            _write_manifest(tmp, step)
            if final.exists():  # the same step again: never a moment without one of the two
                os.replace(final, self.directory / f"{REPLACED}{step:08d}")
            os.replace(tmp, final)
            _sync(self.directory)
        except Exception as error:  # safetensors raises its own type for a full disk
            shutil.rmtree(tmp, ignore_errors=True)
            if not isinstance(error, OSError) and "SafetensorError" not in type(error).__name__:
                raise
            good = self.steps()
            kept = f"the last good checkpoint is {self._path(good[-1])}" if good else "there is no earlier checkpoint"
            raise MoaiError(
                f"cannot write checkpoint {final}: {error}. Nothing was lost: {kept}. Free space and --resume"
            ) from error
        shutil.rmtree(self.directory / f"{REPLACED}{step:08d}", ignore_errors=True)
        for old in self.steps()[: -max(1, self.keep_last)]:
            if not self.permanent_every or old % self.permanent_every:
                self._forget(old)

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending; whether they are sound is not looked at."""
        return sorted(int(path.name[5:]) for path in self.directory.glob("step-*") if path.name[5:].isdigit())

    def latest(self, before: int | None = None) -> Path | None:
        """The newest checkpoint whose digests agree, of a step up to `before`. A damaged one is set aside as
        `damaged-step-N` and reported.
        """
        self.tidy()
        for step in reversed([step for step in self.steps() if before is None or step <= before]):
            path = self._path(step)
            problem = next(problems(path), None)
            if problem is None:
                return path
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            logger.warning(
                "checkpoint %s is damaged (%s): kept as %s, trying the one before", path, problem, aside.name
            )
        return None

    def tidy(self) -> None:
        """Remove what a killed process was writing or deleting, and put back what it was about to replace."""
        for prefix in (WRITING, GONE):
            for half in self.directory.glob(f"{prefix}*"):
                shutil.rmtree(half, ignore_errors=True)
        for replaced in self.directory.glob(f"{REPLACED}*"):
            path = self._path(int(replaced.name.removeprefix(REPLACED)))
            if path.exists():
                shutil.rmtree(replaced, ignore_errors=True)
            else:
                replaced.rename(path)

    def forget_after(self, step: int) -> None:
        """Delete the checkpoints of later steps: the run went back and will come by them on another way."""
        for later in self.steps():
            if later > step:
                self._forget(later)

    def _forget(self, step: int) -> None:
        gone = self.directory / f"{GONE}{step:08d}"
        os.replace(self._path(step), gone)  # so that nobody sees half of it
        shutil.rmtree(gone, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"


def _copied(tensors: Tensors) -> Tensors:
    """Copies in memory that training does not change; what shared its memory shares the copy."""
    copies: dict[Any, torch.Tensor] = {}

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if key not in copies:
            copies[key] = tensor.to("cpu", copy=True)
        return copies[key]

    return {name: copy(tensor) for name, tensor in tensors.items()}


def problems(path: Path) -> Iterator[str]:
    """What is wrong with a checkpoint; nothing for a sound one."""
    try:
        manifest = json.loads((path / "MANIFEST.json").read_text(encoding="utf-8"))
        files = dict(manifest["files"])
        own = (path / "MANIFEST.sha256").read_bytes()
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield f"MANIFEST.json: {error}"
        return
    if own != _own_digest(path).encode():
        yield "MANIFEST.json does not match its digest"
        return
    for name, digest in files.items():
        file = path / name
        if ".." in Path(name).parts or not file.is_file():
            yield f"{name} is missing"
        elif sha256_of(file) != digest:
            yield f"{name} does not match its digest"


def _write_manifest(directory: Path, step: int) -> None:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    digests = {}
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
        digests[path.relative_to(directory).as_posix()] = sha256_of(path)
    content = json.dumps({"step": step, "torch": torch.__version__, "files": digests}, indent=1)
    _write_synced(directory / "MANIFEST.json", content)
    _write_synced(directory / "MANIFEST.sha256", _own_digest(directory))
    _sync(directory)


def _own_digest(directory: Path) -> str:
    return f"{sha256_of(directory / 'MANIFEST.json')}  MANIFEST.json\n"


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
