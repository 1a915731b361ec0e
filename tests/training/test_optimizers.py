"""Every optimizer: it learns, it resumes to the bit, it decays what it should; Lion and Muon against their papers."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from moai_llm.modeling.model import MoaiForCausalLM
from moai_llm.optimization import OPTIM_OPTIONS, GroupRule, OptimConfig
from moai_llm.runtime import MoaiError
from moai_llm.training import state
from moai_llm.training.clipping import Clip
from moai_llm.training.lion import CHUNK, Lion
from moai_llm.training.loop import train_step
from moai_llm.training.muon import Muon, orthogonalise
from moai_llm.training.optim import OPTIMIZERS, Combined, make_optimizer, parameter_groups, place_state
from moai_llm.training.precision import make_precision
from tests.conftest import tiny_model
from tests.training.conftest import MakeRecipe, train
from tests.training.test_run import Stop, same, stop_at

CPU = torch.device("cpu")
ON_CPU = [name for name in OPTIMIZERS if not name.startswith("paged")]
LRS = {"lion": 1e-3, "sgd": 0.3, "muon": 2e-2}
HYBRID = {"layer_types": ["linear_attention", "full_attention"], "mlp_layer_types": ["sparse", "dense"]}


def model_of(kind: str) -> MoaiForCausalLM:
    """fp32, with some tensors large enough for 8-bit states."""
    bricks = HYBRID if kind == "hybrid" else {}
    return tiny_model(hidden_size=64, intermediate_size=96, **bricks).float().train()


def config_of(name: str, **changes: object) -> OptimConfig:
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes", reason="needs the extra bnb")
    return OptimConfig(name=name, **{"lr": LRS.get(name, 1e-2), **changes})  # type: ignore[arg-type]


def batch() -> dict[str, Tensor]:
    ids = torch.randint(0, 61, (4, 16), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone()}


@pytest.mark.parametrize("kind", ["dense", "hybrid"])
@pytest.mark.parametrize("name", ON_CPU)
def test_it_learns_a_batch(name: str, kind: str) -> None:
    model, config = model_of(kind), config_of(name)
    optimizer, clip, precision = make_optimizer(model, config), Clip(model), make_precision("fp32", CPU)
    losses = [train_step(model, optimizer, precision, [batch()], lr=config.lr, clip=clip).numbers["loss"]
              for _ in range(8)]  # fmt: skip
    assert losses[-1] < losses[0] - 0.4, losses


@pytest.mark.parametrize("name", ON_CPU)
def test_resumed_equals_uninterrupted_bit_for_bit(name: str, make_recipe: MakeRecipe) -> None:
    """A hybrid of attention, Mamba and experts: fp32 and 8-bit states, counters, both halves of Muon."""
    config_of(name)
    wanted = [f"optim.name={name}", "train.steps=5", "checkpoint.every=2", f"optim.lr={LRS.get(name, 1e-3)}"]
    whole = train(make_recipe(*wanted, out="whole"), quiet=True)
    broken = make_recipe(*wanted, "eval.every=1", out="broken")
    with pytest.raises(Stop):
        train(broken, hooks=[stop_at(3)], quiet=True)
    assert same(whole, train(broken, resume=True, quiet=True))


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "muon"])
def test_control_without_its_states_a_run_does_not_resume(
    name: str, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_of(name)
    wanted = [f"optim.name={name}", "train.steps=5", "checkpoint.every=2"]
    whole = train(make_recipe(*wanted, out="whole"), quiet=True)
    broken = make_recipe(*wanted, "eval.every=1", out="broken")
    with pytest.raises(Stop):
        train(broken, hooks=[stop_at(3)], quiet=True)
    monkeypatch.setattr(state, "_load_optimizer", lambda *arguments: None)
    assert not same(whole, train(broken, resume=True, quiet=True))


@pytest.mark.parametrize("name", ON_CPU)
def test_states_are_found_by_name_not_by_place(name: str) -> None:
    """Saved from a model whose parameters were registered in another order."""
    left, right = model_of("hybrid"), model_of("hybrid")
    for module in right.modules():
        module._parameters = dict(reversed(module._parameters.items()))
        module._modules = dict(reversed(module._modules.items()))
    optimizers = []
    for model in (left, right):
        optimizer = make_optimizer(model, config_of(name))
        train_step(model, optimizer, make_precision("fp32", CPU), [batch()], lr=1e-3, clip=Clip(model))
        optimizers.append(optimizer)
    saved = state.optimizer_tensors(left, optimizers[0])
    state._load_optimizer(saved, right, optimizers[1])
    again = state.optimizer_tensors(right, optimizers[1])
    assert saved.keys() == again.keys() and saved and all(torch.equal(saved[key], again[key]) for key in saved)
    train_step(right, optimizers[1], make_precision("fp32", CPU), [batch()], lr=1e-3, clip=Clip(right))


# ---------------------------------------------------------------- decay and groups


@pytest.mark.parametrize("name", ON_CPU)
def test_only_matrices_decay(name: str) -> None:
    """With gradients of zero nothing moves but by weight decay."""
    model = model_of("hybrid")
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    optimizer = make_optimizer(model, config_of(name, lr=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for key, value in model.named_parameters():
        still = value.dim() < 2 or key.endswith(("A_log", "dt_bias", ".D", "bias"))
        expected = before[key] * (1.0 if still else 0.95)
        assert torch.allclose(value, expected, rtol=1e-5, atol=0), key


def test_rules_by_name() -> None:
    model = model_of("hybrid")
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    rules = [
        GroupRule(match=r"embed_tokens|lm_head", lr_scale=0.5, weight_decay=0.0),
        GroupRule(match=r"layers\.0\.", lr_scale=2.0),
    ]
    groups = parameter_groups(model, OptimConfig(lr=1e-3, groups=rules))
    found = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert found.keys() == set(names.values()) and sum(len(g["params"]) for g in groups) == len(names)
    assert found["model.embed_tokens.weight"] == found["lm_head.weight"] == (0.5, 0.0)
    assert found["model.layers.0.mixer.in_proj_x.weight"] == (2.0, 0.1)
    assert found["model.layers.0.mixer.A_log"] == (2.0, 0.0) and found["model.layers.1.mixer_norm.weight"] == (1.0, 0.0)
    assert all(group["lr"] == pytest.approx(1e-3 * group["lr_scale"]) for group in groups)


@pytest.mark.parametrize("name", ["adamw", "muon", "adamw_8bit"])
def test_a_group_learns_at_its_own_rate(name: str) -> None:
    """A share of zero leaves the group where it is, in each part of a combined optimizer."""
    model = model_of("hybrid")
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    optimizer = make_optimizer(model, config_of(name, groups=[GroupRule(match=r"layers\.0\.|embed", lr_scale=0.0)]))
    train_step(model, optimizer, make_precision("fp32", CPU), [batch()], lr=1e-2, clip=Clip(model))
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    assert moved and not any("layers.0." in key or "embed" in key for key in moved)
    assert any("layers.1." in key for key in moved)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([{"match": "lm_haed"}], r"groups\[0\].match 'lm_haed' finds no parameter \(did you mean 'lm_head'\?\); there"),
        ([{"match": "embed"}, {"match": "embed_tok"}], r"groups\[1\].*only parameters that an earlier rule took"),
        ([{"match": "norm", "weight_decay": 0.1}], "never decay: leave out"),
    ],
)
def test_rules_that_do_nothing(rules: list[dict[str, object]], message: str) -> None:
    config = OptimConfig(groups=[GroupRule(**rule) for rule in rules])  # type: ignore[arg-type]
    for name in ("adamw", "muon"):
        config.name = name  # type: ignore[assignment]
        config.__post_init__()
        with pytest.raises(MoaiError, match=message):
            make_optimizer(model_of("dense"), config)


def test_each_optimizer_has_its_options() -> None:
    assert OPTIM_OPTIONS.keys() == OPTIMIZERS.keys()


# ---------------------------------------------------------------- the optimizers themselves


def test_lion_is_algorithm_2() -> None:
    """Written out in fp64 from arXiv 2302.06675, over several chunks and a parameter without a gradient."""
    torch.manual_seed(0)
    shapes = [(7,), (CHUNK + 3,), (5, 11), (1,), ()]
    ours = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    theirs = [parameter.detach().clone() for parameter in ours]
    momenta = [torch.zeros_like(parameter) for parameter in theirs]
    idle = nn.Parameter(torch.ones(3))
    lr, beta1, beta2, decay = 1e-2, 0.9, 0.99, 0.1
    optimizer = Lion([*ours, idle], lr=lr, betas=(beta1, beta2), weight_decay=decay)
    for _ in range(4):
        for i, parameter in enumerate(ours):
            gradient = torch.randn_like(parameter)
            parameter.grad = gradient
            update = torch.sign(beta1 * momenta[i] + (1 - beta1) * gradient)
            theirs[i] = theirs[i] - lr * (update + decay * theirs[i])
            momenta[i] = beta2 * momenta[i] + (1 - beta2) * gradient
        optimizer.step()
    for parameter, expected in zip(ours, theirs):
        assert torch.allclose(parameter, expected, rtol=0, atol=1e-12)
    assert torch.equal(idle, torch.ones(3)) and idle not in optimizer.state
    assert not torch.allclose(ours[0], theirs[0] - lr * torch.ones_like(theirs[0]))  # control


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 5, 13), (4, 17, 6), (7, 3), (1, 9)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_is_torchs_for_each_matrix(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """In bf16 nearly to the bit; in fp32 up to the rounding of bf16, in which torch's always computes."""
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(shape))
    start = stack.detach().clone().view(-1, *shape[-2:])
    matrices = [nn.Parameter(matrix.clone()) for matrix in start]
    ours = Muon([stack], lr=0.1, momentum=0.9, weight_decay=0.1, dtype=dtype)
    theirs = torch.optim.Muon(matrices, lr=0.1, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        stack.grad = torch.randn(shape)
        for matrix, gradient in zip(matrices, stack.grad.view(-1, *shape[-2:])):
            matrix.grad = gradient.clone()
        ours.step()
        theirs.step()
    near = 0.03 if dtype == torch.float32 else 0.01
    expected = torch.stack([matrix.detach() for matrix in matrices])
    assert (stack.detach().view_as(expected) - expected).norm() < near * (expected - start).norm()


def test_each_matrix_of_a_stack_is_orthogonal_on_its_own() -> None:
    torch.manual_seed(0)
    stack = torch.randn(4, 12, 9)
    found = orthogonalise(stack, torch.float32)
    values = torch.linalg.svdvals(found)
    assert float(values.min()) > 0.5 and float(values.max()) < 1.4
    u, _, v = torch.linalg.svd(stack, full_matrices=False)
    assert (found - u @ v).norm() < 0.3 * found.norm()
    whole = orthogonalise(stack.flatten(0, 1), torch.float32).view_as(stack)  # control: as one matrix
    assert (whole - u @ v).norm() > 0.5 * whole.norm()


def test_what_muon_takes() -> None:
    model = tiny_model(hidden_size=64, router_noise=True, position_embedding="learned", **HYBRID).float()
    optimizer = make_optimizer(model, OptimConfig(name="muon"))
    assert isinstance(optimizer, Combined)
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    taken, rest = ({names[id(p)] for g in part.param_groups for p in g["params"]} for part in optimizer.parts)
    assert [type(part) for part in optimizer.parts] == [Muon, torch.optim.AdamW]
    assert {"model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"} <= taken  # experts
    assert {"model.layers.0.mixer.in_proj_x.weight", "model.layers.1.mixer.q_proj.weight"} <= taken
    outside = ("embed", "lm_head", "router", "conv", "A_log", "norm", "bias", ".D")
    assert not [key for key in taken if any(word in key for word in outside)]
    assert {"model.embed_tokens.weight", "model.embed_positions.weight", "lm_head.weight"} <= rest
    assert len(taken) + len(rest) == len(names)


def test_an_update_of_muon_is_as_large_as_adamws() -> None:
    """So that one learning rate serves both: 0.2 of it, the usual root mean square of AdamW's (arXiv 2502.16982)."""
    model = model_of("hybrid")
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    optimizer = make_optimizer(model, OptimConfig(name="muon", lr=1e-2, weight_decay=0.0))
    train_step(model, optimizer, make_precision("fp32", CPU), [batch()], lr=1e-2, clip=Clip(model))
    for key in ("model.layers.0.mlp.up_proj", "model.layers.1.mixer.q_proj.weight"):
        size = float((model.get_parameter(key).detach() - before[key]).square().mean().sqrt())
        assert 0.1e-2 < size < 0.3e-2, key


def test_adafactor_does_not_scale_with_the_weights() -> None:
    """Its learning rate means what AdamW's means: the first update has a root mean square of about it."""
    for size in (0.01, 10.0):
        linear = nn.Linear(16, 16, bias=False)
        nn.init.constant_(linear.weight, size)
        optimizer = make_optimizer(linear, OptimConfig(name="adafactor", lr=1e-2, weight_decay=0.0))
        linear.weight.grad = torch.randn(16, 16)
        optimizer.step()
        assert 0.5e-2 < float((linear.weight.detach() - size).square().mean().sqrt()) < 1.5e-2


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    found = {}
    for name, parameter in model.named_parameters():
        states = [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor)]
        found[name] = sum(value.nbytes for value in states if value.shape == parameter.shape)
    return found


def test_8bit_states_are_8bit_where_they_are_many() -> None:
    config = config_of("adamw_8bit")
    model = model_of("hybrid")
    optimizer = make_optimizer(model, config)
    train_step(model, optimizer, make_precision("fp32", CPU), [batch()], lr=1e-3, clip=Clip(model))
    for name, size in state_bytes(model, optimizer).items():
        parameter = model.get_parameter(name)
        bits = 8 if parameter.numel() >= 4096 and "embed" not in name else 32
        assert size == 2 * parameter.numel() * bits // 8, name


def test_8bit_is_close_to_32() -> None:
    config = config_of("adamw_8bit")
    losses = []
    for each in (config, OptimConfig(lr=config.lr)):
        model = model_of("dense")
        optimizer, clip, precision = make_optimizer(model, each), Clip(model), make_precision("fp32", CPU)
        losses.append([train_step(model, optimizer, precision, [batch()], lr=each.lr, clip=clip).numbers["loss"]
                       for _ in range(6)])  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], abs=0.1) and losses[0] != losses[1]


@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw_8bit"])
def test_paging_needs_a_gpu(name: str) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra bnb")
    instead = "adamw_8bit" if name.endswith("8bit") else "adamw"
    with pytest.raises(MoaiError, match=rf"on cpu there is nothing to page: use optim.name={instead}"):
        make_optimizer(model_of("dense"), OptimConfig(name=name))  # type: ignore[arg-type]


def test_restored_states_of_a_paged_optimizer_are_paged() -> None:
    """Where its memory comes from is the optimizer's to say; on a CPU it warns and gives ordinary memory."""
    bnb = pytest.importorskip("bitsandbytes", reason="needs the extra bnb")
    paged, plain = nn.Parameter(torch.zeros(64, 64)), nn.Parameter(torch.zeros(64, 64))
    optimizer = Combined(bnb.optim.PagedAdamW8bit([paged]), torch.optim.AdamW([plain]))
    state = torch.arange(4096, dtype=torch.uint8).view(64, 64)
    with pytest.warns(UserWarning, match="Paged optimizers are not supported on CPU"):
        placed = place_state(optimizer, paged, "state1", state)
    assert torch.equal(placed, state) and placed.data_ptr() != state.data_ptr()
    assert place_state(optimizer, paged, "absmax1", state).data_ptr() == state.data_ptr()
    assert place_state(optimizer, plain, "state1", state).data_ptr() == state.data_ptr()


def test_without_bitsandbytes_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MoaiError, match=r"moai-llm\[bnb\]"):
        make_optimizer(model_of("dense"), OptimConfig(name="adamw_8bit"))


def test_a_combined_optimizer_is_one() -> None:
    """Groups, states and what is loaded are those its parts work on."""
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    both = Combined(torch.optim.SGD([a], lr=1.0, momentum=0.5), torch.optim.AdamW([b], lr=1.0))
    for step in range(2):
        for group in both.param_groups:
            group["lr"] = 0.0 if step == 0 else 0.1
        a.grad, b.grad = torch.ones(3), torch.ones(3)
        both.step()
        assert math.isclose(float(a[0].detach()), 1.0 if step == 0 else 0.85, rel_tol=1e-6)
        assert bool((b == 1.0).all()) == (step == 0)
    assert set(both.state[a]) == {"momentum_buffer"} and {"exp_avg", "exp_avg_sq"} < set(both.state[b])
    both.load_state_dict(both.state_dict())
    both.zero_grad()
    assert a.grad is None and b.grad is None
    both.param_groups[0]["lr"] = 0.0
    a.grad = torch.ones(3)
    both.step()
    assert float(a[0].detach()) == pytest.approx(0.85) and float(both.state[a]["momentum_buffer"][0]) == 1.75


def test_the_states_of_a_checkpoint_stay_plain(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """8-bit states: maps that all tensors share are written, and counters come back as numbers."""
    config_of("adamw_8bit")
    from safetensors.torch import load_file

    last = train(make_recipe("optim.name=adamw_8bit", "train.steps=2"), quiet=True)
    saved = load_file(last / state.STATE / "optimizer.safetensors")
    kinds = {key.partition("/")[0] for key in saved}
    assert {"state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2", "step"} <= kinds
    counters = {tensor.dtype for key, tensor in saved.items() if key.startswith("step/")}
    assert counters == {torch.int64, torch.float32}  # of bitsandbytes and of torch's fused AdamW
