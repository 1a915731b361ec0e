"""Rows of a model that stand for no token have no part in a probability, whoever reckons it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moai_llm.evaluation.long_context import token_scores
from moai_llm.evaluation.perplexity import evaluate, evaluate_text
from moai_llm.evaluation.scoring import Request, score
from moai_llm.inference import Engine, Sampling, TextModel
from moai_llm.inference.server.scoring import prompt_logprobs
from moai_llm.modeling.vocabulary import resize_vocabulary
from moai_llm.tokenizer import Tokenizer
from tests.conftest import tiny_model

TEXT = "Interest is paid on the deposit. 이자가 붙어요. "


def with_heavy_padding(tokenizer: Tokenizer) -> Any:
    """A tenth of the mass, or more, lies on rows without a token."""
    torch.manual_seed(0)
    model = tiny_model(vocab_size=tokenizer.vocab_size + 96)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.vocab_size :] *= 3
    return model


def by_answers(text_model: TextModel, prompt: list[int]) -> float:
    """What the engine reports of the token it chose."""
    engine = Engine(text_model)
    engine.submit(prompt, Sampling(1, temperature=0, logprobs=1))
    (told,) = [event.logprob for event in engine.step() if event.logprob is not None]
    return told


def all_ways(text_model: TextModel) -> dict[str, float]:
    model, tokenizer = text_model.model, text_model.tokenizer
    ids = tokenizer.encode(TEXT)
    row = torch.tensor([ids])
    return {
        "moai eval perplexity": -evaluate_text(text_model, TEXT).nats,
        "evaluations of a run": -evaluate(model, [{"input_ids": row, "labels": row}], tokenizer).nats,
        "lm-eval": score(model, [Request(ids, 1)], vocabulary=tokenizer.vocab_size)[0].total,
        "moai eval long": sum(float(part.sum()) for part, _ in token_scores(text_model, ids)),
        "echo of the server": sum(part for part, _ in prompt_logprobs(text_model, ids, 1)),
    }


def test_as_if_they_were_cut_off(tokenizer: Tokenizer) -> None:
    padded = TextModel(with_heavy_padding(tokenizer), tokenizer, Path("here"))
    cut = TextModel(with_heavy_padding(tokenizer), tokenizer, Path("here"))
    resize_vocabulary(cut.model, [(i,) for i in range(tokenizer.vocab_size)])
    found, right = all_ways(padded), all_ways(cut)
    ids = torch.tensor([tokenizer.encode(TEXT)])
    with torch.no_grad():
        hidden = cut.model(ids).logits[0, :-1].log_softmax(-1)
        whole = padded.model(ids).logits[0, :-1].log_softmax(-1)
    expected, control = (float(p.gather(1, ids[0, 1:, None]).sum()) for p in (hidden, whole))
    assert control < expected - 1  # control: the padding takes its share
    for way in found:
        assert found[way] == pytest.approx(expected, abs=1e-3), way
        assert found[way] == pytest.approx(right[way], rel=1e-9), way
    prompt = tokenizer.encode(TEXT)
    assert by_answers(padded, prompt) == pytest.approx(by_answers(cut, prompt), rel=1e-6)
