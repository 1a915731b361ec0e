"""Losses over representations: which of many texts belongs to which. Queries are rows, candidates are columns.

What counts as the right answer and what is no answer at all are masks, so in-batch negatives, given hard negatives,
several right answers and false negatives are all the same op.
"""

from __future__ import annotations

import torch
from torch import Tensor


def info_nce(
    scores: Tensor, positive: Tensor, excluded: Tensor, *, margin: float = 2.0, scale: Tensor | float = 1.0,
    inside: bool = False,
) -> Tensor:  # fmt: skip
    """(n,) loss of each query; 0 where it has no right answer.

    One right answer: -log softmax of its score (InfoNCE, arXiv 1807.03748). Several: the mean of that over them
    (arXiv 2004.11362, eq. 2), or with `inside` minus the log of the mean of their probabilities (eq. 3).

    Args:
        scores: (n, m) similarity of each query and candidate, not yet scaled; fp32 or fp64.
        positive: (n, m) bool, right answers.
        excluded: (n, m) bool, candidates that are neither right nor wrong; a right answer is never excluded.
        margin: a wrong answer that scores more than this above the best right one is taken for an unlabelled right
            one and excluded too (arXiv 2506.05176, section 3.2); cosines never differ by more than 2.
        scale: one over the temperature.
    """
    best = scores.masked_fill(~positive, -torch.inf).amax(1, keepdim=True).detach()
    out = (excluded | (scores.detach() > best + margin)) & ~positive
    some = positive.any(1)
    logits = (scores * scale).masked_fill(out, -torch.inf)
    log_p = logits - logits.masked_fill(~some[:, None], 0).logsumexp(1, keepdim=True)
    count = positive.sum(1).clamp_min(1)
    if inside:
        right = log_p.masked_fill(~positive, -torch.inf).masked_fill(~some[:, None], 0)
        return torch.where(some, count.to(scores.dtype).log() - right.logsumexp(1), 0)
    return -torch.where(positive, log_p, 0).sum(1) / count


def pair_margin(cosine: Tensor, target: Tensor, margin: float) -> Tensor:
    """(n,) half of t d^2 + (1 - t) max(0, margin - d)^2 with d = 1 - cosine: what belongs together is drawn close, the
    rest is pushed `margin` away (Hadsell, Chopra and LeCun, CVPR 2006, eq. 4). `target` t is 1 or 0, or in between.
    """
    distance = 1 - cosine
    return 0.5 * (target * distance.square() + (1 - target) * (margin - distance).clamp_min(0).square())


def meanings(text: Tensor, record: Tensor, merges: Tensor) -> Tensor:
    """(n,) int64, equal for documents that are known to mean the same: equal texts do, and so do those that `merges`
    of a record say, its anchor and its right answers; and whatever follows from that.

    Args:
        text: (n,) int64, equal where the texts are.
        record: (n,) int64, the record a document belongs to.
        merges: (n,) bool; a wrong answer means the same as nothing else in its record.
    """
    _, text = text.unique(return_inverse=True)
    _, record = record.unique(return_inverse=True)
    texts, records = int(text.max()) + 1 if len(text) else 0, int(record.max()) + 1 if len(record) else 0
    found = torch.arange(texts, device=text.device)
    while True:  # the smallest number spreads over each set of texts that are connected
        of_record = torch.full((records,), texts, device=text.device, dtype=torch.int64)
        of_record = of_record.scatter_reduce(0, record[merges], found[text[merges]], "amin")
        spread = found.scatter_reduce(0, text[merges], of_record[record[merges]], "amin")
        spread = spread[spread]
        if torch.equal(spread, found):
            return found[text]
        found = spread
