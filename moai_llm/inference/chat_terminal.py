"""A chat in a terminal: answers as they come, commands, a line of figures after each answer, Ctrl-C.

Whatever a model or a file says is text to show, never a command to the terminal: control characters are written out.
Where the output is no terminal, it is the answers alone, as they are; everything else goes to the standard error.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import cast

from moai_llm.inference.chat import Chat
from moai_llm.inference.chat_commands import Commands, context
from moai_llm.inference.chat_input import Input
from moai_llm.runtime import MoaiError

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
# C0 but tab and line end, DEL, C1, and the marks that turn the direction of what follows
UNSAFE = [*range(0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
ESCAPES = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in UNSAFE}


def printable(text: str) -> str:
    """Text that a terminal shows and does not obey."""
    return text.translate(ESCAPES)


class Terminal:
    """Where a chat is shown.

    Attributes:
        person: whether somebody types, rather than a file or a pipe.
        screen: whether the answers go to a terminal.
    """

    def __init__(self) -> None:
        self.person, self.screen = sys.stdin.isatty(), sys.stdout.isatty()
        self.colours = self.screen and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # a screen that cannot show a character shows a question mark

    def write(self, text: str) -> None:
        """A piece of an answer."""
        sys.stdout.write(printable(text) if self.screen else text)
        sys.stdout.flush()

    def note(self, text: str, dim: bool = True) -> None:
        """Whatever is not an answer."""
        text = printable(text) if self.screen or sys.stderr.isatty() else text
        if self.screen:
            print(f"{DIM}{text}{PLAIN}" if dim and self.colours else text, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)

    @contextmanager
    def interruptible(self, chat: Chat) -> Iterator[None]:
        """Within it the first Ctrl-C ends the answer between two tokens, and the second one at once."""
        if not self.person or threading.current_thread() is not threading.main_thread():
            yield
            return
        pressed = False

        def press(*_: object) -> None:
            nonlocal pressed
            if pressed:
                raise KeyboardInterrupt
            pressed = True
            chat.session.cancel()

        before = signal.signal(signal.SIGINT, press)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def run_terminal(chat: Chat, commands: Commands | None = None, history: Path | None = None) -> None:
    """Ask and answer until the end of the input.

    Args:
        history: the file of lines that were typed before; None keeps nothing.

    Raises:
        MoaiError: a mistake in input that nobody types; a person is told, and goes on.
    """
    terminal, commands = Terminal(), commands or Commands(chat)
    source = Input(terminal.person, terminal.screen, history)
    if terminal.person:
        count = sum(p.numel() for p in chat.text_model.model.parameters())
        terminal.note(
            f"{chat.text_model.path}: {count:,} parameters, context {chat.text_model.context:,}. "
            "/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves"
        )
    while True:
        try:
            if terminal.person and terminal.screen:
                print()
            line = source.read()
        except EOFError:
            if terminal.person:
                terminal.note("", dim=False)
            return
        except KeyboardInterrupt:
            if not terminal.person:
                raise
            terminal.note("\n(Ctrl-D or /exit leaves)")
            continue
        try:
            if line and not _take(line, chat, commands, terminal, source):
                return
        except MoaiError as error:
            if not terminal.person:
                raise
            terminal.note(str(error), dim=False)


def run_once(chat: Chat, question: str) -> None:
    """One question, one answer."""
    _answer(chat.say(question), chat, Terminal())


def _take(line: str, chat: Chat, commands: Commands, terminal: Terminal, source: Input) -> bool:
    """A question or a command; whether the chat goes on."""
    if not line.startswith("/") or line.startswith("//"):
        _answer(chat.say(line[1:] if line.startswith("//") else line), chat, terminal)
        return True
    outcome = commands.run(line)
    if outcome.text:
        terminal.note(outcome.text, dim=False)
    if outcome.edit is not None:
        if not source.can_edit:
            raise MoaiError("there is no line editing here: write /edit TEXT")
        try:
            changed = source.read(outcome.edit)
        except (EOFError, KeyboardInterrupt):
            changed = ""
        if not changed:
            terminal.note("\n(the question stays)")
            return True
        _answer(chat.retry(changed), chat, terminal)
    elif outcome.again:
        _answer(chat.retry(outcome.instead), chat, terminal)
    return not outcome.leave


def _answer(pieces: Iterator[str], chat: Chat, terminal: Terminal) -> None:
    """Show an answer as it comes, and then what there is to say of it."""
    before, begun, forced = len(chat.turns), False, False
    try:
        with terminal.interruptible(chat), closing(cast("Generator[str]", pieces)):
            for piece in pieces:
                begun = True
                terminal.write(piece)
    except KeyboardInterrupt:
        if not terminal.person:
            raise
        chat.session.reset()  # it may have been torn from the middle of a step
        forced = True
    finally:
        if begun or len(chat.turns) > before:
            terminal.write("\n")
    turn = chat.last if len(chat.turns) > before else None
    if turn is None:
        terminal.note("[stopped: nothing was said, and the conversation is as before]")
        return
    if forced or turn.finished == "cancelled":
        terminal.note("[stopped]")
    elif turn.tokens == 0:
        terminal.note("[the model has nothing to say to this]")
    if turn.dropped:
        terminal.note(f"[the oldest {turn.dropped} messages no longer fit into the context and are left out]")
    if terminal.person and terminal.screen:
        if turn.finished == "length":
            terminal.note("[the answer ends at its limit: /set max_new_tokens=N raises it, up to the context]")
        speed = f" · {turn.speed:,.1f} tokens/s" if turn.speed else ""
        first = f" · first after {turn.first:.2f} s" if turn.tokens else ""
        terminal.note(f"{turn.tokens:,} tokens{speed}{first} · context {context(chat)}")
