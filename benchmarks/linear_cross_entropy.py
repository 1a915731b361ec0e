"""Losses and their gradients from hidden states: ours in chunks against all logits at once, extra peak memory and time.

The cross-entropy of the next token, DPO over pairs of answers and the KL divergence from a teacher. Times are those of
the CPU: what the work costs, also on a machine that does other work. Liger's formulations in torch are measured beside
ours where the package is installed; its cross-entropy is a Triton kernel and runs on no CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Table, interleave, peak_memory, require_close, threads
from moai_llm.losses import create_loss_function
from moai_llm.ops.cross_entropy import linear_cross_entropy
from moai_llm.ops.distillation import DistillationTerms, Head, linear_distillation
from moai_llm.ops.log_probs import document_sums, linear_log_probs

ROWS, ANSWERS = 4096, 8  # four pairs of answers of 512 tokens
SIZES = ((512, 32768), (512, 131072), (1024, 32768), (1024, 131072))
SMALLER = ((512, 32768), (512, 65536))  # all logits of two models, with what autograd keeps of them, are large soon
Gradients = tuple[Tensor, Tensor, Tensor]
Candidates = dict[str, Callable[..., Gradients]]
BETA = 0.1


def with_gradients(loss: Callable[..., Tensor]) -> Callable[..., Gradients]:
    def run(hidden: Tensor, weight: Tensor, *others: Tensor) -> Gradients:
        value = loss(hidden, weight, *others)
        return (value, *torch.autograd.grad(value, (hidden, weight)))

    return run


@with_gradients
def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).to(wide(hidden)), targets)


@with_gradients
def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, targets).objective / targets.numel()


def of_pairs(log_probs: Tensor) -> Tensor:
    """DPO with a reference that holds everything equally likely; the better answers come first, as Liger has them."""
    answers = torch.arange(len(log_probs)) * ANSWERS // len(log_probs)
    sums = document_sums(log_probs, answers, ANSWERS).view(2, -1).t()
    return create_loss_function({"type": "dpo", "params": {"beta": BETA}})(  # type: ignore[operator]
        sums, torch.ones_like(sums), torch.zeros_like(sums)
    ).objective.mean()


@with_gradients
def plain_dpo(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    log_p = torch.log_softmax(F.linear(hidden, weight).to(wide(hidden)), -1)
    return of_pairs(log_p.gather(1, targets[:, None]).squeeze(1))


@with_gradients
def chunked_dpo(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return of_pairs(linear_log_probs(hidden, weight, targets))


@with_gradients
def plain_kl(hidden: Tensor, weight: Tensor, targets: Tensor, their_hidden: Tensor, their_weight: Tensor) -> Tensor:
    z, t = (F.linear(h, w).to(wide(hidden)) for h, w in ((hidden, weight), (their_hidden, their_weight)))
    return F.kl_div(F.log_softmax(z, -1), F.log_softmax(t, -1), reduction="batchmean", log_target=True)


@with_gradients
def chunked_kl(hidden: Tensor, weight: Tensor, targets: Tensor, their_hidden: Tensor, their_weight: Tensor) -> Tensor:
    student, teacher = Head(hidden, weight), Head(their_hidden, their_weight)
    return linear_distillation(student, teacher, targets, DistillationTerms()).objective / targets.numel()


def liger() -> tuple[Candidates, Candidates]:
    """Liger's DPO and its KL divergence, as it computes them without a GPU; nothing where it is not installed."""
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss, LigerFusedLinearJSDLoss
    except ImportError as error:
        print(f"  Liger is left out, it is not installed ({error}): pip install 'moai-llm[bench]'")
        return {}, {}
    dpo = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False, compiled=False, average_log_prob=False)
    kl = LigerFusedLinearJSDLoss(0.0, 1.0, beta=0.0, compiled=False)

    @with_gradients
    def liger_dpo(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return dpo(weight, hidden.view(ANSWERS, -1, hidden.shape[1]), targets.view(ANSWERS, -1))[0]

    @with_gradients
    def liger_kl(hidden: Tensor, weight: Tensor, targets: Tensor, their_hidden: Tensor, their_weight: Tensor) -> Tensor:
        return kl(hidden, weight, their_hidden, their_weight, targets)

    return {"liger": liger_dpo}, {"liger": liger_kl}


def wide(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def inputs(rows: int, width: int, vocab: int, dtype: torch.dtype, teacher: bool = False) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)

    def head(width: int) -> tuple[Tensor, Tensor]:
        weight = torch.randn(vocab, width, generator=g) * width**-0.5
        return torch.randn(rows, width, generator=g).to(dtype), weight.to(dtype)

    made = [t.requires_grad_() for t in head(width)]
    targets = torch.randint(0, vocab, (rows,), generator=g)
    return (*made, targets, *(head(2 * width) if teacher else ()))


def check(candidates: Candidates, teacher: bool = False) -> None:
    """All against float64 at an odd size."""
    made = inputs(9 * ANSWERS, 48, 1001, torch.float64, teacher)
    truth = candidates["plain"](*made)
    for name, function in candidates.items():
        single = (t.detach().float() if t.is_floating_point() else t for t in made)
        found = function(*(t.requires_grad_() if i < 2 else t for i, t in enumerate(single)))
        for got, right in zip(found, truth):
            require_close(name, got, right, 1e-5)


def run(quick: bool = False) -> list[Table]:
    of_dpo, of_kl = liger()
    losses: list[tuple[str, Candidates, tuple[tuple[int, int], ...], bool]] = [
        ("cross-entropy", {"plain": plain, "ours": chunked}, SIZES, False),
        ("DPO", {"plain": plain_dpo, "ours": chunked_dpo, **of_dpo}, SMALLER, False),
        ("distillation", {"plain": plain_kl, "ours": chunked_kl, **of_kl}, SMALLER, True),
    ]
    tables = []
    with threads(2):
        for title, candidates, sizes, teacher in losses:
            check(candidates, teacher)
            for dtype in (torch.float32, torch.bfloat16):
                tables.append(measure(title, candidates, dtype, sizes[:1] if quick else sizes, teacher))
    return tables


def measure(
    title: str, candidates: Candidates, dtype: torch.dtype, sizes: tuple[tuple[int, int], ...], teacher: bool
) -> Table:
    name = str(dtype).removeprefix("torch.")
    others = [key for key in candidates if key != "plain"]
    table = Table(
        f"Linear + {title}, forward and backward, {ROWS} rows, {name}",
        (
            "hidden x vocabulary",
            *(f"{key} CPU s" for key in candidates),
            *(f"CPU time of {key}, plain = 1" for key in others),
            *(f"{key} extra MiB" for key in candidates),
            *(f"memory of {key}, plain = 1" for key in others),
        ),
    )
    print(table.title)
    for width, vocab in sizes:
        made = inputs(ROWS, width, vocab, dtype, teacher)
        # the gradients of hidden and weight are the result, not an extra
        result = sum(t.numel() * t.element_size() for t in made[:2])
        bound = {key: partial(function, *made) for key, function in candidates.items()}
        extra = {key: peak_memory(call) - result for key, call in bound.items()}
        cpu = {key: timing.cpu for key, timing in interleave(bound, rounds=2, warmup=0).items()}
        memory, time = ({key: found[key] / found["plain"] for key in others} for found in (extra, cpu))
        table.add(f"{width} x {vocab}", *cpu.values(), *time.values(), *(x / 2**20 for x in extra.values()),
                  *memory.values())  # fmt: skip
        most = 1.1 * (4 / 3 if title == "DPO" else 1)  # the logits are made once more: four products for three
        table.goal(f"CPU time of {width} x {vocab}, {name}", time["ours"], at_most=most)
        if (width, vocab) == sizes[-1] or vocab == 131072:
            table.goal(f"extra peak memory of {width} x {vocab}, {name}", memory["ours"], at_most=1 / 6)
    return table
