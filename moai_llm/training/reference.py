"""How likely the model that a run starts from holds each answer, computed once and kept in a file.

A preference loss compares with that model. Its log-probabilities are two numbers a pair, so it need not stay in memory.
They lie in `reference/` of the run, with digests of what they were computed from: a run that is resumed or begun anew
takes them from there, one with another model or store does not, and what was done when a pass was cut off is not lost.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moai_llm.data.pair_loader import PairLoader
from moai_llm.data.shards import sha256_of
from moai_llm.modeling.model import MoaiForCausalLM
from moai_llm.training.monitor import follow
from moai_llm.training.precision import Precision

logger = logging.getLogger("moai_llm")
SAVE_SECONDS = 60.0  # work that an interrupted pass may lose

# (model, rows) -> log-probabilities (B, most, 2) of both answers of each pair
LogProbs = Callable[[MoaiForCausalLM, dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Origin:
    """What the numbers depend on."""

    model: str  # fingerprint_of its directory
    store: str  # fingerprint
    seq_len: str  # longer pairs are cut
    overlong: str
    precision: str


def fingerprint_of(model: Path) -> str:
    """Digest of a model directory: its config and weights."""
    digest = hashlib.sha256()
    for file in sorted(path for path in model.iterdir() if path.suffix in (".safetensors", ".bin")):
        digest.update(f"{file.name} {sha256_of(file)}\n".encode())
    digest.update((model / "config.json").read_bytes())
    return digest.hexdigest()


def file_of(run: Path, store: str) -> Path:
    """Where a run keeps the numbers of a store with this fingerprint."""
    return run / "reference" / f"{store[:16]}.safetensors"


def read(file: Path, origin: Origin, pairs: int) -> Tensor | None:
    """(pairs, 2) fp32 of an earlier pass, NaN where it did not come to; None if there is none of this origin. A file
    that is damaged or of another origin is reported.
    """
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as opened:
            described, values = opened.metadata() or {}, opened.get_tensor("log_probs")
    except (OSError, SafetensorError) as error:
        logger.warning("%s is damaged (%s): the reference is computed again", file, error)
        return None
    if described.get("sha256") != _digest(values) or values.shape != (pairs, 2):
        logger.warning("%s is damaged (its digest does not agree): the reference is computed again", file)
        return None
    other = [name for name, value in asdict(origin).items() if described.get(name) != value]
    if other:
        logger.warning("%s is of another %s: the reference is computed again", file, " and ".join(other))
        return None
    return values


def origin_of(file: Path) -> dict[str, str]:
    """What a file says that it was computed from; {} where it cannot be read."""
    try:
        with safe_open(file, "pt") as opened:
            return opened.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def write(file: Path, origin: Origin, values: Tensor) -> None:
    """Replace the file by one that is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".tmp-{file.name}-{os.getpid()}")
    try:
        save_file({"log_probs": values}, temporary, metadata={**asdict(origin), "sha256": _digest(values)})
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


@torch.no_grad()
def compute(
    model: MoaiForCausalLM,
    loader: PairLoader,
    log_probs: LogProbs,
    precision: Precision,
    rows: int,
    *,
    known: Tensor | None,
    save: Callable[[Tensor], None],
    quiet: bool,
) -> Tensor:
    """(pairs, 2) log-probabilities of every pair in a row of the loader, NaN of those in none.

    Args:
        rows: of a forward pass.
        known: what an earlier pass came to.
        save: called with what is there about once a minute, and at the end if there is something new.
    """
    values = torch.full((len(loader.pairs), 2), torch.nan) if known is None else known.clone()
    training, saved, changed = model.training, time.monotonic(), False
    model.eval()
    for batch in follow(loader.epoch(rows), -(-len(loader) // rows), "reference log-probabilities", quiet=quiet):
        there = batch["pairs"] >= 0
        if not values[batch["pairs"][there]].isnan().any():
            continue
        with precision.autocast():
            found = log_probs(model, {key: tensor.to(precision.device) for key, tensor in batch.items()})
        values[batch["pairs"][there]], changed = found.float().cpu()[there], True
        if time.monotonic() - saved > SAVE_SECONDS:
            save(values)
            saved = time.monotonic()
    model.train(training)
    if changed:
        save(values)
    return values


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()
