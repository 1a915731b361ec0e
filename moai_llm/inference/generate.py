"""Texts from prompts: a whole list of them through the engine, or one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from moai_llm.inference.engine import Engine, Request
from moai_llm.inference.load import TextModel
from moai_llm.inference.sampling import Sampling
from moai_llm.runtime import MoaiError


@dataclass
class Generated:
    """What came after a prompt.

    Attributes:
        finished: "stop" or "length".
        logprobs: of each token, where asked for, and `top` the most likely tokens in its place.
    """

    prompt: str
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finished: str = ""
    logprobs: list[float] | None = None
    top: list[list[tuple[int, float]]] | None = None


def generate(
    model: TextModel, prompts: Sequence[str], sampling: Sampling | None = None, *, samples: int = 1, batch: int = 8
) -> list[list[Generated]]:
    """`samples` continuations of each prompt, in the order of the prompts. With a seed, sample i of prompt j draws from
    seed + i: every prompt alike.
    """
    result: dict[int, list[Generated]] = dict(stream_generated(model, prompts, sampling, samples=samples, batch=batch))
    return [result[i] for i in range(len(prompts))]


def stream_generated(
    model: TextModel,
    prompts: Sequence[str],
    sampling: Sampling | None = None,
    *,
    samples: int = 1,
    batch: int = 8,
    engine: Engine | None = None,
) -> Iterator[tuple[int, list[Generated]]]:
    """(place of the prompt, its continuations), each as soon as it is there."""
    sampling = sampling or Sampling()
    engine = engine or Engine(model, max_batch=batch)
    encoded = [model.tokenizer.encode(prompt) for prompt in prompts]
    waiting: dict[Request, tuple[int, Generated]] = {}
    done: dict[int, list[Generated]] = {}
    for i in sorted(range(len(prompts)), key=lambda i: -len(encoded[i])):  # of one length together, the longest first
        answers = [Generated(prompts[i]) for _ in range(samples)]
        for sample, answer in enumerate(answers):
            own = sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + sample)
            if own.logprobs is not None:
                answer.logprobs, answer.top = [], []
            try:
                waiting[engine.submit(encoded[i], own)] = (i, answer)
            except MoaiError as error:
                raise MoaiError(f"prompt {i + 1}: {error}" if len(prompts) > 1 else str(error)) from None
        done[i] = answers
    left = {i: samples for i in done}
    while engine.busy:
        for event in engine.step():
            place, answer = waiting[event.request]
            answer.text += event.text
            if event.token is not None:
                answer.tokens.append(event.token)
                if answer.logprobs is not None and answer.top is not None:
                    answer.logprobs.append(event.logprob or 0.0)
                    answer.top.append(event.top or [])
            if event.finished:
                answer.finished = event.finished
                left[place] -= 1
                if not left[place]:
                    yield place, done.pop(place)


def sample_text(
    model: TextModel,
    prompt: str,
    max_length: int = 128,
    temperature: float = 0.8,
    top_p: float = 0.95,
    top_k: int = 50,
    seed: int | None = None,
) -> str:
    """The prompt with up to `max_length` tokens of continuation."""
    return prompt + generate(model, [prompt], Sampling(max_length, temperature, top_k, top_p, seed=seed))[0][0].text
