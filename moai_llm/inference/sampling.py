"""How the next token is chosen: the settings of a request, and the choice for a whole batch at once.

A filter works on logits sorted from the most likely on, so that its definition is a line each. Every request draws from
a generator of its own: its seed gives the same text alone and in any batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moai_llm.runtime import MoaiError

NO = -torch.inf


@dataclass(frozen=True)
class Sampling:
    """How a text goes on. temperature 0 is greedy. Penalties come first, then the temperature, then the filters in
    the order of the fields, each on what the one before has left.
    """

    max_new_tokens: int = 128
    temperature: float = 0.8
    #: only so many of the most likely tokens; 0: all
    top_k: int = 50
    #: the smallest set of tokens that holds this probability (nucleus, arXiv 1904.09751, section 3.1)
    top_p: float = 0.95
    #: logits of tokens of the prompt or the answer are divided (or, below 0, multiplied) by it (1909.05858, 4.1)
    repetition_penalty: float = 1.0
    seed: int | None = None
    #: tokens at least this times as likely as the most likely one (arXiv 2407.01082)
    min_p: float = 0.0
    #: of the tokens whose surprise is closest to the expected one, the smallest set of this probability (2202.00666)
    typical_p: float = 1.0
    #: subtracted from the logit of each token of the answer
    presence_penalty: float = 0.0
    #: subtracted as often as the token is in the answer
    frequency_penalty: float = 0.0
    #: texts that end the answer, and are not part of it
    stop: tuple[str, ...] = ()
    #: report the log probability of each token, and of so many of the most likely ones
    logprobs: int | None = None

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": self.max_new_tokens >= 1, "temperature": 0 <= self.temperature < torch.inf,
            "top_k": self.top_k >= 0, "top_p": 0 < self.top_p <= 1, "min_p": 0 <= self.min_p <= 1,
            "typical_p": 0 < self.typical_p <= 1, "repetition_penalty": 0 < self.repetition_penalty < torch.inf,
            "presence_penalty": abs(self.presence_penalty) < torch.inf,
            "frequency_penalty": abs(self.frequency_penalty) < torch.inf,
            "stop": all(self.stop) and not isinstance(self.stop, str), "logprobs": (self.logprobs or 0) >= 0,
            "seed": -(2**63) <= (self.seed or 0) < 2**64,
        }  # fmt: skip
        for name, fine in checks.items():
            if not fine:
                raise MoaiError(f"{name} = {getattr(self, name)!r} is out of range")

    @property
    def penalises(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


class Draw:
    """What one request remembers between tokens: its random numbers, and which tokens were there."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self.sampling = sampling
        self.generator = torch.Generator()
        self.generator.manual_seed(sampling.seed) if sampling.seed is not None else self.generator.seed()
        self.prompt = set(prompt) if sampling.repetition_penalty != 1.0 else set()
        self.answer: Counter[int] = Counter()

    def add(self, token: int) -> None:
        """The token has become part of the answer."""
        if self.sampling.penalises:
            self.answer[token] += 1

    def uniform(self) -> float:
        return float(torch.rand((), generator=self.generator, dtype=torch.float64))


class Choice(NamedTuple):
    """`logprob` and `top` are of the model's own distribution, before penalties, temperature and filters."""

    token: int
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None


class Distribution(NamedTuple):
    """What a row draws from: `probabilities` (M,) fp64 of the tokens `ids` (M,)."""

    probabilities: Tensor
    ids: Tensor

    def at(self, uniform: float) -> int:
        """The token at this point of the cumulative distribution."""
        reached = self.probabilities.cumsum(0)
        place = torch.searchsorted(reached, uniform * reached[-1:], right=True)
        return int(self.ids[min(int(place), int(self.probabilities.nonzero()[-1]))])  # a product may round up to 1

    def of(self, token: int) -> float:
        return float(self.probabilities[self.ids == token].sum())


def choose(logits: Tensor, draws: Sequence[Draw]) -> list[Choice]:
    """One token for each row of logits (B, V)."""
    adjusted = penalised(logits, draws)
    tokens = adjusted.argmax(-1).tolist()
    warm = [i for i, draw in enumerate(draws) if draw.sampling.temperature > 0]
    for i, distribution in zip(warm, distributions(adjusted, [draws[i] for i in warm], warm)):
        tokens[i] = distribution.at(draws[i].uniform())
    return [reported(row, token, draw) for row, token, draw in zip(logits, tokens, draws)]


def reported(logits: Tensor, token: int, draw: Draw) -> Choice:
    """The choice of a token, with what the request wants to know of the logits (V,) it was chosen from."""
    count = draw.sampling.logprobs
    if count is None:
        return Choice(token)
    logprobs = logits.to(torch.float64).log_softmax(-1)
    best = logprobs.topk(min(count, len(logprobs)))
    return Choice(token, float(logprobs[token]), list(zip(best.indices.tolist(), best.values.tolist())))


def penalised(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Logits (B, V) less what the tokens that were there cost."""
    if not any(draw.sampling.penalises for draw in draws):
        return logits
    logits = logits.clone()
    for row, draw in zip(logits, draws):
        sampling = draw.sampling
        seen = sorted(draw.prompt | draw.answer.keys()) if sampling.repetition_penalty != 1.0 else []
        if seen:
            ids = torch.tensor(seen, device=row.device)
            values, penalty = row[ids], sampling.repetition_penalty
            row[ids] = torch.where(values > 0, values / penalty, values * penalty)
        if draw.answer and (sampling.presence_penalty or sampling.frequency_penalty):
            ids = torch.tensor(list(draw.answer), device=row.device)
            times = torch.tensor(list(draw.answer.values()), device=row.device, dtype=row.dtype)
            row[ids] -= sampling.presence_penalty + sampling.frequency_penalty * times
    return logits


def distributions(logits: Tensor, draws: Sequence[Draw], rows: Sequence[int]) -> list[Distribution]:
    """What each of these rows of penalised logits (B, V) draws from; their temperatures are above 0."""
    result: dict[int, Distribution] = {}
    groups: dict[str, list[int]] = {"top_k": [], "sorted": [], "plain": []}
    for i, draw in enumerate(draws):
        s = draw.sampling
        kind = "plain" if s.top_p == s.typical_p == 1 and s.min_p == 0 else "sorted"
        groups["top_k" if 0 < s.top_k < logits.shape[-1] else kind].append(i)
    for kind, group in groups.items():
        if not group:
            continue
        samplings, chosen = [draws[i].sampling for i in group], logits[[rows[i] for i in group]]
        if kind == "top_k":  # the best are few among many: to find them is several times faster than to sort all
            values, ids = chosen.topk(max(s.top_k for s in samplings))
        elif kind == "sorted":
            values, ids = chosen.sort(stable=True, dim=-1, descending=True)
        else:
            values, ids = chosen, torch.arange(logits.shape[-1], device=logits.device).expand_as(chosen)
        kept = filtered(values.to(torch.float64), samplings)
        result.update({i: Distribution(p, these) for i, p, these in zip(group, kept.softmax(-1), ids)})
    return [result[i] for i in range(len(draws))]


def filtered(values: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Temperature and filters on logits (B, M) fp64 that fall along each row; what goes becomes -inf. A filter keeps at
    least one token.
    """

    def column(name: str) -> Tensor:
        return torch.tensor([[float(getattr(s, name))] for s in samplings], dtype=torch.float64, device=values.device)

    values = values / column("temperature")
    place = torch.arange(values.shape[-1], device=values.device)
    top_k = column("top_k")
    values = values.masked_fill((top_k > 0) & (place >= top_k), NO)
    if any(s.top_p < 1 for s in samplings):
        p = values.softmax(-1)
        values = values.masked_fill((p.cumsum(-1) - p >= column("top_p")) & (place > 0), NO)
    if any(s.min_p > 0 for s in samplings):
        p = values.softmax(-1)
        values = values.masked_fill((p < column("min_p") * p[:, :1]) & (place > 0), NO)
    if any(s.typical_p < 1 for s in samplings):
        values = torch.where(column("typical_p") < 1, _typical(values, column("typical_p")), values)
    return values


def _typical(values: Tensor, mass: Tensor) -> Tensor:
    logp = values.log_softmax(-1)
    p = logp.exp()
    entropy = -(p * logp).nan_to_num(0.0).sum(-1, keepdim=True)
    order = (-logp - entropy).abs().sort(stable=True, dim=-1).indices
    ordered = p.gather(-1, order)
    leave = ordered.cumsum(-1) - ordered >= mass
    leave[:, 0] = False
    return values.masked_fill(torch.zeros_like(leave).scatter(-1, order, leave), NO)
