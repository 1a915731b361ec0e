"""Exports with packed matrices: what transformers reads is the rounded model, and rounding is to the nearest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from moai_llm.export import compressed
from moai_llm.export.compressed import export_compressed, round_weight
from moai_llm.runtime import MoaiError

pytest.importorskip("compressed_tensors")


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 64), (4, 128)])
def test_rounding_is_to_the_nearest(bits: int, group: int) -> None:
    weight = torch.randn(5, 3 * 128, generator=torch.Generator().manual_seed(0))
    rounded = round_weight(weight, bits, group)
    half = 2 ** (bits - 1)
    assert rounded.codes.min() >= -half and rounded.codes.max() <= half - 1 and rounded.scales.shape[1] == 384 // group
    for row in range(5):
        for start in range(0, 384, group):
            part, scale = weight[row, start : start + group], rounded.scales[row, start // group]
            allowed = scale * torch.arange(-half, half)
            nearest = allowed[(part[:, None] - allowed).abs().argmin(1)]
            assert torch.equal(rounded.weight[row, start : start + group], nearest)
    assert torch.equal(round_weight(torch.zeros(2, 32), 4, 32).weight, torch.zeros(2, 32))


@pytest.mark.parametrize(("kind", "dtype"), [("qwen3", "int4"), ("llama", "int8"), ("jamba, no attention", "int4")])
def test_transformers_reads_the_rounded_model(kind: str, dtype: str, made: Callable[..., Path], tmp_path: Path) -> None:
    found = export_compressed(made(kind), tmp_path / "out", dtype=dtype, group=32)
    assert found.found is not None and found.found.largest <= found.found.allowed
    assert found.rounding is not None and found.rounding.largest > 10 * found.found.allowed  # control: it is rounded
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert written["format"] == "pack-quantized" and written["quant_method"] == "compressed-tensors"
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        packed = {key for key in file.keys() if key.endswith("weight_packed")}  # noqa: SIM118
        for key in packed:
            shape = file.get_tensor(key.replace("_packed", "_shape")).tolist()
            assert file.get_tensor(key).numel() * 4 == shape[0] * shape[1] * compressed.BITS[dtype] // 8
            assert file.get_tensor(key.replace("_packed", "_scale")).dtype == torch.bfloat16
    assert packed and not [key for key in packed if any(part in key for part in ("lm_head", "embed", "dt_", "x_proj"))]
    assert any("instead of" in note for note in found.notes)


def test_a_wrong_scale_is_found_and_nothing_kept(
    made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = compressed._pack

    def wrong(native, scales, *rest):  # type: ignore[no-untyped-def]
        name = next(iter(scales))
        return real(native, {**scales, name: 2 * scales[name]}, *rest)

    monkeypatch.setattr(compressed, "_pack", wrong)
    with pytest.raises(MoaiError, match="does not compute what the model computes"):
        export_compressed(made(), tmp_path / "out", group=32)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_is_refused(made: Callable[..., Path], tmp_path: Path) -> None:
    model = made()
    for keys, message in (
        ({"dtype": "q4_0"}, "written in int4 or int8"),
        ({"group": 48}, "groups of 32, 64, 128"),
        ({"group": 128}, "no matrix has rows of a multiple of 128 .* smaller --group-size"),
    ):
        with pytest.raises(MoaiError, match=message):
            export_compressed(model, tmp_path / "out", **keys)  # type: ignore[arg-type]
        assert not (tmp_path / "out").exists()


def test_experts_are_refused(made: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(MoaiError, match="does not read a packed model whose experts are stacked: use --format gguf"):
        export_compressed(made("qwen3_moe"), tmp_path / "out", group=32)
