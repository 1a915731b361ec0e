"""The model is a transformers model: Auto classes, generate with every cache, beams, padding, dtypes, tied weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from moai_llm.modeling.model import MoaiForCausalLM, MoaiModel
from tests.conftest import tiny_config, tiny_model

HYBRID = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention", "sliding_attention"],
          "mlp_layer_types": ["dense", "sparse"]}  # fmt: skip
KINDS = {
    "attention": {},
    "sliding": {"layer_types": ["sliding_attention"]},
    "mamba": {"layer_types": ["linear_attention"], "mlp_layer_types": ["none"]},
    "hybrid": HYBRID,
    "learned": {"position_embedding": "learned", "norm_type": "layer_norm", "mlp_gated": False},
}


def greedy_without_cache(model, ids: torch.Tensor, steps: int) -> torch.Tensor:  # type: ignore[no-untyped-def]
    for _ in range(steps):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_greedy_generation_equals_the_uncached_model(kind: str) -> None:
    model, ids = tiny_model(**KINDS[kind]), torch.randint(1, 61, (2, 9))
    expected = greedy_without_cache(model, ids, 10)
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), expected)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_left_padded_batches_and_beams(kind: str) -> None:
    model, long, short = tiny_model(**KINDS[kind]), torch.randint(1, 61, (1, 9)), torch.randint(1, 61, (1, 3))
    ids, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    ids[0], ids[1, 6:], mask[0], mask[1, 6:] = long, short, 1, 1
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(together[:1], model.generate(long, **options))
    assert torch.equal(together[1, 6:], model.generate(short, **options)[0])
    beams = model.generate(ids, attention_mask=mask, num_beams=3, **options)
    assert torch.equal(beams[1, 6:], model.generate(short, num_beams=3, **options)[0])


def test_save_and_load_through_auto_classes(tmp_path: Path) -> None:
    model = tiny_model(**HYBRID).float()
    model.save_pretrained(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}
    ids = torch.randint(1, 61, (2, 11))
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert isinstance(loaded, MoaiForCausalLM)
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert isinstance(AutoModel.from_pretrained(tmp_path), MoaiModel)
    assert AutoConfig.from_pretrained(tmp_path).layer_types == model.config.layer_types


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights(tmp_path: Path, tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied).float()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path)
    loaded = MoaiForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    ids = torch.randint(1, 61, (1, 5))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    loaded(ids, labels=ids).loss.backward()
    assert loaded.model.embed_tokens.weight.grad is not None


def test_the_recurrence_stays_fp32_under_every_precision(tmp_path: Path) -> None:
    model = tiny_model("linear_attention").float()
    model.save_pretrained(tmp_path)
    exact = model.model.layers[0].mixer.A_log.clone()
    halves = {
        "to": MoaiForCausalLM(model.config).to(torch.bfloat16),
        "half": MoaiForCausalLM(model.config).half(),
        "from_pretrained": MoaiForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16),
    }
    for name, half in halves.items():
        mixer = half.model.layers[0].mixer
        assert {mixer.A_log.dtype, mixer.D.dtype, mixer.dt_bias.dtype} == {torch.float32}, name
        assert mixer.x_proj.weight.dtype in (torch.bfloat16, torch.float16), name
    assert torch.equal(halves["from_pretrained"].model.layers[0].mixer.A_log, exact)
    out = halves["from_pretrained"](torch.randint(1, 61, (1, 9))).logits
    assert out.dtype == torch.bfloat16 and torch.isfinite(out).all()


def test_initial_step_sizes_and_decays() -> None:
    torch.manual_seed(0)
    mixer = MoaiForCausalLM(tiny_config("linear_attention", ssm_state_size=16)).model.layers[1].mixer
    steps = torch.nn.functional.softplus(mixer.dt_bias)
    assert steps.min() >= 0.99e-3 and steps.max() <= 1.01e-1
    assert torch.allclose(mixer.A_log.exp()[3], torch.arange(1.0, 17.0))


def test_training_returns_a_loss_and_no_logits() -> None:
    model, ids = tiny_model(**HYBRID).train(), torch.randint(1, 61, (2, 12))
    output = model(ids, labels=ids)
    assert output.logits is None and output.past_key_values is None
    assert torch.isclose(output.loss.detach(), output.cross_entropy + output.aux_loss)
    plain = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert torch.isclose(output.cross_entropy, plain, rtol=1e-10)
    assert model.eval()(ids, labels=ids).logits.shape == (2, 12, 61)
    assert model(ids, logits_to_keep=1).logits.shape == (2, 1, 61)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_agree(implementation: str) -> None:
    model, ids = tiny_model(), torch.randint(1, 61, (2, 12))
    expected = model(ids).logits
    model.set_attn_implementation(implementation)
    assert (model(ids).logits - expected).abs().max() < 1e-10


def test_wrong_inputs() -> None:
    model, ids = tiny_model(), torch.randint(1, 61, (1, 5))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model.model()
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model.model(ids, inputs_embeds=torch.zeros(1, 5, 32))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["attention", "mamba", "hybrid"])
def test_layers_compile_without_graph_breaks(kind: str) -> None:
    model, ids = tiny_model(**KINDS[kind]).float().train(), torch.randint(1, 61, (2, 12))
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    model(ids, labels=ids).loss.backward()
    assert max((p.grad - expected[name]).abs().max() for name, p in model.named_parameters()) < 1e-5
