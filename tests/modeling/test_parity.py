"""Our models against the transformers classes they can become: same logits, both directions, in fp32 on random
weights.
"""

from __future__ import annotations

import pytest
import torch
import transformers

from moai_llm.modeling.convert import FAMILIES, from_native, native_family, to_native
from moai_llm.recipe import get_config, list_recipes
from tests.conftest import tiny_config, tiny_model

SMALL = {"vocab_size": 97, "hidden_size": 60, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def qwen3(**changes):  # type: ignore[no-untyped-def]
    config = transformers.Qwen3Config(**SMALL, **HEADS, intermediate_size=128, head_dim=16, **changes)
    return transformers.Qwen3ForCausalLM(config)


def qwen3_moe():  # type: ignore[no-untyped-def]
    config = transformers.Qwen3MoeConfig(
        **{**SMALL, "num_hidden_layers": 4}, **HEADS, intermediate_size=128, moe_intermediate_size=32, head_dim=16,
        num_experts=6, num_experts_per_tok=2, decoder_sparse_step=2, norm_topk_prob=True,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config)


def mamba():  # type: ignore[no-untyped-def]
    return transformers.MambaForCausalLM(transformers.MambaConfig(**SMALL, state_size=7))


def jamba():  # type: ignore[no-untyped-def]
    config = transformers.JambaConfig(
        **{**SMALL, "hidden_size": 64, "num_hidden_layers": 4}, **HEADS, intermediate_size=96, num_experts=4,
        attn_layer_period=4, attn_layer_offset=2, expert_layer_period=2, expert_layer_offset=1,
    )  # fmt: skip
    return transformers.JambaForCausalLM(config)


def attention_only(kind: str, **changes):  # type: ignore[no-untyped-def]
    config = getattr(transformers, f"{kind}Config")(
        **{**SMALL, "hidden_size": 64}, **HEADS, intermediate_size=128, **changes
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # which begin at zero
            torch.nn.init.normal_(parameter)
    return model


LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
NATIVE = {
    "qwen3": qwen3,
    "qwen3 with biases, tied": lambda: qwen3(attention_bias=True, tie_word_embeddings=True),
    "qwen3 with a window": lambda: qwen3(use_sliding_window=True, sliding_window=7, max_window_layers=1),
    "qwen3 with yarn": lambda: qwen3(
        rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
        max_position_embeddings=64,
    ),
    "qwen3_moe": qwen3_moe,
    "llama with biases, tied, and Llama 3's rope": lambda: attention_only(
        "Llama", attention_bias=True, tie_word_embeddings=True, rope_parameters=LLAMA3, head_dim=16
    ),
    "mistral": lambda: attention_only("Mistral", sliding_window=7),
    "mixtral": lambda: attention_only("Mixtral", num_local_experts=5, num_experts_per_tok=2),
    "mixtral with a window": lambda: attention_only("Mixtral", num_local_experts=5, sliding_window=7),
    "mamba": mamba,
    "jamba": jamba,
}
# these arrive as models that leave as something else
ARRIVING = {
    "qwen2": (lambda: attention_only("Qwen2"), "llama"),
    "mistral without a window": (lambda: attention_only("Mistral", sliding_window=None), "llama"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NATIVE)
def test_logits_are_equal_in_both_directions(name: str) -> None:
    torch.manual_seed(0)
    native = NATIVE[name]().eval()
    with torch.no_grad():
        for parameter in native.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        ids = torch.randint(0, 97, (2, 23))
        ours = from_native(native)
        expected = native(ids).logits
        assert (ours(ids).logits - expected).abs().max() < 5e-6
        again = to_native(ours)
        assert type(again) is type(native)
        assert torch.equal(again(ids).logits, expected)
        broken = from_native(native)  # control: one wrong weight shows
        broken.model.layers[0].mixer_norm.weight.mul_(1.1)
        assert (broken(ids).logits - expected).abs().max() > 1e-4
    assert ours.config.parameters()["total"] == sum(p.numel() for p in ours.parameters())


@pytest.mark.parametrize("name", ARRIVING)
def test_some_arrive_as_one_family_and_leave_as_another(name: str) -> None:
    torch.manual_seed(0)
    make, leaves = ARRIVING[name]
    native = make().eval()
    ids = torch.randint(0, 97, (2, 23))
    with torch.no_grad():
        expected, ours = native(ids).logits, from_native(native)
        assert (ours(ids).logits - expected).abs().max() < 5e-6
        assert native_family(ours.config) == leaves
        assert (to_native(ours)(ids).logits - expected).abs().max() < 5e-6


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mlps", [["dense"], ["dense", "sparse"], ["sparse", "dense"]])
def test_mamba_with_channel_mixers_leaves_as_jamba_with_a_layer_that_does_nothing(mlps: list[str]) -> None:
    changes = {"layer_types": ["linear_attention"], "mlp_layer_types": mlps, "norm_topk_prob": False,
               "moe_intermediate_size": 48}  # fmt: skip
    model = tiny_model(num_hidden_layers=3, **changes).float()
    native = to_native(model, "jamba")
    ids = torch.randint(0, 61, (1, 19))
    assert native.config.num_hidden_layers == 4 and native.config.layer_types[-1] == "full_attention"
    with torch.no_grad():
        assert (native(ids).logits - model(ids).logits).abs().max() < 1e-5
        both = [m.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0) for m in (model, native)]
        assert torch.equal(*both)  # through transformers' cache, which a Jamba without attention breaks
        added = native.model.layers[3]
        added.feed_forward = type(native.model.layers[0].feed_forward)(native.config)  # control: not zero
        for parameter in added.feed_forward.parameters():
            parameter.normal_()
        assert (native(ids).logits - model(ids).logits).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore")
def test_a_trained_hybrid_of_ours_leaves_as_jamba() -> None:
    changes = {"layer_types": ["linear_attention", "full_attention"], "mlp_layer_types": ["dense", "sparse"],
               "position_embedding": "none", "use_qk_norm": False, "norm_topk_prob": False,
               "moe_intermediate_size": 48}  # fmt: skip
    model = tiny_model(**changes).float()
    ids = torch.randint(0, 61, (1, 19))
    with torch.no_grad():
        assert (to_native(model)(ids).logits - model(ids).logits).abs().max() < 1e-5


def test_what_has_no_native_class_is_refused_with_reasons() -> None:
    with pytest.raises(ValueError) as caught:
        native_family(tiny_config("linear_attention", "dense", layer_types=["linear_attention", "full_attention"]))
    assert all(f"{family}: " in str(caught.value) for family in FAMILIES)
    with pytest.raises(ValueError, match="jamba: its attention has no positions"):
        to_native(tiny_model(layer_types=["linear_attention", "full_attention"]), "jamba")
    with pytest.raises(ValueError, match="did you mean 'qwen3'"):
        native_family(tiny_config(), "qwen")
    with pytest.raises(ValueError, match="OlmoForCausalLM cannot be imported"):
        from_native(transformers.OlmoForCausalLM(transformers.OlmoConfig(**SMALL, **HEADS, intermediate_size=32)))
    with pytest.raises(ValueError, match="mlp_bias"):
        from_native(attention_only("Llama", mlp_bias=True))


def test_which_presets_leave_natively() -> None:
    leaving = {}
    for name in list_recipes():
        try:
            leaving[name] = native_family(get_config(name))
        except ValueError:
            leaving[name] = None
    assert leaving["moai-3b"] == leaving["moai-2b"] == "qwen3"
    assert leaving["moai-mamba-pure-0.9b"] == "mamba"
    assert leaving["moai-hybrid-1.7b"] == leaving["moai-hybrid-moe-0.8b"] == leaving["quickstart"] == "jamba"
    assert leaving["moai-mamba-2b"] == leaving["moai-mamba-16b-tiny"] == "jamba"  # with one layer of zeros
    assert leaving["blues-01"] is leaving["khanh-692m"] is None
