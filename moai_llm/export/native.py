"""A model as a directory of transformers' own class, which needs no package of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from moai_llm.config import read_config
from moai_llm.data.embedded import sample_texts
from moai_llm.export.place import require_free, written_beside
from moai_llm.export.probe import answers, difference, require_equal
from moai_llm.export.source import Exported, Progress, load_source, quiet, silent
from moai_llm.inference.load import resolve_model
from moai_llm.modeling.convert import native_family, to_native
from moai_llm.modeling.mamba import Mamba
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export_native(
    path: str | Path, out: str | Path, *, family: str | None = None, dtype: str = "fp32", overwrite: bool = False,
    progress: Progress = silent,
) -> Exported:  # fmt: skip
    """Write a model for transformers, read it again with transformers, and compare.

    Args:
        path: a model directory of ours, or a run.
        family: see `modeling/families.py`; the first that fits when None.
        dtype: of the files, fp32 | bf16. Mamba's A_log, D and dt_bias stay in fp32.

    Raises:
        MoaiError: no class computes this model, or not this one; `out` is not free; what was written is not the model,
            and then nothing is kept.
    """
    path, out = resolve_model(path), Path(out)
    require_free(out, path, overwrite)
    if dtype not in DTYPES:
        raise MoaiError(f"a model of transformers is written in {' or '.join(DTYPES)}, not {dtype!r}")
    try:
        name = native_family(read_config(path / "config.json"), family)
    except ValueError as error:
        raise MoaiError(f"{path}: {error}") from None
    source = load_source(path, progress)
    rounding, said = None, source.said
    if dtype != "fp32":
        _round(source.model, DTYPES[dtype])
        said = answers(source.model, source.asked)
        rounding = difference(source.said, said, source.asked)
    tokenizer, layers = source.tokenizer, source.model.config.num_hidden_layers
    experts = "sparse" in (source.model.config.mlp_layer_types or ())
    with quiet(), written_beside(out) as place:
        progress("writing", 0, 1)
        native: Any = to_native(source.model, name)
        added = native.config.num_hidden_layers > layers
        describe(native, tokenizer)
        del source.model  # from here on there is one model in memory
        _save(native, place, DTYPES[dtype])
        del native
        tokenizer.save(place)
        progress("writing", 1, 1)
        again = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
        target = type(again).__name__
        heard = answers(again, source.asked, lambda done: progress("asking what was written", done, len(said)))
        found = difference(said, heard, source.asked)
        notes = require_equal(found, f"the {target} that was written", experts)
        compared = compare_tokenizer(place, tokenizer)
        size = sum(file.stat().st_size for file in place.iterdir())
    if added:
        notes.append("one attention layer of zeros is added: it changes nothing, and that class does not run without")
    return Exported(out, target, size, found, rounding, compared, notes)


def _round(model: Any, dtype: torch.dtype) -> None:
    for name, parameter in model.named_parameters():
        if name.rsplit(".", 1)[-1] not in Mamba.KEEP_FP32:
            parameter.data = parameter.data.to(dtype).float()


KEEP_FP32 = ("A_log", ".D", "dt_proj.bias")  # the same in their names


def _save(native: Any, place: Path, dtype: torch.dtype) -> None:
    for name, parameter in native.named_parameters():
        if not name.endswith(KEEP_FP32):
            parameter.data = parameter.data.to(dtype)
    native.config.dtype = dtype
    native.save_pretrained(place, max_shard_size="5GB")


def describe(native: Any, tokenizer: Tokenizer) -> None:
    """The tokens by which transformers begins, pads and stops."""
    roles = {name: tokenizer.special_ids.get(tokenizer.roles.get(name, "")) for name in ("bos_token", "pad_token")}
    ids = {"bos_token_id": roles["bos_token"], "pad_token_id": roles["pad_token"], "eos_token_id": tokenizer.eos_id}
    for name, value in ids.items():
        setattr(native.config, name, value)
    native.generation_config = transformers.GenerationConfig(**{**ids, "eos_token_id": tokenizer.stop_ids})


def compare_tokenizer(place: Path, tokenizer: Tokenizer) -> tuple[int, int]:
    texts = [text for documents in sample_texts().values() for text in documents]
    theirs = transformers.AutoTokenizer.from_pretrained(place)
    ours = tokenizer.encode_batch(texts)
    differ = sum(theirs.encode(text, add_special_tokens=False) != ids for text, ids in zip(texts, ours))
    if differ:
        raise MoaiError(
            f"transformers gives {differ} of {len(texts)} texts other ids than the model knows: its tokenizer.json is "
            "read otherwise there. Nothing was kept"
        )
    return len(texts), differ
