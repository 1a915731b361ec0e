"""Kinds of caches: the laws each keeps, the bounds it promises, and what it holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moai_llm.commands.kv_options import KINDS as OF_COMMANDS
from moai_llm.inference import Session
from moai_llm.inference.kv import KV_CACHES, KVOptions, kv_cache, make_cache
from moai_llm.inference.kv.fp8 import Fp8Layer, from_fp8, to_fp8
from moai_llm.inference.kv.mapped import MappedLayer
from moai_llm.inference.kv.offload import OffloadedLayer, chain
from moai_llm.inference.kv.quantized import QuantizedLayer, dequantize, quantize, value_group
from moai_llm.inference.kv.size import held_bytes, predicted_bytes
from moai_llm.ops.attention import attention_reference
from moai_llm.runtime import MoaiError
from tests.conftest import tiny_config, tiny_model
from tests.inference.conftest import KINDS, alone, greedy, ids_model

MODELS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "multi-query": {"num_key_value_heads": 1},
    "multi-head": {"num_key_value_heads": 4},
    "hybrid": {"num_hidden_layers": 3, "layer_types": ["linear_attention", "sliding_attention", "full_attention"]},
    "learned": {"position_embedding": "learned", "norm_type": "layer_norm"},
}
EXACT = ("dynamic", "static", "sliding", "offload", "mmap")
CUTS = [17, 7, 1, 1, 3, *[1] * 5]  # 34 tokens: chunks of odd sizes, then one at a time
LENGTH = sum(CUTS)
OPTIONS = KVOptions(length=60, window=100, group=4, residual=6, device="cuda")  # offload refuses a CPU


def text(seed: int = 0, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(0, 61, (1, length), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def through(model: Any, cache: Any, ids: torch.Tensor, cuts: list[int] | None = None) -> torch.Tensor:
    """The logits of all tokens, which go through the cache in pieces."""
    return torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split(cuts or CUTS, 1)], 1)


@torch.inference_mode()
def uncached(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits


# ---------------------------------------------------------------- laws


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("name", MODELS)
def test_exact_kinds_are_no_cache_at_all(name: str, kind: str) -> None:
    model, ids = tiny_model(**MODELS[name]), text()
    torch.testing.assert_close(through(model, make_cache(model.config, kind, None, OPTIONS), ids), uncached(model, ids))


@pytest.mark.parametrize("kind", ("dynamic", "static", "sliding"))
def test_a_model_of_sliding_layers(kind: str) -> None:
    model, ids = tiny_model("sliding_attention"), text()
    torch.testing.assert_close(through(model, make_cache(model.config, kind), ids), uncached(model, ids))


@pytest.mark.parametrize("kind", ("int8", "int4", "fp8"))
def test_control_small_numbers_show(kind: str) -> None:
    """The law above sees what these change; and it is small, as long as they do what they promise."""
    model, ids = tiny_model(), text()
    off = (through(model, make_cache(model.config, kind, None, OPTIONS), ids) - uncached(model, ids)).abs().max()
    assert 1e-4 < off < 0.5


@pytest.mark.parametrize("kind", ("dynamic", "static", "int8", "int4", "mmap"))
def test_a_session_says_the_same(kind: str) -> None:
    """Greedy, over two turns of which the second goes on from the first."""
    text_model, prompt = ids_model("hybrid"), [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    session = Session(text_model, kv_cache(text_model, kind))
    for more in ([], [7, 7]):
        prompt = prompt + more
        answer = list(session.stream(prompt, greedy(9)))
        assert answer == alone(text_model, prompt, 9)  # the residual of int8 and int4 holds them all
        prompt = prompt + answer


def test_a_session_over_dynamic_rope_begins_again_when_frequencies_change() -> None:
    text_model = ids_model("dynamic")
    session, prompt = Session(text_model, kv_cache(text_model)), [3, 1, 4, 1, 5, 9, 2, 6]
    for count in (4, 20):
        answer = list(session.stream(prompt, greedy(count)))
        assert answer == alone(text_model, prompt, count)
        prompt = [*prompt, *answer]


def test_a_long_prompt_goes_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moai_llm.inference.session.PREFILL_CHUNK", 7)
    text_model, prompt = ids_model("hybrid"), text(1)[0].tolist()
    assert list(Session(text_model, kv_cache(text_model)).stream(prompt, greedy(5))) == alone(text_model, prompt, 5)


@pytest.mark.parametrize("kind", ("dynamic", "int8", "mmap", "static"))
def test_models_of_other_classes(kind: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model, ids = LlamaForCausalLM(config).double().eval(), text()
    options = KVOptions(length=60, residual=60)  # the residual holds them all
    torch.testing.assert_close(through(model, make_cache(config, kind, None, options), ids), uncached(model, ids))


@pytest.mark.parametrize("kind", ("int4", "fp8", "offload", "mmap"))
def test_rows_can_be_picked(kind: str) -> None:
    """As beam search does: row 1 goes on as two rows."""
    model, ids = tiny_model(), torch.cat([text(0), text(1)])
    cache, other = (make_cache(model.config, kind, None, OPTIONS) for _ in range(2))
    through(model, cache, ids)
    expected = through(model, other, ids[1:].repeat(2, 1))
    cache.reorder_cache(torch.tensor([1, 1]))
    more, both = text(2, 5).repeat(2, 1), text(2, 5).repeat(2, 1)
    torch.testing.assert_close(through(model, cache, more, [5]), through(model, other, both, [5]))
    cache.reset()
    torch.testing.assert_close(through(model, cache, ids[1:].repeat(2, 1)), expected)


# ---------------------------------------------------------------- small numbers


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("bits", (8, 4))
@pytest.mark.parametrize(("shape", "dim", "group"), [((1, 2, 12, 7), 2, 4), ((2, 1, 6, 8), 3, 4), ((1, 1, 2, 5), 3, 5)])
def test_no_number_is_off_by_more_than_half_a_step(
    bits: int, shape: tuple[int, ...], dim: int, group: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(2)
    x = (torch.randn(shape, dtype=torch.float64) * 3 + 2).to(dtype)
    x[..., :1] *= 30  # a channel of large numbers, as keys have
    back = dequantize(*quantize(x, bits, dim, group), bits, dim, group, dtype)
    cut = (*shape[:dim], shape[dim] // group, group, *shape[dim + 1 :])
    groups = x.double().reshape(cut)
    spread = groups.amax(dim + 1, keepdim=True) - groups.amin(dim + 1, keepdim=True)
    stored = torch.finfo(dtype if dtype == torch.bfloat16 else torch.float32).eps
    # half a step, and what rounding minimum, step and result adds
    bound = spread / (2**bits - 1) / 2 + 2 * stored * (groups.abs().amax(dim + 1, keepdim=True) + spread)
    off = (back.double().reshape(cut) - groups).abs()
    assert (off <= bound).all()
    if dtype == torch.float64:
        assert (off > bound / 8).any()  # control: the bound is not a wide one


def test_keys_go_by_channel() -> None:
    """A channel of large keys spoils nothing but itself; by token it would spoil every channel."""
    torch.manual_seed(3)
    k = torch.randn(1, 1, 32, 8, dtype=torch.float64)
    k[..., 0] += 50
    k[..., 0] *= 10
    by_channel = dequantize(*quantize(k, 4, 2, 32), 4, 2, 32, k.dtype)
    by_token = dequantize(*quantize(k, 4, 3, 8), 4, 3, 8, k.dtype)
    off = [float((back - k)[..., 1:].abs().max()) for back in (by_channel, by_token)]
    assert off[0] < 0.25 < 1 < off[1]


def test_equal_numbers_come_back_as_they_are() -> None:
    x = torch.full((1, 1, 4, 4), -2.5)
    assert torch.equal(dequantize(*quantize(x, 4, 2, 4), 4, 2, 4, x.dtype), x)


def test_a_group_of_values_fits_the_head() -> None:
    assert value_group(32, 64) == 32 and value_group(32, 48) == 48 and value_group(32, 7) == 7


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_fp8_is_off_by_a_sixteenth_at_most(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    x = torch.randn(2, 3, 11, 7, dtype=torch.float64).exp().mul(torch.randn(2, 3, 11, 7).sign()).to(dtype)
    x[0, 0, 0] = 0
    numbers, scale = to_fp8(x)
    off = (from_fp8(numbers, scale, dtype).double() - x.double()).abs()
    slack = torch.finfo(dtype).eps * x.double().abs() if dtype == torch.bfloat16 else 1e-6 * x.double().abs()
    bound = torch.maximum(x.double().abs() / 16, scale.double() * 2**-10) + slack
    assert (off <= bound).all()
    assert (off > x.double().abs() / 40).any()  # control: it is not exact either


@pytest.mark.parametrize("bits", (8, 4))
def test_attention_is_off_by_what_the_steps_allow(bits: int) -> None:
    """A score is off by at most e = sum over channels of |q| x half a step, so a weight by a factor of exp(2 e) at
    most, and the output by that share of the largest value, and half a step of a value.
    """
    torch.manual_seed(8)
    q, k, v = (0.5 * torch.randn(1, 2, 9, 8, dtype=torch.float64) for _ in range(3))
    q = q[:, :, 8:]
    layer = QuantizedLayer(bits, group=4, residual=0)
    layer.update(k[:, :, :8], v[:, :, :8])
    off = (layer.attend(q, k[:, :, 8:], v[:, :, 8:]) - attention_reference(q, k, v, None, None, None, 8**-0.5)).abs()
    groups = k[:, :, :8].unflatten(2, (2, 4))
    step = (groups.amax(3) - groups.amin(3)) / (2**bits - 1)  # (1, 2, groups, channels)
    e = ((q.abs() * step / 2).sum(-1) * 8**-0.5).amax(-1)[..., None, None]
    of_values = (v[:, :, :8].amax(-1) - v[:, :, :8].amin(-1)).amax(-1)[..., None, None] / (2**bits - 1) / 2
    bound = ((2 * e).exp() - 1) * v.abs().amax((2, 3), keepdim=True) + of_values + 1e-6
    assert (off <= bound).all() and float((off / bound).max()) > 0.02  # control: what is stored is not exact


@pytest.mark.parametrize("residual", (0, 6))
def test_the_latest_tokens_stay_as_they_are(residual: int) -> None:
    torch.manual_seed(5)
    k, v = (torch.randn(1, 2, 23, 8, dtype=torch.float64) for _ in range(2))
    layer = QuantizedLayer(4, group=4, residual=residual)
    for piece in zip(k.split([5, 1, 1, 16], 2), v.split([5, 1, 1, 16], 2)):
        keys, values = layer.update(*piece)
    assert keys.shape == k.shape and layer.get_seq_length() == 23
    keys, values = (torch.cat(parts, 2) for parts in zip(*layer.blocks()))
    exact = (keys == k).all(-1).all(1)[0]
    assert exact[23 - residual :].all() and not exact[: (23 - residual) // 4 * 4].any()
    assert ((values - v).abs() < 0.4).all()


# ---------------------------------------------------------------- where they lie


def test_a_file_of_keys_has_no_name_and_gives_its_pages_back(tmp_path: Path) -> None:
    torch.manual_seed(6)
    layer, own = MappedLayer(tmp_path), len(os.listdir("/proc/self/fd"))
    k, v = (torch.randn(1, 2, 700, 64) for _ in range(2))
    for piece in zip(k.split(350, 2), v.split(350, 2)):
        layer.attend(piece[0], *piece)
    keys, values = (torch.cat(parts, 2) for parts in zip(*layer.blocks()))
    assert torch.equal(keys, k) and torch.equal(values, v)
    assert not list(tmp_path.iterdir())
    assert len(os.listdir("/proc/self/fd")) == own + 2  # ours, and the one mmap keeps
    assert _resident(tmp_path) <= 64  # a fault of the last page may have brought those behind it
    assert layer._data is not None and float(layer._data.sum()) == pytest.approx(float(k.sum() + v.sum()), abs=1e-1)
    assert _resident(tmp_path) > 500  # control: reading brings them in
    del layer
    assert len(os.listdir("/proc/self/fd")) == own


def _resident(directory: Path) -> int:
    """Kilobytes of the files in a directory that are in the memory of this process."""
    lines, inside, total = Path("/proc/self/smaps").read_text().splitlines(), False, 0
    for line in lines:
        if "-" in line.split(" ")[0] and not line.split(" ")[0].endswith(":"):
            inside = str(directory) in line
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    x = torch.zeros(1, 1, 3, 4)
    with pytest.raises(MoaiError, match="no room for 8,192 bytes of keys and values: No space left"):
        MappedLayer().attend(x, x, x)


def test_offloading_brings_the_next_layer() -> None:
    layers = [OffloadedLayer() for _ in range(3)]
    chain(layers)
    x = torch.randn(1, 1, 300, 4)
    for layer in layers:
        layer.update(x, x)
    assert [layer._brought is not None for layer in layers] == [True, False, False]  # the first, for the next token
    layers[0].update(x[:, :, :1], x[:, :, :1])
    assert [layer._brought is not None for layer in layers] == [False, True, False]
    keys, _ = layers[1].update(x[:, :, :1], x[:, :, :1])
    assert torch.equal(keys, torch.cat([x, x[:, :, :1]], 2))


# ---------------------------------------------------------------- bytes


@pytest.mark.parametrize("kind", KV_CACHES)
@pytest.mark.parametrize("name", ("grouped", "hybrid"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
def test_bytes_are_as_predicted(name: str, kind: str, dtype: torch.dtype) -> None:
    model = tiny_model(**MODELS[name]).float().to(dtype)
    cache = make_cache(model.config, kind, None, OPTIONS)
    through(model, cache, text())
    size = torch.finfo(dtype).bits // 8
    predicted = predicted_bytes(model.config, kind, LENGTH, size, length=60, window=100, group=4, residual=6)
    assert held_bytes(cache) == predicted


def test_four_bits_are_less_than_a_third_of_bf16() -> None:
    config = tiny_config(head_dim=64, max_position_embeddings=8192)
    sizes = {kind: predicted_bytes(config, kind, 8192, 2) for kind in ("dynamic", "int8", "int4", "fp8")}
    assert sizes["int4"] < sizes["dynamic"] / 3 < sizes["fp8"] < sizes["int8"] < sizes["dynamic"] / 1.7


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("changes", "kind", "keep", "options", "says"),
    [
        ({"mixer": "linear_attention"}, "int4", None, {}, "keeps no keys and values. Its Mamba layers hold a state"),
        ({"mixer": "linear_attention"}, "static", None, {}, "keeps no keys and values"),
        ({"mixer": "sliding_attention"}, "mmap", None, {}, "for layers of full attention, and this model has none"),
        ({"mixer": "sliding_attention"}, "dynamic", "window:4", {}, "this model has no such layer"),
        ({}, "int5", None, {}, "'int5' is not one of dynamic, .*did you mean"),
        ({}, "sliding", None, {}, "add --kv-window N"),
        ({}, "offload", None, {}, "this model is there already"),
        ({}, "int8", "window:4", {}, "it does not go with int8: choose one"),
        ({}, "dynamic", "windows:4", {}, "'windows:4' is not one of window:N"),
        ({}, "dynamic", "sinks:0+window:4", {}, "must be at least 1"),
        ({}, "dynamic", "sinks:4", {}, "is not one of"),
        ({}, "int8", None, {"group": 3}, "must be even"),
        ({}, "int8", None, {"residual": -1}, "must be at least 0"),
        ({}, "mmap", None, {"directory": Path("/nowhere")}, "no such directory"),
        (KINDS["dynamic"], "dynamic", "sinks:1+window:4", {}, "that of dynamic RoPE depends on the length"),
    ],
)
def test_mistakes_are_told(
    changes: dict[str, Any], kind: str, keep: str | None, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(MoaiError, match=says):
        make_cache(tiny_config(**changes), kind, keep, KVOptions(**options))


def test_other_classes_cannot_forget() -> None:
    for kind, keep in (("dynamic", "window:4"), ("sliding", None)):
        with pytest.raises(MoaiError, match="a model of type llama computes its own"):
            make_cache(LlamaConfig(), kind, keep, KVOptions(window=4))


def test_a_static_cache_says_when_it_is_full() -> None:
    model = tiny_model(**MODELS["hybrid"])
    cache = make_cache(model.config, "static", None, KVOptions(length=20))
    with pytest.raises(MoaiError, match="has room for 20 tokens, 24 do not fit"):
        through(model, cache, text())


def test_padded_rows_are_refused() -> None:
    model, ids = tiny_model(), text()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="rows without padding"):
        model(ids, attention_mask=mask, past_key_values=make_cache(model.config, "fp8"))


def test_commands_know_all_kinds() -> None:
    assert tuple(KV_CACHES) == OF_COMMANDS


def test_no_two_layers_share_a_tensor() -> None:
    cache = make_cache(tiny_config(), "fp8")
    assert cache.layers[0] is not cache.layers[1] and isinstance(cache.layers[0], Fp8Layer)
