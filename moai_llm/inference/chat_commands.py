"""What lines that begin with a slash do in a chat: a table of commands, mistakes as sentences, completion."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from moai_llm.inference.chat import Chat
from moai_llm.inference.chat_file import file_path, load, save
from moai_llm.inference.sampling import Sampling
from moai_llm.runtime import MoaiError, did_you_mean

WHOLE = ("max_new_tokens", "top_k", "seed")
SETTINGS = tuple(field.name for field in fields(Sampling) if field.name != "logprobs")  # a chat shows no logprobs


@dataclass(frozen=True)
class Outcome:
    """What a command wants of the terminal.

    Attributes:
        text: to show.
        again: answer the last question again, or `instead` of it this one.
        edit: let the user change this question, and answer it instead.
    """

    text: str = ""
    again: bool = False
    instead: str | None = None
    edit: str | None = None
    leave: bool = False


@dataclass(frozen=True)
class Command:
    usage: str
    what: str
    run: Callable[[Commands, str], Outcome]


class Commands:
    """The commands over one chat.

    Attributes:
        file: where the conversation was saved to or loaded from.
    """

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.file: Path | None = None

    def run(self, line: str) -> Outcome:
        """Raises:
        MoaiError: a mistake in the line; nothing has changed.
        """
        name, _, rest = line.partition(" ")
        name = {"/quit": "/exit", "/?": "/help"}.get(name, name)
        if name not in COMMANDS:
            raise MoaiError(f"there is no {name}{did_you_mean(name, COMMANDS)}; /help lists the commands")
        return COMMANDS[name].run(self, rest.strip())

    def load(self, text: str) -> Outcome:
        if not text:
            raise MoaiError("write /load FILE")
        path = Path(text).expanduser()
        if not path.exists() and not path.suffix:
            path = file_path(text)
        load(self.chat, path)
        self.file = path
        count = sum(message["role"] == "user" for message in self.chat.messages)
        left = " The last question has no answer yet: /retry answers it." if self.chat.open else ""
        return Outcome(f"{path}: {_counted(count, 'question')}. /history shows them.{left}")

    def _save(self, text: str) -> Outcome:
        if not text and self.file is None:
            raise MoaiError("write /save FILE")
        path = file_path(text) if text else self.file
        assert path is not None
        save(self.chat, path, overwrite=self.file is not None and path.absolute() == self.file.absolute())
        self.file = path
        return Outcome(f"saved to {path}")

    def _reset(self, _: str) -> Outcome:
        self.chat.reset()
        self.file = None
        return Outcome("forgotten" + ("; the system message stays" if self.chat.system else ""))

    def _undo(self, _: str) -> Outcome:
        question = self.chat.undo()
        if question is None:
            raise MoaiError("there is nothing to take back")
        return Outcome(f"taken back: {_short(question)}")

    def _retry(self, _: str) -> Outcome:
        self._require_question()
        greedy = self.chat.sampling.temperature == 0 and not self.chat.open
        note = "at temperature 0 nothing is drawn: /set temperature=0.7 for another answer" if greedy else ""
        return Outcome(note, again=True)

    def _edit(self, text: str) -> Outcome:
        question = self._require_question()
        return Outcome(again=True, instead=text) if text else Outcome(edit=question)

    def _require_question(self) -> str:
        question = self.chat.question
        if question is None:
            raise MoaiError("there is no question yet")
        return question

    def _system(self, text: str) -> Outcome:
        if not text:
            return Outcome(f"system: {self.chat.system}" if self.chat.system else "there is no system message")
        self.chat.set_system(None if text.lower() == "none" else text)
        return Outcome("system message set" if self.chat.system else "system message removed")

    def _set(self, text: str) -> Outcome:
        if not text:
            now = self.chat.sampling
            return Outcome("\n".join(f"{name} = {_value(getattr(now, name))}" for name in SETTINGS))
        name, value = setting(text)
        self.chat.sampling = replace(self.chat.sampling, **{name: value})
        return Outcome(f"{name} = {_value(value)}")

    def _history(self, _: str) -> Outcome:
        lines, first = [], sum(message["role"] == "system" for message in self.chat.messages[:1])
        for i, message in enumerate(self.chat.messages):
            hidden = " (left out)" if first <= i < first + self.chat.left_out else ""
            calls = f" {json.dumps(message['tool_calls'], ensure_ascii=False)}" if message.get("tool_calls") else ""
            lines.append(f"{message['role']}{hidden}: {message['content']}{calls}")
        return Outcome("\n".join(lines) or "nothing yet")

    def _stats(self, _: str) -> Outcome:
        chat, turns = self.chat, self.chat.turns
        model = chat.text_model.model
        said, rest = sum(turn.tokens for turn in turns), sum(turn.rest for turn in turns)
        reused, read = sum(turn.reused for turn in turns), sum(turn.prompt for turn in turns)
        after = sum(turn.tokens - 1 for turn in turns if turn.tokens > 1)
        lines = [
            f"model: {chat.text_model.path}, {sum(p.numel() for p in model.parameters()):,} parameters, "
            f"{str(model.dtype).removeprefix('torch.')} on {model.device}",
            f"answers: {len(turns)}, {said:,} tokens" + (f", {after / rest:,.1f} tokens/s" if rest > 0 else ""),
            f"prompts: {read:,} tokens, {read - reused:,} computed, {reused:,} reused",
        ]
        if chat.last is not None:
            lines.append(f"context: {context(chat)}")
        if chat.left_out:
            lines.append(f"left out for lack of room: {_counted(chat.left_out, 'message')}")
        return Outcome("\n".join(lines))

    def _help(self, text: str) -> Outcome:
        if text:
            name = "/" + text.removeprefix("/")
            if name not in COMMANDS:
                raise MoaiError(f"there is no {name}{did_you_mean(name, COMMANDS)}")
            return Outcome(f"{COMMANDS[name].usage}: {COMMANDS[name].what}")
        width = max(len(command.usage) for command in COMMANDS.values())
        lines = [f"{command.usage:<{width}}  {command.what}" for command in COMMANDS.values()]
        return Outcome("\n".join([*lines, "", MORE.format(names=", ".join(SETTINGS))]))

    def _exit(self, _: str) -> Outcome:
        return Outcome(leave=True)


COMMANDS = {
    "/reset": Command("/reset", "forget the conversation", Commands._reset),
    "/undo": Command("/undo", "take back the last question and its answer", Commands._undo),
    "/retry": Command("/retry", "answer the last question again, with another seed", Commands._retry),
    "/edit": Command("/edit [TEXT]", "change the last question and answer it again", Commands._edit),
    "/system": Command("/system [TEXT]", "show or set the system message; none removes it", Commands._system),
    "/set": Command("/set [NAME=VALUE]", "show or change how answers are drawn", Commands._set),
    "/save": Command("/save [FILE]", "write the conversation as JSON", Commands._save),
    "/load": Command("/load FILE", "go on from a saved conversation", Commands.load),
    "/history": Command("/history", "show the conversation", Commands._history),
    "/stats": Command("/stats", "tokens, speed, what was computed and what was not", Commands._stats),
    "/help": Command("/help [COMMAND]", "this list", Commands._help),
    "/exit": Command("/exit", "leave (also Ctrl-D)", Commands._exit),
}
MORE = """A question of several lines: end each but the last with a backslash, or put \"\"\" before and after them.
A question that begins with a slash: write two. Ctrl-C stops an answer and keeps what was said.
/set knows {names}; stop takes a text or a JSON list."""


def setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE to a field of `Sampling` and its value.

    Raises:
        MoaiError: no such field, or a value of another type.
    """
    name, equals, value = (part.strip() for part in text.partition("="))
    if name == "logprobs":
        raise MoaiError("a chat shows no logprobs; `moai generate --logprobs` does")
    if name not in SETTINGS:
        raise MoaiError(f"there is no setting {name!r}{did_you_mean(name, SETTINGS)}; there are {', '.join(SETTINGS)}")
    if not equals or not value:
        raise MoaiError(f"write /set {name}=VALUE")
    if name == "stop":
        return name, _texts(value)
    if value.lower() == "none":
        if name == "seed":
            return name, None
        raise MoaiError(f"{name} takes a number, not none")
    try:
        return name, int(value) if name in WHOLE else _finite(value)
    except ValueError:
        kind = "a whole number" if name in WHOLE else "a number"
        raise MoaiError(f"{name} takes {kind}, not {value!r}") from None


def _finite(value: str) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _texts(value: str) -> tuple[str, ...]:
    """A JSON list of texts, a JSON text, or a text as it stands."""
    if value.lower() == "none":
        return ()
    if value[0] not in '["':
        return (value,)
    try:
        texts = json.loads(value)
    except ValueError:
        raise MoaiError(f'stop takes a text or a JSON list as ["a", "b"], not {value}') from None
    texts = [texts] if isinstance(texts, str) else texts
    if not all(isinstance(text, str) and text for text in texts):
        raise MoaiError(f"stop takes texts that are not empty, not {value}")
    return tuple(texts)


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return json.dumps(value, ensure_ascii=False) if value else "none"
    return "none" if value is None else str(value)


def context(chat: Chat) -> str:
    """How much of the context the conversation takes after the last answer."""
    assert chat.last is not None
    return f"{chat.last.prompt + chat.last.tokens:,} of {chat.text_model.context:,}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _short(text: str, width: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def completions(line: str) -> list[str]:
    """How the last word of a line can go on: commands, settings, names of files."""
    name, space, rest = line.partition(" ")
    if not space:
        return [command + ("" if COMMANDS[command].usage == command else " ") for command in COMMANDS
                if line.startswith("/") and command.startswith(line)]  # fmt: skip
    if name == "/set" and "=" not in rest:
        return [f"{known}=" for known in SETTINGS if known.startswith(rest)]
    if name == "/help":
        return [known for known in COMMANDS if known.startswith(rest)]
    if name in ("/save", "/load"):
        return _files(rest)
    return []


def _files(text: str) -> list[str]:
    folder, slash, begin = text.rpartition("/")
    try:
        entries = sorted(Path(folder + slash or ".").expanduser().iterdir())
    except OSError:
        return []
    found = [e for e in entries if e.name.startswith(begin) and (e.is_dir() or e.suffix == ".json")]
    return [f"{folder}{slash}{entry.name}{'/' if entry.is_dir() else ''}" for entry in found]
