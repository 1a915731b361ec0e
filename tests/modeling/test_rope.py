"""RoPE: every scaling rule against transformers, precision far out, and one scale for the life of a sequence."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import DynamicCache
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from moai_llm.modeling.rope import RotaryEmbedding
from moai_llm.ops.rotary import apply_rotary, rotary_table, rotate
from tests.conftest import tiny_config, tiny_model

LONG = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}
RULES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 16, **LONG},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 16},
}  # fmt: skip


def config(rule: str, length: int = 64):  # type: ignore[no-untyped-def]
    maximum = 16 if rule == "dynamic" else length
    return tiny_config(rope_parameters={**RULES[rule], "rope_theta": 1e4}, max_position_embeddings=maximum)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("length", [12, 64])
def test_angles_equal_transformers(rule: str, length: int) -> None:
    positions = torch.arange(length)[None]
    cos, sin = RotaryEmbedding(config(rule))(positions, length)
    theirs_cos, theirs_sin = Qwen3RotaryEmbedding(config(rule))(torch.zeros(1), positions)
    assert (cos - theirs_cos[..., :4]).abs().max() < 1e-5
    assert (sin - theirs_sin[..., :4]).abs().max() < 1e-5


def test_ntk_is_a_larger_base() -> None:
    c = tiny_config(rope_parameters={"rope_type": "ntk", "rope_theta": 1e4, "factor": 4.0})
    assert c.rope_parameters == {"rope_type": "default", "rope_theta": pytest.approx(1e4 * 4 ** (8 / 6))}


def test_the_documents_yarn_keys_are_translated() -> None:
    c = tiny_config(
        max_position_embeddings=131072,
        rope_scaling={
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
            "alpha": 2.0,
            "beta": 30.0,
        },
    )
    assert c.rope_parameters["rope_type"] == "yarn"
    assert c.rope_parameters["beta_slow"] == 2.0 and c.rope_parameters["beta_fast"] == 30.0
    assert not {"alpha", "beta", "type"} & set(c.rope_parameters)


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="'yarnn' is not one of .*did you mean 'yarn'"):
        RotaryEmbedding(tiny_config(rope_parameters={"rope_type": "yarnn"}))


def test_angles_are_exact_far_out() -> None:
    frequency = torch.tensor([0.731])
    for position in (8191, 131071, 1048575):
        cos, sin = rotary_table(torch.tensor([[position]]), frequency)
        angle = position * float(frequency)
        assert abs(float(cos) - math.cos(angle)) < 3e-7 and abs(float(sin) - math.sin(angle)) < 3e-7
        in_fp32 = torch.cos(torch.tensor(float(position)) * frequency)
        if position > 100_000:  # control: the usual product in fp32 is visibly off
            assert abs(float(in_fp32) - math.cos(angle)) > 1e-4


def test_rotation_keeps_lengths_and_depends_on_distance_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    frequencies = RotaryEmbedding(config("default"))._fixed[0]

    def dot(m: int, n: int) -> float:
        a = apply_rotary(q, *rotary_table(torch.tensor([[m]]), frequencies))
        b = apply_rotary(k, *rotary_table(torch.tensor([[n]]), frequencies))
        assert abs(float(a.norm()) - float(q.norm())) < 1e-5
        return float((a * b).sum())

    assert abs(dot(3, 1) - dot(103, 101)) < 1e-4
    assert abs(dot(3, 1) - dot(3, 2)) > 1e-3


def test_partial_rotation_leaves_the_rest() -> None:
    x = torch.randn(1, 2, 3, 8)
    y = apply_rotary(x, *rotary_table(torch.arange(3)[None], torch.tensor([1.0, 0.1])))
    assert torch.equal(y[..., 4:], x[..., 4:]) and not torch.equal(y[..., :4], x[..., :4])


@pytest.mark.parametrize("rule", ["dynamic", "longrope"])
@torch.no_grad()
def test_cached_equals_uncached_past_the_original_length(rule: str) -> None:
    torch.manual_seed(0)
    model = tiny_model(
        rope_parameters={**RULES[rule], "rope_theta": 1e4}, max_position_embeddings=config(rule).max_position_embeddings
    )
    ids = torch.randint(1, 61, (1, 40))
    whole = model(ids, use_cache=False, rope_length=40).logits
    cache = DynamicCache(config=model.config)
    pieces = [
        model(ids[:, i : i + 8], past_key_values=cache, use_cache=True, rope_length=40).logits for i in range(0, 40, 8)
    ]
    assert (torch.cat(pieces, 1) - whole).abs().max() < 1e-9
    cache = DynamicCache(config=model.config)  # control: choosing anew at every call
    pieces = [model(ids[:, i : i + 8], past_key_values=cache, use_cache=True).logits for i in range(0, 40, 8)]
    assert (torch.cat(pieces, 1) - whole).abs().max() > 1e-3
    generated = model.generate(ids[:, :10], max_new_tokens=30, do_sample=False, pad_token_id=0)
    again = ids[:, :10]
    for _ in range(30):
        again = torch.cat([again, model(again, use_cache=False, rope_length=40).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, again)


@pytest.mark.parametrize("rotated", [2, 6, 10])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_rotation_in_place_is_the_definition(rotated: int, dtype: torch.dtype) -> None:
    """Outputs and gradients, of all or a part of the dimensions, from a transposed tensor."""
    torch.manual_seed(0)
    x = torch.randn(2, 7, 3, 10).to(dtype).transpose(1, 2).requires_grad_()
    cos, sin = rotary_table(torch.randint(0, 50, (2, 7)), torch.rand(rotated // 2))
    grad = torch.randn(2, 3, 7, 10).to(dtype)
    got, truth = apply_rotary(x, cos, sin), rotate(x, cos[:, None], sin[:, None])
    tolerance = 1e-12 if dtype == torch.float64 else 5e-2
    for a, b in zip((got, torch.autograd.grad(got, x, grad)[0]), (truth, torch.autograd.grad(truth, x, grad)[0])):
        assert a.dtype == b.dtype == dtype and (a - b).abs().max() < tolerance
