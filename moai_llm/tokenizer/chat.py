"""Conversations to tokens: ids and the mask of what the model should learn to say, from one function for training and
chat.

The chat template in force is the tokenizer's. One that we know (`templates.py`) is encoded turn by turn: control
tokens are placed by id, and whatever a person or a model wrote is encoded as ordinary text, so nobody can write a
control token into a conversation. Any other Jinja template goes through `custom.py`, which keeps the same promise.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol
from weakref import WeakKeyDictionary, proxy

from moai_llm.runtime import MoaiError, did_you_mean, write_atomically
from moai_llm.tokenizer.load import Tokenizer
from moai_llm.tokenizer.templates import CONTROL, TEMPLATES, Message, Template, Tool

if TYPE_CHECKING:
    from moai_llm.tokenizer.encoder import Encoder

ROLES = ("system", "user", "assistant", "tool")
CHATML_JINJA = TEMPLATES["chatml"].jinja


class Rendered(NamedTuple):
    """`learn` is true where the token is one the assistant says, its end of turn included."""

    ids: list[int]
    learn: list[bool]


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] | None = None,
    add_generation_prompt: bool = False,
) -> Rendered:
    """Encode a conversation by the tokenizer's chat template.

    Args:
        messages: [{"role": "system" | "user" | "assistant" | "tool", "content": text}, ...]; an assistant's may have
            "tool_calls": [{"name": ..., "arguments": mapping or JSON text}, ...], each by itself or under "function".
        tools: JSON descriptions of the functions the assistant may call.
        add_generation_prompt: end with the header of an assistant turn, for the model to go on. Where a Jinja template
            has no `{% generation %}` tags, nothing of such a prompt is marked as learned.

    Raises:
        MoaiError: an unknown role, a missing key, a tokenizer without a chat template, or a conversation the template
            has no form for.
    """
    for i, message in enumerate(messages):
        if message.get("role") not in ROLES or not isinstance(message.get("content"), str) or "tool_calls" in message:
            _check(i, message)
    return Rendered(*_in_force(tokenizer).render(messages, tools or None, add_generation_prompt))


def can_chat(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer has a chat template, or the control tokens of one."""
    return tokenizer.chat_template is not None or _by_tokens(tokenizer) is not None


def template_name(tokenizer: Tokenizer) -> str:
    """chatml, llama3, gemma or custom: the template in force.

    Raises:
        MoaiError: there is none.
    """
    return _in_force(tokenizer).name


def turn_ends(tokenizer: Tokenizer) -> list[int]:
    """The tokens that end an answer by the template in force; none without a template that works."""
    try:
        return _in_force(tokenizer).ends
    except MoaiError:  # a tokenizer may still be used for plain text
        return []


def template_tokens(name_or_path: str | Path) -> tuple[str, ...]:
    """The control tokens a template writes: those of chatml, llama3 or gemma, or what a Jinja file seems to write.

    Raises:
        MoaiError: no such template, or a file that is not Jinja.
    """
    known = TEMPLATES.get(str(name_or_path))
    if known is not None:
        return known.tokens
    from moai_llm.tokenizer.custom import control_strings

    return control_strings(_source(name_or_path))


def set_template(tokenizer: Tokenizer, name_or_path: str | Path) -> None:
    """Put a template in force: chatml, llama3, gemma or a Jinja file. `Tokenizer.save` and `save_template` keep it.

    Raises:
        MoaiError: no such template, or the tokenizer has not the control tokens it writes.
    """
    missing = [token for token in template_tokens(name_or_path) if token not in _added(tokenizer)]
    if missing:
        raise MoaiError(
            f"this tokenizer has no {', '.join(missing)}, which the chat template {name_or_path} writes: train one "
            f"with `moai tokenizer train --chat-template {name_or_path}`"
        )
    tokenizer.chat_template = _source(name_or_path)
    known = TEMPLATES.get(str(name_or_path))
    if known is not None and known.begin:
        tokenizer.roles["bos_token"] = known.begin


def save_template(tokenizer: Tokenizer, directory: str | Path) -> Path:
    """Write the template in force beside a tokenizer that lies on disk, and leave its other files and settings.

    Returns:
        The Jinja file.
    """
    path = Path(directory)
    path = path.parent if path.is_file() else path
    settings_file = path / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file.is_file() else {}
    settings.pop("chat_template", None)  # older files carry it here
    settings.update(tokenizer.roles)
    write_atomically(settings_file, json.dumps(settings, indent=2, ensure_ascii=False))
    write_atomically(path / "chat_template.jinja", tokenizer.chat_template or "")
    return path / "chat_template.jinja"


def _source(name_or_path: str | Path) -> str:
    if str(name_or_path) in TEMPLATES:
        return TEMPLATES[str(name_or_path)].jinja
    path = Path(name_or_path)
    if not path.is_file():
        known = ", ".join(TEMPLATES)
        raise MoaiError(
            f"{name_or_path}: neither a chat template we know{did_you_mean(str(name_or_path), TEMPLATES)} nor a Jinja "
            f"file; known are {known}"
        )
    return path.read_text(encoding="utf-8")


def _check(i: int, message: Message) -> None:
    """A message is well formed, or a `MoaiError`."""
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if role not in ROLES or not (isinstance(content, str) or (content is None and calls)):
        raise MoaiError(f"message {i} must have a role of {', '.join(ROLES)} and a text content, got {dict(message)!r}")
    if not calls:
        return
    functions = [c.get("function") or c for c in calls if isinstance(c, Mapping)] if isinstance(calls, Sequence) else []
    right = [
        isinstance(f, Mapping) and isinstance(f.get("name"), str) and isinstance(f.get("arguments"), (str, Mapping))
        for f in functions
    ]
    if role != "assistant" or not right or not all(right) or len(right) != len(calls):
        raise MoaiError(
            f"message {i}: tool_calls are an assistant's list of {{'name': ..., 'arguments': mapping or JSON text}}, "
            f"got {dict(message)!r}"
        )


class _Bound(Protocol):
    """A template bound to a tokenizer."""

    name: str

    @property
    def ends(self) -> list[int]: ...

    def render(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None, prompt: bool
    ) -> tuple[list[int], list[bool]]: ...


class _Opening(NamedTuple):
    """How a role's turn begins: `ids` up to the last control token of the header, then the text `lead`."""

    ids: list[int]
    lead: str
    lead_ids: list[int]


class TurnEncoder:
    """A template that we know, bound to a tokenizer.

    Text between two control tokens is encoded as one, header and content together, so that ids are those of the whole
    text, which is what transformers encodes.
    """

    def __init__(self, tokenizer: Tokenizer, template: Template) -> None:
        added = _added(tokenizer)
        missing = [token for token in template.tokens if token not in added]
        if missing:
            raise MoaiError(
                f"this tokenizer has no {', '.join(missing)}, so its chat template {template.name} cannot hold a "
                "conversation; train one with `moai tokenizer train`"
            )
        self.name, self._template, self._added = template.name, template, added
        self._tokenizer = proxy(tokenizer)  # what is bound to a tokenizer must not keep it alive
        self.ends = [added[token] for token in (template.end, *template.other_ends) if token in added]
        self._begin = [added[token] for token in CONTROL.findall(template.begin)]
        self._end = [added[template.end]]
        self._after = tokenizer.encode(template.after) if template.after else []
        self._openings: dict[str, _Opening] = {}
        # a control token that is not marked as special would also be found in text
        self._text_has_none = all(token in tokenizer.special_ids for token in template.tokens)
        self._control = {added[token] for token in template.tokens}

    def render(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None, prompt: bool
    ) -> tuple[list[int], list[bool]]:
        encode = self._tokenizer.encode if self._text_has_none else self._encode
        ids, learn = list(self._begin), [False] * len(self._begin)
        for role, text, wanted in self._template.turns(messages, tools):
            opening = self._openings.get(role) or self._opening(role)
            run = encode(opening.lead + text)
            ids += opening.ids
            ids += run
            ids += self._end
            ids += self._after
            if wanted:
                said = self._said_from(run, opening, text)
                learn += [False] * (len(opening.ids) + said)
                learn += [True] * (len(run) - said + len(self._end))
            learn += [False] * (len(ids) - len(learn))
        if prompt:
            opening = self._opening(self._template.names.get("assistant", "assistant"))
            ids += opening.ids + opening.lead_ids
            learn += [False] * (len(ids) - len(learn))
        return ids, learn

    def _opening(self, role: str) -> _Opening:
        """The header of a role."""
        *pieces, lead = re.split(f"({CONTROL.pattern})", self._template.header.format(role=role))
        ids = [i for p in pieces if p for i in ([self._added[p]] if p in self._added else self._encode(p))]
        self._openings[role] = _Opening(ids, lead, self._encode(lead))
        return self._openings[role]

    def _encode(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text)
        if self._text_has_none or self._control.isdisjoint(ids):
            return ids
        return self._encoder.bare.encode(text, add_special_tokens=False).ids

    def _said_from(self, run: list[int], opening: _Opening, text: str) -> int:
        """The first token of a run that holds something of the text."""
        header = len(opening.lead_ids)
        if run[:header] == opening.lead_ids:
            return header
        # a text that begins with a line end may share a token with the header's: learned, as transformers does
        ends = list(accumulate(len(self._tokenizer.token_bytes(i)) for i in run))
        if ends[-1] == len((opening.lead + text).encode("utf-8", "replace")):
            return bisect_right(ends, len(opening.lead.encode()))
        places = self._encoder.plain.encode(opening.lead + text, add_special_tokens=False).offsets
        return next((i for i, (_, end) in enumerate(places) if end > len(opening.lead)), len(run))

    @cached_property
    def _encoder(self) -> Encoder:
        from moai_llm.tokenizer.encoder import Encoder

        return Encoder(self._tokenizer.backend)


# tokenizer -> (the template text it had, the template bound to it)
_BOUND: WeakKeyDictionary[Tokenizer, tuple[str | None, _Bound]] = WeakKeyDictionary()


def _in_force(tokenizer: Tokenizer) -> _Bound:
    """The tokenizer's template, bound to it."""
    known = _BOUND.get(tokenizer)
    if known is None or known[0] is not tokenizer.chat_template:
        known = _BOUND[tokenizer] = (tokenizer.chat_template, _bind(tokenizer))
    return known[1]


def _bind(tokenizer: Tokenizer) -> _Bound:
    source = tokenizer.chat_template
    if source is None:
        template = _by_tokens(tokenizer)
        if template is None:
            some = " and ".join(TEMPLATES["chatml"].tokens)
            raise MoaiError(
                f"this tokenizer has neither a chat template nor the control tokens of one ({some} for chatml), so it "
                "cannot hold a conversation; train one with `moai tokenizer train`"
            )
        return TurnEncoder(tokenizer, template)
    for template in TEMPLATES.values():
        if source.strip() == template.jinja.strip():
            return TurnEncoder(tokenizer, template)
    from moai_llm.tokenizer.custom import CustomTemplate

    return CustomTemplate(tokenizer.backend, tokenizer.roles, source)


def _by_tokens(tokenizer: Tokenizer) -> Template | None:
    """The template whose control tokens a tokenizer without a template has."""
    added = _added(tokenizer)
    return next((t for t in TEMPLATES.values() if all(token in added for token in t.tokens)), None)


def _added(tokenizer: Tokenizer) -> dict[str, int]:
    return {token.content: i for i, token in tokenizer.backend.get_added_tokens_decoder().items()}
