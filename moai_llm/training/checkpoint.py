"""Checkpoints that survive a kill at any moment, and say so when they are damaged.

    checkpoints/step-00000100/
      config.json, model.safetensors, tokenizer.json, recipe.yaml, ...   a model directory like any other
      training_state/optimizer.safetensors, state.json                    what only a resumed run needs
      MANIFEST.json                                                       sha256 of every file, written last

Everything goes to `.tmp-step-N` first, is forced to disk, and becomes `step-N` by one rename. Only JSON and
safetensors: nothing in here can run code.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from moai_llm.data.shards import sha256_of
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from moai_llm.training.optim import place_state

logger = logging.getLogger("moai_llm")
STATE = "training_state"


@dataclass
class Checkpoints:
    """The checkpoints of one run."""

    directory: Path
    keep_last: int = 2

    def save(
        self, step: int, model: Any, tokenizer: Tokenizer, recipe_yaml: str, optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
    ) -> Path:  # fmt: skip
        """Write checkpoint `step` and forget the oldest beyond `keep_last`.

        Raises:
            MoaiError: the disk is full or cannot be written; earlier checkpoints are untouched.
        """
        final, tmp = self.directory / f"step-{step:08d}", self.directory / f".tmp-step-{step:08d}"
        shutil.rmtree(tmp, ignore_errors=True)
        try:
            (tmp / STATE).mkdir(parents=True)
            model.save_pretrained(tmp)
            tokenizer.save(tmp)
            (tmp / "recipe.yaml").write_text(recipe_yaml, encoding="utf-8")
            save_file(_optimizer_tensors(model, optimizer), tmp / STATE / "optimizer.safetensors")
            content = {**state, "step": step, "rng": _rng_state()}
            (tmp / STATE / "state.json").write_text(json.dumps(content), encoding="utf-8")
            _write_manifest(tmp, step)
            if final.exists():  # the same step again, after a resume
                shutil.rmtree(final)
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
        for old in self.steps()[: -max(1, self.keep_last)]:
            shutil.rmtree(self._path(old), ignore_errors=True)
        return final

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending; whether they are sound is not looked at."""
        return sorted(int(path.name[5:]) for path in self.directory.glob("step-*") if path.name[5:].isdigit())

    def latest(self) -> Path | None:
        """The newest checkpoint whose digests agree. A damaged one is set aside as `damaged-step-N` and reported."""
        for step in reversed(self.steps()):
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

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"


def problems(path: Path) -> Iterator[str]:
    """What is wrong with a checkpoint; nothing for a sound one."""
    try:
        manifest = json.loads((path / "MANIFEST.json").read_text(encoding="utf-8"))
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield f"MANIFEST.json: {error}"
        return
    for name, digest in files.items():
        file = path / name
        if ".." in Path(name).parts or not file.is_file():
            yield f"{name} is missing"
        elif sha256_of(file) != digest:
            yield f"{name} does not match its digest"


def restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load weights, optimizer and random state of a sound checkpoint; returns what `save` was given as `state`.

    Raises:
        MoaiError: the checkpoint is of another model.
    """
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        weights.update(load_file(file))
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # shapes
        raise MoaiError(f"{path} is a checkpoint of another model: {str(error).splitlines()[1].strip()}") from None
    tied = set(getattr(model, "_tied_weights_keys", None) or {})
    if unexpected or set(missing) - tied:
        raise MoaiError(f"{path} is a checkpoint of another model: {[*unexpected, *missing][:3]} ...")
    _load_optimizer(load_file(path / STATE / "optimizer.safetensors"), model, optimizer)
    state = json.loads((path / STATE / "state.json").read_text(encoding="utf-8"))
    _set_rng_state(state.pop("rng"))
    return state


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """{"exp_avg/model.norm.weight": tensor, ...}: by parameter name, so that the order of groups does not matter.

    A number of Python becomes a 64-bit scalar, and a number again when it is read: torch's own counters have 32 bits.
    A tensor that several parameters share, such as the quantisation map of 8-bit states, is written for each of them.
    """
    tensors: dict[str, torch.Tensor] = {}
    written = set()
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, (int, float)):
                value = torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)
            tensor = value.detach().contiguous()
            tensors[f"{key}/{name}"] = tensor.clone() if tensor.data_ptr() in written else tensor
            written.add(tensor.data_ptr())
    return tensors


def _load_optimizer(tensors: dict[str, torch.Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for full, tensor in tensors.items():
        key, _, name = full.partition("/")
        if name not in parameters:
            raise MoaiError(f"the optimizer state names {name}, which this model does not have")
        parameter, number = parameters[name], tensor.dim() == 0 and tensor.dtype in (torch.int64, torch.float64)
        value = tensor.item() if number else place_state(optimizer, parameter, key, tensor)
        optimizer.state[parameter][key] = value


def _write_manifest(directory: Path, step: int) -> None:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    digests = {}
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
        digests[path.relative_to(directory).as_posix()] = sha256_of(path)
    manifest = directory / "MANIFEST.json"
    with manifest.open("w", encoding="utf-8") as file:
        json.dump({"step": step, "torch": torch.__version__, "files": digests}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync(directory)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rng_state() -> dict[str, Any]:
    python = random.getstate()
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [python[0], list(python[1]), python[2]],
        "numpy": [kind, [int(k) for k in keys], int(position), int(has_gauss), float(gauss)],
        "torch": _bytes_to_text(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        state["cuda"] = [_bytes_to_text(t) for t in torch.cuda.get_rng_state_all()]
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, numbers, position, has_gauss, value = state["numpy"]
    np.random.set_state((kind, np.array(numbers, dtype=np.uint32), position, has_gauss, value))
    torch.set_rng_state(_text_to_bytes(state["torch"]))
    if "cuda" in state and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all([_text_to_bytes(t) for t in state["cuda"]])


def _bytes_to_text(tensor: torch.Tensor) -> str:
    return base64.b64encode(tensor.cpu().numpy().tobytes()).decode()


def _text_to_bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
