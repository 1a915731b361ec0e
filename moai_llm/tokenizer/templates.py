"""The chat templates we know, as data: how a turn begins and ends, who is called what, where a system message and tools
go.

A template turns a conversation into turns of ordinary text (`Template.turns`); control tokens stand only in `begin`,
`header`, `end`, where `chat.py` places them by id. The Jinja file of the same name says the same to transformers, and a
test holds the two together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from moai_llm.runtime import MoaiError

Message = Mapping[str, Any]
Tool = Mapping[str, Any]


class Turn(NamedTuple):
    """`role` as the header names it; `text` is ordinary text; `learn` where the assistant speaks."""

    role: str
    text: str
    learn: bool


@dataclass(frozen=True)
class ToolForm:
    """How tools, calls and results are written, all of it ordinary text.

    Attributes:
        place: whose turn the tools are written into: after a first system message, or before a first user text.
        offer: the tools as text.
        call: (what the assistant says, its calls) as text.
        result: what a tool returned, as text.
        result_role: whose turn a result is.
        together: whether results that follow each other share a turn.
    """

    place: str
    offer: Callable[[Sequence[Tool]], str]
    call: Callable[[str, Sequence[Mapping[str, Any]]], str]
    result: Callable[[str], str]
    result_role: str
    together: bool = False


@dataclass(frozen=True)
class Template:
    """One way to write a conversation.

    Attributes:
        begin: control token before everything, once.
        header: what stands before a turn's text; `{role}` is whose turn it is.
        end: control token that ends a turn. The assistant learns to say it, and generation stops at it.
        after: text between turns; not learned.
        names: roles that the header calls otherwise.
        strip: outer whitespace of texts is dropped, as the published template does.
        system_turn: a system message has a turn of its own; else it stands in front of the first user's text.
        tools: None where there is no form for tools.
        other_ends: further control tokens that end an answer in published models, where a tokenizer has them.
    """

    name: str
    header: str
    end: str
    begin: str = ""
    after: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    strip: bool = False
    system_turn: bool = True
    tools: ToolForm | None = None
    other_ends: tuple[str, ...] = ()

    @cached_property
    def jinja(self) -> str:
        """The same template for transformers, with `{% generation %}` around what is learned."""
        return Path(__file__).with_name(f"{self.name}.jinja").read_text(encoding="utf-8")

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """The control tokens it writes."""
        return tuple(dict.fromkeys(CONTROL.findall(self.begin + self.header + self.end)))

    def turns(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> Iterator[Turn]:
        """The turns of a conversation whose messages are well formed.

        Raises:
            MoaiError: a conversation this template has no form for.
        """
        offer = self._form().offer(tools) if tools else ""
        in_system = offer and self._form().place == "system"
        if in_system and not (messages and messages[0]["role"] == "system"):
            yield Turn("system", offer, False)
            offer = ""
        results: list[str] = []  # of the tools that have just answered
        front = ""  # what goes in front of the next user's text
        for i, message in enumerate(messages):
            role, content = message["role"], message.get("content") or ""
            text = content.strip() if self.strip else content
            if role == "user":
                if offer and not in_system:
                    front, offer = front + offer, ""
                yield Turn("user", front + text, False)
                front = ""
            elif role == "assistant":
                calls = message.get("tool_calls")
                yield Turn(self.names.get(role, role), self._form().call(text, calls) if calls else text, True)
            elif role == "tool":
                form = self._form()
                results.append(form.result(content))
                if not (form.together and i + 1 < len(messages) and messages[i + 1]["role"] == "tool"):
                    yield Turn(form.result_role, "\n".join(results), False)
                    results = []
            elif self.system_turn:
                yield Turn(role, f"{text}\n\n{offer}" if in_system and i == 0 and offer else text, False)
                offer = "" if in_system else offer
            elif i == 0 and len(messages) > 1 and messages[1]["role"] == "user":
                front = f"{content}\n\n"
            else:
                raise MoaiError(f"the {self.name} template takes a system message only in front of a first user turn")
        if offer:
            raise MoaiError(f"the {self.name} template writes tools into the first user turn, and there is none")

    def _form(self) -> ToolForm:
        if self.tools is None:
            able = " and ".join(name for name, template in TEMPLATES.items() if template.tools)
            raise MoaiError(f"the {self.name} template has no form for tools; {able} have")
        return self.tools


CONTROL = re.compile(r"<\|\w+\|>|<\w+>")


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)  # as transformers' `tojson`


def _call(call: Mapping[str, Any], arguments: str) -> str:
    """{"name": ..., arguments: ...}; arguments that are JSON already stay as they are."""
    function = call.get("function") or call
    values = function["arguments"]
    written = values if isinstance(values, str) else _json(values)
    return f'{{"name": {_json(function["name"])}, "{arguments}": {written}}}'


def _hermes_offer(tools: Sequence[Tool]) -> str:
    signatures = "".join(f"\n{_json(tool)}" for tool in tools)
    return (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>{signatures}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
        'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )


def _hermes_call(text: str, calls: Sequence[Mapping[str, Any]]) -> str:
    written = [f"<tool_call>\n{_call(call, 'arguments')}\n</tool_call>" for call in calls]
    return "\n".join([text, *written] if text else written)


def _llama_offer(tools: Sequence[Tool]) -> str:
    signatures = "".join(f"{_json(tool, indent=4)}\n\n" for tool in tools)
    return (
        "Given the following functions, please respond with a JSON for a function call with its proper arguments that "
        'best answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of '
        f"argument name and its value}}.Do not use variables.\n\n{signatures}"
    )


def _llama_call(text: str, calls: Sequence[Mapping[str, Any]]) -> str:
    if len(calls) > 1:
        raise MoaiError("the llama3 template takes one tool call in a turn")
    written = _call(calls[0], "parameters")
    return f"{text}\n{written}" if text else written


TEMPLATES = {
    template.name: template
    for template in (
        Template(
            "chatml",
            header="<|im_start|>{role}\n",
            end="<|im_end|>",
            after="\n",
            tools=ToolForm(
                "system",
                _hermes_offer,
                _hermes_call,
                result=lambda text: f"<tool_response>\n{text}\n</tool_response>",
                result_role="user",
                together=True,
            ),
        ),
        Template(
            "llama3",
            begin="<|begin_of_text|>",
            header="<|start_header_id|>{role}<|end_header_id|>\n\n",
            end="<|eot_id|>",
            strip=True,
            tools=ToolForm("user", _llama_offer, _llama_call, result=_json, result_role="ipython"),
            other_ends=("<|eom_id|>",),
        ),
        Template(
            "gemma",
            begin="<bos>",
            header="<start_of_turn>{role}\n",
            end="<end_of_turn>",
            after="\n",
            names={"assistant": "model"},
            strip=True,
            system_turn=False,
        ),
    )
}
