"""Load a model directory and continue token sequences, one token at a time, with a cache.

`Session` keeps the cache between calls: when the next prompt begins with what was already fed (the next turn of a
chat), only the rest is computed.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moai_llm.modeling.model import new_cache
from moai_llm.runtime import MoaiError, has_fast_bf16, pick_device
from moai_llm.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy; the filters apply in the order of the fields."""

    max_new_tokens: int = 128
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 0.95
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": self.max_new_tokens >= 1, "temperature": self.temperature >= 0, "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1, "repetition_penalty": self.repetition_penalty > 0,
        }  # fmt: skip
        for name, fine in checks.items():
            if not fine:
                raise MoaiError(f"{name} = {getattr(self, name)} is out of range")


@dataclass
class TextModel:
    """A model with its tokenizer."""

    model: Any
    tokenizer: Tokenizer
    path: Path

    @property
    def context(self) -> int:
        """Tokens the model was made for; with learned positions, all it can take."""
        return int(self.model.config.max_position_embeddings)


def resolve_model(path: str | Path) -> Path:
    """The model directory a path means: itself, `model` inside it, or the newest checkpoint of a run.

    Raises:
        MoaiError: none of these is there.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        return path
    if (path / "model" / "config.json").is_file():
        return path / "model"
    found = sorted(path.glob("checkpoints/step-*/config.json"))
    if found:
        return found[-1].parent
    what = "no such directory" if not path.exists() else "no model in it (config.json, model/ or checkpoints/)"
    raise MoaiError(f"{path}: {what}")


def is_for_vectors(directory: Path) -> bool:
    """Whether the model there was trained to make vectors; it has no head then."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "MoaiForEmbedding" in (config.get("architectures") or ())


def load_model(path: str | Path, device: str = "auto", dtype: str = "auto") -> TextModel:
    """Load a model directory, a run (its newest checkpoint) or a quickstart, ready to generate.

    Args:
        dtype: fp32 | bf16 | fp16, or auto: bf16 where the device is faster in it, else fp32.
    """
    directory = resolve_model(path)
    target = pick_device(device)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if dtype == "auto":
        dtype = "bf16" if has_fast_bf16(target) else "fp32"
    if dtype not in dtypes:
        raise MoaiError(f"dtype {dtype!r} is not one of auto, {', '.join(dtypes)}")
    tokenizer = load_tokenizer(directory)
    if is_for_vectors(directory):
        raise MoaiError(f"{directory} makes vectors of texts and writes none: use `moai embed`, or a language model")
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtypes[dtype])
    except (OSError, ValueError, KeyError) as error:
        raise MoaiError(f"{directory} cannot be loaded: {error}") from None
    if model.config.vocab_size < tokenizer.vocab_size:
        raise MoaiError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}"
        )
    return TextModel(model.to(target).eval(), tokenizer, directory)  # type: ignore[arg-type]


class Session:
    """A growing sequence and the cache of what the model has seen of it."""

    def __init__(self, text_model: TextModel) -> None:
        self.text_model = text_model
        self.reset()

    def reset(self) -> None:
        self._fed: list[int] = []
        self._cache: Any = None

    @torch.inference_mode()
    def stream(self, prompt: list[int], sampling: Sampling) -> Iterator[int]:
        """Yield new tokens after `prompt` (all tokens from the beginning) until a stop token, which is not yielded,
        or the limit.

        Raises:
            MoaiError: an empty prompt, or one that leaves no room for an answer in a model of learned positions.
        """
        model, tokenizer = self.text_model.model, self.text_model.tokenizer
        if not prompt:
            raise MoaiError("an empty prompt: give the model something to continue")
        limit = sampling.max_new_tokens
        if getattr(model.config, "position_embedding", "rope") == "learned":
            limit = min(limit, self.text_model.context - len(prompt))
            if limit < 1:
                raise MoaiError(f"the prompt has {len(prompt)} tokens; this model takes {self.text_model.context}")
        known = len(self._fed)
        if self._cache is None or prompt[:known] != self._fed or known >= len(prompt):
            self.reset()
            self._cache = new_cache(model.config)
        generator = torch.Generator(device=model.device)
        generator.manual_seed(sampling.seed) if sampling.seed is not None else generator.seed()
        pending, tokens, stops = prompt[len(self._fed) :], list(prompt), set(tokenizer.stop_ids)
        for _ in range(limit):
            logits = model(
                input_ids=torch.tensor([pending], device=model.device),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
                rope_length=len(prompt) + limit,
            ).logits[0, -1]
            self._fed += pending
            token = choose(logits[: tokenizer.vocab_size].float(), sampling, generator, tokens)
            if token in stops:
                return
            tokens.append(token)
            pending = [token]
            yield token


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator, seen: list[int]) -> int:
    """One token id from logits (V,) fp32."""
    if sampling.repetition_penalty != 1.0:  # arXiv 1909.05858, section 4.1
        ids = torch.tensor(sorted(set(seen)), device=logits.device)
        values = logits[ids]
        penalty = sampling.repetition_penalty
        logits = logits.index_copy(0, ids, torch.where(values > 0, values / penalty, values * penalty))
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[0]:
        kept = logits.topk(sampling.top_k)
        logits = torch.full_like(logits, -torch.inf).index_copy(0, kept.indices, kept.values)
    if sampling.top_p < 1:  # nucleus, arXiv 1904.09751, section 3.1: the smallest set that holds top_p, never empty
        values, order = logits.sort(descending=True)
        before = values.softmax(-1).cumsum(-1) - values.softmax(-1)
        logits = logits.index_fill(0, order[before >= sampling.top_p], -torch.inf)
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))


class TextStream:
    """Tokens in, text out, never half a character: the bytes of a character may be spread over several tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self.tokenizer.token_bytes(token))

    def end(self) -> str:
        return self._decoder.decode(b"", final=True)


def stream_text(session: Session, prompt: list[int], sampling: Sampling) -> Iterator[str]:
    """`Session.stream` as pieces of text."""
    text = TextStream(session.text_model.tokenizer)
    for token in session.stream(prompt, sampling):
        piece = text.push(token)
        if piece:
            yield piece
    rest = text.end()
    if rest:
        yield rest


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
    sampling = Sampling(max_length, temperature, top_k, top_p, seed=seed)
    return prompt + "".join(stream_text(Session(model), model.tokenizer.encode(prompt), sampling))
