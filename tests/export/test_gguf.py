"""GGUF files: what is in them, that they are read back, and that a wrong one is found. llama.cpp itself reads them in
test_llama_cpp.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moai_llm.export import gguf as export_module
from moai_llm.export.gguf import export_gguf
from moai_llm.export.gguf_file import BOUNDS, compare
from moai_llm.export.layout import lay_out, refusals
from moai_llm.modeling.convert import prepared
from moai_llm.modeling.model import MoaiForCausalLM
from moai_llm.recipe import get_config, list_recipes
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer, load_tokenizer
from tests.conftest import tiny_config
from tests.export.conftest import IN_LLAMA_CPP, KINDS, save

WIDE = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96, "moe_intermediate_size": 32}  # whole blocks


def fields(file: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


@pytest.mark.parametrize("kind", IN_LLAMA_CPP)
def test_the_file_is_the_model(kind: str, made: Callable[..., Path], tmp_path: Path) -> None:
    done = export_gguf(made(kind), tmp_path / "model.gguf")
    assert done.target == KINDS[kind][2] and done.tokenizer[1] == 0 and done.rounding is None
    assert done.found is not None and done.found.largest < 1e-5
    header = fields(tmp_path / "model.gguf")
    assert header["general.architecture"] == done.target and header["general.file_type"] == 0
    assert header[f"{done.target}.vocab_size"] == len(header["tokenizer.ggml.tokens"])  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("kind", ["llama", "jamba"])
def test_rounding_is_within_the_type_and_said(kind: str, dtype: str, made: Callable[..., Path], tmp_path: Path) -> None:
    done = export_gguf(made(kind, **{**WIDE, "moe_intermediate_size": 96}), tmp_path / "model.gguf", dtype=dtype)
    assert done.found is None and done.rounding is not None
    limit = {"fp16": 1e-3, "bf16": 3e-3, "q8_0": 3e-3, "q4_0": 0.2}[dtype]  # a router may choose another expert
    assert 1e-9 < done.rounding.divergence < limit
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    name = {"fp16": "F16", "bf16": "BF16"}.get(dtype, dtype.upper())
    assert stored["blk.0.ffn_up.weight"].tensor_type.name == name
    assert stored["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    assert stored["token_embd.weight"].tensor_type.name == ("Q8_0" if dtype == "q4_0" else name)
    if kind == "jamba":
        assert stored["blk.1.ffn_gate_exps.weight"].tensor_type.name == name
        small = ("ssm_a", "ssm_d", "ssm_x.weight", "ssm_dt.weight", "ssm_conv1d.weight")
        assert {stored[f"blk.0.{part}"].tensor_type.name for part in small} == {"F32"}


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_what_is_stored_is_what_gguf_itself_makes(kind: str, made: Callable[..., Path], tmp_path: Path) -> None:
    folder = made(**WIDE)
    export_gguf(folder, tmp_path / "model.gguf", dtype=kind)
    weights = load_file(folder / "model.safetensors")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    number = gguf.GGMLQuantizationType[kind.upper()]
    for ours, theirs in (("mixer.q_proj", "attn_q"), ("mlp.down_proj", "ffn_down")):
        expected = gguf.quantize(weights[f"model.layers.1.{ours}.weight"].numpy(), number)
        assert np.array_equal(stored[f"blk.1.{theirs}.weight"].data, expected)


def test_rows_that_are_no_whole_blocks_stay_in_fp16(made: Callable[..., Path], tmp_path: Path) -> None:
    done = export_gguf(made(), tmp_path / "model.gguf", dtype="q8_0")  # intermediate_size 48
    assert "in F16" in done.notes[0]
    stored = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert stored["blk.0.ffn_down.weight"] == "F16" and stored["blk.0.ffn_up.weight"] == "Q8_0"


def test_the_header_says_what_the_config_says(made: Callable[..., Path], tmp_path: Path) -> None:
    export_gguf(made("qwen3, yarn"), tmp_path / "model.gguf")
    header = fields(tmp_path / "model.gguf")
    wanted = {
        "context_length": 128, "embedding_length": 32, "block_count": 2, "feed_forward_length": 48,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 8, "rope.freq_base": 1e4,
        "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32,
    }  # fmt: skip
    assert {key: header[f"qwen3.{key}"] for key in wanted} == wanted
    tokenizer = load_tokenizer(tmp_path / "made")
    assert header["tokenizer.ggml.eos_token_id"] == tokenizer.eos_id
    assert header["tokenizer.ggml.eot_token_id"] == tokenizer.special_ids["<|im_end|>"]
    assert header["tokenizer.ggml.padding_token_id"] == tokenizer.pad_id
    assert header["tokenizer.ggml.add_bos_token"] is False
    assert "generation" in str(tokenizer.chat_template)
    assert "<|im_start|>" in str(header["tokenizer.chat_template"])
    assert "generation %}" not in str(header["tokenizer.chat_template"])
    export_gguf(tmp_path / "made", tmp_path / "folder")
    assert {file.name for file in (tmp_path / "folder").iterdir()} == {"model.gguf", "Modelfile"}


def test_a_jamba_says_where_its_attention_is(made: Callable[..., Path], tmp_path: Path) -> None:
    done = export_gguf(made("jamba, no attention"), tmp_path / "model.gguf")
    header = fields(tmp_path / "model.gguf")
    assert header["jamba.block_count"] == 4 and header["jamba.attention.head_count_kv"] == [0, 0, 0, 1]
    assert any("attention layer of zeros" in note for note in done.notes)
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert not stored["blk.3.attn_output.weight"].any() and not stored["blk.3.ffn_down.weight"].any()
    assert stored["blk.0.ffn_down.weight"].any()


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe, dense too", "jamba"])
def test_a_wrong_file_is_found(kind: str, made: Callable[..., Path], tmp_path: Path) -> None:
    folder, file = made(kind), tmp_path / "model.gguf"
    export_gguf(folder, file)
    model = MoaiForCausalLM.from_pretrained(folder)
    size = load_tokenizer(folder).vocab_size
    model.resize_token_embeddings(size)
    layout = lay_out(model.config, str(KINDS[kind][2]))
    _, state = prepared(model, layout.family)
    before = {name: tensor.clone() for name, tensor in state.items()}
    compare(file, layout, state, "fp32")
    for name, tensor in state.items():  # what was read has taken the place of ours
        assert torch.allclose(tensor, before[name], atol=1e-6) and (
            name.endswith("A_log") or tensor.equal(before[name])
        )
    writing = gguf.GGUFReader(file, "r+")
    changed = next(tensor for tensor in writing.tensors if tensor.name == "blk.0.attn_norm.weight")
    changed.data[3] += 1e-3
    writing.data.flush()
    with pytest.raises(MoaiError, match="blk.0.attn_norm.weight, stored as F32, is further"):
        compare(file, layout, state, "fp32")
    layout.keys["block_count"] += 1
    with pytest.raises(MoaiError, match="block_count is"):
        compare(file, layout, state, "fp32")


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "fp32"), (float("nan"), "q8_0"), (7e4, "fp16")])
def test_values_that_a_type_cannot_hold_are_refused(
    value: float, dtype: str, made: Callable[..., Path], tmp_path: Path
) -> None:
    folder = made(**WIDE)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][1, 2] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MoaiError, match="ffn_up.weight, stored as"), np.errstate(invalid="ignore"):
        export_gguf(folder, tmp_path / "model.gguf", dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16", "BF16"])
def test_the_bounds_hold_and_are_tight(kind: str) -> None:
    """Over many blocks, with outliers: nothing is beyond the bound of its type, and half the bound would not do."""
    from moai_llm.export.gguf_file import _error

    torch.manual_seed(0)
    ours = torch.randn(512, 256) * torch.randn(512, 1).exp()
    ours[::7, ::31] *= 20
    number = gguf.GGMLQuantizationType[kind]
    stored = torch.from_numpy(gguf.dequantize(gguf.quantize(ours.numpy(), number), number).copy())
    assert BOUNDS[kind] / 2 < float(_error(ours, stored, kind).max()) <= BOUNDS[kind]


def test_only_the_last_step_may_replace_a_file(
    made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = made(), tmp_path / "model.gguf"
    export_gguf(folder, file)
    before = file.read_bytes()
    with pytest.raises(MoaiError, match="--overwrite"):
        export_gguf(folder, file)

    def wrong(model, family):  # type: ignore[no-untyped-def]
        config, state = prepared(model, family)
        return config, {name: tensor for name, tensor in state.items() if name != "model.norm.weight"}

    monkeypatch.setattr(export_module, "prepared", wrong)
    with pytest.raises(KeyError):
        export_gguf(folder, file, overwrite=True)
    assert file.read_bytes() == before and {path.name for path in tmp_path.iterdir()} == {"made", "model.gguf"}


def test_what_llama_cpp_does_not_compute_is_refused_with_reasons(tmp_path: Path, tokenizer: Tokenizer) -> None:
    reasons = {
        "qwen3": {"hidden_act": "gelu"}, "qwen3moe": {"mlp_layer_types": ["sparse"], "norm_topk_prob": False},
        "jamba": {**KINDS["jamba"][0], "head_dim": 16}, "mamba": {**KINDS["mamba"][0], "ssm_expand": 3},
        "llama": {"use_qk_norm": False, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        "hy_v3": {"mlp_layer_types": ["sparse"], "attention_bias": True},
    }  # fmt: skip
    says = {
        "qwen3": "its channel mixers use SiLU", "qwen3moe": "its routing weights are renormalised",
        "jamba": "the heads of its attention are together as wide", "mamba": "its Mamba is twice as wide",
        "llama": "its rope is default, linear, yarn, llama3, not dynamic", "hy_v3": "its projections have no biases",
    }  # fmt: skip
    for architecture, changes in reasons.items():
        found = refusals(tiny_config(**changes))
        assert says[architecture] in str(found[architecture]), architecture
    folder = save(tiny_config(position_embedding="learned"), tokenizer, tmp_path / "made")
    with pytest.raises(MoaiError, match="no architecture that computes this model") as caught:
        export_gguf(folder, tmp_path / "out")
    assert all(f"  {name}: " in str(caught.value) for name in reasons)
    with pytest.raises(MoaiError, match="llama.cpp's mamba: it has no learned positions"):
        export_gguf(folder, tmp_path / "out", architecture="mamba")
    with pytest.raises(MoaiError, match="did you mean 'q8_0'"):
        export_gguf(folder, tmp_path / "out", dtype="q8")


@pytest.mark.parametrize(
    ("rope", "reason"),
    [
        ({"attention_factor": 1.0}, "scales attention"), ({"beta_fast": 16}, "the usual beta_fast"),
        ({"truncate": False}, "the usual truncate"), ({"mscale": 1.0}, "the usual mscale"),
        ({"partial_rotary_factor": 0.5}, "turns whole heads"), ({}, None),
    ],
)  # fmt: skip
def test_yarn_leaves_only_as_llama_cpp_has_it(rope: dict[str, object], reason: str | None) -> None:
    config = tiny_config(rope_parameters={"rope_type": "yarn", "factor": 4.0, **rope})
    found = refusals(config)["qwen3"]
    assert found is None if reason is None else reason in str(found)


def test_which_presets_leave_for_llama_cpp() -> None:
    leaving = {}
    for name in list_recipes():
        reasons = refusals(get_config(name))
        leaving[name] = next((architecture for architecture, reason in reasons.items() if reason is None), None)
    assert leaving["moai-3b"] == leaving["moai-2b"] == "qwen3" and leaving["moai-mamba-pure-0.9b"] == "mamba"
    assert leaving["moai-mamba-2b"] == leaving["moai-hybrid-1.7b"] == leaving["quickstart"] == "jamba"
    assert leaving["blues-01"] is leaving["khanh-692m"] is None


def test_a_file_is_no_larger_than_its_types(made: Callable[..., Path], tmp_path: Path) -> None:
    """4.5 bits a weight for Q4_0, 8.5 for Q8_0, beside a vocabulary and small weights in fp32."""
    folder = made(**WIDE, num_hidden_layers=4)
    weights = load_file(folder / "model.safetensors")
    linear = sum(weight.numel() for name, weight in weights.items() if name.endswith("_proj.weight"))
    sizes = {d: export_gguf(folder, tmp_path / f"{d}.gguf", dtype=d).size for d in ("bf16", "q8_0", "q4_0")}
    assert sizes["bf16"] - sizes["q8_0"] > 0.9 * linear * (16 - 8.5) / 8
    assert sizes["q8_0"] - sizes["q4_0"] == linear * (8.5 - 4.5) / 8
