"""Learning from a teacher: how likely another model holds each token, instead of only which one came.

The teacher has the same tokenizer; its width, depth and bricks are its own. It runs once for each micro-batch, and of
neither model the logits are ever whole in memory (`ops/distillation.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moai_llm.data.loader import Batch
from moai_llm.losses import DistillationLoss
from moai_llm.modeling.model import MoaiForCausalLM
from moai_llm.ops.distillation import Head
from moai_llm.training.objective import Counts, MicroBatch, Reads, count_tokens, hidden_states, with_router
from moai_llm.training.precision import AUTOCAST, Precision
from moai_llm.training.reference import fingerprint_of


class Distillation:
    """A student beside its teacher.

    Args:
        tokens: in the vocabulary; rows of the embeddings beyond it are padding.
        teacher: its model directory, and `load` reads it.
    """

    reads: Reads = "rows"

    def __init__(self, loss: DistillationLoss, tokens: int, teacher: Path, load: Callable[[], MoaiForCausalLM]) -> None:
        self.loss, self.tokens, self.path, self.load = loss, tokens, teacher, load
        self.teacher: MoaiForCausalLM | None = None

    def identity(self) -> dict[str, str]:
        return {"teacher": fingerprint_of(self.path)}

    def prepare(self, model: MoaiForCausalLM, store: Any, precision: Precision, **_: Any) -> None:
        dtype = AUTOCAST[precision.name] or torch.float32  # what the products run in anyway
        teacher = self.load().to(device=precision.device, dtype=dtype)  # type: ignore[call-arg]
        self.teacher = teacher.eval().requires_grad_(False)

    def look_ahead(self, *_: Any) -> None:
        pass

    def count(self, batches: Sequence[Batch]) -> Counts:
        tokens = count_tokens(batches)
        return Counts(tokens, tokens)

    def forward(
        self,
        model: MoaiForCausalLM,
        batch: Batch,
        counts: Counts,
        *,
        router_load: Tensor | None = None,
        noise_key: Tensor | None = None,
    ) -> MicroBatch:
        assert self.teacher is not None
        with torch.no_grad():
            theirs, _ = hidden_states(self.teacher, batch)
        output, targets = hidden_states(model, batch, noise_key)
        sums = self.loss.sums(_head(model, output), _head(self.teacher, theirs), targets.flatten(), self.tokens)
        numbers = {"loss": sums.cross_entropy, "kl": sums.forward}
        if self.loss.terms.reverse:
            numbers["reverse_kl"] = sums.reverse
        means = {name: value / counts.targets for name, value in numbers.items()}
        return with_router(sums.objective / counts.targets, means, model, output, counts, router_load)


def _head(model: MoaiForCausalLM, output: Any) -> Head:
    return Head(output.last_hidden_state.flatten(0, 1), model.lm_head.weight)
