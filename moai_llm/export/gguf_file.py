"""The GGUF file itself: a model and its tokenizer written, read again, and compared with what they came from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moai_llm import __version__
from moai_llm.export.layout import Layout, State, Weight
from moai_llm.export.vocabulary import Rule, Vocabulary, as_read
from moai_llm.runtime import MoaiError, require

Progress = Callable[[int, int], None]
# our name -> (gguf's, the number of the file type in llama.h)
TYPES = {"fp32": ("F32", 0), "fp16": ("F16", 1), "bf16": ("BF16", 32), "q8_0": ("Q8_0", 7), "q4_0": ("Q4_0", 2)}
BLOCK = 32  # values that share a scale in the quantised types
# how far a stored value may be from the weight, in steps of its block (quantised), or as a share of itself. A step is
# stored in fp16, which moves the end of its range of 127 or 8 steps by up to 2^-11 of that; Q4_0 has 16 levels from
# -8 to 7, so a weight at +8 loses a whole step.
BOUNDS = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8, "Q8_0": 0.57, "Q4_0": 1.01}


def type_of(weight: Weight, shape: tuple[int, ...], dtype: str) -> str:
    """The type a weight is stored in, by gguf's name."""
    if weight.full or len(shape) < 2:
        return "F32"
    if dtype == "q4_0" and weight.name in ("token_embd.weight", "output.weight"):
        dtype = "q8_0"  # as llama.cpp's own tools do: four bits there cost the most and save the least
    if dtype.startswith("q") and shape[-1] % BLOCK:
        return "F16"
    return TYPES[dtype][0]


@torch.no_grad()
def write(
    file: Path, layout: Layout, state: State, vocabulary: Vocabulary, dtype: str, name: str,
    progress: Progress = lambda done, all: None,
) -> None:  # fmt: skip
    """Write the file, one weight after the other: beside the model it needs the memory of its largest weight."""
    gguf = require("gguf", "gguf")
    writer = gguf.GGUFWriter(file, layout.architecture)
    writer.add_name(name)
    writer.add_description(f"written by moai-llm {__version__}" + BORROWED.get(layout.architecture, ""))
    writer.add_file_type(TYPES[dtype][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in layout.keys.items():
        _add(writer, f"{layout.architecture}.{key}", value)
    _add_vocabulary(writer, vocabulary)
    stored = []
    for weight in layout.weights:
        tensor = weight.of(state)
        kind = type_of(weight, tuple(tensor.shape), dtype)
        stored.append(kind)
        number = gguf.GGMLQuantizationType[kind]
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, number) if kind not in ("F32", "F16") else tensor.shape
        size, raw = {"F32": (4, np.float32), "F16": (2, np.float16)}.get(kind, (1, np.uint8))
        writer.add_tensor_info(weight.name, shape, np.dtype(raw), int(np.prod(shape)) * size, number)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, (weight, kind) in enumerate(zip(layout.weights, stored), 1):
            with np.errstate(over="ignore"):  # what does not fit into fp16 is found by `compare`
                writer.write_tensor_data(gguf.quantize(weight.of(state).numpy(), gguf.GGMLQuantizationType[kind]))
            progress(done, len(stored))
    finally:
        writer.close()


BORROWED = {
    "hy_v3": "; Qwen3MoE with dense layers, which that architecture lacks, in the graph of hy_v3: its shared experts "
    "are zeros"
}


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.rule.name)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types([int(kind) for kind in vocabulary.kinds])
    writer.add_token_merges(vocabulary.merges)
    for role, i in vocabulary.ids.items():
        writer.add_uint32(f"tokenizer.ggml.{role}_token_id", i)
    writer.add_add_bos_token(False)  # a chat template writes what a conversation begins with
    writer.add_add_eos_token(False)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


# ---------------------------------------------------------------- reading back


def read_vocabulary(file: Path, rule: Rule) -> Any:
    """What llama.cpp makes of the file's vocabulary, see `as_read`.

    Raises:
        MoaiError: the file names another rule.
    """
    reader = require("gguf", "gguf").GGUFReader(file)
    fields = {
        name: reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("pre", "tokens", "token_type", "merges")
    }
    if fields["pre"] != rule.name:
        raise MoaiError(f"{file} names the split {fields['pre']!r}, not {rule.name!r}")
    return as_read(rule, fields["tokens"], fields["token_type"], fields["merges"])


@torch.no_grad()
def compare(
    file: Path, layout: Layout, state: State, dtype: str, progress: Progress = lambda done, all: None
) -> dict[str, int]:
    """Read every weight of the file, compare it with ours, and put it in the place of ours.

    Returns:
        How many weights there are of each type.

    Raises:
        MoaiError: the header or a weight is not what was to be written.
    """
    gguf = require("gguf", "gguf")
    reader = gguf.GGUFReader(file)
    header = {f"{layout.architecture}.{key}": value for key, value in layout.keys.items()}
    for key, value in {"general.architecture": layout.architecture, **header}.items():
        found = reader.fields[key].contents() if key in reader.fields else None
        same = bool(np.isclose(found, value, rtol=1e-6)) if isinstance(value, float) and found else found == value
        if not same:
            raise MoaiError(f"{file}: {key} is {found!r}, and was to be {value!r}")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    if set(stored) != {weight.name for weight in layout.weights}:
        raise MoaiError(f"{file} does not hold the weights it was to hold")
    kinds: dict[str, int] = {}
    for done, weight in enumerate(layout.weights, 1):
        ours, tensor = weight.of(state), stored[weight.name]
        kind = tensor.tensor_type.name
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).reshape(ours.shape)
        if kind != type_of(weight, tuple(ours.shape), dtype) or not bool(
            (_error(ours, values, kind) <= BOUNDS[kind]).all()
        ):
            raise MoaiError(
                f"{file}: {weight.name}, stored as {kind}, is further from the model's weight than that type explains: "
                "does it hold values that do not fit, or none at all (NaN)?"
            )
        weight.put_back(state, values)
        kinds[kind] = kinds.get(kind, 0) + 1
        progress(done, len(layout.weights))
    return kinds


def _error(ours: Tensor, stored: Tensor, kind: str) -> Tensor:
    """How far stored values are from ours, in the unit of `BOUNDS`."""
    apart = (stored - ours).abs()
    if kind == "F32":
        return apart
    if kind in ("F16", "BF16"):
        smallest = 2.0**-14 if kind == "F16" else 2.0**-126  # below it values are evenly spaced
        return apart / ours.abs().clamp_min(smallest)
    blocks = ours.unflatten(-1, (-1, BLOCK)).abs().amax(-1, keepdim=True)
    step = blocks / (127 if kind == "Q8_0" else 8)
    return apart.unflatten(-1, (-1, BLOCK)) / step.clamp_min(2.0**-24)
