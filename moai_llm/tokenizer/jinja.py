"""A chat template in Jinja, run in a sandbox: a conversation to text, and which characters the assistant is to learn.

The template comes with a model that somebody else published, so it is a program of a stranger: it sees plain data only,
cannot change it, and reaches no attribute of Python. This file knows text; tokens are the matter of `custom.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moai_llm.runtime import MoaiError
from moai_llm.tokenizer.encoder import Span, valid

MARKS = "moai_marks"  # a variable of the template
PRIVATE = range(0xF0000, 0xFFFFE)  # Unicode's private plane 15: characters that stand for nothing


class _Generation(Extension):
    """`{% generation %}` ... `{% endgeneration %}`, as transformers knows it. What stands between leaves between two
    marks, so that its place is right wherever the block's text goes afterwards.
    """

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark", [nodes.ContextReference()]), [], [], body).set_lineno(line)

    def _mark(self, context: Any, caller: Any) -> str:
        opening, closing = context[MARKS]
        return opening + caller() + closing


class JinjaTemplate:
    """A compiled template.

    Args:
        names: what `bos_token` and `eos_token` stand for in it.

    Raises:
        MoaiError: it is not Jinja.
    """

    def __init__(self, source: str, names: Mapping[str, str]) -> None:
        self.source, self.names = source, dict(names)
        self.now = datetime.now()  # for templates that write the date; one moment for all renderings of a conversation
        self._environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        self._environment.filters["tojson"] = _to_json
        self._environment.globals.update(
            raise_exception=_refuse, strftime_now=lambda form: self.now.strftime(form), namespace=_Namespace
        )
        try:
            self._tree = self._environment.parse(source)
            self._compiled = self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise MoaiError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from None

    @cached_property
    def has_generation(self) -> bool:
        """Whether it says itself what the assistant is to learn."""
        calls = self._tree.find_all(nodes.ExtensionAttribute)
        return any(call.identifier == _Generation.identifier for call in calls)

    @cached_property
    def literals(self) -> list[str]:
        """The strings written in it."""
        pieces = [piece.data for piece in self._tree.find_all(nodes.TemplateData)]
        return pieces + [c.value for c in self._tree.find_all(nodes.Const) if isinstance(c.value, str)]

    def text(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Any = None,
        prompt: bool = False,
        marks: tuple[str, str] = ("", ""),
    ) -> str:
        """The conversation as text.

        Args:
            prompt: end with what an assistant's turn begins with.
            marks: to be written around what `{% generation %}` encloses.

        Raises:
            MoaiError: the template refuses the conversation, fails on it, or does what a template may not do.
        """
        try:
            given = {"messages": plain(messages), "tools": plain(tools), "add_generation_prompt": prompt}
            return self._compiled.render({**self.names, **given, MARKS: marks})
        except jinja2.exceptions.SecurityError as error:
            raise MoaiError(f"the chat template does what a template may not do: {error}") from None
        except MoaiError as error:
            raise MoaiError(f"the chat template refuses the conversation: {error}") from None
        except Exception as error:  # a template is a program: it can fail in any way
            raise MoaiError(f"the chat template fails on the conversation: {error}") from None

    def spans(self, messages: Sequence[Mapping[str, Any]], tools: Any, prompt: bool, text: str) -> list[Span]:
        """What of `text`, this conversation's, the assistant is to learn, by the `{% generation %}` blocks.

        Raises:
            MoaiError: the template changes such a block after it was closed.
        """
        opening, closing = free_characters([self.source, text], 2)
        marked = self.text(messages, tools, prompt, (opening, closing))
        kept: list[str] = []
        spans: list[Span] = []
        place = start = depth = 0
        for piece in re.split(f"([{opening}{closing}])", marked):
            if piece == opening:
                start = place if depth == 0 else start
                depth += 1
            elif piece == closing:
                depth -= 1
                if depth == 0:
                    spans.append((start, place))
            else:
                kept.append(piece)
                place += len(piece)
        if "".join(kept) != text:
            raise MoaiError(
                "the chat template changes the text of a {% generation %} block after the block, so what is to be "
                "learned has no place: put the tags around what is printed"
            )
        return spans

    def spans_by_prefix(
        self, messages: Sequence[Mapping[str, Any]], tools: Any, text: str, tail: str, closing: str
    ) -> list[Span]:
        """The same for a template without `{% generation %}`: a turn of the assistant is what its message adds to the
        prompt before it, and ends where its end of turn ends.

        Args:
            tail: what the template writes after an answer that is the last.
            closing: the part of it that is learned: up to the control token that ends the turn.

        Raises:
            MoaiError: the template writes a turn otherwise when others follow, so no prompt is a beginning of `text`.
        """
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            try:
                prompt, turn = self.text(messages[:i], tools, True), self.text(messages[: i + 1], tools)
            except MoaiError as error:
                raise MoaiError(f"{CANNOT_TELL}: it fails on the messages before message {i} alone ({error})") from None
            if closing and turn.endswith(tail):
                turn = turn[: len(turn) - len(tail)] + closing
            if not (text.startswith(prompt) and text.startswith(turn) and len(prompt) <= len(turn)):
                raise MoaiError(f"{CANNOT_TELL}: it writes message {i} otherwise when others follow it. {REMEDY}")
            spans.append((len(prompt), len(turn)))
        return spans


CANNOT_TELL = "the chat template has no {% generation %} tags, and what the assistant is to learn cannot be derived"
REMEDY = (
    "Put {% generation %} and {% endgeneration %} around what the assistant says, or choose a template that has them: "
    "moai tokenizer template TOKENIZER --set chatml"
)


def free_characters(texts: Iterable[str], count: int) -> list[str]:
    """Characters of Unicode's private use that occur in none of the texts."""
    used = {c for text in texts for c in set(text)}
    free = (chr(code) for code in PRIVATE if chr(code) not in used)
    return [next(free) for _ in range(count)]


def plain(value: Any) -> Any:
    """A copy in JSON's types, its strings valid Unicode: what a template may see.

    Raises:
        MoaiError: something that is not JSON.
    """
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return valid(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [plain(item) for item in value]
    raise MoaiError(f"a conversation holds text, numbers, lists and mappings, not {type(value).__name__}")


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON without the HTML escapes of Jinja's own filter, as transformers has it."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str) -> str:
    raise MoaiError(str(message))


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without names that begin with an underscore, where Python keeps what a template may not
    reach.
    """

    def __init__(*args: Any, **names: Any) -> None:  # so that a name may be `self`
        self, *mappings = args
        values = dict(*mappings, **names)
        for name in values:
            _Namespace._check(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace may not hold {name!r}")
