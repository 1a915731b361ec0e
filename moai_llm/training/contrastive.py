"""Training on texts that belong together: which of all texts of a step is the right answer to each.

Every text is compared with all of the step, over all its micro-batches, so a step cannot be cut into sums as other
losses can. It goes twice through the model instead (GradCache, arXiv 2101.06983): once without gradients for the
vectors, whose gradient the loss then gives, and once more, a micro-batch at a time, to carry that gradient on. Memory
for activations is that of one micro-batch, and the step is the step of one big batch, dropout included: what is drawn
in the first pass is drawn again in the second.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moai_llm.data.embedding_store import ANCHOR, RIGHT, WRONG
from moai_llm.data.loader import Batch
from moai_llm.losses import ContrastiveLoss
from moai_llm.modeling.embedding import MoaiEmbeddingOutput, MoaiForEmbedding
from moai_llm.ops.contrastive import info_nce, meanings, pair_margin
from moai_llm.ops.gather import gather_rows
from moai_llm.training.objective import Counts, MicroBatch, Reads, add_up, with_router
from moai_llm.training.precision import Precision

SCORES = 1 << 24  # in memory at a time


class Texts(NamedTuple):
    """What is known of texts beside their vectors, (n,) each."""

    record: Tensor
    role: Tensor
    score: Tensor
    text: Tensor

    @classmethod
    def of(cls, batch: Batch) -> Texts:
        there = batch["role"] > 0
        return cls(*(batch[name][there] for name in cls._fields))

    @classmethod
    def joined(cls, several: Sequence[Texts]) -> Texts:
        return cls(*(torch.cat(parts) for parts in zip(*several)))

    def gathered(self) -> Texts:
        return Texts(*map(gather_rows, self))


class _Planned(NamedTuple):
    """What the first pass found for a micro-batch."""

    random: RandomState
    gradient: Tensor  # (n, D) of the loss by its vectors
    of_scale: Tensor | None  # by the logarithm of a learned scale, with the first micro-batch
    loss: Tensor  # () of the whole step, with the first micro-batch
    numbers: dict[str, Tensor]


class RandomState:
    """Of torch's generators, to draw the same numbers again."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._cpu = device, torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


class Contrastive:
    """Texts that belong together, by a loss over their vectors."""

    reads: Reads = "embedding"

    def __init__(self, loss: ContrastiveLoss) -> None:
        self.loss = loss
        self._planned: deque[_Planned] = deque()

    def identity(self) -> dict[str, str]:
        return {}

    def prepare(self, *_: Any, **__: Any) -> None:
        pass

    def count(self, batches: Sequence[Batch]) -> Counts:
        texts = [Texts.of(batch) for batch in batches]
        tokens = sum(int((batch["seq_idx"] < batch["role"].shape[1]).sum()) for batch in batches)
        return Counts(int(_targets(self.loss, Texts.joined(texts)).sum()), tokens)

    def look_ahead(self, model: Any, parts: Sequence[tuple[Batch, Tensor]], precision: Precision) -> None:
        """The first pass, where there are several micro-batches."""
        model.bound_scale()
        self._planned.clear()
        if len(parts) < 2:
            return
        counted = model.model.expert_counts.clone()  # both passes count, and one is enough
        states, vectors = [], []
        with torch.no_grad():
            for batch, key in parts:
                states.append(RandomState(precision.device))
                with precision.autocast():
                    vectors.append(_vectors(_output(model, batch, key), batch))
        model.model.expert_counts.copy_(counted)
        texts = Texts.joined([Texts.of(batch) for batch, _ in parts])
        loss, numbers, gradient, of_scale = self._gradient(model, torch.cat(vectors), texts)
        for i, (state, part) in enumerate(zip(states, gradient.split([len(v) for v in vectors]))):
            first = i == 0
            said = numbers if first else {}
            self._planned.append(_Planned(state, part, of_scale if first else None, loss * first, said))

    def _gradient(
        self, model: MoaiForEmbedding, vectors: Tensor, texts: Texts
    ) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor | None]:
        """The loss of a step and what is said of it, its gradient by the vectors and by a learned scale, in memory
        that does not grow with the number of scores.
        """
        with torch.enable_grad():
            own = vectors.detach().requires_grad_()
            log_scale = None if model.log_scale is None else model.log_scale.detach().requires_grad_()
            gathered = gather_rows(own)
            every = own if gathered is own else gathered.detach().requires_grad_()
            total, numbers = vectors.new_zeros(()), dict[str, Tensor]()
            for term, said in terms(self.loss, own, texts, every, texts.gathered(), log_scale):
                term.backward()
                total = total + term.detach()
                add_up(numbers, said)
            if gathered is not own:
                gathered.backward(every.grad if every.grad is not None else torch.zeros_like(every))
        assert own.grad is not None
        return total, numbers, own.grad, None if log_scale is None else log_scale.grad

    def forward(
        self,
        model: Any,
        batch: Batch,
        counts: Counts,
        *,
        router_load: Tensor | None = None,
        noise_key: Tensor | None = None,
    ) -> MicroBatch:
        if not self._planned:
            output, texts = _output(model, batch, noise_key), Texts.of(batch)
            own, numbers = _vectors(output, batch), dict[str, Tensor]()
            loss = own.sum() * 0.0
            every = gather_rows(own)
            for term, said in terms(self.loss, own, texts, every, texts.gathered(), model.log_scale):
                loss = loss + term
                add_up(numbers, said)
            return self._made(loss, numbers, model, output, counts, router_load)
        planned = self._planned.popleft()
        planned.random.restore()
        output = _output(model, batch, noise_key)
        carried = (_vectors(output, batch) * planned.gradient).sum()
        if planned.of_scale is not None:
            carried = carried + model.log_scale * planned.of_scale
        loss = carried - carried.detach() + planned.loss  # the value of the loss, the gradient of what carries it
        return self._made(loss, planned.numbers, model, output, counts, router_load)

    def _made(
        self, loss: Tensor, numbers: dict[str, Tensor], model: Any, output: MoaiEmbeddingOutput, counts: Counts,
        load: Tensor | None,
    ) -> MicroBatch:  # fmt: skip
        if numbers and model.log_scale is not None:
            numbers = {**numbers, "temperature": (-model.log_scale.detach()).exp()}
        return with_router(loss, {"loss": loss.detach(), **numbers}, model, output, counts, load)  # type: ignore[arg-type]


def _output(model: MoaiForEmbedding, batch: Batch, key: Tensor | None) -> MoaiEmbeddingOutput:
    output: MoaiEmbeddingOutput = model(
        batch["input_ids"], position_ids=batch["position_ids"], seq_idx=batch["seq_idx"],
        documents=batch["role"].shape[1], noise_key=key,
    )  # fmt: skip
    return output


def _vectors(output: MoaiEmbeddingOutput, batch: Batch) -> Tensor:
    """(texts, D), fp32 or fp64."""
    assert output.embeddings is not None
    return output.embeddings[batch["role"] > 0]


def right_answers(loss: ContrastiveLoss, texts: Texts) -> Tensor:
    """(n,) bool."""
    return (texts.role == RIGHT) & ((texts.score < 0) | (texts.score >= loss.positive_score))


def _targets(loss: ContrastiveLoss, texts: Texts) -> Tensor:
    """(n,) bool, over which the loss is a mean: anchors that have a right answer, or answers."""
    if loss.kind != "info_nce":
        return texts.role != ANCHOR
    return (texts.role == ANCHOR) & torch.isin(texts.record, texts.record[right_answers(loss, texts)])


def terms(
    loss: ContrastiveLoss, own: Tensor, texts: Texts, every: Tensor, all_texts: Texts, log_scale: Tensor | None
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Parts of a step's loss that add up to it, each with a graph of its own, and what is said of the step.

    Args:
        own: (n, D) vectors of this rank's texts. every: those of all ranks; the loss of all is the sum over the ranks.
        log_scale: of a learned temperature.
    """
    with torch.autocast(own.device.type, enabled=False):
        count = _targets(loss, all_texts).sum().clamp_min(1)
        if loss.kind == "info_nce":
            yield from _info_nce_terms(loss, own, texts, every, all_texts, log_scale, count)
        else:
            yield _pair_term(loss, own, texts, count)


def _info_nce_terms(
    loss: ContrastiveLoss, own: Tensor, texts: Texts, every: Tensor, all_texts: Texts, log_scale: Tensor | None,
    count: Tensor,
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:  # fmt: skip
    right = right_answers(loss, all_texts)
    meaning = meanings(all_texts.text, all_texts.record, (all_texts.role == ANCHOR) | right)
    known, order = all_texts.text.sort()
    mine = meaning[order[torch.searchsorted(known, texts.text)]]
    anchors, answers = (all_texts.role == ANCHOR).nonzero()[:, 0], (all_texts.role != ANCHOR).nonzero()[:, 0]
    share = 0.5 if loss.symmetric else 1.0

    def rows_of(queries: Tensor, candidates: Tensor, may: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """(loss, whether the best candidate is right, whether there is a right one, which queries), some at a time."""
        for part in queries.split(max(1, SCORES // max(1, len(candidates)))):
            scores = own[part] @ every[candidates].T
            positive = (texts.record[part, None] == all_texts.record[candidates]) & may
            excluded = torch.zeros_like(positive)
            if loss.mask_equal:
                excluded = mine[part, None] == meaning[candidates]
            scale = loss.scale if log_scale is None else log_scale.exp()
            found = info_nce(scores, positive, excluded, margin=loss.margin, scale=scale, inside=loss.inside)
            seen = scores.detach().masked_fill(excluded & ~positive, -torch.inf)
            best = seen.argmax(1, keepdim=True)
            yield found, positive.gather(1, best)[:, 0], positive.any(1), part

    own_anchors = (texts.role == ANCHOR).nonzero()[:, 0]
    for found, best, some, _ in rows_of(own_anchors, answers, right[answers]):
        said = {"accuracy": best.sum().to(own.dtype) / count, "pairs": some.sum().to(own.dtype)}
        yield share * found.sum() / count, said
    if loss.symmetric:
        of_record = {
            name: torch.bincount(all_texts.record[chosen], minlength=int(all_texts.record.max()) + 1)
            for name, chosen in (("anchors", anchors), ("rights", right.nonzero()[:, 0]))
        }
        own_rights = right_answers(loss, texts).nonzero()[:, 0]
        for found, _, _, part in rows_of(own_rights, anchors, torch.ones_like(anchors, dtype=torch.bool)):
            record = texts.record[part]
            weight = of_record["anchors"][record] / of_record["rights"][record].to(own.dtype)
            yield share * (found * weight).sum() / count, {}


def _pair_term(loss: ContrastiveLoss, own: Tensor, texts: Texts, count: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    place = torch.arange(len(own), device=own.device)
    anchor = torch.where(texts.role == ANCHOR, place, 0).cummax(0).values  # a record's texts follow its anchor
    answers = (texts.role != ANCHOR).nonzero()[:, 0]
    cosine = (own[anchor[answers]] * own[answers]).sum(1)
    graded = texts.score[answers].to(own.dtype)
    right = texts.role[answers] == RIGHT
    target = torch.where(graded >= 0, graded, right.to(own.dtype))
    found = (cosine - target).square() if loss.kind == "cosine" else pair_margin(cosine, target, loss.margin)
    said = {"pairs": torch.tensor(float(len(answers)), device=own.device)}
    for name, role in (("cosine_right", RIGHT), ("cosine_wrong", WRONG)):
        of_role = texts.role[answers] == role
        if of_role.any():
            said[name] = cosine.detach()[of_role].mean()
    return found.sum() / count, said
