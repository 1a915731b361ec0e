"""Products in fp8, emulated on the CPU: which layers, near bf16, plain checkpoints, resumed to the bit, refusals.

What the emulation computes is rounded to 8 bits as on a GPU, and multiplied in fp32. The kernels need a GPU.
"""

from __future__ import annotations

import sys
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file

from moai_llm import recipe as recipes
from moai_llm.config import MoaiConfig
from moai_llm.inference.load import load_model
from moai_llm.modeling.linear import Linear, plain
from moai_llm.modeling.model import MoaiForCausalLM
from moai_llm.planning.hardware import ACCELERATORS, parse_hardware
from moai_llm.planning.plan import Options, make_plan
from moai_llm.runtime import MoaiError
from moai_llm.training import fp8
from moai_llm.training.build import prepare_model
from moai_llm.training.events import read_metrics
from moai_llm.training.measure import random_batch
from moai_llm.training.precision import make_precision
from tests.training.conftest import MakeRecipe, train
from tests.training.test_run import Stop, same, stop_at

CPU = torch.device("cpu")
FP8 = "train.precision=fp8"


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    monkeypatch.setattr(fp8, "require_device", lambda device: None)
    monkeypatch.setattr(fp8, "settings", lambda f: f.Float8LinearConfig(pad_inner_dim=True, emulate=True))


def fresh(name: str) -> MoaiForCausalLM:
    torch.manual_seed(0)
    return MoaiForCausalLM(recipes.get_config(name))


def gradients(model: MoaiForCausalLM, precision: str, tokens: int = 21) -> dict[str, torch.Tensor]:
    batch = random_batch(2, tokens, 100, documents=2)
    with make_precision(precision, CPU).autocast():
        loss = model.train()(**batch, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("name", ["moai-3b-tiny", "moai-mamba-2b-tiny", "moai-hybrid-moe-0.8b-tiny"])
def test_which_layers_and_how_near(name: str) -> None:
    """Each gradient is near the one of fp32: e5m2 keeps two binary digits, and the errors of a product average out. The
    control is the size of the error: there is one.
    """
    exact, model = fresh(name), fp8.to_fp8(fresh(name))
    converted = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and type(m) is not Linear}
    fits = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    fits |= {"in_proj_x", "in_proj_z", "out_proj"}
    linear = {n for n, m in exact.named_modules() if isinstance(m, torch.nn.Linear)}
    assert converted == {n for n in linear if n.rpartition(".")[2] in fits} and len(linear) > len(converted)
    assert not any(plain(m) for n, m in model.named_modules() if n in converted)  # no fast path reads their weights
    assert list(model.state_dict()) == list(exact.state_dict())
    assert fp8.describe(model).startswith(f"fp8: {len(converted)} of ")
    near, right = gradients(model, "fp8"), gradients(exact, "fp32")
    assert near.keys() == right.keys()
    flat, wanted = (torch.cat([g[n].flatten() for n in right]) for g in (near, right))
    assert 1e-2 < (flat - wanted).norm() / wanted.norm() < 0.25
    for key in right:
        if key.rpartition(".")[0] in converted:
            assert torch.cosine_similarity(near[key].flatten(), right[key].flatten(), 0) > 0.95, key


@pytest.mark.usefixtures("emulated")
def test_sizes_that_do_not_fit_stay() -> None:
    config = recipes.load("moai-3b-tiny", ["model.intermediate_size=72"]).model
    model = fp8.to_fp8(MoaiForCausalLM(MoaiConfig(**asdict(config))))
    mlp = model.model.layers[0].mlp
    assert type(mlp.up_proj) is Linear and type(model.model.layers[0].mixer.q_proj) is not Linear
    assert "down_proj, gate_proj, up_proj and the output layer stay" in fp8.describe(model)
    small = recipes.load("moai-mamba-2b-tiny", ["model.hidden_size=24", "model.intermediate_size=40"]).model
    small.ssm_expand = 1
    with pytest.raises(MoaiError, match="no linear layer of this model has sizes that are multiples of 16"):
        fp8.to_fp8(MoaiForCausalLM(MoaiConfig(**asdict(small))))


@pytest.mark.usefixtures("emulated")
def test_recomputed_layers_give_the_same_gradients(make_recipe: MakeRecipe) -> None:
    name, found = "moai-hybrid-moe-0.8b-tiny", []
    for way in ("none", "selective", "full"):
        recipe = make_recipe(FP8, f"train.activation_checkpointing={way}")
        found.append(gradients(prepare_model(fresh(name), recipe, CPU), "fp8"))
    for other in found[1:]:
        assert all(torch.equal(found[0][key], other[key]) for key in found[0])


@pytest.mark.usefixtures("emulated")
def test_a_run_learns_and_resumes_to_the_bit(make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]) -> None:
    keys = ["train.steps=5", "optim.lr=1e-2"]
    whole = train(make_recipe(FP8, *keys, out="whole"))
    assert "fp8: 19 of 25 linear layers of the decoder; dt_proj, x_proj and the output" in capsys.readouterr().out
    broken = make_recipe(FP8, *keys, "eval.every=1", out="broken")
    with pytest.raises(Stop):
        train(broken, hooks=[stop_at(4)], quiet=True)
    assert same(whole, train(broken, resume=True, quiet=True))
    half = train(make_recipe("train.precision=bf16", *keys, out="half"), quiet=True)
    assert not same(whole, half)  # control
    losses = [
        [row["loss"] for row in read_metrics(path.parents[1] / "metrics.jsonl") if "loss" in row]
        for path in (whole, half)
    ]
    assert losses[0][-1] < losses[0][0] - 0.5
    assert all(abs(a - b) < 0.1 for a, b in zip(*losses))
    saved, other = load_file(whole / "model.safetensors"), load_file(half / "model.safetensors")
    assert {k: (v.dtype, v.shape) for k, v in saved.items()} == {k: (v.dtype, v.shape) for k, v in other.items()}


@pytest.mark.usefixtures("emulated")
def test_a_checkpoint_needs_no_torchao(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = train(make_recipe(FP8, "train.steps=1"), quiet=True)
    for name in [name for name in sys.modules if name.split(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchao", None)  # as if it were not installed
    loaded = load_model(saved, dtype="fp32")
    assert all(type(m) is Linear for m in loaded.model.modules() if isinstance(m, torch.nn.Linear))
    assert not [file for file in saved.glob("*.json") if "fp8" in file.read_text() or "float8" in file.read_text()]
    with pytest.raises(MoaiError, match=r"this needs the package 'torchao.float8': pip install 'moai-llm\[fp8\]'"):
        prepare_model(fresh("moai-3b-tiny"), make_recipe(FP8), CPU)


def test_where_there_is_no_fp8(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MoaiError, match="capability 8.9 .* and this run is on cpu: set train.precision=bf16"):
        train(make_recipe(FP8), quiet=True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    for capability in [(7, 5), (8, 0), (8, 6)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        with pytest.raises(MoaiError, match=f"NVIDIA A100 has {capability[0]}.{capability[1]}: set train.precision"):
            fp8.require_device(torch.device("cuda"))
    for capability in [(8, 9), (9, 0), (10, 0), (12, 0)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        fp8.require_device(torch.device("cuda"))
    with pytest.raises(MoaiError, match="adapters .lora. leave them frozen"):
        recipes.load("moai-3b-tiny", [FP8, "lora.rank=4", "train.init_from=x"])


def test_the_plan_of_fp8() -> None:
    recipe, options = recipes.load("moai-3b", [FP8]), Options(micro_batch=1)
    plan = make_plan(recipe, parse_hardware("H100-SXM"), options)
    assert any("those of train.precision=bf16" in note for note in plan.notes)
    half = make_plan(recipes.load("moai-3b", ["train.precision=bf16"]), parse_hardware("H100-SXM"), options)
    assert plan.fits == half.fits and not any("fp8" in note for note in half.notes)
    for name in ("A100-80GB", "RTX-3090", "T4", "cpu"):
        with pytest.raises(MoaiError, match="no products in fp8: set train.precision=bf16"):
            make_plan(recipe, parse_hardware(name, memory=64), options)
    assert {name for name, device in ACCELERATORS.items() if device.fp8} == {
        "H100-SXM", "H100-PCIe", "H200", "B200", "L4", "L40S", "RTX-4090", "RTX-5090"
    }  # fmt: skip
