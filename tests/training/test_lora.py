"""LoRA: only adapters change, their sum with the model is saved, peft reads them, decoding does not lose them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moai_llm import recipe as recipes
from moai_llm.inference.generate import sample_text
from moai_llm.inference.load import load_model
from moai_llm.modeling.mamba import Mamba
from moai_llm.modeling.model import MoaiForCausalLM, new_cache
from moai_llm.modeling.moe import MoE
from moai_llm.optimization import LoraConfig
from moai_llm.runtime import MoaiError
from moai_llm.training import lora
from moai_llm.training.build import prepare_model
from moai_llm.training.events import read_metrics
from moai_llm.training.optim import make_optimizer
from tests.training.conftest import MakeRecipe, train
from tests.training.test_run import Stop, same, stop_at, tensors

peft = pytest.importorskip("peft")
LORA = ("lora.rank=4", "lora.experts=true", "optim.lr=1e-2")
HYBRID = "moai-hybrid-moe-0.8b-tiny"  # attention, Mamba, dense and sparse channel mixers


@pytest.fixture
def base(make_recipe: MakeRecipe) -> Path:
    return train(make_recipe("train.steps=1", out="base"), quiet=True)


def adapted(seed: int = 0, **keys: Any) -> MoaiForCausalLM:
    """A tiny model whose adapters are far from zero."""
    torch.manual_seed(seed)
    config = recipes.get_config(HYBRID)
    model = MoaiForCausalLM(config).eval()
    lora.add_adapters(model, LoraConfig(**{"rank": 3, "experts": True, **keys}))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def ids(length: int = 11) -> Tensor:
    return torch.randint(0, 100, (2, length), generator=torch.Generator().manual_seed(0))


def test_a_run_trains_adapters_alone(make_recipe: MakeRecipe, base: Path) -> None:
    recipe = make_recipe(*LORA, f"train.init_from={base}", "train.steps=25", out="tuned")
    last = train(recipe, quiet=True)
    losses = [row["loss"] for row in read_metrics(Path(recipe.train.out) / "metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.5
    states = load_file(last / "training_state" / "optimizer.safetensors")
    assert states and all(".lora_" in name for name in states)
    before, after = load_file(base / "model.safetensors"), load_file(last / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    kinds = {name.split(".", 3)[-1] for name in changed}
    frozen = ("embed_tokens", "lm_head", "norm", "router", "conv", "A_log", "dt_bias", ".D")
    assert not [name for name in changed if any(part in name for part in frozen)]
    assert {"mixer.q_proj.weight", "mixer.in_proj_x.weight", "mixer.dt_proj.weight"} <= kinds
    assert {name for name in before if name.endswith((".up_proj", ".down_proj"))} <= changed
    assert "lora" not in (last / "config.json").read_text()


def test_rank_0_is_no_lora(make_recipe: MakeRecipe) -> None:
    model = MoaiForCausalLM(recipes.get_config(HYBRID))
    prepare_model(model, make_recipe("lora.rank=0"), torch.device("cpu"))
    assert not lora.has_adapters(model) and all(p.requires_grad for p in model.parameters())
    whole, none = train(make_recipe(out="whole"), quiet=True), train(make_recipe("lora.rank=0", out="none"), quiet=True)
    assert same(whole, none) and not (none / lora.FOLDER).exists()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks transformers
def test_what_is_saved_is_the_sum_and_peft_reads_the_adapter(make_recipe: MakeRecipe, base: Path) -> None:
    recipe = make_recipe(*LORA, f"train.init_from={base}", out="tuned")
    last = train(recipe, quiet=True)
    summed = load_model(recipe.train.out, dtype="fp32")
    plain = MoaiForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    wrong = logits(plain, ids())
    by_peft = peft.PeftModel.from_pretrained(plain, last / lora.FOLDER).eval()
    torch.testing.assert_close(logits(summed.model, ids()), logits(by_peft, ids()), atol=1e-5, rtol=1e-5)
    assert (logits(summed.model, ids()) - wrong).abs().max() > 1e-2  # control: the adapter does something
    config = json.loads((last / lora.FOLDER / lora.CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(base) and config["peft_type"] == "LORA"
    assert sample_text(summed, "Document", 3, seed=0).startswith("Document")
    further = make_recipe(*LORA, f"train.init_from={last}", "train.steps=2", out="further")
    assert (train(further, quiet=True) / lora.FOLDER / lora.WEIGHTS).is_file()
    full = make_recipe(f"train.init_from={last}", "train.steps=1", "optim.lr=0", out="full")
    before, after = (load_file(path / "model.safetensors") for path in (last, train(full, quiet=True)))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("writing", ["false", "true"])
def test_a_resumed_run_is_the_same_to_the_bit(make_recipe: MakeRecipe, base: Path, writing: str) -> None:
    keys = [*LORA, f"train.init_from={base}", f"checkpoint.asynchronous={writing}"]
    whole = train(make_recipe(*keys, out="whole"), quiet=True)
    broken = make_recipe(*keys, "eval.every=1", out="broken")
    with pytest.raises(Stop):
        train(broken, hooks=[stop_at(5)], quiet=True)
    resumed = train(broken, resume=True, quiet=True)
    assert same(whole, resumed)
    left, right = (load_file(path / lora.FOLDER / lora.WEIGHTS) for path in (whole, resumed))
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    if writing == "false":
        other = train(make_recipe(*keys, "train.seed=1", out="other"), quiet=True)  # control
        assert tensors(other).keys() == tensors(whole).keys() and not same(whole, other)


def test_the_model_below_must_stay_as_it_was(make_recipe: MakeRecipe, base: Path) -> None:
    recipe = make_recipe(*LORA, f"train.init_from={base}", "train.steps=1", out="tuned")
    last = train(recipe, quiet=True)
    recipe.train.steps = 2
    weights = load_file(base / "model.safetensors")
    MoaiForCausalLM.from_pretrained(last).save_pretrained(base)
    with pytest.raises(MoaiError, match="was trained on other data, batches or weights"):
        train(recipe, resume=True, quiet=True)
    assert weights.keys() == load_file(base / "model.safetensors").keys()
    base.rename(base.with_name("elsewhere"))
    with pytest.raises(MoaiError, match="belong on train.init_from .* which is not there: put it back, or begin"):
        train(recipe, resume=True, quiet=True)


def test_the_sum_of_experts_is_the_written_out_one() -> None:
    """(E, out, in) + alpha / rank sum_r B[e, :, r] A[e, r, :], each expert by itself."""
    model = adapted(alpha=6.0)
    summed, found = lora.summed_weights(model), 0
    plain = dict(model.named_parameters())
    for name, module in model.named_modules():
        if not isinstance(module, peft.tuners.lora.layer.ParamWrapper):
            continue
        key = f"{name.replace('.base_layer', '')}.{module.parameter_name}"
        weight = next(p for n, p in plain.items() if n.replace(".base_layer", "") == key)
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        count, rank = weight.shape[0], 3
        for e in range(count):
            own_a, own_b = a[e * rank : (e + 1) * rank], torch.stack([b[:, r * count + e] for r in range(rank)], 1)
            torch.testing.assert_close(summed[key][e], weight[e] + 6.0 / 3 * own_b @ own_a)
        found += 1
    assert found == 2 * sum(isinstance(module, MoE) for module in model.modules()) > 0


def twin_of(model: MoaiForCausalLM) -> MoaiForCausalLM:
    twin = MoaiForCausalLM(model.config).eval()
    twin.load_state_dict(lora.summed_weights(model))
    return twin


def test_adapters_and_their_sum_compute_the_same_with_gradients() -> None:
    model = adapted()
    twin = twin_of(model)
    torch.testing.assert_close(logits(model, ids()), logits(twin, ids()), atol=2e-4, rtol=2e-4)
    for each in (model, twin):
        each(input_ids=ids(), labels=ids()).loss.backward()
    layer = model.model.layers[0].mixer
    projection = layer.out_proj if isinstance(layer, Mamba) else layer.o_proj
    full = twin.get_submodule("model.layers.0.mixer." + ("out_proj" if isinstance(layer, Mamba) else "o_proj"))
    b = projection.lora_B["default"].weight
    expected = projection.scaling["default"] * projection.lora_A["default"].weight @ full.weight.grad.T
    assert b.grad is not None
    torch.testing.assert_close(b.grad, expected.T, atol=2e-4, rtol=2e-3)
    assert projection.base_layer.weight.grad is None


def cached_logits(model: MoaiForCausalLM, tokens: Tensor, first: int = 4) -> Tensor:
    """The prompt at once, then one token at a time."""
    cache, found = new_cache(model.config), []
    with torch.inference_mode():
        for begin, end in [(0, first), *((i, i + 1) for i in range(first, tokens.shape[1]))]:
            piece = tokens[:, begin:end]
            found.append(model(input_ids=piece, past_key_values=cache, use_cache=True).logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("rows", [1, 2])
def test_decoding_does_not_lose_an_adapter(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    tokens = ids()[:rows]
    expected = logits(model, tokens)
    torch.testing.assert_close(cached_logits(model, tokens), expected, atol=1e-3, rtol=1e-3)
    monkeypatch.setattr("moai_llm.modeling.mamba.plain", lambda *layers: True)  # control: the op that reads weights
    assert (cached_logits(model, tokens) - expected).abs().max() > 0.05


def test_plain_projections_take_the_step_op() -> None:
    mixers = [m for m in MoaiForCausalLM(recipes.get_config(HYBRID)).modules() if isinstance(m, Mamba)]
    assert mixers and all(mixer._step_weights() for mixer in mixers)
    wrapped = [m for m in adapted(targets=["out_proj"], experts=False).modules() if isinstance(m, Mamba)]
    assert wrapped and not any(mixer._step_weights() for mixer in wrapped)


def test_recomputing_layers_gives_the_same_gradients(make_recipe: MakeRecipe, base: Path) -> None:
    found = []
    for way in ("false", "true"):
        keys = [*LORA, f"train.init_from={base}", f"train.activation_checkpointing={way}", "train.steps=3"]
        last = train(make_recipe(*keys, out=f"run-{way}"), quiet=True)
        found.append(load_file(last / lora.FOLDER / lora.WEIGHTS))
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-5) for name in found[0])
    assert any(tensor.abs().max() > 1e-3 for name, tensor in found[0].items() if "lora_B" in name)


def test_targets_are_chosen_and_groups_see_adapters(make_recipe: MakeRecipe, base: Path) -> None:
    recipe = make_recipe(
        "lora.rank=2", "lora.dropout=0.1", "lora.targets=[q_proj, 'mixer\\.in_proj']", f"train.init_from={base}",
        "optim.groups=[{match: lora_B, lr_scale: 4}]", "train.steps=2",
    )  # fmt: skip
    last = train(recipe, quiet=True)
    names = load_file(last / lora.FOLDER / lora.WEIGHTS)
    assert names and all("q_proj" in name or "in_proj_" in name for name in names)
    model = MoaiForCausalLM.from_pretrained(base)
    prepare_model(model, recipe, torch.device("cpu"))
    groups = make_optimizer(model, recipe.optim).param_groups
    assert {group["lr_scale"] for group in groups} == {1.0, 4.0}
    assert sum(len(group["params"]) for group in groups) == len(names)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["lora.rank=2"], "lora.rank=2 trains adapters .* set train.init_from"),
        (["lora.alpha=32"], "lora.rank=0 is off"),
        (["lora.rnak=2"], "lora.rnak: unknown key .did you mean 'rank'"),
        (["lora.rank=2", "lora.targets=[]", "train.init_from=x"], "lora.targets is empty"),
        (["lora.rank=2", "lora.targets=['(']", "train.init_from=x"], "not a regular expression"),
        (
            ["lora.rank=2", "lora.experts=true", "lora.dropout=0.1", "train.init_from=x"],
            "lora.dropout is not there for",
        ),
        (["lora.rank=2", "lora.experts=true", "train.compile=true", "train.init_from=x"], "train.compile=true cannot"),
    ],
)
def test_what_makes_no_sense_is_refused(keys: list[str], message: str) -> None:
    with pytest.raises(MoaiError, match=message):
        recipes.load(HYBRID, keys)


def test_what_this_model_does_not_have_is_refused() -> None:
    model = MoaiForCausalLM(recipes.get_config("moai-hybrid-1.7b-tiny"))
    with pytest.raises(MoaiError, match="no experts: leave it out"):
        lora.add_adapters(model, LoraConfig(rank=2, experts=True))
    with pytest.raises(
        MoaiError, match="'q_porj' finds no linear layer .did you mean 'q_proj'..; there are model.layers.N"
    ):
        lora.add_adapters(model, LoraConfig(rank=2, targets=["q_porj"]))
