"""A model that makes vectors as a directory of sentence-transformers, which needs no package of ours.

It holds transformers' own class for the hidden states, then modules that pool, project and scale. What is written is
loaded again by sentence-transformers and compared, text by text, before it takes its place.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from moai_llm.config import MoaiConfig
from moai_llm.data.embedded import sample_texts
from moai_llm.export.place import require_free, written_beside
from moai_llm.export.source import Progress, quiet, silent
from moai_llm.inference.embed import Embedder, embed, load_embedder
from moai_llm.inference.load import resolve_model
from moai_llm.modeling.convert import native_family, to_native
from moai_llm.modeling.embedding import MoaiForEmbedding
from moai_llm.modeling.model import MoaiForCausalLM
from moai_llm.runtime import MoaiError, require
from moai_llm.tokenizer import Tokenizer

TOLERANCE = 1e-5  # between numbers of two vectors of length one
POOLINGS = {"mean": "mean", "last": "lasttoken", "first": "cls"}


@dataclass(frozen=True)
class ExportedVectors:
    """What was written and found.

    Attributes:
        target: the class of transformers that makes the hidden states.
        texts: how many were compared, and `largest` the largest difference of a number.
    """

    path: Path
    target: str
    size: int
    width: int
    texts: int
    largest: float
    notes: list[str] = field(default_factory=list)


def export_sentence_transformers(
    path: str | Path, out: str | Path, *, family: str | None = None, overwrite: bool = False,
    progress: Progress = silent,
) -> ExportedVectors:  # fmt: skip
    """Write a model for `SentenceTransformer(out)`, in fp32, and compare.

    Args:
        path: a model directory of ours, or a run. A language model is exported as the mean of its hidden states.
        family: see `modeling/families.py`; the first that fits when None.

    Raises:
        MoaiError: no class of transformers computes the hidden states; `out` is not free; what was written gives other
            vectors, and then nothing is kept.
    """
    library = require("sentence_transformers", "st")
    path, out = resolve_model(path), Path(out)
    require_free(out, path, overwrite)
    embedder = load_embedder(path, "cpu", "fp32")
    settings = embedder.model.settings
    if settings.bidirectional:
        raise MoaiError(
            f"{path}: its attention looks both ways, and transformers' classes of decoders look back alone: train with "
            "embedding.bidirectional=false to export it"
        )
    plain = MoaiConfig(**{**embedder.model.config.to_dict(), "embedding": None})
    try:
        name = native_family(plain, family)
    except ValueError as error:
        raise MoaiError(f"{path}: {error}\nA directory of ours is read by sentence-transformers only where moai_llm is "
                        "installed, so it is not written") from None  # fmt: skip
    texts = probe_texts()
    progress("asking the model", 0, 1)
    said = embed(embedder, texts)
    with quiet(), written_beside(out) as place:
        progress("writing", 0, 1)
        native: Any = to_native(_language_model(embedder.model, plain), name)
        base = native.base_model
        base.config.architectures = [type(base).__name__]
        base.save_pretrained(place, max_shard_size="5GB")
        target = type(base).__name__
        _write_tokenizer(place, embedder.tokenizer, embedder.context)
        _write_modules(place, embedder, library.__version__)
        progress("asking what was written", 0, 1)
        largest = _compared(place, texts, said, library)
        size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    notes = [] if embedder.trained else ["it was not trained for vectors: they are the means of its hidden states"]
    return ExportedVectors(out, target, size, said.shape[1], len(texts), largest, notes)


def probe_texts() -> list[str]:
    """Texts of each language, short, long and empty."""
    whole = [text for documents in sample_texts().values() for text in documents]
    return [*whole, *(text[:40] for text in whole), "\n\n".join(whole), "a", ""]


def _compared(place: Path, texts: Sequence[str], said: np.ndarray, library: Any) -> float:
    """The largest difference, read again as anybody would.

    Raises:
        MoaiError: more than rounding.
    """
    again = library.SentenceTransformer(str(place), device="cpu", local_files_only=True)
    heard = np.asarray(again.encode(list(texts), batch_size=5, show_progress_bar=False), np.float32)
    largest = float(np.abs(heard - said).max()) if heard.shape == said.shape else float("inf")
    scale = max(1.0, float(np.abs(said).max()))  # of vectors that are not scaled to one
    if not largest <= TOLERANCE * scale:
        raise MoaiError(
            f"what sentence-transformers makes of it differs by {largest:.1e}, allowed is {TOLERANCE * scale:.0e}. "
            "Nothing was kept; please report this with the model's config.json"
        )
    return largest


def _language_model(model: MoaiForEmbedding, config: MoaiConfig) -> MoaiForCausalLM:
    """Its decoder below a head that nobody reads, which is what the tables of families know."""
    with torch.device("meta"):
        whole = MoaiForCausalLM(config)
    whole.model = model.model
    whole.lm_head.weight = model.model.embed_tokens.weight
    return whole.eval()


def _write_tokenizer(place: Path, tokenizer: Tokenizer, context: int) -> None:
    """With the end-of-text token behind each text, which the model was trained with."""
    tokenizer.save(place)
    file, end = place / "tokenizer.json", next(n for n, i in tokenizer.special_ids.items() if i == tokenizer.eos_id)
    content = json.loads(file.read_text(encoding="utf-8"))
    template = {
        "type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}},
                                                 {"SpecialToken": {"id": end, "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {end: {"id": end, "ids": [tokenizer.eos_id], "tokens": [end]}},
    }  # fmt: skip
    before = content.get("post_processor")
    kept = [] if before is None or before.get("type") == "TemplateProcessing" else [before]
    content["post_processor"] = {"type": "Sequence", "processors": [*kept, template]}
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    config = place / "tokenizer_config.json"
    settings = {**json.loads(config.read_text(encoding="utf-8")), "model_max_length": context, "padding_side": "right"}
    config.write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")


def _write_modules(place: Path, embedder: Embedder, version: str) -> None:
    """What sentence-transformers reads beside the model: its modules in their order."""
    settings, width = embedder.model.settings, int(embedder.model.config.hidden_size)
    kinds = ["Transformer", "Pooling"]
    kinds += ["Dense"] * (settings.projection is not None) + ["Normalize"] * settings.normalize
    modules = []
    for i, kind in enumerate(kinds):
        folder = "" if kind == "Transformer" else f"{i}_{kind}"
        modules.append({"idx": i, "name": str(i), "path": folder, "type": f"sentence_transformers.models.{kind}"})
        if folder:
            (place / folder).mkdir()
    _json(place / "modules.json", modules)
    _json(place / "config_sentence_transformers.json", {
        "__version__": {"sentence_transformers": version}, "model_type": "SentenceTransformer",
        "prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine",
    })  # fmt: skip
    _json(place / "sentence_bert_config.json", {"max_seq_length": embedder.context, "do_lower_case": False})
    chosen = POOLINGS[settings.pooling]
    _json(place / "1_Pooling" / "config.json", {
        "word_embedding_dimension": width, "pooling_mode_cls_token": chosen == "cls",
        "pooling_mode_mean_tokens": chosen == "mean", "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False, "pooling_mode_weightedmean_tokens": False,
        "pooling_mode_lasttoken": chosen == "lasttoken", "include_prompt": True,
    })  # fmt: skip
    if embedder.model.projection is not None:
        _json(place / "2_Dense" / "config.json", {
            "in_features": width, "out_features": embedder.model.width, "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
        })  # fmt: skip
        save_file({"linear.weight": embedder.model.projection.weight.detach().contiguous()},
                  place / "2_Dense" / "model.safetensors")  # fmt: skip


def _json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
