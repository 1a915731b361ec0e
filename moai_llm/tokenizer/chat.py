"""Conversations to tokens: ids and the mask of what the model should learn to say, from one function for training and
chat.

The chat template in force is the tokenizer's. One that we know (`templates.py`) is encoded turn by turn: control
tokens are placed by id, and whatever a person or a model wrote is encoded as ordinary text, so nobody can write a
control token into a conversation. Any other Jinja template goes through `custom.py`, which keeps the same promise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

from moai_llm.runtime import MoaiError, did_you_mean, write_atomically
from moai_llm.tokenizer.load import Tokenizer
from moai_llm.tokenizer.templates import TEMPLATES, Message, Template, Tool
from moai_llm.tokenizer.turns import TurnEncoder, added_ids, can_be_cut

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
    missing = [token for token in template_tokens(name_or_path) if token not in added_ids(tokenizer)]
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
    else:
        template = next((known for known in TEMPLATES.values() if source.strip() == known.jinja.strip()), None)
    if template is not None:
        missing = [token for token in template.tokens if token not in added_ids(tokenizer)]
        if missing:
            raise MoaiError(
                f"this tokenizer has no {', '.join(missing)}, so its chat template {template.name} cannot hold a "
                "conversation; train one with `moai tokenizer train`"
            )
        if can_be_cut(tokenizer, template):
            return TurnEncoder(tokenizer, template)
        source = template.jinja
    from moai_llm.tokenizer.custom import CustomTemplate

    return CustomTemplate(tokenizer.backend, tokenizer.roles, source or "", template.name if template else "custom")


def _by_tokens(tokenizer: Tokenizer) -> Template | None:
    """The template whose control tokens a tokenizer without a template has."""
    added = added_ids(tokenizer)
    return next((t for t in TEMPLATES.values() if all(token in added for token in t.tokens)), None)
