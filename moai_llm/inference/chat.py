"""A conversation in the terminal: streaming, several turns, commands that begin with a slash, Ctrl-C stops the answer
only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any

from moai_llm.inference.load import TextModel
from moai_llm.inference.sampling import Sampling
from moai_llm.inference.session import Session, stream_text
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer.chat import can_chat, render

HELP = """/reset            forget the conversation
/system TEXT      set the system message and start again
/set NAME=VALUE   change sampling: {names}
/history          show the conversation
/exit             leave (also Ctrl-D)"""


class Chat:
    """The conversation so far and the model's session over it.

    Args:
        cache: as in `Session`.

    Raises:
        MoaiError: the model's tokenizer has no chat template.
    """

    def __init__(
        self,
        text_model: TextModel,
        sampling: Sampling,
        system: str | None = None,
        cache: Callable[[], Any] | None = None,
    ) -> None:
        if not can_chat(text_model.tokenizer):
            raise MoaiError(
                f"{text_model.path} is not a chat model: its tokenizer has no chat template. "
                "Use `moai generate`, or fine-tune it first"
            )
        self.text_model, self.sampling, self.system = text_model, sampling, system
        self.session = Session(text_model, cache)
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self.session.reset()

    def say(self, text: str) -> Iterator[str]:
        """Add a user turn and yield the answer in pieces; what was yielded stays in the conversation even if it is
        cut short.
        """
        self.messages.append({"role": "user", "content": text})
        answer = {"role": "assistant", "content": ""}
        try:
            for piece in stream_text(self.session, self._prompt(), self.sampling):
                answer["content"] += piece
                yield piece
        finally:
            self.messages.append(answer)

    def _prompt(self) -> list[int]:
        """The rendered conversation; the oldest exchanges go when it would not leave room for an answer."""
        tokenizer = self.text_model.tokenizer
        room = max(1, self.text_model.context - self.sampling.max_new_tokens)
        ids = render(tokenizer, self.messages, add_generation_prompt=True).ids
        while len(ids) > room and len(self.messages) > 2:
            oldest = 1 if self.messages[0]["role"] == "system" else 0
            del self.messages[oldest : oldest + 2]
            ids = render(tokenizer, self.messages, add_generation_prompt=True).ids
        return ids

    def command(self, line: str) -> str | None:
        """Run a /command and return what to show; None means leave."""
        name, _, rest = line[1:].partition(" ")
        if name in ("exit", "quit"):
            return None
        actions: dict[str, Callable[[str], str]] = {
            "reset": self._reset, "system": self._system, "set": self._set, "history": self._history,
            "help": lambda _: HELP.format(names=", ".join(f.name for f in fields(Sampling))),
        }  # fmt: skip
        if name not in actions:
            return f"there is no /{name}; /help lists the commands"
        return actions[name](rest.strip())

    def _reset(self, _: str) -> str:
        self.reset()
        return "forgotten"

    def _system(self, text: str) -> str:
        self.system = text or None
        self.reset()
        return "system message set" if text else "system message removed"

    def _set(self, text: str) -> str:
        name, _, value = text.partition("=")
        known = {f.name: f for f in fields(Sampling)}
        if name.strip() not in known or not value:
            return f"write /set NAME=VALUE with one of {', '.join(known)}"
        try:
            number = float(value)
            whole = name.strip() in ("max_new_tokens", "top_k", "seed", "logprobs")
            change: dict[str, Any] = {name.strip(): int(number) if whole else number}
            self.sampling = replace(self.sampling, **change)
        except ValueError as error:
            return str(error)
        return f"{name.strip()} = {getattr(self.sampling, name.strip())}"

    def _history(self, _: str) -> str:
        return "\n".join(f"{m['role']}: {m['content']}" for m in self.messages) or "nothing yet"


def run_terminal(chat: Chat) -> None:
    """Read lines until the end of input; piped input is answered line by line without prompts."""
    interactive = sys.stdin.isatty()
    if interactive:
        with suppress(ImportError):
            import readline  # noqa: F401 - arrow keys and history in input()
        print(f"{chat.text_model.path}  ·  /help for commands, Ctrl-C stops an answer, Ctrl-D leaves")
    while True:
        try:
            line = input("\n> " if interactive else "").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit to leave)")
            continue
        if not line:
            continue
        if line.startswith("/"):
            shown = chat.command(line)
            if shown is None:
                break
            print(shown)
            continue
        try:
            for piece in chat.say(line):
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
            chat.session.reset()  # the cache may hold a token that was never shown
        except MoaiError as error:
            print(f"[{error}]", end="")
        print()
