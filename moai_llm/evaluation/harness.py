"""A model of ours as lm-eval (the extra `eval`) knows models, so that any of its tasks runs on it.

Scores are those of lm-eval's own adapter for transformers, up to rounding: a context that is too long loses its
beginning, a text without one begins with the token that begins (else ends) a document. Two things are our own: what
answers to one question share is computed once, and text never becomes a control token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

from moai_llm.evaluation.scoring import Request, score
from moai_llm.inference import Engine, Sampling, Session, TextModel
from moai_llm.modeling.slots import fits_slots
from moai_llm.runtime import MoaiError, require
from moai_llm.tokenizer.chat import can_chat, render

Progress = Callable[[str, int, int], None]
MAX_NEW_TOKENS = 256  # lm-eval's default


def silent(what: str, done: int, total: int) -> None:
    """No progress."""


def library() -> Any:
    """lm-eval, quiet.

    Raises:
        MoaiError: it is not installed.
    """
    import logging

    found = require("lm_eval", "eval")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return found


def adapter(
    text_model: TextModel, *, batch_tokens: int | None = None, max_new_tokens: int | None = None,
    progress: Progress = silent,
) -> Any:  # fmt: skip
    """The model as an `lm_eval.api.model.LM`.

    Args:
        batch_tokens: tokens of a batch, padding included.
        max_new_tokens: of answers, where a task does not say; also its upper limit where it does.
    """
    return _adapter_class()(text_model, batch_tokens, max_new_tokens, progress)


@lru_cache(maxsize=1)
def _adapter_class() -> type:
    library()
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class Adapter(TemplateLM):
        """Log-likelihoods, rolling log-likelihoods and answers of a `TextModel`."""

        def __init__(
            self, text_model: TextModel, batch_tokens: int | None, max_new_tokens: int | None, progress: Progress
        ) -> None:
            super().__init__()
            self.text_model, self.batch_tokens, self.progress = text_model, batch_tokens, progress
            self.max_new_tokens = max_new_tokens
            self._device = text_model.model.device
            self._rendered: dict[str, list[int]] = {}  # a conversation as text -> as tokens

        @property
        def max_length(self) -> int:
            return self.text_model.context

        @property
        def eot_token_id(self) -> int:
            return self.text_model.tokenizer.eos_id

        @property
        def prefix_token_id(self) -> int:
            tokenizer = self.text_model.tokenizer
            begin = tokenizer.special_ids.get(tokenizer.roles.get("bos_token", ""))
            return tokenizer.eos_id if begin is None else begin

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            known = self._rendered.get(string)
            return self.text_model.tokenizer.encode(string) if known is None else list(known)

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            if context in self._rendered:  # an answer begins after a control token: nothing merges across it
                return list(self._rendered[context]), self.text_model.tokenizer.encode(continuation)
            return super()._encode_pair(context, continuation)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            found = self._score([(context, continuation) for _, context, continuation in requests])
            for (key, _, _), answer in zip(requests, found):
                if key is not None:
                    self.cache_hook.add_partial("loglikelihood", key, answer)
            return found

        def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
            rows = []
            for context, continuation in pairs:
                if not continuation or len(continuation) > self.max_length:
                    raise MoaiError(
                        f"an answer of {len(continuation)} tokens cannot be scored: this model takes 1 to "
                        f"{self.max_length}"
                    )
                tokens = [*context, *continuation][-(self.max_length + 1) :]
                rows.append(Request(tokens, len(tokens) - len(continuation)))
            scored = score(
                self.text_model.model,
                rows,
                vocabulary=self.text_model.tokenizer.vocab_size,
                batch_tokens=self.batch_tokens,
                progress=lambda done: self.progress("scoring", done, len(rows)),
            )
            return [(one.total, bool(one.greedy.all())) for one in scored]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
            pairs: list[tuple[list[int], list[int]]] = []
            counts = []
            for (text,) in (request.args for request in requests):
                windows = get_rolling_token_windows(
                    self.tok_encode(text), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
                )
                before = len(pairs)
                pairs += map(make_disjoint_window, windows)
                counts.append(len(pairs) - before)
            parts = iter(self._score(pairs))
            return [sum(next(parts)[0] for _ in range(count)) for count in counts]

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
            tasks = [(self.tok_encode(prompt), self._generation(options)) for prompt, options in _arguments(requests)]
            done = 0

            def one_more(_: int) -> None:
                nonlocal done
                done += 1
                self.progress("generating", done, len(tasks))

            return continue_prompts(self.text_model, tasks, one_more)

        def _generation(self, options: dict[str, Any]) -> tuple[Sampling, list[str], int]:
            """(sampling, stop strings, tokens of context) of lm-eval's options."""
            asked = [options[name] for name in LENGTHS if options.get(name) is not None]
            limit = int(asked[0]) if asked else self.max_new_tokens or MAX_NEW_TOKENS
            limit = min(limit, self.max_new_tokens or limit)
            room = self.max_length - limit
            if room < 1:
                raise MoaiError(
                    f"the task lets answers be {limit} tokens long, and the model's context is {self.max_length}: "
                    f"--max-new-tokens {max(1, self.max_length // 2)} limits them"
                )
            unknown = set(options) - KNOWN_OPTIONS
            if unknown:
                raise MoaiError(f"generation_kwargs of the task: cannot do {', '.join(sorted(unknown))} here")
            temperature = float(options.get("temperature") or 0.0)
            samples = options.get("do_sample")
            if samples is None:
                samples = temperature > 0
            sampling = Sampling(
                max_new_tokens=limit,
                temperature=(temperature or 1.0) if samples else 0.0,
                top_k=int(options.get("top_k") or 0),
                top_p=float(options.get("top_p") or 1.0),
                repetition_penalty=float(options.get("repetition_penalty") or 1.0),
                seed=0 if samples else None,
            )
            until = options.get("until") or []
            return sampling, [until] if isinstance(until, str) else list(until), room

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            tokenizer = self.text_model.tokenizer
            if add_generation_prompt:
                ids = render(tokenizer, chat_history, add_generation_prompt=True).ids
            else:  # the last message is the beginning of the answer
                begun = tokenizer.encode(chat_history[-1]["content"])
                ids = [*render(tokenizer, chat_history[:-1], add_generation_prompt=True).ids, *begun]
            text = tokenizer.decode(ids)
            self._rendered[text] = ids
            return text

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            return self.text_model.tokenizer.chat_template if chat_template else None

        @property
        def tokenizer_name(self) -> str:
            return self.text_model.tokenizer.fingerprint

    return Adapter


LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-eval's names of one thing
KNOWN_OPTIONS = {*LENGTHS, "until", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty"}


def _arguments(requests: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    for request in requests:
        yield request.args[0], request.args[1]


def continue_prompts(
    text_model: TextModel,
    tasks: Sequence[tuple[list[int], tuple[Sampling, list[str], int]]],
    progress: Callable[[int], None] = lambda index: None,
) -> list[str]:
    """The answers to prompts, each up to its first stop string, which is left out.

    Args:
        tasks: of each prompt its tokens, how to choose tokens, what ends an answer, and how many of the last tokens of
            the prompt fit.
    """
    answers = [""] * len(tasks)
    prompts = [
        (prompt[-room:], replace(sampling, stop=tuple(filter(None, stops))))
        for prompt, (sampling, stops, room) in tasks
    ]

    def keep(i: int, tokens: list[int]) -> None:
        answers[i] = text_model.tokenizer.decode(tokens, skip_special=True)
        for stop in prompts[i][1].stop:
            answers[i] = answers[i].split(stop)[0]
        progress(i)

    if not fits_slots(text_model.model.config):  # of another class: one after the other
        session = Session(text_model)
        for i, task in enumerate(prompts):
            keep(i, list(session.stream(*task)))
        return answers
    engine = Engine(text_model)
    places = {engine.submit(*task): i for i, task in enumerate(prompts)}
    while engine.busy:
        for event in engine.step():
            if event.finished:
                keep(places[event.request], event.request.tokens)
    return answers


def require_chat(text_model: TextModel) -> None:
    """Raises `MoaiError` where a chat template was asked for and the tokenizer has none."""
    if not can_chat(text_model.tokenizer):
        raise MoaiError(f"{text_model.path}: its tokenizer has no chat template; leave --apply-chat-template out")


@contextmanager
def offline_and_quiet(hub: bool = False) -> Iterator[None]:
    """Data sets are read from this machine only, unless the Hub was asked for; and no bars of others."""
    import datasets
    import lm_eval.api.task as of_tasks

    bar_of_tasks, of_tasks.tqdm = of_tasks.tqdm, lambda iterable, **_: iterable
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or not hub
    bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bar()
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, of_tasks.tqdm = before, bar_of_tasks
        if bars:
            datasets.enable_progress_bar()
