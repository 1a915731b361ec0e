"""JSON files: a list of objects, read one after the other, so that a list may be larger than memory; or one object.

The parser is Python's own (`JSONDecoder.raw_decode`), run on a window of the file. It fails where the window ends
within a value; then the window is made larger and the value read again, which costs at most twice the work.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from io import BufferedReader
from typing import Any, BinaryIO

import orjson

from moai_llm.data.sources.formats import json_type, read_jsonl
from moai_llm.data.sources.records import Broken, Reading, Record, Skipped
from moai_llm.data.sources.streams import BLOCK, Chunks, as_utf8, buffered, not_utf8, too_long

NEAR = 16  # characters: an error this close to the end of the window may be due to the end


def read_json(file: BinaryIO, name: str, reading: Reading, skipped: Skipped) -> Iterator[Record]:
    """The objects of a list, one object, or objects one after the other. JSON lines that are named .json, as those of
    C4 are, are recognised by their first line.
    """
    stream = as_utf8(file, name, reading)
    head, number = stream.readline(BLOCK), 1
    while head.isspace():
        head, number = stream.readline(BLOCK), number + 1
    if not head:
        raise Broken(name, "not JSON", ": the file has nothing but white space")
    if head.startswith(b"{") and not head.endswith(b"\n"):
        head += stream.readline(reading.max_record)
    whole = buffered(Chunks(_chain(head, stream)))
    if head.startswith(b"{") and is_json(head):
        yield from read_jsonl(whole, name, reading, skipped, first=number)
    else:
        yield from _values(Window(whole, name, reading), name, skipped)


def _chain(head: bytes, stream: BufferedReader) -> Iterator[bytes]:
    yield head
    while block := stream.read(BLOCK):
        yield block


def is_json(line: bytes) -> bool:
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError:
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            return False
    return True


def _values(window: Window, name: str, skipped: Skipped) -> Iterator[Record]:
    if window.next_character() != "[":
        number = 0
        while window.next_character():
            value, number = window.value(name), number + 1
            place = name if number == 1 else f"{name}: object {number}"
            if isinstance(value, dict):
                yield Record(value, place, name)
            else:
                skipped.bad(name, place, f"{json_type(value)} instead of a list of objects")
        return
    window.at += 1
    number, after = 0, window.next_character()
    if after == "]":
        window.at += 1
    while after != "]":
        number += 1
        place = f"{name}: item {number}"
        value = window.value(place)
        if isinstance(value, dict):
            yield Record(value, place, name)
        else:
            skipped.bad(name, place, f"{json_type(value)} instead of an object")
        after = window.next_character()
        if after not in (",", "]"):
            found = f"{after!r}" if after else "the end of the file"
            raise Broken(name, "not JSON", f": {found} after item {number}, where a comma or ] belongs")
        window.at += 1
    if window.next_character():
        raise Broken(name, "not JSON", f": something follows the list of {number} items")


class Window:
    """The part of the file that is in memory, as text."""

    def __init__(self, stream: BufferedReader, name: str, reading: Reading):
        self._stream, self._name, self._reading = stream, name, reading
        self._decoder, self._parser = codecs.getincrementaldecoder("utf-8")(), json.JSONDecoder()
        self._read = 0  # bytes
        self._ended = False
        self.text, self.at = "", 0

    def more(self) -> None:
        block = self._stream.read(max(BLOCK, len(self.text) - self.at))
        self._ended = not block
        try:
            self.text = self.text[self.at :] + self._decoder.decode(block, final=self._ended)
        except UnicodeDecodeError as error:
            before = self._read + len(block) - len(error.object)  # the decoder may have kept part of a character
            raise Broken(self._name, *not_utf8(error.object, error, self._reading, before)) from None
        self._read, self.at = self._read + len(block), 0

    def next_character(self) -> str:
        """The next one that is no white space, "" at the end."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in " \t\r\n":
                    return self.text[self.at]
                self.at += 1
            if self._ended:
                return ""
            self.more()

    def value(self, place: str) -> Any:
        self.next_character()
        while True:
            try:
                value, end = self._parser.raw_decode(self.text, self.at)
                if self._ended or end < len(self.text):  # else a number may go on
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                cut = error.pos >= len(self.text) - NEAR or error.msg.startswith("Unterminated string")
                if self._ended or not cut:
                    near = self.text[max(self.at, error.pos - 20) : error.pos + 20]
                    raise Broken(place, "not JSON", f": {error.msg}, near {near!r}") from None
            except ValueError as error:  # an integer of thousands of digits
                raise Broken(place, "not JSON", f": {error}") from None
            except RecursionError:
                raise Broken(place, "JSON nested too deeply") from None
            if len(self.text) - self.at > self._reading.max_record:
                reason, detail = too_long(self._reading.max_record, "an object")
                raise Broken(place, reason, detail + ". Of a .json file only a list is read piece by piece")
            self.more()
