"""One text after another in the same place, as the turns of a chat: what was computed before is not computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import DynamicCache

from moai_llm.config import MoaiConfig
from moai_llm.inference.engine import Engine, context_of
from moai_llm.inference.load import TextModel
from moai_llm.inference.sampling import Draw, Sampling, choose
from moai_llm.inference.text_stream import TextStream
from moai_llm.modeling.model import new_cache
from moai_llm.modeling.slots import fits_slots
from moai_llm.runtime import MoaiError

PREFILL_CHUNK = 512  # tokens of a prompt that are computed at once


class Session:
    """A growing sequence and the cache of what the model has seen of it.

    Args:
        cache: makes the cache of transformers to use, in place of the engine's own; `kv_cache` of inference/kv gives
            one. Models whose class the engine does not know always take one.

    Attributes:
        reused: tokens of the last prompt that were not computed again.
        finished: why the last stream ended: "stop", "length", or "cancelled" where nobody wanted the rest.
    """

    def __init__(self, text_model: TextModel, cache: Callable[[], Any] | None = None) -> None:
        self.text_model = text_model
        own = cache is None and fits_slots(text_model.model.config)
        self._make = None if own else cache or (lambda: _cache_of(text_model.model.config))
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._engine = None if self._make else Engine(self.text_model, max_batch=1)
        self._fed: list[int] = []
        self._cache: Any = None
        self._rope = 0
        self.reused, self.finished, self._unwanted = 0, "", False

    def cancel(self) -> None:
        """End the running stream before its next token, also while it reads its prompt. A signal handler may call it:
        nothing is torn, and what was computed stays.
        """
        self._unwanted = True

    def stream(self, prompt: list[int], sampling: Sampling) -> Iterator[int]:
        """Yield new tokens after `prompt` (all tokens from the beginning) until a stop token, which is not yielded,
        a stop text, or the limit.

        Raises:
            MoaiError: an empty prompt, or one that leaves no room for an answer.
        """
        self.reused, self.finished, self._unwanted = 0, "cancelled", False
        if self._engine is None:
            yield from self._over_cache(prompt, sampling)
            return
        request = self._engine.submit(prompt, sampling)
        try:
            while request.finished is None and not self._unwanted:
                for event in self._engine.step():
                    if event.request is request and event.token is not None:
                        yield event.token
        finally:  # whoever stops reading ends the request
            self._engine.cancel(request)
            self._engine.step()
            self.reused, self.finished = request.reused, request.finished or "cancelled"

    @torch.inference_mode()
    def _over_cache(self, prompt: list[int], sampling: Sampling) -> Iterator[int]:
        """The plain loop over one of transformers' caches."""
        model, tokenizer = self.text_model.model, self.text_model.tokenizer
        if not prompt:
            raise MoaiError("an empty prompt: give the model something to continue")
        known, ours = len(self._fed), model.config.model_type == "moai"
        if self._cache is None or prompt[:known] != self._fed or known >= len(prompt):
            assert self._make is not None
            self._fed, self._cache = [], self._make()
        limit = sampling.max_new_tokens
        learned, endless = ours and model.config.position_embedding == "learned", getattr(self._cache, "endless", False)
        context: int | None = None
        if not ours:  # positions of other people's classes may be learned too: none goes past what it was made for
            context = self.text_model.context if self.text_model.bounded else None
        elif learned or (fits_slots(model.config) and not endless):
            context = context_of(self.text_model)
        if context is not None:
            limit = min(limit, context - len(prompt))
            if limit < 1:
                raise MoaiError(
                    f"the prompt has {len(prompt)} tokens; this model takes {context}, with the answer. With RoPE, "
                    "--kv-keep sinks:4+window:N has no such limit"
                )
        draw, text = Draw(sampling, prompt), TextStream(tokenizer, sampling.stop)
        # only our own models take a length to come
        ahead = {"rope_length": len(prompt) + limit} if ours else {}
        rotary = getattr(model.model, "rotary", None) if ours else None
        rope = rotary.choice(len(prompt) + limit) if rotary is not None else 0
        if rope != self._rope and self._fed:  # keys rotated by other frequencies do not go with the new ones
            assert self._make is not None
            self._fed, self._cache = [], self._make()
        self._rope = rope
        self.reused = len(self._fed)
        pending, stops = prompt[self.reused :], set(tokenizer.stop_ids)
        for _ in range(limit):
            size = PREFILL_CHUNK if ours else len(pending)  # states of other classes may not go on with several tokens
            for start in range(0, len(pending), size):
                if self._unwanted:
                    return
                part = pending[start : start + size]
                ids = torch.tensor([part], device=model.device)
                output = model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1, **ahead)
                self._fed += part
            token = choose(output.logits[:, -1, : tokenizer.vocab_size].float(), [draw])[0].token
            if token in stops:
                self.finished = "stop"
                return
            draw.add(token)
            text.push(token)
            pending = [token]
            yield token
            if text.stopped:
                self.finished = "stop"
                return
        self.finished = "length"


def _cache_of(config: Any) -> Any:
    return new_cache(config) if isinstance(config, MoaiConfig) else DynamicCache(config=config)


def stream_text(session: Session, prompt: list[int], sampling: Sampling) -> Iterator[str]:
    """`Session.stream` as pieces of text."""
    text = TextStream(session.text_model.tokenizer, sampling.stop)
    for token in session.stream(prompt, sampling):
        piece = text.push(token)
        if piece:
            yield piece
    rest = text.end()
    if rest:
        yield rest
