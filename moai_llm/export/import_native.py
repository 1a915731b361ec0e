"""A checkpoint of another class as one of ours, to train on: weights, configuration, tokenizer, and a comparison.

Nothing of a checkpoint is run: safetensors, or pickles that may hold tensors alone, and no code of its own.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken

from moai_llm.data.embedded import sample_texts
from moai_llm.export.place import require_free, written_beside
from moai_llm.export.probe import Difference, answers, difference, inputs, require_equal
from moai_llm.export.source import Progress, quiet, silent
from moai_llm.modeling.convert import from_native
from moai_llm.modeling.families import FAMILIES
from moai_llm.modeling.model import MoaiForCausalLM
from moai_llm.modeling.vocabulary import resize_vocabulary
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer, load_tokenizer
from moai_llm.tokenizer.load import PAD

FILES = ["*.json", "*.jinja", "*.txt", "*.safetensors"]  # what is fetched of a model on the Hub
LEGACY = ["pytorch_model*.bin"]  # only where there are no safetensors


@dataclass(frozen=True)
class Imported:
    """`found` is our model, read again from its files, against theirs."""

    path: Path
    origin: str
    parameters: int
    found: Difference
    notes: list[str] = field(default_factory=list)


def import_native(
    name: str | Path, out: str | Path, *, overwrite: bool = False, progress: Progress = silent
) -> Imported:
    """Write a model of transformers as one of ours, in the precision it came in, read it again, and compare.

    Args:
        name: a directory, or a name on the Hub such as `Qwen/Qwen3-0.6B`.

    Raises:
        MoaiError: there is no such model, it is of a class we do not compute or has a setting that our bricks have
            not, `out` is not free, or what was written is not the model, and then nothing is kept.
    """
    out = Path(out)
    source = _find(str(name))
    require_free(out, source, overwrite)
    origin = _require_known(source)
    tokenizer = load_tokenizer(source)
    with quiet():
        try:
            native: Any = transformers.AutoModelForCausalLM.from_pretrained(
                source, dtype="auto", trust_remote_code=False, weights_only=True
            )
        except (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
            raise MoaiError(f"{source} cannot be loaded: {error}") from None
        dtype = native.dtype
        native = native.float().eval()
        _require_rows(native, tokenizer, source)
        try:
            model = from_native(native)
        except ValueError as error:
            raise MoaiError(f"{source}: {error}") from None
        asked = inputs(tokenizer, min(native.config.vocab_size, tokenizer.vocab_size), _context(native.config))
        said = answers(native, asked, lambda done: progress(f"asking the {origin}", done, len(asked)))
        notes = _compare_ids(source, tokenizer)
        del native
        tokenizer, more = _prepare_training(model, tokenizer)
        with written_beside(out) as place:
            progress("writing", 0, 1)
            model.to(dtype).save_pretrained(place, max_shard_size="5GB")
            tokenizer.save(place)
            parameters = sum(p.numel() for p in model.parameters())
            del model
            progress("writing", 1, 1)
            again = MoaiForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
            heard = answers(again, asked, lambda done: progress("asking what was written", done, len(asked)))
            width = said[0].shape[-1]
            found = difference(said, [logits[:, :width] for logits in heard], asked)
            experts = "sparse" in (again.config.mlp_layer_types or ())
            notes += require_equal(found, "the model that was written", experts)
    return Imported(out, origin, parameters, found, notes + more)


def _find(name: str) -> Path:
    """The directory of a model, fetched from the Hub where `name` is one there."""
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/")):
        raise MoaiError(f"{name}: neither a directory nor a name on the Hub such as Qwen/Qwen3-0.6B")
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(name, allow_patterns=FILES))
        if not any(path.glob("*.safetensors")):
            path = Path(snapshot_download(name, allow_patterns=FILES + LEGACY))
    except (OSError, ValueError) as error:  # those of requests and of the Hub are OSErrors; ValueError: not a name
        raise MoaiError(f"{name} is no directory here and cannot be fetched from the Hub: {error}") from None
    return path


def _require_known(source: Path) -> str:
    """The class of a model that we compute; read before its weights are."""
    file = source / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MoaiError(f"{file} cannot be read, so {source} is no model: {error}") from None
    known = {family.model_class: family for family in FAMILIES.values()}
    types = {getattr(transformers, family.config_class).model_type: name for name, family in known.items()}
    kind = values.get("model_type")
    if kind == "moai":
        raise MoaiError(f"{source} is a model of ours already")
    if kind not in types:
        raise MoaiError(f"{source} is a {kind!r}; what can be brought here are {', '.join(sorted(types))}")
    if "quantization_config" in values:
        raise MoaiError(f"{source} is quantised: take the model it was made from, in fp32 or bf16")
    return types[kind]


def _context(config: Any) -> int:
    return int(getattr(config, "max_position_embeddings", None) or 1 << 20)


def _require_rows(native: Any, tokenizer: Tokenizer, source: Path) -> None:
    if native.config.vocab_size < tokenizer.vocab_size:
        raise MoaiError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} tokens, the model {native.config.vocab_size}"
        )


def _compare_ids(source: Path, tokenizer: Tokenizer) -> list[str]:
    """transformers has classes of its own for some models, which may read a tokenizer.json otherwise."""
    texts = [text for documents in sample_texts().values() for text in documents]
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:  # some want a package more
        return [f"its tokenizer.json is taken as it is: transformers did not load it ({str(error).splitlines()[0]})"]
    differ = [
        text for text, ids in zip(texts, tokenizer.encode_batch(texts))
        if theirs.encode(text, add_special_tokens=False) != ids
    ]  # fmt: skip
    if differ:
        raise MoaiError(
            f"{source}: the {type(theirs).__name__} of transformers gives {len(differ)} of {len(texts)} texts other "
            f"ids than its tokenizer.json says, such as {differ[0][:60]!r}: which ones the model knows cannot be told"
        )
    return []


def _prepare_training(model: MoaiForCausalLM, tokenizer: Tokenizer) -> tuple[Tokenizer, list[str]]:
    """What training needs and many published tokenizers lack: a token that pads and stands for nothing else."""
    _ = tokenizer.eos_id  # refused without one
    notes = []
    if tokenizer.roles.get("pad_token") not in tokenizer.special_ids or tokenizer.pad_id == tokenizer.eos_id:
        spare = next((name for name in tokenizer.special_tokens if "pad" in name.lower()), None)
        if spare is None:
            tokenizer.backend.add_special_tokens([AddedToken(PAD, special=True, normalized=False)])
            spare = PAD
        notes.append(f"it had no token to pad with: {spare} is one now")
        tokenizer = Tokenizer(tokenizer.backend, {**tokenizer.roles, "pad_token": spare}, tokenizer.chat_template)
        rows = model.config.vocab_size
        if tokenizer.vocab_size > rows:
            with torch.no_grad():
                resize_vocabulary(model, [(i,) for i in range(rows)] + [()] * (tokenizer.vocab_size - rows))
            notes.append(f"the vocabulary grows from {rows:,} to {tokenizer.vocab_size:,} rows for it")
    bos = tokenizer.special_ids.get(tokenizer.roles.get("bos_token", ""))
    ids = {"eos_token_id": tokenizer.eos_id, "bos_token_id": bos, "pad_token_id": tokenizer.pad_id}
    for key, value in ids.items():
        setattr(model.config, key, value)
    model.generation_config = transformers.GenerationConfig(**{**ids, "eos_token_id": tokenizer.stop_ids})
    return tokenizer, notes
