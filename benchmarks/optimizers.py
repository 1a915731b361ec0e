"""Optimizers: bytes of state a parameter, and the time of a step, beside torch's and transformers' own.

The step alone, over fixed gradients, on one thread. AdamW, its 8-bit form and Lion count only if their steps are those
of the formula, written out in fp64. Times are of the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor

from benchmarks.harness import Table, interleave, require_close, threads
from benchmarks.models import DENSE
from moai_llm.config import MoaiConfig
from moai_llm.modeling.model import MoaiForCausalLM
from moai_llm.optimization import OptimConfig
from moai_llm.runtime import has_fast_bf16
from moai_llm.training.muon import Muon
from moai_llm.training.optim import OPTIMIZERS, make_optimizer

LR, DECAY = 1e-3, 0.1
ON_CPU = [name for name in OPTIMIZERS if not name.startswith("paged")]
PEERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "torch AdamW, plain": lambda model: torch.optim.AdamW(model.parameters(), lr=LR, foreach=False),
    "torch AdamW, foreach": lambda model: torch.optim.AdamW(model.parameters(), lr=LR, foreach=True),
    "torch Adafactor": lambda model: torch.optim.Adafactor(model.parameters(), lr=LR),
    "transformers Adafactor": lambda model: Adafactor(
        model.parameters(), lr=LR, scale_parameter=False, relative_step=False
    ),
}


def run(quick: bool = False) -> list[Table]:
    check()
    layers = 2 if quick else 6
    shared = dict(DENSE, vocab_size=8192, num_hidden_layers=layers, moe_intermediate_size=512)
    hybrid = dict(layer_types=["linear_attention", "full_attention"], mlp_layer_types=["dense", "sparse"])
    return [measure("dense", shared, quick), measure("hybrid with experts", {**shared, **hybrid}, quick), muon(quick)]


def measure(name: str, fields: dict[str, Any], quick: bool) -> Table:
    makers: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
        each: lambda model, each=each: make_optimizer(model, OptimConfig(name=each, lr=LR, weight_decay=DECAY))  # type: ignore[misc]
        for each in ON_CPU
    }
    optimizers, models = {}, {}
    for key, make in {**makers, **PEERS}.items():
        models[key] = model_of(fields)
        optimizers[key] = make(models[key])
        optimizers[key].step()  # makes its states
    count = sum(parameter.numel() for parameter in models["adamw"].parameters())
    table = Table(
        f"{name}, {count / 1e6:.1f}M parameters, one thread",
        ("optim.name", "bytes of state a parameter", "CPU-ms of a step", "times AdamW's"),
    )
    print(table.title)
    with threads(1):
        timings = interleave({key: each.step for key, each in optimizers.items()}, rounds=1 if quick else 7)
    bytes_of = {key: state_bytes(each) / count for key, each in optimizers.items()}
    for key, timing in timings.items():
        table.add(key, f"{bytes_of[key]:.2f}", 1e3 * timing.cpu, timing.cpu / timings["adamw"].cpu)
    table.goal("bytes a parameter, lion / adamw", bytes_of["lion"] / bytes_of["adamw"], at_most=0.51)
    table.goal("bytes a parameter, adafactor", bytes_of["adafactor"], at_most=0.1)
    plain = timings["torch AdamW, plain"].cpu
    table.goal("CPU time, torch's plain AdamW / adamw", plain / timings["adamw"].cpu, at_least=1.5)
    table.goal("CPU time, torch's plain AdamW / lion", plain / timings["lion"].cpu, at_least=1)
    return table


def muon(quick: bool) -> Table:
    """One matrix of the dense model; torch's computes in bf16 wherever it runs."""
    shape = (64, 128) if quick else (DENSE["hidden_size"], DENSE["intermediate_size"])
    fast = has_fast_bf16(torch.device("cpu"))
    ours, theirs = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.empty(shape))
    theirs.data.copy_(ours.data)
    start, gradient = ours.detach().clone(), torch.randn(shape)
    steps = {
        "muon": Muon([ours], lr=LR, weight_decay=DECAY, dtype=torch.bfloat16 if fast else torch.float32),
        "torch Muon": torch.optim.Muon([theirs], lr=LR, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"),
    }
    ours.grad, theirs.grad = gradient, gradient.clone()
    for optimizer in steps.values():
        optimizer.step()
    require_close("muon", ours - start, theirs - start, 0.03)
    table = Table(
        f"Muon, a matrix of {shape[0]} x {shape[1]}, one thread of a CPU with{'' if fast else 'out'} fast bf16",
        ("optim.name", "CPU-ms of a step"),
    )
    print(table.title)
    with threads(1):
        timings = interleave({key: each.step for key, each in steps.items()}, rounds=1 if quick else 5)
    for key, timing in timings.items():
        table.add(key, 1e3 * timing.cpu)
    table.goal("CPU time, torch's Muon / muon", timings["torch Muon"].cpu / timings["muon"].cpu, at_least=1)
    return table


def model_of(fields: dict[str, Any]) -> MoaiForCausalLM:
    torch.manual_seed(0)
    model = MoaiForCausalLM(MoaiConfig(**fields)).float()
    for parameter in model.parameters():
        parameter.grad = 1e-2 * torch.randn_like(parameter)
    return model


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Each tensor once, also one that all parameters share."""
    tensors = {
        value.data_ptr(): value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    }
    return sum(tensors.values())


def check(steps: int = 3) -> None:
    """The update of a matrix after a few steps, against the formula in fp64."""
    torch.manual_seed(0)
    start, gradients = torch.randn(96, 64), torch.randn(steps, 96, 64)
    truth = {"adamw": adamw(start, gradients), "lion": lion(start, gradients)}
    for name, near, tolerance in (
        ("adamw", "adamw", 1e-3), ("adamw_8bit", "adamw", 0.1), ("lion", "lion", 1e-3),
    ):  # fmt: skip
        layer = nn.Linear(64, 96, bias=False)
        with torch.no_grad():
            layer.weight.copy_(start)
        optimizer = make_optimizer(layer, OptimConfig(name=name, lr=LR, weight_decay=DECAY))  # type: ignore[arg-type]
        for gradient in gradients:
            layer.weight.grad = gradient.clone()
            optimizer.step()
        require_close(name, layer.weight - start, truth[near] - start, tolerance)


def adamw(start: Tensor, gradients: Tensor) -> Tensor:
    """arXiv 1711.05101, Algorithm 2."""
    (beta1, beta2), eps = OptimConfig().betas or (0.0, 0.0), 1e-8
    p = start.double()
    m = v = torch.zeros_like(p)
    for t, g in enumerate(gradients.double(), 1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        p = p - LR * (m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + eps) + DECAY * p)
    return p


def lion(start: Tensor, gradients: Tensor) -> Tensor:
    """arXiv 2302.06675, Algorithm 2."""
    beta1, beta2 = OptimConfig(name="lion").betas or (0.0, 0.0)
    p = start.double()
    m = torch.zeros_like(p)
    for g in gradients.double():
        p = p - LR * ((beta1 * m + (1 - beta1) * g).sign() + DECAY * p)
        m = beta2 * m + (1 - beta2) * g
    return p
