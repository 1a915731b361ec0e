"""Conversations by somebody else's Jinja template: the same ids as transformers gives, but no text of a message becomes
a control token.

The template's text is encoded whole, so that ids are those of transformers. Only where a message holds the string of a
control token is more done: the conversation is rendered once more with placeholders, which shows where the messages
stand in the text; control tokens are then read from the template's own text alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NamedTuple

import tokenizers

from moai_llm.runtime import MoaiError, logger
from moai_llm.tokenizer.encoder import Content, Encoder, Span, covered
from moai_llm.tokenizer.jinja import JinjaTemplate, free_characters, plain

# What looks like a control token in a template; a tokenizer decides whether it is one
LOOKS_LIKE_CONTROL = re.compile(r"<[|｜][^|｜<>\s]+[|｜]>|<(?:start|end)_of_\w+>|</?s>|<[be]os>")


class Probe(NamedTuple):
    """What a template writes after an answer that is the last: all of it, its beginning up to the control token that
    ends the turn, that token, and whether the template's own tags let it be learned.
    """

    tail: str
    closing: str
    ends: list[int]
    learned: bool


class CustomTemplate:
    """A Jinja template bound to a tokenizer.

    Args:
        roles: the tokenizer's `bos_token` and so on, which templates name.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, roles: Mapping[str, str], source: str, name: str = "custom"
    ) -> None:
        self.name = name
        self.template, self._warned = JinjaTemplate(source, roles), False
        self.encoder = Encoder(backend, "\0".join(self.template.literals))

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Any, prompt: bool) -> tuple[list[int], list[bool]]:
        """(ids, learn) of a conversation. A prompt by a template without `{% generation %}` has nothing to learn."""
        self.template.now = datetime.now()
        messages = [{key: plain(value) for key, value in m.items() if value is not None} for m in messages]
        tools = plain(tools)
        text = self.template.text(messages, tools, prompt)
        ids, places = self.encoder.encode(text, self._contents(messages, tools, prompt, text))
        return ids, covered(places, self._spans(messages, tools, prompt, text))

    @property
    def ends(self) -> list[int]:
        """The control token after what an assistant says; none where the template writes none."""
        return self._probe.ends

    @cached_property
    def _probe(self) -> Probe:
        """What stands after an answer, seen in a small conversation."""
        (answer,) = free_characters([self.template.source], 1)
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
        try:
            text = self.template.text(messages)
        except MoaiError:
            return Probe("", "", [], True)
        before, _, tail = text.rpartition(answer)
        ids, places = self.encoder.encode(tail)
        end = next((k for k, i in enumerate(ids) if i in self.encoder.control), None)
        if not before or end is None:
            return Probe("", "", [], True)
        at = places[end][0]
        closing = tail[: at + len(self.encoder.control[ids[end]])]
        learned = True
        if self.template.has_generation:
            spans = self.template.spans(messages, None, False, text)
            learned = covered([(len(before) + 1 + at, len(before) + 2 + at)], spans)[0]
        return Probe(tail, closing, [ids[end]], learned)

    def _spans(self, messages: Sequence[Mapping[str, Any]], tools: Any, prompt: bool, text: str) -> list[Span]:
        if self.template.has_generation:
            if not (prompt or self._probe.learned or self._warned):
                self._warned = True
                token = self.encoder.control[self._probe.ends[0]]
                logger.warning(
                    "%s stands outside the {%% generation %%} block of this chat template: the model will not learn to "
                    "end its answers. Put it inside",
                    token,
                )
            return self.template.spans(messages, tools, prompt, text)
        if prompt:
            return []
        return self.template.spans_by_prefix(messages, tools, text, self._probe.tail, self._probe.closing)

    def _contents(self, messages: Sequence[Any], tools: Any, prompt: bool, text: str) -> list[Content]:
        """Where in the text stand the strings of messages that hold a control token's string.

        Raises:
            MoaiError: the template changes such a string, so that its place cannot be known.
        """
        by_whom = [*((message, message["role"] == "assistant") for message in messages), (tools, False)]
        dangerous = self.encoder.dangerous((string, said) for value, said in by_whom for string in _strings(value))
        if not dangerous:
            return []
        marks = free_characters([self.template.source, text, *dangerous], len(dangerous))
        mark_of = dict(zip(dangerous, marks))
        said: dict[str, bool] = {}  # by mark: whether only the assistant wrote it

        def hide(value: Any, by_assistant: bool) -> Any:
            if isinstance(value, str):
                if value not in mark_of:
                    return value
                mark, core = mark_of[value], value.strip()
                said[mark] = said.get(mark, True) and by_assistant
                return value.replace(core, mark, 1)
            if isinstance(value, Mapping):
                return {hide(key, by_assistant): hide(item, by_assistant) for key, item in value.items()}
            return [hide(item, by_assistant) for item in value] if isinstance(value, (list, tuple)) else value

        hidden = [hide(message, message["role"] == "assistant") for message in messages]
        try:
            with_marks = self.template.text(hidden, hide(tools, False), prompt)
        except MoaiError:
            with_marks = ""
        cores = {mark: string.strip() for string, mark in mark_of.items()}
        places = _align(with_marks, text, cores)
        if places is None:
            raise MoaiError(
                f"a message holds the control token {self.encoder.first_control(dangerous)!r}, and the chat template "
                "changes the text of messages, so it cannot be kept as text. Take it out of the message, or choose a "
                "template of ours: moai tokenizer template TOKENIZER --set chatml"
            )
        return [Content(start, end, said[mark]) for mark, start, end in places]


def control_strings(source: str) -> tuple[str, ...]:
    """What a template writes that looks like a control token, in its own text and in small conversations."""
    template = JinjaTemplate(source, {"bos_token": "", "eos_token": ""})
    texts = list(template.literals)
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    for part in (talk, talk[1:]):
        try:
            texts.append(template.text(part, None, True))
        except MoaiError:  # no system message, for one
            continue
    return tuple(dict.fromkeys(found for text in texts for found in LOOKS_LIKE_CONTROL.findall(text)))


def _strings(value: Any) -> Iterator[str]:
    """The strings of a message, keys included, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _align(with_marks: str, text: str, cores: Mapping[str, str]) -> list[tuple[str, int, int]] | None:
    """(mark, start, end) of each marked string in `text`, which must be `with_marks` with each mark replaced by its
    string, as it is or as JSON writes it; else None.
    """
    pieces = re.split(f"([{''.join(cores)}])", with_marks)
    places, at = [], len(pieces[0])
    if not text.startswith(pieces[0]):
        return None
    for mark, literal in zip(pieces[1::2], pieces[2::2]):
        core = cores[mark]
        for form in (core, json.dumps(core, ensure_ascii=False)[1:-1], json.dumps(core)[1:-1]):
            if text.startswith(form + literal, at):
                places.append((mark, at, at + len(form)))
                at += len(form) + len(literal)
                break
        else:
            return None
    return places if at == len(text) else None
