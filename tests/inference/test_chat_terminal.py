"""The chat on a screen, through a pipe, and in a real pseudo-terminal with a process of its own."""

from __future__ import annotations

import codecs
import io
import locale
import os
import re
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from moai_llm.cli import main
from moai_llm.inference.chat import Chat
from moai_llm.inference.chat_input import Input, completer
from moai_llm.inference.chat_terminal import printable, run_once, run_terminal
from moai_llm.inference.load import TextModel
from moai_llm.inference.sampling import Sampling
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from tests.conftest import ROOT, tiny_model

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def chat(tokenizer: Tokenizer) -> Chat:
    model = tiny_model(layer_types=["linear_attention", "full_attention"], vocab_size=512)
    return Chat(TextModel(model, tokenizer, Path("here")), Sampling(8, temperature=0))


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set the input; `keyboard` and `screen` make it look like a terminal."""

    def put(text: str, keyboard: bool = False, screen: bool = False) -> None:
        stdin = io.StringIO(text)
        monkeypatch.setattr(stdin, "isatty", lambda: keyboard, raising=False)
        monkeypatch.setattr("sys.stdin", stdin)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: screen)
        monkeypatch.setattr("moai_llm.inference.chat_input._readline", lambda: None)
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setenv("TERM", "xterm")

    return put


def test_control_characters_are_written_out() -> None:
    bad = "a\x1b[31mred\x1b]0;title\x07\x9b2J\r\x08\x7f\u202egnp.exe\u2066"
    shown = printable(bad)
    assert shown == "a\\x1b[31mred\\x1b]0;title\\x07\\x9b2J\\x0d\\x08\\x7f\\u202egnp.exe\\u2066"
    fine = "한국어\t日本語 🙂👩‍👩‍👧 é e\u0301 \u200f\n"
    assert printable(fine) == fine
    assert all(c in "\t\n" or not 0 <= ord(c) < 32 for c in printable("".join(map(chr, range(0x300)))))


def says(chat: Chat, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Let the model say this text."""
    tokens = chat.text_model.tokenizer.encode(text)

    def stream(prompt: list[int], sampling: Sampling) -> Iterator[int]:
        chat.session.finished = "cancelled"
        yield from tokens
        chat.session.finished = "stop"

    monkeypatch.setattr(chat.session, "stream", stream)


def test_what_a_model_says_is_no_command_to_the_terminal(
    chat: Chat, typed: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    evil = "hi\x1b]52;c;cm0gLXJm\x07\x1b[2J \x9b31m 안녕 🙂"
    says(chat, monkeypatch, evil)
    typed("hello\n/history\n", keyboard=True, screen=True)
    run_terminal(chat)
    output = capsys.readouterr().out
    ours = output.replace("\x1b[2m", "").replace("\x1b[0m", "")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", ours) and "안녕 🙂" in ours
    assert ours.count("\\x1b]52;c;") == 2 and chat.messages[1]["content"] == evil
    typed("hello\n")  # a pipe gets what was said
    run_terminal(chat)
    assert capsys.readouterr().out == evil + "\n"


def test_piped_input_gives_answers_alone(chat: Chat, typed: Callable[..., None], capsys: Capture) -> None:
    typed('hello\n\n/set temperature=0\nmore \\\nlines\n"""\na\n  b\n\\\n"""\n//slash\n/exit\nnever\n')
    run_terminal(chat)
    output, errors = capsys.readouterr()
    assert "temperature = 0.0" in errors and "temperature" not in output and "tokens/s" not in output + errors
    asked = [m["content"] for m in chat.messages if m["role"] == "user"]
    assert asked == ["hello", "more \nlines", "a\n  b\n\\", "/slash"]
    said = [m["content"] for m in chat.messages if m["role"] == "assistant"]
    assert output == "".join(f"{text}\n" for text in said)
    typed("/rset\nnever\n")
    with pytest.raises(MoaiError, match="did you mean '/reset'"):  # nobody is there to be told
        run_terminal(chat)


def test_once(chat: Chat, typed: Callable[..., None], capsys: Capture) -> None:
    typed("")
    run_once(chat, "/hello")
    output, errors = capsys.readouterr()
    assert output == chat.messages[1]["content"] + "\n" and chat.messages[0]["content"] == "/hello" and not errors


def test_on_a_screen(chat: Chat, typed: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    typed("".join(f"question number {i} of interest\n" for i in range(8)) + "/nothing\n", keyboard=True, screen=True)
    run_terminal(chat)
    output = capsys.readouterr().out
    assert re.search(
        r"\x1b\[2m8 tokens · [\d,.]+ tokens/s · first after \d+\.\d\d s · context \d+ of 128\x1b\[0m", output
    )
    assert re.search(r"\[the oldest \d+ messages no longer fit into the context and are left out\]", output)
    assert "there is no /nothing" in output and "[the answer ends at its limit" in output
    typed("again\n", keyboard=True, screen=True)
    monkeypatch.setenv("NO_COLOR", "1")
    run_terminal(chat)
    output = capsys.readouterr().out
    assert "tokens/s" in output and "\x1b" not in output


def test_typed_and_written_to_a_file(chat: Chat, typed: Callable[..., None], capsys: Capture) -> None:
    typed("hello\n/oops\n/set seed=1\nwhy?\n", keyboard=True, screen=False)
    run_terminal(chat)
    output, errors = capsys.readouterr()
    assert output == "".join(m["content"] + "\n" for m in chat.messages if m["role"] == "assistant")
    assert "> " in errors and "there is no /oops" in errors and "seed = 1" in errors and "\x1b" not in errors


def test_a_block_that_is_never_closed(typed: Callable[..., None]) -> None:
    typed('"""one line"""\n""" a\nb"""\nx\\\n')
    source = Input(False, False)
    assert [source.read(), source.read(), source.read()] == ["one line", " a\nb", "x"]
    typed('"""a\nb\n')
    assert Input(False, False).read() == "a\nb"


def test_tab_goes_through_all() -> None:
    complete = completer(lambda: "/re")
    assert [complete("/re", n) for n in range(3)] == ["/reset", "/retry", None]


def test_without_line_editing_edit_needs_a_text(chat: Chat, typed: Callable[..., None], capsys: Capture) -> None:
    typed("hello\n/edit\n/edit goodbye\n", keyboard=True, screen=True)
    run_terminal(chat)
    assert "write /edit TEXT" in capsys.readouterr().out
    assert [m["content"] for m in chat.messages if m["role"] == "user"] == ["goodbye"]


def test_a_second_ctrl_c_ends_at_once(
    chat: Chat, typed: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def torn(prompt: list[int], sampling: Sampling) -> Iterator[int]:
        chat.session.finished = "cancelled"
        yield from chat.text_model.tokenizer.encode("part")
        for _ in range(2):  # the first asks the session to end, which this one does not do
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        raise AssertionError("not interrupted")

    monkeypatch.setattr(chat.session, "stream", torn)
    typed("hello\n", keyboard=True, screen=True)
    before = signal.getsignal(signal.SIGINT)
    run_terminal(chat)
    assert "part\n" in capsys.readouterr().out and signal.getsignal(signal.SIGINT) is before
    assert chat.messages[-1]["content"] == "part"


# ---------------------------------------------------------------- a real terminal


class Pty:
    """`moai chat` on a pseudo-terminal, as a person uses it: in a fork of this process, which has imported torch, or in
    a fresh one.
    """

    def __init__(self, fresh: bool, *arguments: str) -> None:
        import pty

        words, self.output = ["chat", *arguments], ""
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a read may end within a character
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads; the child has one
            self.pid, self.master = pty.fork()
        if self.pid:
            return
        try:
            os.environ.update(TERM="xterm", LC_ALL="C.UTF-8", PYTHONPATH=str(ROOT))
            os.environ.pop("NO_COLOR", None)
            if fresh:
                os.execv(sys.executable, [sys.executable, "-m", "moai_llm", *words])
            with suppress(locale.Error):  # readline asks it how wide a character is
                locale.setlocale(locale.LC_ALL, "C.UTF-8")
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.stdin, sys.stdout, sys.stderr = (
                io.TextIOWrapper(io.FileIO(fd, mode), encoding="utf-8", line_buffering=True)
                for fd, mode in ((0, "r"), (1, "w"), (2, "w"))
            )
            main(words)
            sys.stdout.flush()
            os._exit(0)
        except BaseException:
            sys.stdout.flush()
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(1)  # never back into the suite

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def until(self, pattern: str, seconds: float = 60) -> str:
        """What came since the last match, up to the end of this one."""
        end = time.monotonic() + seconds
        while (found := re.search(pattern, self.output)) is None:
            assert time.monotonic() < end, f"{pattern} is not in {self.output!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.output += self.decoder.decode(os.read(self.master, 65536))
                except OSError:  # the other end is gone
                    raise AssertionError(f"it ended after {self.output!r}") from None
        seen, self.output = self.output[: found.end()], self.output[found.end() :]
        return seen

    def leave(self) -> int:
        self.type("\x04")
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.master)
        return code


READY = r"\n(\x1b\[\?2004h)?> "


@pytest.mark.skipif(sys.platform == "win32", reason="there is no pty")
@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_in_a_real_terminal(fresh: bool, tokenizer: Tokenizer, tmp_path: Path) -> None:
    pytest.importorskip("readline")
    model = tiny_model(vocab_size=512, layer_types=["linear_attention", "full_attention"]).float()
    model.config.max_position_embeddings = 100_000
    file = tmp_path / "new" / "history"
    model.save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    arguments = (
        str(tmp_path / "model"),
        "--max-new-tokens",
        "20000",
        "--seed",
        "1",
        "--device",
        "cpu",
        "--history-file",
        str(file),
    )
    here = Pty(fresh, *arguments)
    assert "context 100,000" in here.until(READY)
    here.type("/set max_new_tokens=6\r")
    here.until("max_new_tokens = 6")
    here.until(READY)
    here.type("이자가 뭐예요?\x7f!\r")  # a wide question, its last character changed
    answer = here.until(r"tokens/s[^\n]*context \d+ of 100,000")
    assert "이자가 뭐예요" in answer and "6 tokens" in answer
    here.until(READY)
    here.type("/set max_new_tokens=20000\r")
    here.until(READY)
    here.type("endless\r")
    assert len(here.until("endless\r\n(.|\n){40}")) > 40  # it streams
    here.type("\x03")
    assert "tokens/s" in here.until(r"\[stopped\](.|\n)*context \d+ of")
    here.until(READY)
    here.type("\x1b[A")  # arrow up: the last line
    here.until("endless")
    here.type("\x15/save " + str(tmp_path / "talk") + "\r")
    here.until("saved to .*talk.json")
    here.until(READY)
    here.type("/his\t\r")
    shown = here.until("user: endless\r\nassistant: ")
    assert "user: 이자가 뭐예요!" in shown
    here.until(READY)
    assert here.leave() == 0
    assert file.read_text(encoding="utf-8").splitlines()[:2] == ["/set max_new_tokens=6", "이자가 뭐예요!"]
    assert file.stat().st_mode & 0o77 == 0  # nobody else reads what was asked

    there = Pty(fresh, *arguments)
    there.until(READY)
    there.type(f"/load {tmp_path / 'talk.json'}\r")
    there.until("2 questions")
    there.until(READY)
    there.type("/set max_new_tokens=4\r")
    there.until(READY)
    there.type("\x1b[A" * 3)  # past what was typed here: the history of the first process
    there.until("history")  # of the word alone what differs is drawn
    there.type("\x15/edit\r")
    there.until("> endless")
    there.type("ly?\r")
    there.until("4 tokens")
    there.until(READY)
    there.type("/history\r")
    assert "user: 이자가 뭐예요!" in there.until("user: endlessly\\?\r\nassistant: ")
    there.until(READY)
    assert there.leave() == 0
