"""Lines that begin with a slash: what they do, what they say to a mistake, how they are completed; the saved file."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from moai_llm.inference.chat import Chat
from moai_llm.inference.chat_commands import COMMANDS, SETTINGS, Commands, completions
from moai_llm.inference.load import TextModel
from moai_llm.inference.sampling import Sampling
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from tests.conftest import tiny_model

TALK = [{"role": "system", "content": "짧게."}, {"role": "user", "content": "이자가 뭐예요?\n\n\"why\" \x1b[31m"},
        {"role": "assistant", "content": "利子 🙂"}]  # fmt: skip


@pytest.fixture
def commands(tokenizer: Tokenizer) -> Commands:
    model = tiny_model(layer_types=["linear_attention", "full_attention"], vocab_size=512)
    return Commands(Chat(TextModel(model, tokenizer, Path("here")), Sampling(8, temperature=0)))


def said(commands: Commands, line: str) -> str:
    return commands.run(line).text


def test_the_conversation(commands: Commands) -> None:
    chat = commands.chat
    assert said(commands, "/history") == "nothing yet" and said(commands, "/system") == "there is no system message"
    assert said(commands, "/system Be brief.") == "system message set"
    assert chat.messages == [{"role": "system", "content": "Be brief."}] and "Be brief." in said(commands, "/system")
    list(chat.say("hi"))
    assert "user: hi" in said(commands, "/history") and len(chat.messages) == 3
    chat.left_out = 2
    assert "user (left out): hi" in said(commands, "/history")
    chat.left_out = 0
    assert said(commands, "/undo") == "taken back: hi" and len(chat.messages) == 1
    list(chat.say("hi"))
    assert said(commands, "/reset") == "forgotten; the system message stays" and len(chat.messages) == 1
    assert said(commands, "/system none") == "system message removed" and said(commands, "/reset") == "forgotten"
    assert commands.run("/exit").leave and commands.run("/quit").leave
    for line in ("/undo", "/retry", "/edit", "/edit x"):
        with pytest.raises(MoaiError):
            commands.run(line)


def test_again(commands: Commands) -> None:
    list(commands.chat.say("hi"))
    assert "at temperature 0 nothing is drawn" in said(commands, "/retry") and commands.run("/retry").again
    said(commands, "/set temperature=0.7")
    assert commands.run("/retry").again and not said(commands, "/retry")
    assert commands.run("/edit").edit == "hi" and commands.run("/edit ho ho").instead == "ho ho"


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("temperature=0.5", 0.5), ("temperature = 0", 0.0), ("top_k=7", 7), ("max_new_tokens=3", 3), ("seed=9", 9),
        ("seed=none", None), ("min_p=0.1", 0.1), ("presence_penalty=-1", -1.0), ("stop=Q:", ("Q:",)), ("stop=none", ()),
        ('stop=["a, b", "\\n"]', ("a, b", "\n")), ('stop="\\n\\n"', ("\n\n",)), ("stop=[]", ()), ("stop=a=b", ("a=b",)),
    ],
)  # fmt: skip
def test_set(commands: Commands, line: str, value: object) -> None:
    commands.chat.sampling = Sampling(8, seed=1, stop=("x",))
    name = line.partition("=")[0].strip()
    assert said(commands, f"/set {line}").startswith(f"{name} = ")
    assert getattr(commands.chat.sampling, name) == value
    assert f"{name} = " in said(commands, "/set")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set top_p=3", "top_p = 3.0 is out of range"),
        ("/set top_p=x", "top_p takes a number, not 'x'"),
        ("/set top_p=nan", "top_p takes a number, not 'nan'"),
        ("/set top_k=1.5", "top_k takes a whole number, not '1.5'"),
        ("/set temperature=none", "temperature takes a number, not none"),
        ("/set seed=99999999999999999999999", "out of range"),
        ("/set temprature=1", "there is no setting 'temprature' .did you mean 'temperature'"),
        ("/set temperature", "write /set temperature=VALUE"),
        ("/set =3", "there is no setting ''"),
        ("/set logprobs=3", "moai generate --logprobs"),
        ('/set stop=["a"', "a text or a JSON list"),
        ('/set stop=[1, ""]', "texts that are not empty"),
        ("/rest", "there is no /rest .did you mean '/reset'.*/help"),
        ("/help hstory", "did you mean '/history'"),
        ("/", "there is no /; /help"),
        ("/load", "write /load FILE"),
        ("/save", "write /save FILE"),
    ],
)
def test_mistakes_are_sentences(commands: Commands, line: str, message: str) -> None:
    before = commands.chat.sampling
    with pytest.raises(MoaiError, match=message):
        commands.run(line)
    assert commands.chat.sampling == before


def test_help_and_figures(commands: Commands) -> None:
    text = said(commands, "/help")
    assert all(command.usage in text for command in COMMANDS.values()) and all(name in text for name in SETTINGS)
    assert set(SETTINGS) == {field.name for field in fields(Sampling)} - {"logprobs"}
    assert said(commands, "/help save").startswith("/save [FILE]: ")
    assert "answers: 0, 0 tokens" in said(commands, "/stats")
    list(commands.chat.say("What is interest?"))
    list(commands.chat.say("Why?"))
    turns, text = commands.chat.turns, said(commands, "/stats")
    assert f"{turns[0].prompt + turns[1].prompt} tokens" in text and f"{turns[1].reused} reused" in text
    assert f"context: {turns[1].prompt + turns[1].tokens} of 128" in text and "float64 on cpu" in text


def test_saved_and_loaded(commands: Commands, tokenizer: Tokenizer, tmp_path: Path) -> None:
    file, chat = tmp_path / "talk.json", commands.chat
    with pytest.raises(MoaiError, match="nothing to save"):
        commands.run(f"/save {file}")
    chat.put(TALK)
    assert said(commands, f"/save {tmp_path / 'talk'}") == f"saved to {file}"
    assert json.loads(file.read_text(encoding="utf-8")) == {"messages": TALK}
    list(chat.say("더"))
    assert said(commands, "/save") == f"saved to {file}"  # its own file again
    other = Commands(Chat(chat.text_model, chat.sampling))
    with pytest.raises(MoaiError, match="is there already"):
        other.chat.put(TALK)
        other.run(f"/save {file}")
    assert "2 questions" in said(other, f"/load {tmp_path / 'talk'}")
    assert other.chat.messages == chat.messages and other.chat.system == "짧게."
    assert "".join(other.chat.say("and?"))
    with pytest.raises(MoaiError, match="is saved as .json"):
        commands.run("/save talk.txt")
    with pytest.raises(MoaiError, match="cannot be written"):
        commands.run(f"/save {tmp_path}/nowhere/talk.json")


def test_the_file_is_training_data(commands: Commands, tokenizer: Tokenizer, tmp_path: Path) -> None:
    from moai_llm.data.sft import read_conversations
    from moai_llm.data.sources import read_records

    tools = [{"type": "function", "function": {"name": "rate", "parameters": {}}}]
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "rate", "arguments": {"year": 1}}]}
    talk = [*TALK[:2], call, {"role": "tool", "content": "3%"}, TALK[2]]
    commands.chat.put(talk, tools)
    commands.run(f"/save {tmp_path / 'talk.json'}")
    [(messages, *_)] = read_conversations(read_records([str(tmp_path / "talk.json")]))
    assert list(messages) == talk and messages.tools == tools
    commands.run("/reset")
    commands.run(f"/load {tmp_path / 'talk.json'}")
    assert commands.chat.messages == talk and commands.chat.tools == tools


def test_a_conversation_of_others(commands: Commands, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}, {"from": "human", "value": "open?"}]
    (tmp_path / "a.json").write_text(json.dumps({"conversations": turns}))
    assert "The last question has no answer yet: /retry" in said(commands, f"/load {tmp_path / 'a.json'}")
    with pytest.raises(MoaiError, match="no answer yet"):
        list(commands.chat.say("another"))
    assert commands.run("/retry").again and "".join(commands.chat.retry())
    assert [m["content"] for m in commands.chat.messages][:3] == ["hi", "ho", "open?"] and not commands.chat.open


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a JSON file"),
        (b"\xff\xfe\x00", "is not a JSON file"),
        (b'{"messages": [{"role": "user", "content": "cut o', "is not a JSON file"),
        (b"[" * 100_000, "is not a JSON file"),
        (b"3", "'messages' is a number"),
        (b"{}", "it has no `messages`; /save writes one"),
        (b'{"messages": []}', "'messages' is empty"),
        (b'{"messages": [3]}', "message 0 is a number"),
        (b'{"messages": [{"role": "robot", "content": "x"}]}', "unknown role 'robot'"),
        (b'{"messages": [{"role": "user", "content": 5}]}', "is a number, not text"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}', "before any user has spoken"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_broken_file_loses_nothing(commands: Commands, content: bytes | None, message: str, tmp_path: Path) -> None:
    commands.chat.put(TALK)
    file = tmp_path / "broken.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(MoaiError, match=message):
        commands.run(f"/load {file}")
    assert commands.chat.messages == TALK and commands.file is None
    assert content is None or file.read_bytes() == content


def test_completion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert completions("/re") == ["/reset", "/retry"] and completions("/sy") == ["/system "]
    assert completions("hello") == [] and completions("/history x") == []
    assert completions("/set top") == ["top_k=", "top_p="] and completions("/set top_k=") == []
    assert completions("/help /un") == ["/undo"]
    (tmp_path / "talks").mkdir()
    for name in ("talk.json", "talk.txt", "talks/one.json"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert completions("/load ta") == ["talk.json", "talks/"] and completions("/load talks/") == ["talks/one.json"]
    assert completions("/load nowhere/") == []
