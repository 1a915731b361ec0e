"""Memory of a training step beside what `moai plan` says: tiny and small twins of three presets.

`held` is what the allocator had given out at once at most, exact to the byte. `resident` is by how much the memory of a
fresh process grew while it did the same: it also counts code that is loaded on the way, and blocks that are kept free.
"""

from __future__ import annotations

from itertools import product

import torch

from benchmarks.harness import Table, peak_memory
from moai_llm import recipe as recipes
from moai_llm.planning.activations import Setting
from moai_llm.planning.layouts import Layout, memory
from moai_llm.recipe import Recipe
from moai_llm.training.measure import RealStep, random_batch

CPU = torch.device("cpu")
ROWS, DOCUMENTS = 4, 3
SMALL = {
    "moai-3b-tiny": ("model.hidden_size=384", "model.num_hidden_layers=6", "model.head_dim=64",
                     "model.intermediate_size=768", "model.vocab_size=32000"),
    "moai-mamba-2b-tiny": ("model.hidden_size=512", "model.num_hidden_layers=5", "model.intermediate_size=1408",
                           "model.vocab_size=16000"),
    "blues-01-tiny": ("model.hidden_size=384", "model.num_hidden_layers=4", "model.num_attention_heads=6",
                      "model.head_dim=64", "model.intermediate_size=1024", "model.vocab_size=32000"),
}  # fmt: skip


def run(quick: bool) -> list[Table]:
    table = Table(
        f"{ROWS} rows of {DOCUMENTS} documents, two micro-batches, MiB",
        ("recipe", "parameters, M", "precision", "recompute", "planned", "held", "off, %", "resident"),
    )
    worst = 0.0
    sizes = ("tiny",) if quick else ("tiny", "small")
    for name, size, precision, recompute in product(SMALL, sizes, ("fp32", "bf16"), ("false", "true")):
        keys = [f"train.precision={precision}", f"train.activation_checkpointing={recompute}"]
        # a CPU without bf16 is slow in it: short rows
        keys += [*SMALL[name], f"data.seq_len={256 if precision == 'fp32' else 64}"] if size == "small" else []
        recipe = recipes.load(name, keys)
        planned, held, resident = measure(recipe)
        off = 100 * (planned / held - 1)
        worst = max(worst, abs(off))
        mib = [f"{bytes_ / 2**20:.1f}" for bytes_ in (planned, held, resident)]
        million = recipe.model.parameters()["total"] / 1e6
        table.add(name, million, precision, recompute, *mib[:2], f"{off:+.1f}", mib[2])
    table.goal("planned off by at most, %", worst, at_most=10)
    return [table]


def measure(recipe: Recipe) -> tuple[float, int, int]:
    """Bytes planned, held at once, and by which a process grows."""
    sizes = (ROWS, recipe.data.seq_len, recipe.model.vocab_size, DOCUMENTS)

    def steps() -> tuple[RealStep, list[dict[str, torch.Tensor]]]:
        batches = [random_batch(*sizes, seed=i) for i in range(2)]
        step = RealStep(recipe, CPU)
        step.run(batches)
        return step, batches

    step, batches = steps()
    held = step.peak_bytes(batches)
    del step
    resident = peak_memory(lambda: [step.run(batches) for step, batches in [steps()]])
    setting = Setting(ROWS, recipe.data.seq_len, recipe.train.precision == "bf16", "cpu", DOCUMENTS)
    return memory(recipe, Layout("one device"), setting, 2).total, held, resident
