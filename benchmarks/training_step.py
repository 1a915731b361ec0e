"""A training step (forward, backward, fused AdamW) of equal models: ours, transformers, litgpt. Same weights, same
batch.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import models
from benchmarks.harness import Disagreement, Table, Timing, interleave, threads
from moai_llm.ops.dispatch import use
from moai_llm.recipe import OptimConfig
from moai_llm.runtime import has_fast_bf16
from moai_llm.training.clipping import Clip
from moai_llm.training.loop import train_step
from moai_llm.training.optim import make_optimizer
from moai_llm.training.precision import make_precision

VOCABS = {8192: "12.6M parameters, vocabulary 8k", 65536: "34.6M parameters, vocabulary 64k"}
Step = Callable[[], float]


def run(quick: bool = False) -> list[Table]:
    rounds = 3 if quick else 9
    with threads(2):
        tables = []
        for vocab in list(VOCABS)[: 1 if quick else 2]:
            tables += [dense(vocab, rounds), dense_compiled(vocab, rounds)]
        tables += [mixture(rounds), *state_space(quick), defaults(rounds)]
    return tables


def batch(vocab: int, rows: int = 2, length: int = 512) -> Tensor:
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(0))


def stepper(model: nn.Module, ids: Tensor, bf16: bool = False, **scan: str) -> Step:
    """One optimizer step; every candidate gets the same optimizer."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        with use(**scan), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            output = model(input_ids=ids, labels=ids)
            loss = output if isinstance(output, Tensor) else output.loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def require_same_losses(steps: dict[str, Step], count: int = 2) -> None:
    """The first steps of all candidates give the losses of the first one: same function, same gradients, same update.

    Raises:
        Disagreement: they differ by more than 1e-4 of it, 1e-2 where computed in bf16.
    """
    losses = {name: [step() for _ in range(count)] for name, step in steps.items()}
    first = next(iter(losses.values()))
    for name, values in losses.items():
        tolerance = 1e-2 if "bf16" in name else 1e-4
        if any(abs(a - b) > tolerance * b for a, b in zip(values, first)):
            raise Disagreement(f"losses of {name} are {values}, those of the first candidate {first}")


def measure(
    title: str, steps: dict[str, Step], tokens: int, rounds: int, baseline: str
) -> tuple[Table, dict[str, Timing]]:
    print(title)
    timings = interleave(steps, rounds)
    table = Table(title, ("step", "tokens/s", "ms (wall)", "ms (CPU)", f"speed, {baseline} = 1"))
    for name, t in timings.items():
        table.add(name, tokens / t.wall, t.wall * 1e3, t.cpu * 1e3, t.times_faster_than(timings[baseline]))
    gc.collect()
    return table, timings


def dense(vocab: int, rounds: int) -> Table:
    ids = batch(vocab)
    steps: dict[str, Step] = {}
    for bf16 in (False, True):
        made = {
            "ours": models.ours(models.qwen3(vocab)),
            "transformers Qwen3": models.qwen3(vocab),
            "litgpt": models.Litgpt(models.qwen3(vocab)),
        }
        named = {f"{name}, {'bf16' if bf16 else 'fp32'}": stepper(model, ids, bf16) for name, model in made.items()}
        require_same_losses(named)
        steps |= named
    table, t = measure(
        f"Dense, {VOCABS[vocab]}, 2 x 512 tokens", steps, ids.numel(), rounds, "transformers Qwen3, fp32"
    )
    for precision in ("fp32", "bf16"):
        for peer in ("transformers Qwen3", "litgpt"):
            ratio = t[f"ours, {precision}"].times_faster_than(t[f"{peer}, {precision}"])
            table.goal(f"dense against {peer}, {precision}", ratio, 1.0)
    return table


def dense_compiled(vocab: int, rounds: int) -> Table:
    ids = batch(vocab)
    steps: dict[str, Step] = {}
    for bf16 in (False, True):
        own, peer = models.ours(models.qwen3(vocab)), models.qwen3(vocab)
        for layer in own.model.layers:
            layer.compile(dynamic=False)
        named = {"ours": own, "transformers Qwen3": torch.compile(peer)}
        precision = "bf16" if bf16 else "fp32"
        found = {f"{name}, {precision}": stepper(model, ids, bf16) for name, model in named.items()}
        require_same_losses(found)
        steps |= found
    title = f"Dense, compiled, {VOCABS[vocab]}, 2 x 512 tokens"
    table, t = measure(title, steps, ids.numel(), rounds, "transformers Qwen3, fp32")
    for precision in ("fp32", "bf16"):
        ratio = t[f"ours, {precision}"].times_faster_than(t[f"transformers Qwen3, {precision}"])
        table.goal(f"dense, compiled, against transformers, {precision}", ratio, 1.0)
    return table


def mixture(rounds: int) -> Table:
    ids = batch(8192)
    steps: dict[str, Step] = {}
    peers = ("eager", "grouped_mm")  # batched_mm copies an expert per token: gigabytes and minutes at this size
    for bf16 in (False, True):
        own = models.ours(models.qwen3_moe(8192, "eager"))
        own.config.router_aux_loss_coef = 0.0  # as in the peers: their value of it is another one
        precision = "bf16" if bf16 else "fp32"
        found = {f"ours, {precision}": stepper(own, ids, bf16)}
        for name in peers:
            found[f"transformers {name}, {precision}"] = stepper(models.qwen3_moe(8192, name), ids, bf16)
        require_same_losses(found)
        steps |= found
    title = "Mixture of experts, 8 experts, top-2, every second layer, vocabulary 8k, 2 x 512 tokens"
    table, t = measure(title, steps, ids.numel(), rounds, "transformers grouped_mm, fp32")
    for precision in ("fp32", "bf16"):
        ratio = t[f"ours, {precision}"].times_faster_than(t[f"transformers grouped_mm, {precision}"])
        table.goal(f"MoE against transformers grouped_mm, {precision}", ratio, 1.0)
    return table


def state_space(quick: bool) -> list[Table]:
    """transformers' eager Mamba takes minutes a step at 512 tokens, so there it runs once."""
    tables = []
    for length, rounds, goal in ((128, 3, 5.0), (512, 1, 10.0))[: 1 if quick else 2]:
        ids = batch(8192, length=length)
        steps = {
            "ours, native scan": stepper(models.ours(models.mamba(8192)), ids, selective_scan="native"),
            "ours, torch scan": stepper(models.ours(models.mamba(8192)), ids, selective_scan="torch"),
            "ours, native scan, bf16": stepper(models.ours(models.mamba(8192)), ids, True, selective_scan="native"),
            "transformers with mambapy": stepper(models.mamba(8192, use_mambapy=True), ids),
            "transformers Mamba": stepper(models.mamba(8192), ids),
        }
        fast = {name: step for name, step in steps.items() if name != "transformers Mamba"}
        require_same_losses(fast if length > 128 else steps)
        title = f"Mamba, 8.9M parameters, vocabulary 8k, 2 x {length} tokens, fp32 where not said"
        print(title)
        t = interleave(fast, 3 if quick else 9)
        t["transformers Mamba"] = interleave({"peer": steps["transformers Mamba"]}, rounds, warmup=0)["peer"]
        table = Table(title, ("step", "tokens/s", "ms (wall)", "ms (CPU)", "speed, transformers Mamba = 1"))
        for name, found in t.items():
            peer = t["transformers Mamba"].wall
            table.add(name, ids.numel() / found.wall, found.wall * 1e3, found.cpu * 1e3, peer / found.wall)
        for name in ("native", "torch"):
            ratio = t["transformers Mamba"].wall / t[f"ours, {name} scan"].wall
            table.goal(f"{name} scan against transformers, T = {length}", ratio, goal)
        tables.append(table)
    return tables


def defaults(rounds: int) -> Table:
    """What a user gets who changes nothing: our training loop beside transformers' default precision and optimizer.

    Both train on the same packed rows of short documents, clip gradients and use fused AdamW. transformers reads the
    documents from `position_ids` and builds a mask.
    """
    vocab, length = 8192, 1024
    ids = batch(vocab, length=length)
    lengths = [171, 40, 300, 93, 211, 122, 87]
    position_ids = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1).contiguous()
    assert position_ids.shape[1] == length
    labels = ids.masked_fill(position_ids == 0, -100)  # the first token of a document is not predicted
    seq_idx = (position_ids == 0).cumsum(-1) - 1
    own, peer = models.ours(models.qwen3(vocab)), models.qwen3(vocab).train()
    own.train()
    precision = make_precision("auto", torch.device("cpu"))
    optimizer, clip = make_optimizer(own, OptimConfig(lr=1e-4, weight_decay=0.0)), Clip(own)
    theirs = torch.optim.AdamW(peer.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    rows: dict[str, Any] = {"input_ids": ids, "labels": labels, "position_ids": position_ids, "seq_idx": seq_idx}

    def our_step() -> float:
        return train_step(own, optimizer, precision, [rows], lr=1e-4, clip=clip).numbers["objective"]

    def their_step() -> float:
        loss = peer(input_ids=ids, labels=labels, position_ids=position_ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        theirs.step()
        theirs.zero_grad(set_to_none=True)
        return float(loss.detach())

    steps: dict[str, Step] = {
        f"ours, defaults ({precision.name})": our_step,
        "transformers, defaults (fp32)": their_step,
    }
    require_same_losses(steps)
    title = f"Default settings, 12.6M parameters, packed rows of {len(lengths)} documents, 2 x {length} tokens"
    table, t = measure(title, steps, ids.numel(), rounds, "transformers, defaults (fp32)")
    mine, other = t.values()
    # without fast bf16 both sides compute in fp32 and there is less to gain
    table.goal("our defaults against transformers' defaults", mine.times_faster_than(other),
               1.5 if has_fast_bf16(torch.device("cpu")) else 1.0)  # fmt: skip
    return table
