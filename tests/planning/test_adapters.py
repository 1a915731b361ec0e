"""LoRA and QLoRA in the plan: the adapters of the model, and memory within 10% of what a step takes."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from moai_llm import recipe as recipes
from moai_llm.cli import main
from moai_llm.config import MoaiConfig
from moai_llm.modeling.model import MoaiForCausalLM
from moai_llm.ops.nf4_weight import stored_bytes
from moai_llm.planning.activations import Setting
from moai_llm.planning.adapters import count, frozen_flops
from moai_llm.planning.layouts import Layout, memory, stage
from moai_llm.recipe import Recipe
from moai_llm.training.build import prepare_model
from moai_llm.training.fitting import optimizer_bytes
from tests.planning.test_activations import CPU, SMALL, measure, measure_recipe

pytest.importorskip("peft")
QLORA = ("lora.rank=4", "lora.quantize=nf4", "train.init_from=x")
NAMES = ["moai-3b-tiny", "moai-mamba-2b-tiny", "blues-01-tiny", "moai-hybrid-moe-0.8b-tiny"]


def prepared(recipe: Recipe) -> MoaiForCausalLM:
    return prepare_model(MoaiForCausalLM(MoaiConfig(**asdict(recipe.model))), recipe, CPU)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("moai-3b-tiny", []), ("moai-mamba-2b-tiny", ["lora.double_quant=false"]),
        ("moai-hybrid-moe-0.8b-tiny", ["lora.experts=true"]),
        ("moai-hybrid-moe-0.8b-tiny", ["lora.targets=[q_proj, 'layers\\.[01]\\.mlp']", "lora.quantize=null"]),
        ("blues-01-tiny", ["lora.experts=true", "lora.targets=[]"]),
    ],
)  # fmt: skip
def test_adapters_and_weights_are_those_of_the_model(name: str, keys: list[str]) -> None:
    recipe = recipes.load(name, [*QLORA, *keys])
    model = prepared(recipe)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count(recipe.lora, recipe.model) == trained > 0
    step = stage(recipe, Layout("one device"), Setting(1, 16, False, "cpu"), 1)
    assert step.weights == pytest.approx(sum(stored_bytes(p) for p in model.parameters()), rel=2e-3)
    assert step.gradients == 4 * trained and step.optimizer == 8 * trained
    assert optimizer_bytes(recipe, recipe.model) == 8 * trained


@pytest.mark.parametrize("quantize", ["null", "nf4"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_the_peak_of_a_step(name: str, precision: str, quantize: str) -> None:
    recompute, accumulation = ("full", 2) if (precision == "fp32") == (quantize == "nf4") else ("none", 1)
    keys = [*QLORA, f"lora.quantize={quantize}", f"train.precision={precision}",
            f"train.activation_checkpointing={recompute}"]  # fmt: skip
    measured, found = measure(name, keys, 8, accumulation, 3)
    assert found.total == pytest.approx(measured, rel=0.1)


def test_control_other_ways_to_train_miss() -> None:
    keys = ["train.precision=fp32", "data.seq_len=16"]
    measured, _ = measure("moai-mamba-2b-tiny", [*QLORA, *keys], 1, 1, 1)
    for wrong in ([], ["lora.rank=4", "train.init_from=x"]):
        recipe = recipes.load("moai-mamba-2b-tiny", [*keys, *wrong])
        assert memory(recipe, Layout("one device"), Setting(1, 16, False, "cpu"), 1).total > 1.1 * measured


@pytest.mark.slow
@pytest.mark.parametrize("keys", [[], ["lora.quantize=null"], ["lora.experts=true"]])
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("name", SMALL)
def test_the_peak_of_a_step_of_a_small_model(name: str, recompute: str, keys: list[str]) -> None:
    if "lora.experts=true" in keys and name != "blues-01-tiny":
        pytest.skip("no experts")
    changes = [*SMALL[name], f"train.activation_checkpointing={recompute}", "data.seq_len=128", "train.precision=fp32"]
    recipe = replace(recipes.load(name, changes), lora=recipes.load(name, [*QLORA, *keys]).lora)
    measured, found = measure_recipe(recipe, 2, 2, 3)
    assert found.total == pytest.approx(measured, rel=0.1)


def test_operations_that_are_left_out() -> None:
    """Without the gradients of weights a step takes two passes, not three, and what the adapters take."""
    recipe = recipes.load("moai-3b", ["lora.rank=16", "train.init_from=x"])
    flops = recipe.model.flops(1024)
    weights = flops["total"] - flops["attention"]
    extra = 3 * 2.0 * count(recipe.lora, recipe.model)
    assert frozen_flops(recipe.lora, recipe.model) == pytest.approx(weights - extra)


def test_what_the_plan_says(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "moai-3b", "--hardware", "RTX-4090", *QLORA, "lora.rank=16"])
    said = capsys.readouterr().out
    assert "in adapters of rank 16 are trained, the matrices below in 4.13 bits (nf4)" in said and " fits" in said
    main(["plan", "moai-3b", "--hardware", "RTX-4090"])
    assert "too big" in capsys.readouterr().out  # control: all weights do not
