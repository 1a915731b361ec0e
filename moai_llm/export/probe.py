"""Whether two models say the same: the inputs they are asked, and how far their answers are apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moai_llm.data.embedded import sample_texts
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer

TOLERANCE = 1e-4  # of the largest logit, or of one where all are smaller: sums of fp32 in another order
LONG = 1024  # tokens of the longest input, or the context of the model where that is shorter
KEPT = 64  # positions of each input that are compared, from its end


class Difference(NamedTuple):
    """Between the logits of two models.

    Attributes:
        largest: of all differences, absolute.
        scale: the largest logit, absolute.
        divergence: mean KL divergence from the first model's next-token distribution to the second's, in nats.
        agree: share of positions whose most likely token is the same.
        positions: how many were compared.
        beyond: at how many of them a difference is more than `allowed`.
        longest: tokens of the longest input.
    """

    largest: float
    scale: float
    divergence: float
    agree: float
    positions: int
    beyond: int
    longest: int

    @property
    def allowed(self) -> float:
        return TOLERANCE * max(1.0, self.scale)

    def __str__(self) -> str:
        return (
            f"largest difference {self.largest:.1e} (largest logit {self.scale:.3g}) at {self.positions} positions, "
            f"inputs of up to {self.longest} tokens"
        )


def inputs(tokenizer: Tokenizer, vocab_size: int, context: int) -> list[Tensor]:
    """Token ids (1, L): random ones, a text of each language, and a long text."""
    generator = torch.Generator().manual_seed(0)
    found = [torch.randint(0, vocab_size, (1, min(33, context)), generator=generator)]
    texts = sample_texts()
    found += [torch.tensor([tokenizer.encode(documents[0])[: min(96, context)]]) for documents in texts.values()]
    ids = tokenizer.encode("\n\n".join(text for documents in texts.values() for text in documents))
    long = min(LONG, context)
    found.append(torch.tensor([(ids * (1 + long // max(1, len(ids))))[:long]]))
    return [ids for ids in found if ids.shape[1]]


@torch.inference_mode()
def answers(model: Any, asked: Sequence[Tensor], progress: Callable[[int], None] = lambda done: None) -> list[Tensor]:
    """Logits (positions, V) in fp32 of the last positions of each input."""
    device = next(model.parameters()).device
    kept = []
    for done, ids in enumerate(asked, 1):
        logits = model(input_ids=ids.to(device), use_cache=False).logits[0, -KEPT:]
        kept.append(logits.float().cpu().clone())
        progress(done)
    return kept


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor], asked: Sequence[Tensor]) -> Difference:
    """Over all inputs. NaN counts as an infinite difference."""
    scale = max(logits.abs().max().item() for logits in ours)
    apart = torch.cat([(mine - other).abs().amax(-1) for mine, other in zip(ours, theirs, strict=True)])
    apart = apart.nan_to_num(nan=float("inf"), posinf=float("inf"))
    divergence = agree = 0.0
    for mine, other in zip(ours, theirs):
        p, q = mine.double().log_softmax(-1), other.double().log_softmax(-1)
        divergence += (p.exp() * (p - q)).sum().item()
        agree += (mine.argmax(-1) == other.argmax(-1)).sum().item()
    count, longest = len(apart), max(ids.shape[1] for ids in asked)
    found = Difference(apart.max().item(), scale, divergence / count, agree / count, count, 0, longest)
    return found._replace(beyond=int((apart > found.allowed).sum()))


def require_equal(found: Difference, what: str, experts: bool) -> list[str]:
    """Refuse a difference that is more than rounding: then a file must not be used.

    Args:
        experts: whether the model has a router. Where two experts are as good as equal, the last bit decides between
            them, and another one is another answer: that may happen at one position in a hundred.

    Returns:
        What people should know of it.

    Raises:
        MoaiError: it is refused.
    """
    if found.beyond > (found.positions // 100 if experts else 0):
        raise MoaiError(
            f"{what} does not compute what the model computes: {found}, allowed is {found.allowed:.1e}. Nothing was "
            "kept; please report this with the model's config.json"
        )
    if not found.beyond:
        return []
    return [f"at {found.beyond} of {found.positions} positions a router between two equal experts chose the other one"]
