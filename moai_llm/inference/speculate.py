"""Speculative decoding: guess a few tokens cheaply, and let the model check all of them in one forward.

A guess changes the speed and not the text. Guesses that nothing was drawn for (looked up, or greedy) are compared with
what the model chooses anyhow, by the request's own random numbers, so even a sampled text stays the same. Guesses drawn
from a draft model's distribution q are taken with probability min(1, p / q), and else the token comes from what p has
more than q: the text is another one, of exactly the model's distribution p (Leviathan et al., arXiv 2211.17192,
section 2.3).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from moai_llm.inference.load import TextModel
from moai_llm.inference.prefix import common
from moai_llm.inference.sampling import Choice, Distribution, Draw, choose, distributions, penalised, reported
from moai_llm.modeling.slots import SlotCache, fits_slots
from moai_llm.runtime import MoaiError


@dataclass
class Guess:
    """Tokens to check, and the distributions they were drawn from; those are missing where nothing was drawn."""

    tokens: list[int] = field(default_factory=list)
    drawn_from: list[Distribution] | None = None


class Drafter(Protocol):
    """What can guess how a text goes on."""

    def guess(self, tokens: list[int], count: int, draw: Draw) -> Guess:
        """At most `count` tokens after `tokens`."""


class PromptLookup:
    """What came after the last time that the text had its present end (prompt lookup decoding). Good where an answer
    repeats its prompt: code to be changed, a text to be summed up.

    Args:
        longest: tokens of the end to look for, then fewer.
    """

    def __init__(self, longest: int = 3) -> None:
        self.longest = longest
        self._text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # an end -> where the latest text after it begins

    def guess(self, tokens: list[int], count: int, draw: Draw) -> Guess:
        known = len(self._text)
        if tokens[:known] != self._text:  # another text
            self._after, known = {}, 0
        found = 0
        for stop in range(max(known, 1), len(tokens) + 1):
            for size in range(min(self.longest, stop), 0, -1):
                end = tuple(tokens[stop - size : stop])
                if stop == len(tokens):
                    found = found or self._after.get(end, 0)
                else:
                    self._after[end] = stop
        self._text = tokens[:-1]  # its own end has no text after it yet
        return Guess(tokens[found : found + count] if found else [])


class DraftModel:
    """A smaller model of the same tokenizer.

    Raises:
        MoaiError: its tokenizer is another one, or it is of a class whose cache has no slots.
    """

    def __init__(self, draft: TextModel, target: TextModel) -> None:
        if draft.tokenizer.fingerprint != target.tokenizer.fingerprint:
            raise MoaiError(
                f"{draft.path} has another tokenizer than {target.path}: a draft model must have the same one"
            )
        if not fits_slots(draft.model.config):
            raise MoaiError(f"{draft.path} is a {type(draft.model).__name__}: bring it here with `moai import`")
        self.model, self.size = draft.model, draft.tokenizer.vocab_size
        self.context = draft.context
        self._stops = set(draft.tokenizer.stop_ids)
        self._cache = SlotCache(draft.model.config)
        self._held: list[int] = []
        self._certain: tuple[int, list[tuple[Tensor, Tensor]]] = (0, [])  # states before the last guesses

    def guess(self, tokens: list[int], count: int, draw: Draw) -> Guess:
        if len(tokens) + count > self.context:
            return Guess()
        self._return_to(tokens)
        logits = self._feed(tokens[len(self._held) :])
        if self._cache.has_states:
            self._certain = len(self._held), self._cache.keep_states(0)
        result = Guess([], [] if draw.sampling.temperature > 0 else None)
        while True:
            if result.drawn_from is None:
                token = int(logits.argmax())
            else:
                result.drawn_from.append(distributions(logits[None], [draw], [0])[0])
                token = result.drawn_from[-1].at(draw.uniform())
            result.tokens.append(token)
            if len(result.tokens) == count or token in self._stops:
                return result
            logits = self._feed([token])

    def _return_to(self, tokens: list[int]) -> None:
        """Forget what the model holds beyond these tokens."""
        length = min(common(self._held, tokens), len(tokens) - 1)
        if length == len(self._held):
            return
        if self._cache.has_states:
            if self._certain[0] > length or not self._certain[1]:
                length = 0
                self._cache.clear(0)
            else:
                length = self._certain[0]
                self._cache.put_states(0, self._certain[1])
        self._cache.cut(0, length)
        self._held = self._held[:length]

    def _feed(self, tokens: list[int]) -> Tensor:
        ids = torch.tensor([tokens], device=self.model.device)
        output = self.model(input_ids=ids, past_key_values=self._cache.select(0), use_cache=True, logits_to_keep=1)
        self._held += tokens
        return output.logits[0, -1, : self.size].float()


def checked(logits: Tensor, guess: Guess, draw: Draw, stops: set[int]) -> tuple[list[Choice], int]:
    """What the model says: the guesses it takes over and the one token after them, and how many it took.

    Args:
        logits: (guesses + 1, V), after the text and after each guess.
    """
    choices: list[Choice] = []
    for i, row in enumerate(logits):
        guessed = guess.tokens[i] if i < len(guess.tokens) else None
        if guess.drawn_from is None or guessed is None:
            choice = choose(row[None], [draw])[0]
        else:
            choice = _taken_or_other(row, guessed, guess.drawn_from[i], draw)
        choices.append(choice)
        draw.add(choice.token)
        if choice.token != guessed:
            return choices, i
        if choice.token in stops:
            return choices, i + 1
    raise AssertionError("the last row has no guess, so the loop has returned")


def _taken_or_other(logits: Tensor, guessed: int, q: Distribution, draw: Draw) -> Choice:
    p = distributions(penalised(logits[None], [draw]), [draw], [0])[0]
    if draw.uniform() * q.of(guessed) < p.of(guessed):
        return reported(logits, guessed, draw)
    size = logits.shape[-1]
    more = (_dense(p, size) - _dense(q, size)).clamp_min(0)
    if not more.any():  # p and q are equal but for rounding
        more = _dense(p, size)
    other = Distribution(more, torch.arange(size, device=more.device)).at(draw.uniform())
    return reported(logits, other, draw)


def _dense(distribution: Distribution, size: int) -> Tensor:
    dense = torch.zeros(size, dtype=torch.float64, device=distribution.ids.device)
    return dense.index_add_(0, distribution.ids, distribution.probabilities)
