"""The two routes that generate: a checked request to its answers, whole or streamed."""

from __future__ import annotations

import codecs
from collections.abc import AsyncIterator

from fastapi import Request
from starlette.responses import Response

from moai_llm.inference.sampling import Sampling
from moai_llm.inference.server.answers import Answers, Ask
from moai_llm.inference.server.errors import ApiError
from moai_llm.inference.server.protocol import INT64, ChatRequest, CompletionRequest, Generation
from moai_llm.inference.server.scoring import prompt_logprobs
from moai_llm.inference.server.service import Service
from moai_llm.inference.server.shapes import ChatShape, CompletionShape, Shape, usage
from moai_llm.inference.server.sse import ALIVE, DONE, EventStream, event, to_json, unless_gone
from moai_llm.inference.server.text import LEAST, Token, bytes_of

SLOWLY = 30.0  # seconds a reader may need beyond the time of the answer
COLDEST = 1e-3  # below it, dividing by the temperature leaves one token anyway, or overflows


async def complete(service: Service, request: Request, wanted: CompletionRequest) -> Response:
    """/v1/completions: one text or several, or their ids."""
    service.check_model(wanted.model)
    service.check_generates()
    n, echo = wanted.n or 1, bool(wanted.echo)
    prompts = await service.prompts(wanted.prompt, "prompt", max(1, service.room // n))
    if wanted.max_tokens == 0 and not echo:
        raise ApiError(400, "max_tokens = 0 gives nothing without echo", param="max_tokens")
    lengths = [service.room_for(prompt, wanted.max_tokens, 16, "prompt") for prompt in prompts]
    shape = CompletionShape(service.tokenizer, service.options.name, wanted.logprobs, wanted.with_usage)
    fronts = [await _front(service, request, prompt, wanted.logprobs) if echo else ("", []) for prompt in prompts]
    fronts = [front for front in fronts for _ in range(n)]
    asks = [
        Ask(prompt, sampling(wanted, length, wanted.logprobs, i))
        for prompt, length in zip(prompts, lengths)
        for i in range(n if length else 0)
    ]
    return await _respond(service, request, wanted, shape, asks, fronts, sum(map(len, prompts)))


async def chat(service: Service, request: Request, wanted: ChatRequest) -> Response:
    """/v1/chat/completions."""
    service.check_model(wanted.model)
    service.check_generates()
    if not service.can_chat:
        raise ApiError(
            400, f"{service.options.name} has no chat template: use /v1/completions", code="no_chat_template"
        )
    if wanted.top_logprobs is not None and not wanted.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    if wanted.max_tokens is not None and wanted.max_completion_tokens is not None:
        raise ApiError(400, "max_tokens is the older name of max_completion_tokens: give one", param="max_tokens")
    asked = wanted.max_tokens if wanted.max_completion_tokens is None else wanted.max_completion_tokens
    if asked == 0:
        raise ApiError(400, "max_tokens = 0 gives nothing", param="max_tokens")
    prompt = await service.conversation([message.plain() for message in wanted.messages])
    length = service.room_for(prompt, asked, service.options.max_new_tokens, "messages")
    tops = (wanted.top_logprobs or 0) if wanted.logprobs else None
    shape = ChatShape(service.tokenizer, service.options.name, tops, wanted.with_usage)
    asks = [Ask(prompt, sampling(wanted, length, tops, i)) for i in range(wanted.n or 1)]
    fronts: list[tuple[str, list[Token]]] = [("", [])] * len(asks)
    return await _respond(service, request, wanted, shape, asks, fronts, len(prompt))


def sampling(wanted: Generation, length: int, logprobs: int | None, index: int) -> Sampling:
    """The defaults are OpenAI's: the model's own distribution. Choices of one request have seeds in a row."""
    temperature = 1.0 if wanted.temperature is None else wanted.temperature
    more = {name: getattr(wanted, name) for name in ("min_p", "typical_p", "repetition_penalty")}
    return Sampling(
        max_new_tokens=max(length, 1),
        temperature=0.0 if temperature < COLDEST else temperature,
        top_k=wanted.top_k or 0,
        top_p=1.0 if wanted.top_p is None else wanted.top_p,
        presence_penalty=wanted.presence_penalty or 0.0,
        frequency_penalty=wanted.frequency_penalty or 0.0,
        stop=wanted.stops,
        seed=None if wanted.seed is None else (wanted.seed + index) % INT64,
        logprobs=logprobs,
        **{name: value for name, value in more.items() if value is not None},
    )


async def _front(service: Service, request: Request, prompt: list[int], tops: int | None) -> tuple[str, list[Token]]:
    """What `echo` puts in front: the text of a prompt, and how likely each of its tokens is where that is wanted."""
    text = service.tokenizer.decode(prompt)
    if tops is None:
        return text, []
    scored = await service.with_model(request, lambda: prompt_logprobs(service.model, prompt, tops))
    known: list[tuple[float | None, list[tuple[int, float]]]] = [(None, []), *scored]
    decoder, tokens, place = codecs.getincrementaldecoder("utf-8")("replace"), [], 0
    for token, (logprob, top) in zip(prompt, known):
        bounded = [(i, max(value, LEAST)) for i, value in top]
        tokens.append(Token(token, place, None if logprob is None else max(logprob, LEAST), bounded))
        place += len(decoder.decode(bytes_of(service.tokenizer, token)))
    return text, tokens


async def _respond(
    service: Service, request: Request, wanted: Generation, shape: Shape, asks: list[Ask],
    fronts: list[tuple[str, list[Token]]], prompt_tokens: int,
) -> Response:  # fmt: skip
    answers = Answers(service, asks, shape.tops is not None)
    await answers.start()
    if wanted.stream:
        # nobody holds a place for longer by reading slowly
        limit = service.options.timeout + SLOWLY
        return EventStream(_events(answers, shape, fronts, prompt_tokens), answers.close, limit)
    try:
        content = await unless_gone(request, _whole(answers, shape, fronts, prompt_tokens))
    finally:
        answers.close()
    return Response(content, media_type="application/json")


async def _whole(answers: Answers, shape: Shape, fronts: list[tuple[str, list[Token]]], prompt_tokens: int) -> bytes:
    texts = [[text] for text, _ in fronts]
    tokens = [list(front) for _, front in fronts]
    finish: list[str] = ["length"] * len(fronts)
    async for updates in answers.updates():
        for choice, piece, reason in updates:
            if choice >= 0:
                texts[choice].append(piece.text)
                tokens[choice] += _after(fronts[choice][0], piece.tokens)
                finish[choice] = reason or finish[choice]
    choices = [shape.choice(i, "".join(texts[i]), tokens[i], finish[i]) for i in range(len(fronts))]
    return to_json(shape.answer(choices, usage(prompt_tokens, answers.tokens, answers.cached)))


async def _events(
    answers: Answers, shape: Shape, fronts: list[tuple[str, list[Token]]], prompt_tokens: int
) -> AsyncIterator[bytes]:
    try:
        for i, (text, tokens) in enumerate(fronts):
            if isinstance(shape, ChatShape):
                yield event(shape.piece(shape.opening(i)))
            elif text:
                yield event(shape.piece(shape.delta(i, text, tokens, None if answers.asks else "length")))
        async for updates in answers.updates():
            written = b""
            for choice, piece, reason in updates:
                if choice < 0:
                    written += ALIVE
                elif piece.text or piece.tokens or reason:
                    tokens = _after(fronts[choice][0], piece.tokens)
                    written += event(shape.piece(shape.delta(choice, piece.text, tokens, reason)))
            if written:
                yield written
        if shape.with_usage:
            yield event(shape.last_piece(usage(prompt_tokens, answers.tokens, answers.cached)))
    except ApiError as error:  # the status has been sent; OpenAI's clients raise what such an event says
        yield event(error.content())
    yield DONE


def _after(front: str, tokens: list[Token]) -> list[Token]:
    return [token._replace(start=token.start + len(front)) for token in tokens] if front else tokens
