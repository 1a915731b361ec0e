"""Many texts at once: requests join and leave the running batch between two steps (iteration-level scheduling, Orca,
OSDI 2022).

A step is one chunk of waiting prompts, if there are any, and then one token for every running request. Short prompts
share a chunk, and a forward. So a long prompt delays the others by two chunks at most, and a finished request makes
room at once. Nothing is padded and nothing is computed twice: a slot of the cache is a row with a length of its own
(modeling/slots.py).

The engine belongs to one thread. It knows tokens and text, no connections and no files.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from moai_llm.inference.load import TextModel
from moai_llm.inference.prefix import PrefixStore, shared
from moai_llm.inference.sampling import Choice, Draw, Sampling, choose
from moai_llm.inference.speculate import Drafter, Guess, checked
from moai_llm.inference.text_stream import TextStream
from moai_llm.modeling.slots import SlotCache, fits_slots
from moai_llm.runtime import MoaiError

STOP, LENGTH, CANCELLED = "stop", "length", "cancelled"
MOST_BEHIND = 24  # certain tokens to feed again with a guess


@dataclass(eq=False)
class Request:
    """One text that is going on. Read it; only the engine writes.

    Attributes:
        limit: new tokens at most: what was asked for, or what the context has left.
        tokens: the answer so far.
        reused: tokens of the prompt that an earlier sequence had left.
        finished: why it ended; None while it goes on.
    """

    prompt: list[int]
    sampling: Sampling
    limit: int
    draw: Draw
    text: TextStream
    rope: int = 0
    tokens: list[int] = field(default_factory=list)
    fed: int = 0
    reused: int = 0
    finished: str | None = None
    marks: list[int] = field(default_factory=list)  # lengths at which its beginning is kept for others


@dataclass(frozen=True)
class Event:
    """A new token of a request, or its end. `token` is None where a stop token or a cancel ended it.

    Attributes:
        text: what the token adds to the text: whole characters, and nothing of a stop text.
        logprob: of the token, and `top` the most likely ones, where `Sampling.logprobs` asks for it.
        finished: "stop" (a stop token or text), "length", "cancelled"; None while it goes on.
    """

    request: Request
    token: int | None
    text: str = ""
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None
    finished: str | None = None


@dataclass
class Counters:
    """Sums since the engine began."""

    requests: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    decode_steps: int = 0
    guessed_tokens: int = 0
    taken_tokens: int = 0  # of the guessed ones, those that the model would have said as well
    prefill_chunks: int = 0
    prefill_forwards: int = 0  # over the pieces of one prompt or of several


class Engine:
    """Args:
        max_batch: requests that run at the same time; more wait.
        cache_tokens: tokens of finished sequences that are kept for prompts that begin like them; default four
            contexts.
        prefill_chunk: tokens of a prompt that are computed at once, and of several prompts, the last of which may go
            beyond it.
        prefix_cache: whether anything is kept.
        drafter: guesses tokens while one request runs alone (speculate.py); with several, a guess costs more than it
            saves.
        guesses: tokens it guesses at a time.
        context: prompt and answer together at most; default the model's, none for a model without attention.

    Raises:
        MoaiError: the model is of a class whose cache has no slots.
    """

    def __init__(
        self,
        text_model: TextModel,
        *,
        max_batch: int = 8,
        cache_tokens: int | None = None,
        prefill_chunk: int = 512,
        prefix_cache: bool = True,
        drafter: Drafter | None = None,
        guesses: int = 5,
        context: int | None = None,
    ) -> None:
        for name, value in (("max_batch", max_batch), ("prefill_chunk", prefill_chunk), ("guesses", guesses)):
            if value < 1:
                raise MoaiError(f"{name} = {value} must be at least 1")
        model = text_model.model
        if not fits_slots(model.config) or not hasattr(model, "model"):
            raise MoaiError(
                f"{text_model.path} is a {type(model).__name__}, which the engine cannot run in batches: bring it here "
                "with `moai import`"
            )
        self.text_model, self.max_batch, self.prefill_chunk = text_model, max_batch, prefill_chunk
        self.context = context if context is not None else context_of(text_model)
        self.counters, self._drafter, self._guesses = Counters(), drafter, guesses
        self._model, self._stops = model, set(text_model.tokenizer.stop_ids)
        self._cache = SlotCache(model.config)
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []  # the place in this list is the row of the cache
        self._prefilling: Request | None = None  # in the row after them
        self._told: list[Event] = []
        self._store: PrefixStore | None = None
        if prefix_cache:
            size = cache_tokens if cache_tokens is not None else 4 * text_model.context
            self._store = PrefixStore(size, self._cache.has_states, _token_bytes(model))

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._waiting or self._running or self._prefilling or self._told)

    @property
    def running(self) -> int:
        return len(self._running) + (self._prefilling is not None)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, prompt: list[int], sampling: Sampling) -> Request:
        """Queue a prompt.

        Raises:
            MoaiError: it is empty, has tokens that the model does not know, or leaves no room for an answer.
        """
        if not prompt:
            raise MoaiError("an empty prompt: give the model something to continue")
        size = self._model.config.vocab_size
        if not 0 <= min(prompt) <= max(prompt) < size:
            raise MoaiError(f"the prompt has tokens that are not among the model's {size}")
        limit = sampling.max_new_tokens
        if self.context is not None:
            limit = min(limit, self.context - len(prompt))
            if limit < 1:
                raise MoaiError(f"the prompt has {len(prompt)} tokens; this model takes {self.context}")
        rotary = getattr(self._model.model, "rotary", None)
        request = Request(
            list(prompt), sampling, limit, Draw(sampling, prompt),
            TextStream(self.text_model.tokenizer, sampling.stop),
            rope=0 if rotary is None else rotary.choice(len(prompt) + limit),
        )  # fmt: skip
        self._waiting.append(request)
        self.counters.requests += 1
        return request

    @torch.inference_mode()
    def cancel(self, request: Request) -> None:
        """End a request and free its slot at once; the next step tells its end. A finished one stays as it is."""
        if request.finished is None:
            self._told.append(self._finish(request, Event(request, None, finished=CANCELLED)))

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """A chunk of the prompts that are next, and one token for every running request. Returns what happened, in the
        order in which it did.
        """
        events, self._told = self._told, []
        events += self._prefill()
        if self._running:
            events += self._decode()
        return events

    # ---------------------------------------------------------------- prompts

    def _prefill(self) -> list[Event]:
        events: list[Event] = []
        budget = self.prefill_chunk  # several short prompts make one chunk
        while budget > 0 and (pieces := self._gather(budget)):
            ended = [request for request, stop in pieces if stop == len(request.prompt)]  # all but perhaps the last
            first = len(self._running) - len(ended)
            logits = self._forward_pieces(first, [request.prompt[request.fed : stop] for request, stop in pieces])
            for row, (request, stop) in enumerate(pieces, first):
                budget -= stop - request.fed
                request.fed = stop
                if stop in request.marks or stop == len(request.prompt):
                    self._keep(request, row, request.prompt[:stop])
            events += self._chosen(ended, choose(logits[: len(ended)], [request.draw for request in ended]))
        return events

    def _gather(self, budget: int) -> list[tuple[Request, int]]:
        """The pieces of prompts for one forward, each a request and where its piece ends. They are in the rows behind
        those that ran; the next prompt joins where the one before it ends within the budget.
        """
        pieces: list[tuple[Request, int]] = []
        while budget > 0 and (request := self._prefilling or self._admit([joined for joined, _ in pieces])):
            # where a piece ends depends on its request alone, whatever else the server does
            start = request.fed
            stop = min([len(request.prompt), start + self.prefill_chunk, *(m for m in request.marks if m > start)])
            pieces.append((request, stop))
            budget -= stop - start
            if stop < len(request.prompt):
                break
            self._prefilling = None
            self._running.append(request)
        self.counters.prefill_chunks += len(pieces)
        self.counters.prefill_forwards += bool(pieces)
        return pieces

    def _admit(self, beside: list[Request]) -> Request | None:
        """Give the next request the row after the running ones, with what is known of its beginning. None where there
        is none or no room, or where it has more in common with one of `beside`, which is not computed yet.
        """
        if not self._waiting or len(self._running) == self.max_batch:
            return None
        request, row = self._waiting[0], len(self._running)
        found = None if self._store is None else self._store.find(request.prompt, request.rope)
        known = 0 if found is None else found[1]
        if self._store is not None and shared(request.prompt, [other.prompt for other in beside]) > known:
            return None
        self._prefilling = self._waiting.popleft()
        self._cache.clear(row, final=len(request.prompt) + request.limit)
        if self._store is not None:
            if found is not None:
                self._cache.put(row, found[0], known)
                request.fed = request.reused = known
            next_ones = [other.prompt for other in islice(self._waiting, 2 * self.max_batch)]
            parting = self._store.parting(request.prompt, next_ones)
            request.marks = [parting] if parting > request.fed else []
        self.counters.prompt_tokens += len(request.prompt)
        self.counters.reused_tokens += request.reused
        return request

    def _keep(self, request: Request, row: int, tokens: list[int]) -> None:
        if self._store is None or not self._store.wants(tokens, request.rope):
            return
        if self._cache.lengths[row] > len(tokens):  # a text ended within guesses
            if self._cache.has_states:
                return
            self._cache.cut(row, len(tokens))
        self._store.add(tokens, self._cache.keep(row), request.rope)

    # ---------------------------------------------------------------- tokens

    def _decode(self) -> list[Event]:
        requests = list(self._running)
        if self._drafter is not None and len(requests) == 1 and self._prefilling is None:
            request = requests[0]
            count = min(self._guesses, request.limit - len(request.tokens) - 1)
            behind = len(request.prompt) + len(request.tokens) - request.fed
            if count > 0 and behind <= MOST_BEHIND:
                guess = self._drafter.guess([*request.prompt, *request.tokens], count, request.draw)
                if guess.tokens:
                    return self._check(request, guess)
        for row, request in enumerate(requests):
            if request.fed < len(request.prompt) + len(request.tokens) - 1:  # a refused guess took a state back
                pending = [*request.prompt, *request.tokens][request.fed : -1]
                self._forward(row, [pending])
                request.fed += len(pending)
        logits = self._forward(0, [request.tokens[-1:] for request in requests])
        for request in requests:
            request.fed += 1
        self.counters.decode_steps += 1
        return self._chosen(requests, choose(logits, [request.draw for request in requests]))

    def _check(self, request: Request, guess: Guess) -> list[Event]:
        """Feed what is certain and the guesses in one forward. Keys of refused guesses are cut off; states cannot be:
        the row goes back to before the forward, and what was certain is fed once more with the next guesses.
        """
        before, states = request.fed, self._cache.keep_states(0) if self._cache.has_states else None
        pending = [*request.prompt, *request.tokens][before:]
        logits = self._forward(0, [[*pending, *guess.tokens]], keep=len(guess.tokens) + 1)
        choices, taken = checked(logits, guess, request.draw, self._stops)
        request.fed = before + len(pending) + taken
        if taken < len(guess.tokens):
            if states is not None:
                self._cache.put_states(0, states)
                request.fed = before
            self._cache.cut(0, request.fed)
        self.counters.decode_steps += 1
        self.counters.guessed_tokens += len(guess.tokens)
        self.counters.taken_tokens += taken
        events: list[Event] = []
        for choice in choices:
            events.append(self._add(request, choice, drawn=True))
            if request.finished:
                break
        return events

    def _forward(self, row: int, tokens: list[list[int]], keep: int = 1) -> Tensor:
        """(B, V) logits after the given tokens, equally many for each row from `row` on; or (keep, V), the last ones
        of a single row.
        """
        output = self._model(
            input_ids=torch.tensor(tokens, device=self._model.device),
            past_key_values=self._cache.select(row, len(tokens)),
            use_cache=True,
            logits_to_keep=keep,
        )
        return self._known(output.logits[:, -1] if keep == 1 else output.logits[0])

    def _forward_pieces(self, row: int, pieces: list[list[int]]) -> Tensor:
        """(P, V) logits after each piece; the first goes behind what is in `row`, the next behind the row after it."""
        if len(pieces) == 1:
            return self._forward(row, pieces)
        sizes = [len(piece) for piece in pieces]
        output = self._model(
            input_ids=torch.tensor([list(chain.from_iterable(pieces))], device=self._model.device),
            past_key_values=self._cache.select(row, len(pieces), sizes),
            use_cache=True,
            logits_to_keep=torch.tensor(sizes, device=self._model.device).cumsum(0) - 1,
        )
        return self._known(output.logits[0])

    def _known(self, logits: Tensor) -> Tensor:
        """Of the tokens that the tokenizer knows; at least fp32."""
        logits = logits[:, : self.text_model.tokenizer.vocab_size]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _chosen(self, requests: list[Request], choices: list[Choice]) -> list[Event]:
        return [self._add(request, choice) for request, choice in zip(requests, choices)]

    def _add(self, request: Request, choice: Choice, drawn: bool = False) -> Event:
        if choice.token in self._stops:
            return self._finish(request, Event(request, None, request.text.end(), finished=STOP))
        request.tokens.append(choice.token)
        if not drawn:
            request.draw.add(choice.token)
        self.counters.generated_tokens += 1
        text = request.text.push(choice.token)
        finished = STOP if request.text.stopped else LENGTH if len(request.tokens) >= request.limit else None
        if finished:
            text += request.text.end()
        event = Event(request, choice.token, text, choice.logprob, choice.top, finished)
        return self._finish(request, event) if finished else event

    def _finish(self, request: Request, event: Event) -> Event:
        """Take a request out of wherever it is, and keep the rows together."""
        request.finished = event.finished
        end = len(self._running)
        if request is not self._prefilling and request not in self._running:
            self._waiting.remove(request)
            return event
        row = end if request is self._prefilling else self._running.index(request)
        self._keep(request, row, [*request.prompt, *request.tokens][: request.fed])
        if request is self._prefilling:
            self._prefilling = None
            return event
        if row != end - 1:
            self._cache.move(end - 1, row)
            self._running[row] = self._running[-1]
        self._running.pop()
        if self._prefilling is not None:
            self._cache.move(end, end - 1)
        return event


def context_of(text_model: TextModel) -> int | None:
    """How long a text may become: no limit for states, nor for the RoPE rule that stretches with the text."""
    config: Any = text_model.model.config
    rope = getattr(config, "rope_parameters", None) or {}
    attends = any(kind != "linear_attention" for kind in config.layer_types)
    bounded = attends or getattr(config, "position_embedding", "rope") == "learned"
    return text_model.context if bounded and rope.get("rope_type") != "dynamic" else None


def _token_bytes(model: Any) -> int:
    """Of the keys and values of one token; for a model of states alone, of its hidden states."""
    config = model.config
    layers = sum(kind != "linear_attention" for kind in config.layer_types)
    size = torch.finfo(model.dtype).bits // 8
    if layers:
        return 2 * layers * config.num_key_value_heads * config.head_dim * size
    return config.num_hidden_layers * config.hidden_size * size
