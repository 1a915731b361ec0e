"""A model as a directory of transformers' own class whose matrices are rounded to 4 or 8 bits, in the format of the
package compressed-tensors (`pack-quantized`), which transformers and vLLM read.

Rounded to the nearest, in groups of a row that share a scale; nothing is calibrated. What is written is read again by
transformers and compared with the same class with the rounded weights in it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from moai_llm.config import read_config
from moai_llm.export.native import KEEP_FP32, compare_tokenizer, describe
from moai_llm.export.place import require_free, written_beside
from moai_llm.export.probe import answers, difference, require_equal
from moai_llm.export.source import Exported, Progress, load_source, quiet, silent
from moai_llm.inference.load import resolve_model
from moai_llm.modeling.convert import native_family, to_native
from moai_llm.runtime import MoaiError, require

BITS = {"int4": 4, "int8": 8}
GROUPS = (32, 64, 128)
KEPT = ("lm_head", "x_proj", "dt_proj")  # as they are: the output layer, and what makes the step sizes of Mamba


class Rounded(NamedTuple):
    codes: Tensor  # (out, in) whole numbers, -2^(bits-1) to 2^(bits-1) - 1
    scales: Tensor  # (out, in / group), bf16 numbers

    @property
    def weight(self) -> Tensor:
        groups = self.codes.view(*self.scales.shape, -1)
        return (groups * self.scales[..., None]).view_as(self.codes)


def round_weight(weight: Tensor, bits: int, group: int) -> Rounded:
    """To the nearest, symmetric around zero; the largest of a group is half a step from the end of the range."""
    groups = weight.float().view(weight.shape[0], -1, group)
    half = 2 ** (bits - 1)
    scales = (groups.abs().amax(-1) / (half - 0.5)).clamp_min(1e-8).bfloat16().float()
    codes = (groups / scales[..., None]).round().clamp(-half, half - 1)
    return Rounded(codes.view_as(weight), scales)


def export_compressed(
    path: str | Path, out: str | Path, *, family: str | None = None, dtype: str = "int4", group: int = 128,
    overwrite: bool = False, progress: Progress = silent,
) -> Exported:  # fmt: skip
    """Write a model for transformers and vLLM, read it again with transformers, and compare.

    Args:
        path: a model directory of ours, or a run.
        family: see `modeling/families.py`; the first that fits when None.
        dtype: of the matrices, int4 | int8. All else is written in bf16, Mamba's A_log, D and dt_bias in fp32.
        group: weights of a row that share a scale. Matrices whose rows are no multiple of it stay in bf16.

    Raises:
        MoaiError: no class computes this model, or it has experts; no matrix can be rounded so; `out` is not free; what
            was written is not the model, and then nothing is kept.
    """
    path, out = resolve_model(path), Path(out)
    require_free(out, path, overwrite)
    if dtype not in BITS:
        raise MoaiError(f"compressed-tensors is written in {' or '.join(BITS)}, not {dtype!r}")
    if group not in GROUPS:
        raise MoaiError(f"--group-size {group}: weights share a scale in groups of {', '.join(map(str, GROUPS))}")
    require("compressed_tensors", "compress")
    config = read_config(path / "config.json")
    try:
        name = native_family(config, family)
    except ValueError as error:
        raise MoaiError(f"{path}: {error}") from None
    if "sparse" in (config.mlp_layer_types or ()):
        raise MoaiError(
            f"{path} has experts, and transformers does not read a packed model whose experts are stacked: use "
            "--format gguf --dtype q4_0, or --format hf --dtype bf16"
        )
    source = load_source(path, progress)
    tokenizer = source.tokenizer
    with quiet(), _without_bars(), written_beside(out) as place:
        progress("rounding", 0, 1)
        native: Any = to_native(source.model, name).eval()
        describe(native, tokenizer)
        del source.model  # from here on there is one model in memory
        for key, parameter in native.named_parameters():
            if not key.endswith(KEEP_FP32):
                parameter.data = parameter.data.bfloat16().float()
        scales = _round(native, BITS[dtype], group)
        progress("rounding", 1, 1)
        said = answers(native, source.asked, lambda done: progress("asking the rounded model", done, len(source.asked)))
        before, after = _pack(native, scales, BITS[dtype], group, place)
        del native
        tokenizer.save(place)
        again = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
        target = type(again).__name__
        heard = answers(again, source.asked, lambda done: progress("asking what was written", done, len(said)))
        found = difference(said, heard, source.asked)
        notes = require_equal(found, f"the {target} that was written", experts=False)
        compared = compare_tokenizer(place, tokenizer)
        size = sum(file.stat().st_size for file in place.iterdir())
    notes.append(f"{len(scales)} matrices take {after / 1e6:,.2f} MB instead of {before / 1e6:,.2f} MB in bf16")
    return Exported(out, target, size, found, difference(source.said, said, source.asked), compared, notes)


def _round(native: nn.Module, bits: int, group: int) -> dict[str, Tensor]:
    """Round the matrices of a model in place; returns their scales by name."""
    scales = {}
    for name, module in native.named_modules():
        kept = name.rpartition(".")[2] in KEPT
        if isinstance(module, nn.Linear) and not kept and module.in_features % group == 0:
            rounded = round_weight(module.weight.detach(), bits, group)
            module.weight.data, scales[name] = rounded.weight, rounded.scales
    if not scales:
        raise MoaiError(
            f"no matrix has rows of a multiple of {group} weights, which share a scale: pass a smaller --group-size "
            f"({', '.join(map(str, GROUPS))})"
        )
    return scales


def _pack(native: Any, scales: dict[str, Tensor], bits: int, group: int, place: Path) -> tuple[int, int]:
    """Write the model; returns the bytes of its rounded matrices in bf16, and as they lie there."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    linear = [name for name, module in native.named_modules() if isinstance(module, nn.Linear)]
    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="group", group_size=group)
    config = QuantizationConfig(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}, format="pack-quantized",
        ignore=[name for name in linear if name not in scales],
    )  # fmt: skip
    before = sum(2 * native.get_submodule(name).weight.numel() for name in scales)
    apply_quantization_config(native, config, run_compressed=False, show_progress=False)
    for name, of_groups in scales.items():
        native.get_submodule(name).weight_scale.data = of_groups
    compressor = ModelCompressor.from_pretrained_model(native)
    compressor.compress_model(native)
    after = sum(p.numel() * p.element_size() for name in scales for p in native.get_submodule(name).parameters())
    after -= sum(2 * of_groups.numel() for of_groups in scales.values())  # they are written in bf16
    for key, parameter in native.named_parameters():
        if parameter.is_floating_point() and not key.endswith(KEEP_FP32):
            parameter.data = parameter.data.bfloat16()
    native.config.dtype = torch.bfloat16
    native.save_pretrained(place, max_shard_size="5GB")
    compressor.update_config(place)
    return before, after


@contextmanager
def _without_bars() -> Iterator[None]:
    """compressed-tensors draws bars that nothing turns off."""
    with redirect_stderr(io.StringIO()):
        yield
