"""How much of a long context a model uses: a pass key that it finds again, and perplexity by position.

The prompt goes through the model in pieces, each after the cache of those before it, so that memory grows with the
cache alone and not with the square of the length, nor with logits.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moai_llm.inference import TextModel
from moai_llm.modeling.model import MoaiForCausalLM, new_cache
from moai_llm.modeling.rope import RotaryEmbedding
from moai_llm.ops.logit_chunks import default_chunk_rows
from moai_llm.runtime import MoaiError, did_you_mean
from moai_llm.tokenizer import Tokenizer

PIECE = 1024  # tokens that go through the model at once
DIGITS = 5  # of a pass key
KNOWS = 0.95  # of the keys within the context of training; below it a failure at length says nothing about length
ROPES = ("yarn", "linear", "dynamic", "ntk")


@dataclass(frozen=True)
class Words:
    """A language's form of the test: sentences to fill with, the one to remember, the question and how its answer
    begins.
    """

    fill: tuple[str, ...]
    needle: str
    question: str


# after Mohtashami and Jaggi, arXiv 2305.16300, appendix C
LANGUAGES = {
    "en": Words(
        (" The grass is green.", " The sky is blue.", " The sun is yellow.", " Here we go.", " There and back again."),
        " The pass key is {key}. Remember it. {key} is the pass key.",
        " What is the pass key? The pass key is ",
    ),
    "ko": Words(
        (" 풀은 초록색이다.", " 하늘은 파란색이다.", " 해는 노란색이다.", " 자, 시작하자.", " 갔다가 다시 돌아온다."),
        " 비밀번호는 {key}이다. 기억하라. {key}가 비밀번호이다.",
        " 비밀번호는 무엇인가? 비밀번호는 ",
    ),
}


@dataclass(frozen=True)
class Trial:
    """One prompt: all its tokens, and those of the answer that must follow."""

    prompt: list[int]
    answer: list[int]
    length: int
    depth: float
    language: str


@dataclass(frozen=True)
class Cell:
    """How often a key was found at one length and depth."""

    language: str
    length: int
    depth: float
    found: int
    trials: int
    longest: int  # tokens of the longest prompt

    @property
    def share(self) -> float:
        return self.found / self.trials


# (prompt, answer) -> whether the model, always taking the likeliest token, gives this answer
Predict = Callable[[Sequence[int], Sequence[int]], bool]


def make_trial(tokenizer: Tokenizer, length: int, depth: float, language: str, generator: random.Random) -> Trial:
    """A prompt of at most `length` tokens with its key at a depth from 0, its beginning, to 1, its end.

    Raises:
        MoaiError: it is too short for the key and the question.
    """
    words = LANGUAGES[language]
    key = "".join(generator.choice("123456789") for _ in range(DIGITS))
    needle = tokenizer.encode(words.needle.format(key=key))
    # the answer is what follows the question in one text: a tokenizer may join digits with the space before them
    asked = tokenizer.encode(words.question)
    whole = tokenizer.encode(words.question + key)
    cut = next((i for i, (a, b) in enumerate(zip(asked, whole)) if a != b), min(len(asked), len(whole)))
    question, answer = whole[:cut], whole[cut:]
    fill = [tokenizer.encode(sentence) for sentence in words.fill]
    room = length - len(needle) - len(whole)
    if room < 0:
        raise MoaiError(f"{length} tokens are too few for the pass key and the question, which take {length - room}")
    sentences: list[list[int]] = []
    while room >= len(fill[len(sentences) % len(fill)]):
        sentences.append(fill[len(sentences) % len(fill)])
        room -= len(sentences[-1])
    place = round(depth * len(sentences))
    parts = [*sentences[:place], needle, *sentences[place:], question]
    return Trial([token for part in parts for token in part], answer, length, depth, language)


def passkey(
    tokenizer: Tokenizer,
    predict: Predict,
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    languages: Sequence[str] = ("en", "ko"),
    trials: int = 5,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Cell]:
    """Ask for the key at every length and depth.

    Raises:
        MoaiError: an unknown language, a length that is too short.
    """
    for language in languages:
        if language not in LANGUAGES:
            raise MoaiError(f"no pass key in {language!r}{did_you_mean(language, LANGUAGES)}: {', '.join(LANGUAGES)}")
    total, done, cells = len(lengths) * len(depths) * len(languages) * trials, 0, []
    for language in languages:
        for length in lengths:
            for depth in depths:
                found = longest = 0
                for trial in range(trials):
                    generator = random.Random(f"{seed} {language} {length} {depth} {trial}")
                    one = make_trial(tokenizer, length, depth, language, generator)
                    found += predict(one.prompt, one.answer)
                    longest = max(longest, len(one.prompt) + len(one.answer))
                    done += 1
                    progress(done, total)
                cells.append(Cell(language, length, depth, found, trials, longest))
    return cells


def predictor(text_model: TextModel, piece: int = PIECE) -> Predict:
    """Whether each token of the answer is the likeliest after what is before it: then greedy decoding gives it."""

    def predict(prompt: Sequence[int], answer: Sequence[int]) -> bool:
        tokens = [*prompt, *answer]
        found = [greedy for _, greedy in token_scores(text_model, tokens, first=len(prompt), piece=piece)]
        return bool(torch.cat(found).all())

    return predict


@torch.inference_mode()
def token_scores(
    text_model: TextModel, tokens: Sequence[int], *, first: int = 1, piece: int = PIECE
) -> Iterator[tuple[Tensor, Tensor]]:
    """For the tokens from `first` on, piece by piece: log-probability (n,) fp64, and whether it is the likeliest.

    A model of another class goes through whole: not all of transformers' continue a state with several tokens.
    """
    model, vocabulary = text_model.model, text_model.tokenizer.vocab_size
    options: dict[str, Any] = {"past_key_values": None, "use_cache": True}
    if isinstance(model, MoaiForCausalLM):
        options |= {"past_key_values": new_cache(model.config), "rope_length": len(tokens)}
    elif isinstance(model, PreTrainedModel):
        options, piece = {"use_cache": False}, len(tokens)
    head = model.get_output_embeddings()
    size = default_chunk_rows(model.config.vocab_size, model.device.type)
    inputs = torch.tensor(tokens[:-1], device=model.device)
    targets = torch.tensor(tokens[1:], device=model.device)
    for start in range(0, len(inputs), piece):
        stop = min(start + piece, len(inputs))
        output = model.base_model(input_ids=inputs[None, start:stop], **options)
        if "past_key_values" in options:
            options["past_key_values"] = output.past_key_values
        begin = max(0, first - 1 - start)  # the state at position p says what token p + 1 is
        hidden, wanted = output.last_hidden_state[0, begin:], targets[start:stop][begin:]
        for i in range(0, len(wanted), size):
            logits = head(hidden[i : i + size])[:, :vocabulary]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            here = wanted[i : i + size]
            log_p = logits.gather(1, here[:, None])[:, 0] - torch.logsumexp(logits, -1)
            yield log_p.double().cpu(), (logits.argmax(-1) == here).cpu()


@dataclass(frozen=True)
class Bucket:
    """Positions from `begin` to `end`: mean loss of a token there, in nats, and its standard error over sequences."""

    begin: int
    end: int
    loss: float
    stderr: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700))


def sequences(tokenizer: Tokenizer, texts: Iterable[str], length: int, most: int) -> tuple[list[list[int]], bool]:
    """At most so many sequences of `length` tokens, and whether each is one document.

    Documents that are long enough are taken by themselves; where there are none, short ones follow each other.
    """
    whole: list[list[int]] = []
    joined: list[int] = []
    for text in texts:
        ids = tokenizer.encode(text)
        if len(ids) >= length:
            whole.append(ids[:length])
        elif len(joined) < most * length:
            joined += ids
        if len(whole) >= most:
            break
    if whole:
        return whole[:most], True
    return [joined[i : i + length] for i in range(0, len(joined) - length + 1, length)][:most], False


def by_position(
    text_model: TextModel,
    rows: Sequence[Sequence[int]],
    *,
    buckets: int = 16,
    piece: int = PIECE,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Bucket]:
    """Mean loss of sequences of one length, in so many equal stretches of positions."""
    length = len(rows[0])
    borders = np.unique(np.linspace(1, length, min(buckets, length - 1) + 1).round().astype(int))
    losses = np.empty((len(rows), length - 1))
    for i, row in enumerate(rows):
        losses[i] = -torch.cat([log_p for log_p, _ in token_scores(text_model, row, piece=piece)]).numpy()
        progress(i + 1, len(rows))
    found = []
    for begin, end in zip(borders, borders[1:]):
        means = losses[:, begin - 1 : end - 1].mean(1)
        spread = float(means.std(ddof=1) / math.sqrt(len(rows))) if len(rows) > 1 else math.nan
        found.append(Bucket(int(begin), int(end), float(means.mean()), spread, len(rows) * int(end - begin)))
    return found


def extend(text_model: TextModel, context: int, rope: str | None = None) -> TextModel:
    """The same weights with another context: RoPE scaled by a rule, or as it is when None. What is given stays.

    Raises:
        MoaiError: the model cannot be stretched, or not by this rule.
    """
    model = text_model.model
    if not isinstance(model, MoaiForCausalLM):
        raise MoaiError(f"{text_model.path} is a {type(model).__name__}: --context works on models of ours")
    before = text_model.context
    if model.config.position_embedding == "learned" and context > before:
        raise MoaiError(f"this model has {before} learned positions, and none for {context}")
    config = copy.deepcopy(model.config)
    config.max_position_embeddings = context
    if rope is not None:
        if rope not in ROPES:
            raise MoaiError(f"no --rope {rope!r}{did_you_mean(rope, ROPES)}: {', '.join(ROPES)}")
        if not config.rotates:
            raise MoaiError("no layer of this model rotates positions, so there is no RoPE to scale")
        if context <= before:
            raise MoaiError(f"--rope {rope} stretches a context: --context {context} is not more than {before}")
        given = config.rope_parameters or {}
        if given.get("rope_type", "default") != "default":
            raise MoaiError(f"RoPE of this model is already scaled ({given['rope_type']}): leave --rope out")
        # dynamic scaling takes the factor from the length of each sequence
        factor = 1.0 if rope == "dynamic" else context / before
        scaled = {"rope_type": rope, "rope_theta": given["rope_theta"], "factor": factor}
        if "partial_rotary_factor" in given:
            scaled["partial_rotary_factor"] = given["partial_rotary_factor"]
        if rope == "yarn":
            scaled["original_max_position_embeddings"] = before
        config.rope_parameters = scaled
        try:
            config.resolve()
        except ValueError as error:
            raise MoaiError(f"--rope {rope}: {error}") from None
    stretched = copy.copy(model)  # shares the weights
    stretched._modules = dict(model._modules)
    stretched.config = config
    inner = copy.copy(model.model)
    inner._modules = dict(model.model._modules)
    inner.config = config
    if config.rotates:
        of_rope = copy.deepcopy(config)
        if rope == "dynamic":  # its formula reads the context of training here
            of_rope.max_position_embeddings = before
        inner.rotary = RotaryEmbedding(of_rope)
    stretched.model = inner
    return TextModel(stretched, text_model.tokenizer, text_model.path)
