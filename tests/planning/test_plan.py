"""Layouts, the choice of a micro-batch, days and cost, and the older documents' recipes beside their promises."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

from moai_llm import recipe as recipes
from moai_llm.cli import main
from moai_llm.modeling.model import MoaiForCausalLM
from moai_llm.planning.hardware import ACCELERATORS, GIB, find_device, parse_hardware
from moai_llm.planning.inference import cache_bytes
from moai_llm.planning.layouts import OPTIMIZER_BYTES, Layout, layouts, memory
from moai_llm.planning.plan import Options, make_plan, optimizer_names, setting
from moai_llm.planning.scenarios import SCENARIOS
from moai_llm.runtime import MoaiError
from moai_llm.training.optim import make_optimizer
from tests.conftest import ROOT, tiny_model

A100, EIGHT = parse_hardware("A100-80GB"), parse_hardware("8xA100-80GB")


@pytest.mark.parametrize(
    ("text", "count", "name"),
    [
        ("8xA100-80GB", 8, "A100-80GB"), ("A100-40GB", 1, "A100-40GB"), ("4 x RTX 4090", 4, "RTX-4090"),
        ("h200", 1, "H200"), ("2XH100-SXM", 2, "H100-SXM"), ("rtx-5090", 1, "RTX-5090"),
    ],
)  # fmt: skip
def test_hardware_is_read(text: str, count: int, name: str) -> None:
    hardware = parse_hardware(text)
    assert (hardware.count, hardware.device) == (count, ACCELERATORS[name])


def test_hardware_by_its_own_numbers() -> None:
    hardware = parse_hardware("3xMI300X", tflops=1307, memory=192)
    assert (hardware.count, hardware.device.tflops, hardware.device.memory) == (3, 1307, 192)
    assert parse_hardware("mine", memory=10).device.tflops is None  # nothing is guessed
    assert parse_hardware("L4", tflops=100).device == replace(ACCELERATORS["L4"], tflops=100)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("H100", "may be H100-SXM or H100-PCIe"), ("8xA100", "may be A100-40GB or A100-80GB"),
        ("H201", r"did you mean 'H200'.*--peak-tflops"), ("0xL4", "at least one"),
    ],
)  # fmt: skip
def test_unknown_hardware_says_what_to_do(text: str, message: str) -> None:
    with pytest.raises(MoaiError, match=message):
        parse_hardware(text)


@pytest.mark.parametrize(
    ("reported", "gib", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", 79.3, "A100-80GB"), ("NVIDIA A100-PCIE-40GB", 39.6, "A100-40GB"),
        ("NVIDIA H100 80GB HBM3", 79.1, "H100-SXM"), ("NVIDIA H100 PCIe", 79.1, "H100-PCIe"),
        ("NVIDIA H200", 139.8, "H200"), ("NVIDIA GeForce RTX 4090", 23.6, "RTX-4090"), ("NVIDIA L40S", 44.4, "L40S"),
        ("NVIDIA L4", 22.2, "L4"), ("Tesla T4", 14.7, "T4"), ("Tesla V100-SXM2-32GB", 31.7, "V100-32GB"),
        ("Quadro P5000", 16.0, None),
    ],
)  # fmt: skip
def test_the_name_of_a_driver(reported: str, gib: float, name: str | None) -> None:
    device = find_device(reported, gib)
    assert (device and device.name) == name


def test_every_optimizer_has_its_bytes() -> None:
    assert set(optimizer_names()) <= set(OPTIMIZER_BYTES)


@pytest.mark.parametrize("name", [name for name in optimizer_names() if "8bit" not in name and "paged" not in name])
def test_states_are_as_large_as_they_are_said_to_be(name: str) -> None:
    """Counted after a step; counters of steps and the factors of Adafactor are beside the point."""
    model = tiny_model(hidden_size=128, head_dim=32, intermediate_size=256, vocab_size=512).float().train()
    recipe = recipes.load("moai-3b-tiny", [f"optim.name={name}"])
    optimizer = make_optimizer(model, recipe.optim)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    measured = sum(t.numel() * t.element_size() for t in states)
    layers = sum(p.numel() for p in model.model.layers.parameters())
    of_matrices, of_others = OPTIMIZER_BYTES[name]
    predicted = of_matrices * layers + of_others * (sum(p.numel() for p in model.parameters()) - layers)
    total = sum(p.numel() for p in model.parameters())
    assert measured / total == pytest.approx(predicted / total, abs=0.05)


def test_layouts_share_what_they_say() -> None:
    recipe = recipes.load("moai-3b")
    at = {layout.name: memory(recipe, layout, setting(recipe, EIGHT, 1, Options()), 4) for layout in
          layouts(recipe.model, 8)}  # fmt: skip
    states, total = 4.0 * 3_001_401_088, recipe.model.parameters()["total"]
    assert at["ddp"].weights == states and at["ddp"].optimizer == 8.0 * total
    assert at["zero-1"].optimizer == total and at["zero-1"].gradients == at["ddp"].gradients
    assert at["zero-2"].gradients == pytest.approx(states / 8)
    assert states / 8 < at["zero-3"].weights < states / 3  # its eighth, and the layers at hand
    assert at["tensor 4"].weights == pytest.approx(states / 4, rel=0.01)
    assert at["pipeline 8"].weights < states / 3  # the embedding and the head are a quarter of it
    sizes = [at[name].total for name in ("ddp", "zero-1", "zero-2", "zero-3")]
    assert sizes == sorted(sizes, reverse=True)


def test_pipelines_hold_every_parameter_once() -> None:
    """The stages of an untied model together have its weights; a tied one has its embedding at both ends."""
    from moai_llm.planning.layouts import stage

    for name, twice in (("moai-mamba-2b", 0), ("moai-3b", 122_100 * 3840)):
        recipe = recipes.load(name)
        layout = Layout("pipeline 4", pipeline=4)
        steps = [stage(recipe, layout, setting(recipe, EIGHT, 1, Options()), 8, i) for i in range(4)]
        assert [step.in_flight for step in steps] == [4, 3, 2, 1]
        count = recipe.model.parameters()["total"]
        assert sum(step.weights for step in steps) == 4 * (count + twice)


def test_experts_are_shared_out() -> None:
    recipe = recipes.load("blues-01")
    alone, shared = (
        memory(recipe, Layout("", 8, expert=e), setting(recipe, EIGHT, 1, Options()), 2).weights for e in (1, 8)
    )
    experts = 6 * 8 * 2 * 768 * 3072  # layers, experts, matrices
    assert alone - shared == pytest.approx(4 * experts * 7 / 8, rel=0.01)
    assert not [layout for layout in layouts(recipes.load("moai-3b").model, 8) if layout.expert > 1]


def test_only_one_device_runs_in_this_version() -> None:
    assert [layout.runs_here for layout in layouts(recipes.load("moai-3b").model, 1)] == [True]
    assert not any(layout.runs_here for layout in layouts(recipes.load("moai-3b").model, 8))
    assert any("one device" in note for note in make_plan(recipes.load("moai-3b"), EIGHT, Options()).notes)


def test_the_micro_batch_is_the_largest_that_fits() -> None:
    recipe = recipes.load("moai-2b")
    plan = make_plan(recipe, A100, Options())
    best, limit = plan.best, 80 * GIB * 0.9
    assert best is not None and best.fits and best.memory.total <= limit
    rows = recipe.train.batch_tokens // recipe.data.seq_len
    assert best.micro_batch * best.accumulation == rows
    larger = next(n for n in range(best.micro_batch + 1, rows + 1) if rows % n == 0)
    above = memory(recipe, Layout("one device"), setting(recipe, A100, larger, Options()), rows // larger)
    assert above.total > limit
    asked = make_plan(recipe, A100, Options(micro_batch=3)).fits[0]
    assert (asked.micro_batch, asked.accumulation) == (3, -(-rows // 3))
    fewer = make_plan(recipe, A100, Options(reserve=0.3)).best
    assert fewer is not None and fewer.micro_batch < best.micro_batch


def test_a_step_without_a_row_for_every_device() -> None:
    plan = make_plan(recipes.load("moai-3b-tiny", ["train.batch_tokens=128"]), EIGHT, Options())  # two rows
    assert [fit.layout.name for fit in plan.fits] == ["pipeline 4"]


def test_what_to_change_when_nothing_fits() -> None:
    """Each line is true: the plan of the changed recipe says the same."""
    small = parse_hardware("one", memory=8)
    recipe = recipes.load("khanh-692m", ["data.seq_len=2048", "train.precision=bf16"])
    plan = make_plan(recipe, small, Options())
    assert plan.best is None
    first = plan.advice[0]
    assert first.overrides == ("train.activation_checkpointing=selective",) and not first.fits
    changed = recipes.load("khanh-692m", ["data.seq_len=2048", "train.precision=bf16", *first.overrides])
    assert make_plan(changed, small, Options()).fits[0].memory.total == first.total
    huge = make_plan(recipes.load("moai-mamba-16b"), A100, Options())
    assert "--hardware" in huge.advice[-1].overrides[0] and huge.advice[-1].fits
    assert not any("seq_len" in item for advice in huge.advice for item in advice.overrides)  # could not help


def test_a_shorter_row_helps_where_activations_are_what_is_too_big() -> None:
    recipe = recipes.load("moai-3b-tiny", ["data.seq_len=8192", "train.batch_tokens=8192", "model.vocab_size=64"])
    plan = make_plan(recipe, parse_hardware("small", memory=0.05), Options())
    *before, last = plan.advice
    assert last.fits and any(item.startswith("data.seq_len=") for item in last.overrides)
    assert sum(item.startswith("data.seq_len=") for item in last.overrides) == 1
    assert [advice.overrides for advice in before[:2]] == [
        ("train.activation_checkpointing=selective",), ("train.activation_checkpointing=full",)
    ]  # fmt: skip


def test_days_and_cost() -> None:
    plan = make_plan(recipes.load("moai-3b"), EIGHT, Options(tokens=60e9, mfu=0.5, price=2.0))
    assert plan.total_flops is not None and plan.seconds is not None and plan.cost is not None
    assert plan.seconds == pytest.approx(plan.total_flops / (8 * 312e12 * 0.5))
    assert plan.cost == pytest.approx(plan.seconds / 3600 * 8 * 2.0)
    assert plan.needed_mfu(plan.seconds / 86400) == pytest.approx(0.5)
    assert plan.recomputed == plan.flops["layers"]  # the preset recomputes activations
    every_second = recipes.load("moai-3b", ["train.activation_checkpointing=selective"])
    assert make_plan(every_second, EIGHT, Options()).recomputed == plan.flops["layers"] / 2
    none = recipes.load("moai-3b", ["train.activation_checkpointing=none"])
    assert make_plan(none, EIGHT, Options()).recomputed == 0
    measured = make_plan(recipes.load("moai-3b"), EIGHT, Options(tokens=60e9, tokens_per_second=1e4))
    assert measured.seconds == pytest.approx(60e9 / 8e4)


def test_what_is_not_known_is_not_guessed() -> None:
    recipe = recipes.load("moai-3b")
    assert make_plan(recipe, parse_hardware("mine", memory=80), Options(tokens=1e9)).seconds is None
    assert make_plan(recipe, None, Options(tokens=1e9)).seconds is None
    assert make_plan(recipe, A100, Options(tokens=1e9)).cost is None  # no price
    endless = recipes.load("moai-3b", ["train.epochs=1"])
    assert make_plan(endless, A100, Options()).tokens is None


def test_a_measured_factor_moves_activations_and_not_states() -> None:
    recipe = recipes.load("moai-3b-tiny")
    plain, more = (make_plan(recipe, A100, Options(micro_batch=8, memory_factor=f)).fits[0].memory for f in (1.0, 1.1))
    assert more.total == pytest.approx(1.1 * plain.total)
    assert (more.weights, more.gradients, more.optimizer) == (plain.weights, plain.gradients, plain.optimizer)


def test_a_brick_from_outside_cannot_be_planned() -> None:
    recipe = recipes.load("moai-3b-tiny")
    recipe.model.layer_types = ["shift"] * 4
    with pytest.raises(MoaiError, match="'shift' are not known here"):
        make_plan(recipe, A100, Options())


@pytest.mark.parametrize("name", ["moai-3b-tiny", "moai-hybrid-1.7b-tiny", "moai-mamba-2b-tiny"])
def test_the_cache_is_as_large_as_it_is_said_to_be(name: str) -> None:
    config = recipes.get_config(name)
    model = MoaiForCausalLM(config).eval()
    cache = model(torch.zeros(1, 24, dtype=torch.long), use_cache=True).past_key_values
    measured = sum(t.numel() * t.element_size() for layer in cache.layers for t in _numbers(vars(layer)))
    assert cache_bytes(config, 24, size=4) == measured


def _numbers(kept: object) -> list[torch.Tensor]:
    """The floating-point tensors of nested dicts and lists."""
    if isinstance(kept, torch.Tensor):
        return [kept] if kept.is_floating_point() else []
    inside = kept.values() if isinstance(kept, dict) else kept if isinstance(kept, list | tuple) else []
    return [tensor for item in inside for tensor in _numbers(item)]


def test_the_documents_promises() -> None:
    """Their days need more than the hardware has, at one end of the range at least, in all recipes but the last."""
    recipe, needed = recipes.load("moai-3b"), {}
    for name, scenario in SCENARIOS.items():
        ends = []
        for i in (0, 1):
            hardware = parse_hardware(f"{scenario.devices[1 - i]}x{scenario.device}")
            plan = make_plan(recipe, hardware, Options(tokens=scenario.tokens[i]))
            ends.append(plan.needed_mfu(scenario.days[i]) or 0)
        needed[name] = ends
    assert all(max(needed[name]) > 1 for name in ("basic", "intermediate", "advanced"))
    assert 0.5 < min(needed["ultra-efficient"]) < max(needed["ultra-efficient"]) < 1


def test_the_tree_is_json() -> None:
    tree = make_plan(recipes.load("blues-01"), EIGHT, Options(price=1.5)).to_tree()
    assert json.loads(json.dumps(tree))["layouts"][0]["runs_in_this_version"] is False
    assert tree["recommended"]["bytes"]["peak"] == pytest.approx(
        sum(v for k, v in tree["recommended"]["bytes"].items() if k != "peak")
    )
    assert tree["flops"]["six_n"] == 6 * tree["parameters"]["active"]


PAGE = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")


def test_the_table_of_hardware() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d.]+) \| (\d+) \| (\d+) \| (bf16|fp16) \|$", PAGE, re.MULTILINE)
    assert rows == [
        (d.name, f"{d.tflops:g}", f"{d.memory:g}", f"{d.bandwidth:g}", "bf16" if d.bf16 else "fp16")
        for d in ACCELERATORS.values()
    ]


@pytest.mark.parametrize("printed", re.findall(r"<!-- printed by: moai (.+) -->\n```text\n([^`]+)\n```", PAGE))
def test_what_the_page_shows_is_what_is_printed(printed: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    command, shown = printed
    main(command.split())
    assert [line.rstrip() for line in capsys.readouterr().out.strip().splitlines()] == shown.splitlines()
