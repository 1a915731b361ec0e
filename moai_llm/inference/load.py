"""A model with its tokenizer, from whatever a path means: a model, a run, a quickstart, an export, adapters."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from moai_llm.modeling.convert import from_native
from moai_llm.modeling.families import FAMILIES
from moai_llm.runtime import MoaiError, has_fast_bf16, pick_device, require
from moai_llm.tokenizer import Tokenizer, load_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ADAPTER = "adapter_config.json"
CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len", "context_length")
UNNAMED = 2048  # a window where none is named; lm-eval takes the same


@dataclass
class TextModel:
    """A model with its tokenizer."""

    model: Any
    tokenizer: Tokenizer
    path: Path

    @property
    def context(self) -> int:
        """Tokens the model was made for; with learned positions, all it can take. UNNAMED where its config says none,
        as of classes of states alone.
        """
        return _named_context(self.model.config) or UNNAMED

    @property
    def bounded(self) -> bool:
        """Whether the config says how long a text may be."""
        return _named_context(self.model.config) is not None


def _named_context(config: Any) -> int | None:
    """Most classes of transformers read `max_position_embeddings` as whatever they call it."""
    found = (getattr(config, name, None) for name in CONTEXT_NAMES)
    return next((int(length) for length in found if isinstance(length, int)), None)


def resolve_model(path: str | Path) -> Path:
    """The model directory a path means: itself, `model` inside it, or the newest checkpoint of a run.

    Raises:
        MoaiError: none of these is there.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        return path
    if (path / "model" / "config.json").is_file():
        return path / "model"
    found = sorted(path.glob("checkpoints/step-*/config.json"))
    if found:
        return found[-1].parent
    what = "no such directory" if not path.exists() else "no model in it (config.json, model/ or checkpoints/)"
    raise MoaiError(f"{path}: {what}")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """fp32 | bf16 | fp16, or auto: bf16 where the device is faster in it, else fp32.

    Raises:
        MoaiError: it is none of them.
    """
    if name == "auto":
        name = "bf16" if has_fast_bf16(device) else "fp32"
    if name not in DTYPES:
        raise MoaiError(f"dtype {name!r} is not one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def is_for_vectors(path: str | Path) -> bool:
    """Whether a path means a model that was trained to make vectors; it has no head then."""
    try:
        config = json.loads((resolve_model(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, MoaiError):
        return False
    return isinstance(config, dict) and "MoaiForEmbedding" in (config.get("architectures") or ())


def load_model(path: str | Path, device: str = "auto", dtype: str = "auto") -> TextModel:
    """Load a model directory, a run (its newest checkpoint) or a quickstart, ready to generate.

    A model of a transformers class that our bricks compute, as `moai export --format hf` writes it, becomes one of
    ours. A directory of peft's adapters becomes the sum of them and the model that they name. (A checkpoint of a run
    with adapters already holds that sum.)

    Args:
        dtype: fp32 | bf16 | fp16, or auto: bf16 where the device is faster in it, else fp32.
    """
    target = pick_device(device)
    wanted = pick_dtype(dtype, target)
    path = Path(path)
    if (path / ADAPTER).is_file() and not (path / "config.json").is_file():
        return _with_adapters(path, device, dtype)
    directory = resolve_model(path)
    tokenizer = load_tokenizer(directory)
    if is_for_vectors(directory):
        raise MoaiError(f"{directory} makes vectors of texts and writes none: use `moai embed`, or a language model")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=wanted)
    except (OSError, ValueError, KeyError) as error:
        raise MoaiError(f"{directory} cannot be loaded: {error}") from None
    if model.config.vocab_size < tokenizer.vocab_size:
        raise MoaiError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}"
        )
    return TextModel(_ours(model).to(target).eval(), tokenizer, directory)


def _ours(model: Any) -> Any:
    """The same function of our bricks, where there are bricks for it: they decode faster, in batches, and all that is
    here works on them. Another class stays what it is.
    """
    if type(model).__name__ not in {family.model_class for family in FAMILIES.values()}:
        return model
    if getattr(model.config, "quantization_config", None) is not None:  # its weights are not plain matrices
        return model
    try:
        return from_native(model)
    except ValueError:  # a setting that our bricks have not
        return model


def _with_adapters(path: Path, device: str, dtype: str) -> TextModel:
    """The model that a directory of peft's adapters names, with the adapters added to its weights."""
    peft = require("peft", "lora")
    base = json.loads((path / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base or not Path(base).exists():
        raise MoaiError(
            f"{path} holds adapters for the model {base or 'that it does not name'}, which is not there: put it back, "
            f"or write where it is as base_model_name_or_path into {path / ADAPTER}"
        )
    below = load_model(base, device, dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for an old name
            merged = peft.PeftModel.from_pretrained(below.model, str(path)).merge_and_unload()
    except (ValueError, RuntimeError, KeyError) as error:
        raise MoaiError(f"the adapters of {path} do not fit {below.path}: {error}") from None
    return TextModel(merged.eval(), below.tokenizer, path)
