"""What a run is trained for, as the loop sees it: what it reads, over what the loss of a step is a mean, and the
loss of one micro-batch. The next token is here; pairs of answers and a teacher are in files of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from moai_llm.data.loader import Batch
from moai_llm.data.shards import Store
from moai_llm.losses import shift_labels
from moai_llm.modeling.model import MoaiForCausalLM, MoaiModelOutput, router_loss
from moai_llm.training.precision import Precision

Reads = Literal["rows", "preference", "embedding"]


class Counts(NamedTuple):
    """Of all micro-batches of a step, before the first backward."""

    targets: int  # the loss of the step is the mean over them: tokens, or pairs
    tokens: int  # tokens to learn, over which the router's losses are means


class MicroBatch(NamedTuple):
    """A part of a step. All of it is divided by the counts of the whole step, so that the parts add up."""

    loss: Tensor  # () carries the gradient
    numbers: dict[str, Tensor]  # () each; what is logged, `loss` and `objective` (all of the loss) among them


class Objective(Protocol):
    """Another kind of training is another class of this shape."""

    @property
    def reads(self) -> Reads:
        """Rows of text and conversations, preference pairs, or records of texts that belong together."""

    def identity(self) -> dict[str, str]:
        """Digests of what the loss depends on beside the data; a resumed run must find the same."""

    def prepare(
        self, model: MoaiForCausalLM, store: Store, precision: Precision, *, resumed: bool, quiet: bool
    ) -> None:
        """What has to be there before the first step. Unless the run is resumed, `model` is as it starts."""

    def count(self, batches: Sequence[Batch]) -> Counts: ...

    def look_ahead(self, model: Any, parts: Sequence[tuple[Batch, Tensor]], precision: Precision) -> None:
        """Called before the first `forward` of a step with all its micro-batches and their noise keys, for a loss in
        which each of them depends on all.
        """

    def forward(
        self,
        model: MoaiForCausalLM,
        batch: Batch,
        counts: Counts,
        *,
        router_load: Tensor | None = None,
        noise_key: Tensor | None = None,
    ) -> MicroBatch: ...


class NextToken:
    """The next token, by the loss that the model holds: pretraining and fine-tuning."""

    reads: Reads = "rows"

    def identity(self) -> dict[str, str]:
        return {}

    def prepare(self, *_: Any, **__: Any) -> None:
        pass

    def look_ahead(self, *_: Any) -> None:
        pass

    def count(self, batches: Sequence[Batch]) -> Counts:
        tokens = count_tokens(batches)
        return Counts(tokens, tokens)

    def forward(self, model: MoaiForCausalLM, batch: Batch, counts: Counts, **given: Any) -> MicroBatch:
        output = model(**batch, num_items_in_batch=counts.targets, use_cache=False, **given)
        numbers = {"loss": output.cross_entropy, "objective": output.loss.detach()}
        return MicroBatch(output.loss, numbers if output.aux_loss is None else {**numbers, "aux_loss": output.aux_loss})


def count_tokens(batches: Sequence[Batch]) -> int:
    """Tokens to predict; the first of a row is never one."""
    return sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)


def hidden_states(
    model: MoaiForCausalLM, batch: Batch, noise_key: Tensor | None = None
) -> tuple[MoaiModelOutput, Tensor]:
    """The model's output for a packed batch, and the target of each position (B, L); -100 where there is none."""
    targets = shift_labels(batch["labels"])
    output = model.model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        seq_idx=batch["seq_idx"],
        token_mask=targets != -100,
        noise_key=noise_key,
        use_cache=False,
    )
    return output, targets


def with_router(
    loss: Tensor,
    numbers: dict[str, Tensor],
    model: MoaiForCausalLM,
    output: MoaiModelOutput,
    counts: Counts,
    load: Tensor | None,
) -> MicroBatch:
    """A micro-batch's loss with the router's losses on top, where the model has a router."""
    if output.router is not None:
        aux = router_loss(model.config, output.router, counts.tokens, load)
        loss, numbers = loss + aux, {**numbers, "aux_loss": aux.detach()}
    return MicroBatch(loss, {**numbers, "objective": loss.detach()})


def add_up(sums: dict[str, Tensor], numbers: dict[str, Tensor]) -> None:
    """Add the numbers of a micro-batch to those of the step so far."""
    for name, value in numbers.items():
        sums[name] = sums[name] + value.float() if name in sums else value.float()


def to_floats(sums: dict[str, Tensor]) -> dict[str, float]:
    """All numbers at once: a device is waited for once."""
    return dict(zip(sums, torch.stack(list(sums.values())).tolist()))
