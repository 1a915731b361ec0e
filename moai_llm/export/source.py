"""The model that leaves: loaded in fp32 on the CPU, with its tokenizer, without the rows that no token uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from moai_llm.export.probe import Difference, answers, inputs
from moai_llm.inference.load import load_model
from moai_llm.modeling.model import MoaiForCausalLM
from moai_llm.modeling.vocabulary import resize_vocabulary
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer

Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much


def silent(what: str, done: int, total: int) -> None:
    """No progress."""


@dataclass(frozen=True)
class Exported:
    """What an export has written and found.

    Attributes:
        target: the class of transformers, or llama.cpp's architecture.
        size: bytes of all files.
        found: the file read again, against the model in the precision of the file: equal up to the order of sums. None
            where only the weights could be compared one by one, and what they cost is said by `rounding`.
        rounding: the model in the precision of the file, against the model as it was; None in fp32.
        tokenizer: how many texts were encoded both ways, and how many of them get other ids.
        notes: what a reader of the file should know.
    """

    path: Path
    target: str
    size: int
    found: Difference | None
    rounding: Difference | None
    tokenizer: tuple[int, int]
    notes: list[str] = field(default_factory=list)


@dataclass
class Source:
    """A model ready to leave.

    Attributes:
        asked: the inputs that its copies are compared on.
        said: its logits there, in fp32.
    """

    path: Path
    model: MoaiForCausalLM
    tokenizer: Tokenizer
    asked: list[Tensor]
    said: list[Tensor]

    @property
    def name(self) -> str:
        """Of the model, for people: the folder it came from, or the run of a checkpoint."""
        parts = [part for part in self.path.resolve().parts if part != "model" and part != "checkpoints"]
        return next((part for part in reversed(parts) if not part.startswith("step-")), "model")


def load_source(path: str | Path, progress: Progress = silent) -> Source:
    """Raises `MoaiError` where there is no model of ours."""
    with quiet():
        loaded = load_model(path, device="cpu", dtype="fp32")
    model: Any = loaded.model
    if not isinstance(model, MoaiForCausalLM):
        raise MoaiError(
            f"{loaded.path} is a {type(model).__name__}, not a model of ours: bring it here first with `moai import`"
        )
    size = loaded.tokenizer.vocab_size
    if model.config.vocab_size > size:
        with torch.no_grad():
            resize_vocabulary(model, [(i,) for i in range(size)])
    asked = inputs(loaded.tokenizer, size, loaded.context)
    said = answers(model, asked, lambda done: progress("asking the model", done, len(asked)))
    return Source(loaded.path, model, loaded.tokenizer, asked, said)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars and its advice on packages."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
