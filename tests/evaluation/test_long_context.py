"""The pass key test against models whose answers are known, and prefill in pieces against one forward."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moai_llm.config import MoaiConfig
from moai_llm.evaluation import long_report
from moai_llm.evaluation.long_context import (
    DIGITS,
    KNOWS,
    LANGUAGES,
    ROPES,
    Cell,
    by_position,
    extend,
    make_trial,
    passkey,
    predictor,
    sequences,
    token_scores,
)
from moai_llm.inference import TextModel
from moai_llm.modeling.model import MoaiForCausalLM
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from tests.browser import MEASURE, Page, measured, outside
from tests.conftest import PAIRS, tiny_config, tiny_model

LENGTHS, DEPTHS = (100, 160), (0.0, 0.5, 1.0)


class Copies:
    """In place of a model: what followed the last three tokens when they stood together before comes again.

    What it remembers is its cache, so it works in pieces only if it is handed back.
    """

    def __init__(self, tokenizer: Tokenizer, noise: float = 0.0) -> None:
        self.size, self.noise = tokenizer.vocab_size, noise
        self.config = SimpleNamespace(vocab_size=self.size, max_position_embeddings=4096)
        self.device, self.longest, self.random = torch.device("cpu"), 0, random.Random(0)

    def base_model(self, input_ids: Any, past_key_values: Any, use_cache: bool) -> Any:
        self.longest = max(self.longest, input_ids.shape[1])
        seen: list[int] = list(past_key_values or ())
        rows = torch.zeros(1, input_ids.shape[1], self.size)
        for i, token in enumerate(input_ids[0].tolist()):
            seen.append(token)
            guess = self.random.randrange(self.size) if self.random.random() < self.noise else self.next(seen)
            rows[0, i, guess] = 9.0
        return SimpleNamespace(last_hidden_state=rows, past_key_values=seen)

    def next(self, seen: Sequence[int]) -> int:
        for back in (3, 2, 1):
            for i in range(len(seen) - back - 1, -1, -1):
                if seen[i : i + back] == seen[-back:]:
                    return seen[i + back]
        return 0

    def get_output_embeddings(self) -> Any:
        return lambda hidden: hidden


def shares(cells: list[Cell]) -> list[float]:
    return [cell.share for cell in cells]


@pytest.mark.parametrize("piece", [7, 1000])
def test_a_model_that_copies_finds_every_key(piece: int, tokenizer: Tokenizer) -> None:
    model = Copies(tokenizer)
    predict = predictor(TextModel(model, tokenizer, Path("here")), piece)
    cells = passkey(tokenizer, predict, LENGTHS, DEPTHS, languages=("en",), trials=2)
    assert shares(cells) == [1.0] * 6 and model.longest <= piece
    assert all(cell.length - 30 < cell.longest <= cell.length for cell in cells)


def test_a_model_that_guesses_finds_none(tokenizer: Tokenizer) -> None:
    guesses = predictor(TextModel(Copies(tokenizer, noise=1.0), tokenizer, Path("here")), 50)
    sometimes = predictor(TextModel(Copies(tokenizer, noise=0.2), tokenizer, Path("here")), 50)
    assert sum(shares(passkey(tokenizer, guesses, LENGTHS, DEPTHS, languages=("en",), trials=3))) == 0
    found = passkey(tokenizer, sometimes, LENGTHS, DEPTHS, languages=("en",), trials=10)
    assert 0.1 < sum(shares(found)) / 6 < 0.6  # five tokens in a row, each right four times of five


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_trial_is_what_it_says(language: str, tokenizer: Tokenizer) -> None:
    """A scorer that reads the text finds the key in the prompt and in the answer; the key is nowhere else."""
    keys, needle = set(), LANGUAGES[language].needle
    for depth in DEPTHS:
        trial = make_trial(tokenizer, 300, depth, language, random.Random(f"{depth}"))
        text, answer = tokenizer.decode(trial.prompt), tokenizer.decode(trial.answer)
        key = answer.strip()
        assert len(key) == DIGITS and key.isdigit() and text.count(key) == 2
        assert (text + answer).endswith(LANGUAGES[language].question + key)
        assert tokenizer.encode(LANGUAGES[language].question + key)[-len(trial.answer) :] == trial.answer
        halves = text.split(needle.format(key=key))
        before, after = (sum(half.count(sentence) for sentence in LANGUAGES[language].fill) for half in halves)
        assert before == round(depth * (before + after)) and before + after >= 5
        assert 260 < len(trial.prompt) + len(trial.answer) <= 300
        keys.add(key)
    assert len(keys) == len(DEPTHS)


def test_what_makes_no_sense_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(MoaiError, match="too few for the pass key and the question"):
        passkey(tokenizer, lambda *_: True, [20], [0.5])
    with pytest.raises(MoaiError, match="no pass key in 'kr' .did you mean 'ko'"):
        passkey(tokenizer, lambda *_: True, [200], [0.5], languages=["kr"])


@pytest.mark.parametrize("pair", [*PAIRS[:2], PAIRS[3], PAIRS[6]], ids="-".join)
def test_in_pieces_is_at_once(pair: tuple[str, str], tokenizer: Tokenizer) -> None:
    model = tiny_model(*pair, vocab_size=512)
    text_model, ids = TextModel(model, tokenizer, Path("here")), [(7 * i * i + i) % 500 for i in range(40)]
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0, :, :512].log_softmax(-1)
    wanted = torch.tensor(ids[1:])
    expected, best = log_p[:-1].gather(1, wanted[:, None])[:, 0], log_p[:-1].argmax(-1) == wanted
    for piece in (1, 7, 1000):
        found, greedy = (torch.cat(parts) for parts in zip(*token_scores(text_model, ids, piece=piece)))
        assert torch.allclose(found, expected, rtol=0, atol=1e-9) and (greedy == best).all()
        late, _ = (torch.cat(parts) for parts in zip(*token_scores(text_model, ids, first=30, piece=piece)))
        assert torch.allclose(late, expected[29:], rtol=0, atol=1e-9)


def test_loss_by_position(tokenizer: Tokenizer) -> None:
    text_model = TextModel(tiny_model(vocab_size=512), tokenizer, Path("here"))
    rows = [[(i * i + 3 * row) % 500 for i in range(41)] for row in range(3)]
    losses = torch.stack([-torch.cat([p for p, _ in token_scores(text_model, row)]) for row in rows])
    buckets = by_position(text_model, rows, buckets=4, piece=13)
    assert [(b.begin, b.end) for b in buckets] == [(1, 11), (11, 21), (21, 31), (31, 41)]
    for i, bucket in enumerate(buckets):
        means = losses[:, 10 * i : 10 * i + 10].mean(1)
        assert bucket.loss == pytest.approx(float(means.mean())) and bucket.tokens == 30
        assert bucket.stderr == pytest.approx(float(means.std()) / math.sqrt(3))
    assert math.isnan(by_position(text_model, rows[:1], buckets=2)[0].stderr)


def test_sequences(tokenizer: Tokenizer) -> None:
    long, short = "Interest is paid on the deposit. " * 30, "The lazy dog. "
    rows, single = sequences(tokenizer, [short, long, long], 50, 5)
    assert single and len(rows) == 2 and rows[0] == tokenizer.encode(long)[:50]
    rows, single = sequences(tokenizer, [short] * 40, 50, 2)
    assert not single and len(rows) == 2 and rows[0] == (tokenizer.encode(short) * 40)[:50]
    assert sequences(tokenizer, [short], 50, 2) == ([], False)


@pytest.mark.parametrize("rope", ROPES)
def test_a_stretched_context_is_the_model_built_so(rope: str, tokenizer: Tokenizer) -> None:
    """Against a model of the same weights whose config says the rule; the given model stays what it was."""
    model = tiny_model(vocab_size=512, max_position_embeddings=32)
    text_model, ids = TextModel(model, tokenizer, Path("here")), torch.arange(100)[None]
    before = model(ids).logits
    stretched = extend(text_model, 128, rope)
    assert stretched.context == 128 and text_model.context == 32
    params: dict[str, Any] = {"rope_type": rope, "rope_theta": 1e4, "factor": 1.0 if rope == "dynamic" else 4.0}
    if rope == "yarn":
        params["original_max_position_embeddings"] = 32
    fields = {**model.config.to_dict(), "rope_parameters": params}
    fields["max_position_embeddings"] = 32 if rope == "dynamic" else 128
    built = MoaiForCausalLM(MoaiConfig(**fields)).double().eval()
    built.load_state_dict(model.state_dict())
    expected = built(ids).logits
    assert torch.allclose(stretched.model(ids).logits, expected, rtol=0, atol=1e-12)
    assert (expected - before).abs().max() > 1e-3 and torch.equal(model(ids).logits, before)
    found = torch.cat([p for p, _ in token_scores(stretched, ids[0].tolist(), piece=9)])
    log_p = expected[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    if rope != "dynamic":  # its frequencies depend on the length that is declared, which is one more here
        assert torch.allclose(found, log_p, rtol=0, atol=1e-9)


def test_a_context_that_cannot_be_stretched(tokenizer: Tokenizer) -> None:
    def of(**changes: Any) -> TextModel:
        return TextModel(MoaiForCausalLM(tiny_config(**changes)), tokenizer, Path("here"))

    with pytest.raises(MoaiError, match="128 learned positions, and none for 256"):
        extend(of(position_embedding="learned"), 256)
    with pytest.raises(MoaiError, match="no layer of this model rotates"):
        extend(of(mixer="linear_attention"), 256, "yarn")
    with pytest.raises(MoaiError, match="did you mean 'yarn'"):
        extend(of(), 256, "yarm")
    with pytest.raises(MoaiError, match="is not more than 128"):
        extend(of(), 64, "yarn")
    with pytest.raises(MoaiError, match="already scaled .linear"):
        extend(of(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}), 256, "yarn")
    assert extend(of(mixer="linear_attention"), 256).context == 256


def test_the_report_says_when_it_says_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text_model = TextModel(tiny_model(vocab_size=512), tokenizer, tmp_path)
    good = [
        Cell("en", length, depth, found, 5, length) for depth in (0.0, 1.0) for length, found in ((64, 5), (256, 1))
    ]
    bad = [Cell("ko", length, depth, 1, 5, length) for depth in (0.0, 1.0) for length in (64, 256)]
    buckets = by_position(text_model, [list(range(100))], buckets=3)
    settings = {"context": 256, "rope": "yarn"}
    found = long_report.results(text_model, good + bad, buckets, 128, settings)
    assert found.details["knows_the_task"] == {"en": True, "ko": False}
    (warning,) = long_report.warnings(found)
    assert warning.startswith("pass key, ko: within the context of training (128 tokens)") and f"{KNOWS:.0%}" in warning
    assert {score.metric: score.value for score in found.scores if score.task == "pass key, en"} == {
        "found at 64": 1.0, "found at 256": 0.2
    }  # fmt: skip
    text = long_report.page(found)
    assert not outside(text) and {"Keys found", "Loss by position"} <= set(Page(text).tables) and warning in text
    assert "NaN" not in text.split("<script")[1]
    found.save(tmp_path / "long.json")
    seen = measured(text, tmp_path, 360, MEASURE)
    assert seen["wide"] <= 360 and seen["plots"] == 3 and seen["smallest"] > 6
