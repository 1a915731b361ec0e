"""What a request may hold: the fields of OpenAI's API that this server obeys, and a few it adds.

Types are strict. A field that nobody knows is an error, as a mistyped one would otherwise do nothing in silence; one
that OpenAI knows and this server cannot obey is an error that says so, unless its value asks for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

INT64 = 2**63
MOST_CHOICES, MOST_STOPS, LONGEST_STOP, MOST_LOGPROBS = 128, 16, 256, 20

Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
Id = Annotated[int, Field(ge=0, lt=2**31)]

# taken and without effect: they concern OpenAI's accounts and caches
IGNORED = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
     "parallel_tool_calls")
)  # fmt: skip


class Unsupported:
    """Why a field cannot be obeyed, and the values of it that ask for nothing."""

    def __init__(self, reason: str, *neutral: Any) -> None:
        self.reason, self.neutral = reason, (None, *neutral)


NO_TOOLS = "this server does not parse calls of tools out of an answer"
OF_BOTH = {"logit_bias": Unsupported("biases of single tokens are not supported", {})}
OF_COMPLETIONS = {
    **OF_BOTH,
    "best_of": Unsupported("best_of is not supported: ask for n choices and choose", 1),
    "suffix": Unsupported("insertion is not supported", ""),
}
OF_CHAT = {
    **OF_BOTH,
    "tools": Unsupported(NO_TOOLS, []),
    "tool_choice": Unsupported(NO_TOOLS, "none", "auto"),
    "functions": Unsupported(NO_TOOLS, []),
    "function_call": Unsupported(NO_TOOLS, "none", "auto"),
    "response_format": Unsupported("answers cannot be held to a grammar: only the type text", {"type": "text"}),
    "modalities": Unsupported("answers are text", ["text"]),
    "audio": Unsupported("answers are text"),
    "prediction": Unsupported("predicted output is not supported"),
    "reasoning_effort": Unsupported("this model has no levels of reasoning", "none"),
    "verbosity": Unsupported("this model has no levels of verbosity", "medium"),
    "web_search_options": Unsupported("there is no search"),
}
OF_EMBEDDINGS: Mapping[str, Unsupported] = {}


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against listeners; taken and without effect


class Generation(Strict):
    """What both kinds of generation take. null is the same as leaving a field out."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=0)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # beyond OpenAI's
    top_k: int | None = Field(None, ge=0, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def with_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(Generation):
    prompt: str | list[Id] | list[str] | list[list[Id]]
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)


class Part(Strict):
    """A piece of a message's content. Pictures and sound have other types, and are refused by that."""

    type: Literal["text"]
    text: str


class Function(Strict):
    name: str
    arguments: str


class ToolCall(Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: Function


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    # what an answer of the API carries, so that it can be sent back as it came
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    def plain(self) -> dict[str, Any]:
        """As the chat template takes it."""
        content = self.content
        text = "".join(part.text for part in content) if isinstance(content, list) else content
        plain: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.tool_calls:
            plain["tool_calls"] = [call.model_dump(exclude_none=True) for call in self.tool_calls]
        return plain


class ChatRequest(Generation):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)


class EmbeddingRequest(Strict):
    model: str | None = None
    input: str | list[Id] | list[str] | list[list[Id]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)
