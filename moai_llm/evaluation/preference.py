"""How well a model tells better answers from worse ones, on pairs it does not learn from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moai_llm.data.loader import Batch
from moai_llm.modeling.model import MoaiForCausalLM
from moai_llm.training.objective import add_up, to_floats
from moai_llm.training.precision import Precision
from moai_llm.training.preference import Preference


@torch.no_grad()
def evaluate_pairs(
    objective: Preference, model: MoaiForCausalLM, batches: Sequence[Batch], precision: Precision
) -> dict[str, float]:
    """Means over all pairs of the batches: `loss`, `reward_margin`, `reward_accuracy` and what else a step logs."""
    counts, sums = objective.count(batches), dict[str, Tensor]()
    for batch in batches:
        with precision.autocast():
            part = objective.forward(model, {k: t.to(precision.device) for k, t in batch.items()}, counts)
        add_up(sums, part.numbers)
    return to_floats(sums)
