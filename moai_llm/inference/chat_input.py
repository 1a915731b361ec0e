"""What the user types: lines that can be edited and called back, questions of several lines, completion by Tab.

Editing is Python's readline, and only between a real keyboard and a real screen. Elsewhere lines are read as they come.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from moai_llm.inference.chat_commands import completions

PROMPT, MORE = "> ", ". "
BLOCK = '"""'
KEPT = 1000  # lines of history


class Input:
    """Args:
    keyboard: whether a person types, who wants to see a prompt.
    screen: whether the prompt goes to a terminal; else it goes to the standard error.
    history: the file of earlier lines; None keeps nothing.
    """

    def __init__(self, keyboard: bool, screen: bool, history: Path | None = None) -> None:
        self._keyboard, self._screen = keyboard, screen
        self._readline = _readline() if keyboard and screen else None
        self._history = history if self._readline else None
        reconfigure = getattr(sys.stdin, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")  # a byte that is no text must not end the chat
        if self._readline is not None:
            self._readline.clear_history()
            _complete(self._readline)
        if self._history is not None and self._readline is not None:
            with suppress(OSError):
                self._readline.read_history_file(self._history)

    @property
    def can_edit(self) -> bool:
        return self._readline is not None

    def read(self, begin: str = "") -> str:
        """One question or command, without the marks of several lines.

        Args:
            begin: what stands on the line already, to be changed.

        Raises:
            EOFError: there is no more.
        """
        text = self._line(PROMPT, begin)
        if text.lstrip().startswith(BLOCK):
            text = text.lstrip()[len(BLOCK) :]
            while not text.rstrip().endswith(BLOCK):
                try:
                    text += "\n" + self._line(MORE)
                except EOFError:  # a block that is never closed ends with the input
                    return text.strip("\n")
            return text.rstrip()[: -len(BLOCK)].strip("\n")
        while text.endswith("\\"):
            text = text[:-1] + "\n"
            try:
                text += self._line(MORE)
            except EOFError:
                break
        return text.strip()

    def _line(self, prompt: str, begin: str = "") -> str:
        readline = self._readline
        if readline is None:
            if self._keyboard and not self._screen:
                print(prompt, end="", file=sys.stderr, flush=True)
            return input(prompt if self._keyboard and self._screen else "")
        before = readline.get_current_history_length()
        readline.set_startup_hook((lambda: readline.insert_text(begin)) if begin else None)
        try:
            line = input(prompt)
        finally:
            readline.set_startup_hook(None)
        self._keep(readline.get_current_history_length() - before)
        return line

    def _keep(self, count: int) -> None:
        """Put the newest lines into the file at once: a chat may end in any way."""
        if self._history is None or self._readline is None or count < 1:
            return
        with suppress(OSError):  # a chat goes on where nothing can be written
            self._history.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self._history, os.O_WRONLY | os.O_CREAT, 0o600))  # what was asked is private
            self._readline.append_history_file(count, self._history)


def _readline() -> ModuleType | None:
    try:
        import readline
    except ImportError:  # Windows
        return None
    readline.set_history_length(KEPT)
    return readline


def _complete(readline: ModuleType) -> None:
    readline.set_completer(completer(readline.get_line_buffer))
    readline.set_completer_delims(" ")
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")


def completer(line_so_far: Callable[[], str]) -> Callable[[str, int], str | None]:
    """As readline asks: the n-th way to go on, None after the last."""

    def complete(word: str, n: int) -> str | None:
        found = completions(line_so_far())
        return found[n] if n < len(found) else None

    return complete
