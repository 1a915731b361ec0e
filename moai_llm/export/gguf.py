"""A model as a GGUF file for llama.cpp, Ollama and what else reads that format."""

from __future__ import annotations

from pathlib import Path

from moai_llm.config import MoaiConfig, read_config
from moai_llm.data.embedded import sample_texts
from moai_llm.export.gguf_file import TYPES, compare, read_vocabulary, write
from moai_llm.export.layout import ARCHITECTURES, lay_out, refusals
from moai_llm.export.ollama import modelfile
from moai_llm.export.place import MODEL, require_free, written_beside
from moai_llm.export.probe import answers, difference, require_equal
from moai_llm.export.source import Exported, Progress, load_source, silent
from moai_llm.export.vocabulary import disagreements, vocabulary
from moai_llm.inference.load import resolve_model
from moai_llm.modeling.convert import prepared
from moai_llm.runtime import MoaiError, did_you_mean, require


def export_gguf(
    path: str | Path, out: str | Path, *, architecture: str | None = None, dtype: str = "fp32",
    split: str | None = None, overwrite: bool = False, progress: Progress = silent,
) -> Exported:  # fmt: skip
    """Write a model as GGUF, read the file again, and compare.

    Every weight of the file is compared with the model's, put in its place, and the logits of the model that comes of
    it are compared too: in fp32 they must be equal, in the other types the difference is reported.

    Args:
        path: a model directory of ours, or a run.
        out: a directory, for `model.gguf` and a `Modelfile`; or a name that ends in `.gguf`, for the file alone.
        architecture: see layout.py; the first that fits when None.
        dtype: fp32 | fp16 | bf16 | q8_0 | q4_0.
        split: llama.cpp's rule to split text by, see vocabulary.py; the closest one when None.

    Raises:
        MoaiError: llama.cpp does not compute this model or has no rule for its tokenizer; `out` is not free; what was
            written is not the model, and then nothing is kept.
    """
    require("gguf", "gguf")
    path, out = resolve_model(path), Path(out)
    require_free(out, path, overwrite)
    if dtype not in TYPES:
        raise MoaiError(f"dtype {dtype!r} is not one of {', '.join(TYPES)}{did_you_mean(dtype, TYPES)}")
    chosen = choose(read_config(path / "config.json"), architecture, str(path))
    source = load_source(path, progress)
    words = vocabulary(source.tokenizer, split)
    layout = lay_out(source.model.config, chosen)
    _, state = prepared(source.model, layout.family)
    with written_beside(out) as place:
        file = place / MODEL
        write(file, layout, state, words, dtype, source.name, lambda done, total: progress("writing", done, total))
        kinds = compare(file, layout, state, dtype, lambda done, total: progress("reading it again", done, total))
        heard = answers(
            source.model, source.asked, lambda done: progress("asking what was written", done, len(source.asked))
        )
        found = difference(source.said, heard, source.asked)
        notes = []
        if dtype == "fp32":
            experts = "sparse" in (source.model.config.mlp_layer_types or ())
            notes = require_equal(found, "the GGUF file that was written", experts)
        texts = [text for documents in sample_texts().values() for text in documents]
        count, differ = disagreements(read_vocabulary(file, words.rule), source.tokenizer, texts)
        if out.suffix != ".gguf":
            text = modelfile(source.tokenizer, MODEL, source.model.config.max_position_embeddings)
            (place / "Modelfile").write_text(text, encoding="utf-8")
        size = file.stat().st_size
    stored = ", ".join(f"{number} in {kind}" for kind, number in kinds.items())
    notes += [f"weights: {stored}", *words.notes]
    if len(state) > len(source.model.state_dict()):
        notes.append("one attention layer of zeros is added: it changes nothing, and llama.cpp does not run without")
    if differ:
        notes.append(
            f"llama.cpp would give {len(differ)} of {count} sample texts other ids, such as {differ[0][:60]!r}"
        )
    exact = dtype == "fp32"
    compared = (count, len(differ))
    return Exported(out, chosen, size, found if exact else None, None if exact else found, compared, notes)


def choose(config: MoaiConfig, architecture: str | None, where: str) -> str:
    """The first of llama.cpp's architectures that computes a config, or `architecture`, if it does.

    Raises:
        MoaiError: none does; the message gives each one's reason.
    """
    reasons = refusals(config)
    if architecture is not None:
        if architecture not in ARCHITECTURES:
            known = f"{', '.join(ARCHITECTURES)}{did_you_mean(architecture, ARCHITECTURES)}"
            raise MoaiError(f"{architecture!r} is none of the architectures {known}")
        if reasons[architecture] is not None:
            raise MoaiError(f"{where}: llama.cpp's {architecture}: {reasons[architecture]}")
        return architecture
    fits = next((name for name, reason in reasons.items() if reason is None), None)
    if fits is None:
        lines = "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())
        raise MoaiError(f"{where}: llama.cpp has no architecture that computes this model:\n{lines}")
    return fits
