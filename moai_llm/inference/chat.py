"""A conversation with a model: what was said, what of it still fits, and what a turn has cost. It knows no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moai_llm.inference.load import TextModel
from moai_llm.inference.sampling import Sampling
from moai_llm.inference.session import Session
from moai_llm.inference.text_stream import TextStream
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.chat import can_chat, render, template_name

Message = dict[str, Any]


@dataclass
class Turn:
    """What the last answer has cost.

    Attributes:
        prompt: tokens of the conversation before the answer, and `reused` those of them that were not computed again.
        first: seconds until the first token, and `rest` from there to the last one.
        dropped: messages that this turn has left out for lack of room.
        finished: "stop", "length" or "cancelled".
    """

    prompt: int = 0
    reused: int = 0
    tokens: int = 0
    first: float = 0.0
    rest: float = 0.0
    dropped: int = 0
    finished: str = ""

    @property
    def speed(self) -> float | None:
        """Tokens a second after the first one."""
        return (self.tokens - 1) / self.rest if self.tokens > 1 and self.rest > 0 else None


def require_template(tokenizer: Tokenizer, path: str | Path) -> None:
    """Raises:
    MoaiError: the tokenizer has no chat template, or one that it cannot write.
    """
    if not can_chat(tokenizer):
        raise MoaiError(
            f"{path} is not a chat model: its tokenizer has no chat template, so it does not know whose turn it is. "
            f"Continue texts with `moai generate {path}`. To make it a chat model, put a template in force with `moai "
            f"tokenizer template {path} --set chatml` (the tokenizer needs the template's control tokens: `moai "
            "tokenizer train --chat-template chatml` makes them) and fine-tune it on conversations"
        )
    template_name(tokenizer)


class Chat:
    """The conversation so far and the model's session over it.

    Args:
        cache: as in `Session`.
    Attributes:
        messages: all of it. What no longer fits into the context stays here, and is only not shown to the model.
        left_out: so many of the messages after the system message are not shown to the model.
        turns: what each answer has cost, and `last` the last one.

    Raises:
        MoaiError: the model's tokenizer has no chat template.
    """

    def __init__(
        self,
        text_model: TextModel,
        sampling: Sampling,
        system: str | None = None,
        cache: Callable[[], Any] | None = None,
    ) -> None:
        require_template(text_model.tokenizer, text_model.path)
        self.text_model, self.sampling, self.session = text_model, sampling, Session(text_model, cache)
        self.system, self.turns = system, list[Turn]()
        self.reset()

    @property
    def last(self) -> Turn | None:
        return self.turns[-1] if self.turns else None

    @property
    def question(self) -> str | None:
        """What the user has said last."""
        place = self._last_question()
        return None if place is None else str(self.messages[place]["content"])

    @property
    def open(self) -> bool:
        """Whether the last question has no answer, as in a file that ends with one."""
        return bool(self.messages) and self.messages[-1]["role"] == "user"

    def reset(self) -> None:
        """Forget the conversation; the system message stays."""
        self.put([{"role": "system", "content": self.system}] if self.system else [])

    def put(self, messages: Sequence[Message], tools: list[Any] | None = None) -> None:
        """Go on from another conversation.

        Raises:
            MoaiError: the chat template has no form for it; then all is as before.
        """
        if any(message["role"] != "system" for message in messages):
            render(self.text_model.tokenizer, messages, tools=tools, add_generation_prompt=True)
        self.messages, self.tools = list(messages), tools
        self.system = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
        self.left_out, self._again = 0, 0
        self._said: dict[int, tuple[str, list[int]]] = {}  # place of an answer -> its text and its tokens

    def set_system(self, text: str | None) -> None:
        """Another system message for the same conversation. All of it is then computed again."""
        system = [{"role": "system", "content": text}] if text else []
        self.put([*system, *self.messages[_first(self.messages) :]], self.tools)

    def undo(self) -> str | None:
        """Take the last question back, with what came after it; returns it."""
        place, question = self._last_question(), self.question
        if place is not None:
            self._cut(place)
        return question

    def say(self, text: str) -> Iterator[str]:
        """Add a user turn and yield the answer in pieces.

        Where whoever reads stops, what was yielded stays in the conversation. Where nothing was, or something fails,
        the conversation is as before.

        Raises:
            MoaiError: the question alone is too long, or the one before has no answer.
        """
        if self.open:
            raise MoaiError("the last question has no answer yet: /retry answers it, /undo takes it back")
        self._again = 0
        yield from self._answer([*self.messages, {"role": "user", "content": text}], self.sampling)

    def retry(self, text: str | None = None) -> Iterator[str]:
        """Answer the last question again, or another one in its place, with the next seed where a seed is set. Until
        there is a new answer, the old one stays.
        """
        place = self._last_question()
        if place is None:
            raise MoaiError("there is no question yet")
        question = {"role": "user", "content": self.question if text is None else text}
        self._again = self._again + 1 if text is None and not self.open else 0
        seed = self.sampling.seed
        sampling = self.sampling if seed is None else replace(self.sampling, seed=(seed + self._again) % 2**63)
        yield from self._answer([*self.messages[:place], question], sampling)

    def _answer(self, messages: list[Message], sampling: Sampling) -> Iterator[str]:
        """Answer the last of these messages, and make them the conversation as soon as there is an answer."""
        turn, tokens, start = Turn(), list[int](), time.perf_counter()
        ids, left_out = self._prompt(messages)
        turn.prompt = len(ids)
        text, said = TextStream(self.text_model.tokenizer, sampling.stop), ""
        try:
            with closing(self.session.stream(ids, sampling)) as stream:  # type: ignore[type-var]
                for token in stream:
                    now = time.perf_counter()
                    turn.first = turn.first or now - start
                    turn.rest = now - start - turn.first
                    tokens.append(token)
                    piece = text.push(token)
                    if piece:
                        said += piece
                        yield piece
            if self.session.finished != "cancelled":
                rest = text.end()
                said += rest
                if rest:
                    yield rest
        finally:
            turn.tokens, turn.reused, turn.finished = len(tokens), self.session.reused, self.session.finished
            if said or turn.finished in ("stop", "length"):
                turn.dropped = max(0, left_out - self.left_out)
                self._cut(len(messages) - 1)
                self.left_out = left_out
                self.messages = [*messages, {"role": "assistant", "content": said}]
                self._said[len(messages)] = said, tokens
                self.turns.append(turn)

    def _last_question(self) -> int | None:
        return next((i for i in reversed(range(len(self.messages))) if self.messages[i]["role"] == "user"), None)

    def _cut(self, place: int) -> None:
        """Forget the messages from here on."""
        self.messages = self.messages[:place]
        self._said = {i: said for i, said in self._said.items() if i < place}
        if self.left_out >= place - _first(self.messages):
            self.left_out = 0

    # ---------------------------------------------------------------- what the model sees

    @property
    def room(self) -> int:
        """Tokens a conversation may have before an answer: what the answer may take is kept free, but no more than
        half of the context.
        """
        context = self.text_model.context
        return max(1, context - min(self.sampling.max_new_tokens, context // 2))

    def _prompt(self, messages: list[Message]) -> tuple[list[int], int]:
        """The rendered conversation, and how many messages it leaves out. When it becomes too long, the oldest
        exchanges go until a quarter of the room is free: each time that something goes, the rest is computed again.
        """
        first = _first(messages)
        left_out = self.left_out if first + self.left_out < len(messages) else 0
        ids = self._rendered(messages, first, left_out)
        goal = self.room
        while len(ids) > goal:
            later = [i for i in range(first + left_out + 1, len(messages)) if messages[i]["role"] == "user"]
            if not later:
                break
            goal, left_out = self.room * 3 // 4, later[0] - first
            ids = self._rendered(messages, first, left_out)
        return ids, left_out

    def _rendered(self, messages: list[Message], first: int, left_out: int) -> list[int]:
        """The conversation as the training data was rendered, but with each answer in the tokens that the model has
        said. Text can be cut into tokens in many ways, and another way than the model's would have to be computed
        again: for a state of Mamba from the beginning of the answer, or of the conversation.
        """
        places = [*range(first), *range(first + left_out, len(messages))]
        tokenizer = self.text_model.tokenizer
        ids, learn = render(tokenizer, [messages[i] for i in places], tools=self.tools, add_generation_prompt=True)
        runs = _runs(learn)
        answers = [i for i in places if messages[i]["role"] == "assistant"]
        if len(runs) != len(answers):  # a template that does not say what the assistant's part is
            return ids
        result, done, control = list[int](), 0, set(tokenizer.special_ids.values())
        for place, (start, end) in zip(answers, runs):
            text, tokens = self._said.get(place, ("", []))
            result += ids[done:start]
            closed = end > start and ids[end - 1] in control
            same = tokens and closed and text == messages[place]["content"] == _text(tokenizer, tokens)
            if same and tokenizer.decode(ids[start : end - 1]) == text and not control & set(tokens):
                result += [*tokens, ids[end - 1]]
            else:
                result += ids[start:end]
            done = end
        return result + ids[done:]


def _first(messages: Sequence[Message]) -> int:
    """Where the turns begin: after the system message, if there is one."""
    return 1 if messages and messages[0]["role"] == "system" else 0


def _runs(learn: list[bool]) -> list[tuple[int, int]]:
    """(start, end) of each stretch of tokens that are the assistant's."""
    edges = [i for i in range(len(learn) + 1) if (learn[i - 1] if i else False) != (i < len(learn) and learn[i])]
    return list(zip(edges[::2], edges[1::2]))


def _text(tokenizer: Tokenizer, tokens: list[int]) -> str:
    stream = TextStream(tokenizer)
    return "".join([*map(stream.push, tokens), stream.end()])
