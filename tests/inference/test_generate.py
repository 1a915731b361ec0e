"""Generation: greedy equals the uncached model, sampling filters, sessions that go on, text that is never half a
character.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moai_llm.inference.generate import sample_text
from moai_llm.inference.load import TextModel, load_model, resolve_model
from moai_llm.inference.sampling import Draw, Sampling, choose
from moai_llm.inference.session import Session
from moai_llm.inference.text_stream import TextStream
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from tests.conftest import tiny_model

HYBRID = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention", "sliding_attention"],
          "mlp_layer_types": ["dense", "sparse"], "vocab_size": 512}  # fmt: skip
GREEDY = Sampling(max_new_tokens=12, temperature=0)


@pytest.fixture
def text_model(tokenizer: Tokenizer) -> TextModel:
    return TextModel(tiny_model(**HYBRID), tokenizer, Path("here"))


def uncached(text_model: TextModel, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            logits = text_model.model(torch.tensor([ids]), use_cache=False).logits[
                0, -1, : text_model.tokenizer.vocab_size
            ]
        token = int(logits.argmax())
        if token in text_model.tokenizer.stop_ids:
            break
        ids.append(token)
    return ids[len(prompt) :]


def test_greedy(text_model: TextModel) -> None:
    prompt = text_model.tokenizer.encode("Interest on the deposit")
    assert list(Session(text_model).stream(prompt, GREEDY)) == uncached(text_model, prompt, 12)


def test_a_session_goes_on_where_it_stopped(text_model: TextModel) -> None:
    session, prompt = Session(text_model), text_model.tokenizer.encode("The quick brown")
    calls = []
    forward = text_model.model.forward
    text_model.model.forward = lambda *a, **k: (calls.append(a[0] if a else k["input_ids"]), forward(*a, **k))[1]
    first = list(session.stream(prompt, GREEDY))
    longer = [*prompt, *first, *text_model.tokenizer.encode(" fox jumps")]
    calls.clear()
    second = list(session.stream(longer, GREEDY))
    assert calls[0].shape[1] <= len(longer) - len(prompt) - len(first) + 1  # only what is new was computed
    assert second == uncached(text_model, longer, 12)
    other = text_model.tokenizer.encode("completely different")  # not a continuation: begins again
    assert list(session.stream(other, GREEDY)) == uncached(text_model, other, 12)


def test_sampling_is_reproducible(text_model: TextModel) -> None:
    prompt = text_model.tokenizer.encode("Interest")
    runs = [list(Session(text_model).stream(prompt, Sampling(10, 1.0, 0, 1.0, seed=seed))) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_stop_tokens_end_the_answer(text_model: TextModel) -> None:
    tokenizer, prompt = text_model.tokenizer, text_model.tokenizer.encode("Interest")
    real = text_model.model.forward
    for stop in tokenizer.stop_ids:

        def forward(stop: int = stop, **arguments: object):  # type: ignore[no-untyped-def]
            output = real(**arguments)
            output.logits = torch.zeros_like(output.logits)
            output.logits[..., stop] = 9
            return output

        text_model.model.forward = forward
        assert list(Session(text_model).stream(prompt, GREEDY)) == []


def test_filters() -> None:
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0, -9.0])

    def seen(sampling: Sampling, context: list[int] | None = None) -> set[int]:
        draw = Draw(sampling, context or [])
        return {choose(logits[None], [draw])[0].token for _ in range(300)}

    assert seen(Sampling(temperature=0)) == {0}
    assert seen(Sampling(temperature=2.0, top_k=2, top_p=1.0)) == {0, 1}
    assert seen(Sampling(temperature=2.0, top_k=0, top_p=1.0)) >= {0, 1, 2, 3}
    assert seen(Sampling(temperature=1.0, top_k=0, top_p=0.01)) == {0}  # never empty
    assert seen(Sampling(temperature=1.0, top_k=0, top_p=0.7)) == {0, 1}
    assert seen(Sampling(temperature=0, repetition_penalty=9.0), [0]) == {1}


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"repetition_penalty": 0},
    ],
)
def test_wrong_sampling(wrong: dict) -> None:
    with pytest.raises(MoaiError, match=f"{next(iter(wrong))} = .* is out of range"):
        Sampling(**wrong)


def test_empty_and_too_long_prompts(tokenizer: Tokenizer) -> None:
    model = TextModel(tiny_model(position_embedding="learned", vocab_size=512), tokenizer, Path("here"))
    with pytest.raises(MoaiError, match="empty prompt"):
        next(Session(model).stream([], GREEDY))
    with pytest.raises(MoaiError, match="has 128 tokens; this model takes 128"):
        next(Session(model).stream([1] * 128, GREEDY))
    assert len(list(Session(model).stream([1] * 120, Sampling(50, temperature=0)))) <= 8


def test_text_comes_in_whole_characters(tokenizer: Tokenizer) -> None:
    stream, text = TextStream(tokenizer), "이자 👩‍👩‍👧 利"
    pieces = [stream.push(token) for token in tokenizer.encode(text)] + [stream.end()]
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    stream = TextStream(tokenizer)
    assert stream.push(0xE3) == "" and stream.end() == "\ufffd"


def test_load_and_the_documented_calls(text_model: TextModel, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints" / "step-00000004"
    text_model.model.float().save_pretrained(folder)
    text_model.tokenizer.save(folder)
    for path in (folder, tmp_path / "run"):
        assert resolve_model(path) == folder
    model = load_model(tmp_path / "run", dtype="fp32")
    text = sample_text(model, prompt="Write a story about", max_length=5, temperature=0.8, top_p=0.9, top_k=50)
    assert text.startswith("Write a story about")
    assert load_model(folder, dtype="bf16").model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: None, "no such directory"),
        (lambda path: path.mkdir(), "no model in it"),
        (lambda path: (path.mkdir(), (path / "config.json").write_text("{}")), "no tokenizer.json there"),
    ],
)
def test_what_is_not_a_model(tmp_path: Path, prepare, message: str) -> None:  # type: ignore[no-untyped-def]
    prepare(tmp_path / "m")
    with pytest.raises(MoaiError, match=message):
        load_model(tmp_path / "m")


def test_damaged_and_mismatched_models(text_model: TextModel, tmp_path: Path) -> None:
    text_model.tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "moai", "vocab_size": 512}')
    with pytest.raises(MoaiError, match="cannot be loaded"):
        load_model(tmp_path)
    tiny_model(vocab_size=300).float().save_pretrained(tmp_path)
    with pytest.raises(MoaiError, match="the tokenizer has .* tokens, the model 300"):
        load_model(tmp_path)
    with pytest.raises(MoaiError, match="'int3' is not one of"):
        load_model(tmp_path, dtype="int3")
