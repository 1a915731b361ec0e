"""Perplexity and bits per byte by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from moai_llm.evaluation.perplexity import evaluate, evaluate_text, measure, windows
from moai_llm.inference.load import TextModel
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
        log_p = text_model.model(torch.tensor([ids])).logits[0, :, : tokenizer.vocab_size].log_softmax(-1)
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
    assert found.loss == pytest.approx(math.log(tokenizer.vocab_size))


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
    everything, some = (evaluate(text_model.model, [{"input_ids": ids, "labels": x}], tokenizer) for x in (ids, labels))
    assert everything.targets - some.targets == 4
    assert everything.bytes - some.bytes == int(lengths[ids[0, 1:5]].sum())


@pytest.mark.parametrize("text", ["", "a"])
def test_nothing_to_predict(text_model: TextModel, text: str) -> None:
    with pytest.raises(MoaiError, match="fewer than two tokens"):
        evaluate_text(text_model, text)


def test_a_few_rows_stand_for_all_of_a_mixed_corpus(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Packing puts the long documents first; here they are of another kind than the short ones."""
    from moai_llm.data.loader import Loader
    from moai_llm.data.prepare import prepare_texts
    from moai_llm.data.shards import Store

    short = [f"이자는 {i}번 붙어요. 은행에서 가입할 수 있어요." for i in range(400)]
    long = ["return a + b\n" * 24 for _ in range(60)]
    prepare_texts([(text, "") for text in [*short, *long]], tokenizer, tmp_path / "store", [])
    loader = Loader(Store(tmp_path / "store"), 128, seed=None)
    assert len(loader) > 100
    model = tiny_model(vocab_size=512)
    whole, some = (evaluate(model, loader.epoch(16, limit), tokenizer).loss for limit in (None, 16))
    first = evaluate(model, [loader.rows(0, 16)], tokenizer).loss
    assert abs(some - whole) < 0.2 * abs(first - whole)
    assert some == pytest.approx(evaluate(model, loader.epoch(4, 16), tokenizer).loss, rel=1e-12)


def in_windows(text_model: TextModel, text: str, window: int) -> tuple[float, int]:
    """One window at a time, each a document of its own: (nats, targets)."""
    ids = text_model.tokenizer.encode(text)
    pieces = [torch.tensor([ids[i : i + window]]) for i in range(0, len(ids), window)]
    batches = [{"input_ids": piece, "labels": piece} for piece in pieces if piece.shape[1] > 1]
    found = evaluate(text_model.model, batches, text_model.tokenizer)
    return found.nats, found.targets


@pytest.mark.parametrize("window", [2, 7, 10, 128])
def test_a_stride_of_a_window_is_one_window_after_the_other(text_model: TextModel, window: int) -> None:
    nats, targets = in_windows(text_model, TEXT, window)
    for stride in (window, None):
        found = evaluate_text(text_model, TEXT, window, stride)
        assert found.targets == targets and found.nats == pytest.approx(nats, rel=1e-6)
    if window < 128:
        slid = evaluate_text(text_model, TEXT, window, window // 2)
        assert slid.targets > targets  # control: sliding is something else


@pytest.mark.parametrize(
    ("tokens", "window", "stride"), [(2, 2, 1), (17, 5, 2), (100, 10, 3), (5, 10, 1), (101, 10, 9)]
)
def test_each_token_is_predicted_once_with_enough_before_it(tokens: int, window: int, stride: int) -> None:
    predicted = []
    for begin, end, first in windows(tokens, window, stride):
        assert 0 <= begin < first < end <= tokens and end - begin <= window
        assert begin == 0 or first - begin >= window - stride
        predicted += range(first, end)
    assert predicted == list(range(1, tokens))


def test_control_windows_without_overlap_leave_their_first_tokens_out() -> None:
    predicted = [i for _, end, first in windows(20, 5, 5) for i in range(first, end)]
    assert predicted == [i for i in range(20) if i % 5]


def test_a_sliding_window_by_hand(text_model: TextModel, tokenizer: Tokenizer) -> None:
    ids, nats = tokenizer.encode(TEXT), 0.0
    with torch.no_grad():
        for begin, end, first in windows(len(ids), 12, 5):
            log_p = text_model.model(torch.tensor([ids[begin:end]])).logits[0].log_softmax(-1)
            nats -= sum(float(log_p[i - 1 - begin, ids[i]]) for i in range(first, end))
    found = evaluate_text(text_model, TEXT, 12, 5)
    assert found.nats == pytest.approx(nats) and found.targets == len(ids) - 1
    assert found.bytes == len(b"".join(tokenizer.token_bytes(i) for i in ids[1:]))


def test_documents_come_back_in_order_whatever_goes_together(text_model: TextModel) -> None:
    texts = [(TEXT[: 5 + 13 * i], i) for i in range(8)] + [("", 8), ("a", 9), (TEXT * 3, 10)]
    alone = [evaluate_text(text_model, text, 20) for text, i in texts if i not in (8, 9)]
    together = list(measure(text_model, texts, window=20, batch_tokens=30))
    assert [document.given for document in together] == [*range(8), 10]
    for document, expected in zip(together, alone):
        assert document.found.nats == pytest.approx(expected.nats, rel=1e-9)
        assert (document.found.targets, document.found.bytes) == (expected.targets, expected.bytes)


@pytest.mark.parametrize(
    ("options", "message"), [((1, None), "at least two tokens"), ((10, 11), "left out"), ((10, -1), "left")]
)
def test_windows_that_make_no_sense(text_model: TextModel, options: tuple[int, int | None], message: str) -> None:
    with pytest.raises(MoaiError, match=message):
        evaluate_text(text_model, TEXT, *options)
