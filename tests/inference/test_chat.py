"""The terminal chat: turns, commands, a window that moves, an answer that is interrupted."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from moai_llm.inference import chat as chats
from moai_llm.inference.chat import Chat, run_terminal
from moai_llm.inference.load import TextModel
from moai_llm.inference.sampling import Sampling
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.chat import render
from moai_llm.tokenizer.train import build_tokenizer
from tests.conftest import tiny_model
from tests.tokenizer.conftest import tokenizer_for


@pytest.fixture
def chat(tokenizer: Tokenizer) -> Chat:
    model = tiny_model(layer_types=["linear_attention", "full_attention"], vocab_size=512)
    return Chat(TextModel(model, tokenizer, Path("here")), Sampling(8, temperature=0))


def test_turns_are_remembered(chat: Chat, tokenizer: Tokenizer) -> None:
    first = "".join(chat.say("이자가 뭐예요?"))
    second = "".join(chat.say("and then?"))
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2
    assert chat.messages[1]["content"] == first and chat.messages[3]["content"] == second
    fresh = Chat(chat.text_model, chat.sampling)  # the cache changed nothing
    fresh.messages = chat.messages[:2].copy()
    assert "".join(fresh.say("and then?")) == second


def test_commands(chat: Chat) -> None:
    assert chat.command("/system Be brief.") == "system message set"
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    list(chat.say("hi"))
    assert "user: hi" in chat.command("/history")
    assert chat.command("/set temperature=0.5") == "temperature = 0.5" and chat.sampling.temperature == 0.5
    assert chat.command("/set top_k=7") == "top_k = 7" and chat.sampling.top_k == 7
    assert "out of range" in chat.command("/set top_p=3") and "could not convert" in chat.command("/set top_p=x")
    assert "write /set" in chat.command("/set nothing")
    assert chat.command("/reset") == "forgotten" and len(chat.messages) == 1
    assert "there is no /foo" in chat.command("/foo") and "/system TEXT" in chat.command("/help")
    assert chat.command("/exit") is None
    assert chat.command("/system") == "system message removed" and chat.command("/history") == "nothing yet"


def test_old_turns_leave_a_full_window(chat: Chat) -> None:
    chat.system = "s"
    chat.reset()
    for i in range(12):
        list(chat.say(f"question number {i} about interest"))
    assert chat.messages[0]["role"] == "system" and chat.messages[1]["role"] == "user"
    assert chat.messages[-2]["content"] == "question number 11 about interest" and len(chat.messages) < 20
    rendered = render(chat.text_model.tokenizer, chat.messages[:-1], add_generation_prompt=True)
    assert len(rendered.ids) <= chat.text_model.context - chat.sampling.max_new_tokens


def test_an_interrupted_answer_stays_in_the_conversation(chat: Chat) -> None:
    answer = chat.say("hello")
    piece = next(answer)
    answer.close()
    assert chat.messages[-1] == {"role": "assistant", "content": piece}


def test_piped_input(chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\n/set temperature=0\nagain\n/exit\nnever\n"))
    run_terminal(chat)
    output = capsys.readouterr().out
    assert "temperature = 0.0" in output and not output.startswith(("\n> ", "here"))
    assert [m["content"] for m in chat.messages if m["role"] == "user"] == ["hello", "again"]


def test_ctrl_c_stops_the_answer_only(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(session, prompt, sampling):  # type: ignore[no-untyped-def]
        yield "part"
        raise KeyboardInterrupt

    monkeypatch.setattr(chats, "stream_text", interrupted)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    run_terminal(chat)
    assert "part [stopped]" in capsys.readouterr().out
    assert chat.messages[-1]["content"] == "part"


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma"])
def test_every_template(name: str) -> None:
    """The prompt is rendered by the template in force, and its end of turn ends the answer."""
    tokenizer = tokenizer_for(name)
    model = tiny_model(vocab_size=512)
    chat = Chat(TextModel(model, tokenizer, Path("here")), Sampling(4, temperature=0), system="Be brief.")
    list(chat.say("hello"))
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant"]
    end = tokenizer.stop_ids[-1]
    assert tokenizer.decode([end]) == {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}[name]
    fed, real = [], model.forward

    def forward(input_ids: torch.Tensor, **arguments: object):  # type: ignore[no-untyped-def]
        fed.extend(input_ids[0].tolist())
        output = real(input_ids=input_ids, **arguments)
        output.logits = torch.zeros_like(output.logits)
        output.logits[..., end] = 9
        return output

    model.forward = forward
    chat.reset()
    assert "".join(chat.say("hello")) == ""
    assert fed == render(tokenizer, chat.messages[:-1], add_generation_prompt=True).ids


def test_a_base_model_cannot_chat() -> None:
    plain = build_tokenizer([], ["<|endoftext|>", "<|pad|>"])
    with pytest.raises(MoaiError, match="not a chat model.*moai generate"):
        Chat(TextModel(tiny_model(vocab_size=512), plain, Path("here")), Sampling())
