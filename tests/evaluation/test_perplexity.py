"""Perplexity and bits per byte by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from moai_llm.evaluation.perplexity import evaluate, evaluate_text
from moai_llm.inference.generate import TextModel
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from tests.conftest import tiny_model

TEXT = "Interest is paid on the deposit. 이자가 붙어요. " * 4


@pytest.fixture
def text_model(tokenizer: Tokenizer) -> TextModel:
    return TextModel(tiny_model(vocab_size=512), tokenizer, Path("here"))


def test_by_hand(text_model: TextModel, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    assert len(ids) < text_model.context
    found = evaluate_text(text_model, TEXT)
    with torch.no_grad():
        log_p = text_model.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    nats = -sum(float(log_p[i, ids[i + 1]]) for i in range(len(ids) - 1))
    size = sum(len(tokenizer.token_bytes(i)) for i in ids[1:])
    assert found.nats == pytest.approx(nats) and found.targets == len(ids) - 1 and found.bytes == size
    assert found.loss == pytest.approx(nats / (len(ids) - 1))
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / size)


def test_a_model_that_knows_nothing(tokenizer: Tokenizer) -> None:
    model = tiny_model(vocab_size=512)
    torch.nn.init.zeros_(model.lm_head.weight)
    found = evaluate_text(TextModel(model, tokenizer, Path("here")), TEXT)
    assert found.loss == pytest.approx(math.log(512))


def test_windows(text_model: TextModel, tokenizer: Tokenizer) -> None:
    whole, cut = evaluate_text(text_model, TEXT), evaluate_text(text_model, TEXT, window=10)
    pieces = -(-len(tokenizer.encode(TEXT)) // 10)
    assert cut.targets == whole.targets + 1 - pieces
    assert cut.nats != pytest.approx(whole.nats)


def test_masked_labels_do_not_count(text_model: TextModel, tokenizer: Tokenizer) -> None:
    ids = torch.tensor([tokenizer.encode(TEXT)])
    labels = ids.clone()
    labels[0, 1:5] = -100
    lengths = tokenizer.byte_lengths()
    everything, some = (evaluate(text_model.model, [{"input_ids": ids, "labels": x}], lengths) for x in (ids, labels))
    assert everything.targets - some.targets == 4
    assert everything.bytes - some.bytes == int(lengths[ids[0, 1:5]].sum())


@pytest.mark.parametrize("text", ["", "a"])
def test_nothing_to_predict(text_model: TextModel, text: str) -> None:
    with pytest.raises(MoaiError, match="fewer than two tokens"):
        evaluate_text(text_model, text)
