"""Continue a prompt, or a file of them, with a model directory, a run, an export or adapters.

moai generate work/base --prompt "Once upon a time"
moai generate work/base --input-file prompts.txt --output-file answers.jsonl

One prompt is streamed. A file is worked through in batches; killed and run again, the same command does what is left.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moai_llm.commands.kv_options import add_kv_cache, check_kv, kv_of
from moai_llm.commands.sampling import add_sampling, sampling_of
from moai_llm.runtime import MoaiError

if TYPE_CHECKING:
    from rich.console import Console

    from moai_llm.inference.engine import Engine
    from moai_llm.inference.generate import Generated
    from moai_llm.inference.load import TextModel
    from moai_llm.inference.speculate import Drafter


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model directory, a run, or adapters")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="text to continue; - reads it from the standard input")
    what.add_argument("--input-file", type=Path, help="prompts: .txt, one a line, or .jsonl with a `prompt` each")
    what.add_argument("--eval-text", metavar="TEXT", help="print the perplexity of this text; - reads it from stdin")
    parser.add_argument("--output-file", type=Path, help="answers to --input-file: .json or .jsonl")
    parser.add_argument("--overwrite", action="store_true", help="begin --output-file again")
    parser.add_argument("--num-samples", type=int, default=1, help="continuations of each prompt (default 1)")
    parser.add_argument("--num-beams", type=int, default=1, help="search with so many beams, and draw nothing")
    parser.add_argument("--length-penalty", type=float, default=1.0, help="of beams: above 0 favours long texts")
    parser.add_argument(
        "--logprobs", type=int, metavar="N", help="log probabilities: of each token and the N likeliest"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="texts that go on at the same time (default 8)")
    parser.add_argument("--draft", metavar="MODEL", help="a smaller model of the same tokenizer that guesses ahead")
    parser.add_argument("--prompt-lookup", action="store_true", help="guess ahead by repeating the text so far")
    parser.add_argument("--guesses", type=int, default=5, help="tokens that are guessed at a time (default 5)")
    add_kv_cache(parser)
    add_sampling(parser)


def run(arguments: argparse.Namespace) -> None:
    from moai_llm.runtime import make_console

    _require_consistent(arguments)
    sampling = sampling_of(arguments)  # a wrong value is told before a model is loaded
    prompts = _prompts(arguments)
    from moai_llm.inference.load import load_model

    model = load_model(arguments.model, arguments.device, arguments.dtype)
    console = make_console()
    if arguments.eval_text is not None:
        _perplexity(model, sys.stdin.read() if arguments.eval_text == "-" else arguments.eval_text, console)
    elif arguments.num_beams > 1:
        _beams(model, prompts[0], arguments)
    elif arguments.input_file is not None:
        _file(model, prompts, arguments, console)
    elif arguments.num_samples == 1 and sampling.logprobs is None:
        _stream(model, prompts[0], arguments)
    else:
        _samples(model, prompts[0], arguments)


def _require_consistent(arguments: argparse.Namespace) -> None:
    if (arguments.input_file is None) != (arguments.output_file is None):
        raise MoaiError("--input-file and --output-file go together")
    for name, least in (("num_samples", 1), ("num_beams", 1), ("batch_size", 1), ("guesses", 1)):
        if getattr(arguments, name) < least:
            raise MoaiError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: at least {least}")
    if arguments.draft and arguments.prompt_lookup:
        raise MoaiError("--draft and --prompt-lookup both guess ahead: choose one")
    check_kv(arguments)
    if arguments.kv_cache or arguments.kv_keep:
        for name in ("input_file", "eval_text", "draft", "prompt_lookup", "logprobs"):
            if getattr(arguments, name):
                raise MoaiError(
                    f"--{name.replace('_', '-')} needs the engine's own cache: --kv-cache and --kv-keep are for one "
                    "streamed --prompt"
                )
        if arguments.num_samples > 1 or arguments.num_beams > 1:
            raise MoaiError("--kv-cache and --kv-keep are for one text: leave out --num-samples and --num-beams")
    if arguments.num_beams > 1:
        if arguments.input_file is not None:
            raise MoaiError("--num-beams takes one --prompt, not a file")
        for name in ("draft", "prompt_lookup", "stop", "logprobs", "seed"):
            if getattr(arguments, name):
                raise MoaiError(f"--{name.replace('_', '-')} does not go with --num-beams, which draws nothing")
        if arguments.num_samples > arguments.num_beams:
            raise MoaiError(f"{arguments.num_beams} beams end in at most as many texts: lower --num-samples")


def _prompts(arguments: argparse.Namespace) -> list[str]:
    from moai_llm.inference.prompt_file import read_prompts

    if arguments.input_file is not None:
        return read_prompts(arguments.input_file)
    return [sys.stdin.read() if arguments.prompt == "-" else arguments.prompt]


def _engine(model: TextModel, arguments: argparse.Namespace, batch: int) -> Engine:
    from moai_llm.inference.engine import Engine
    from moai_llm.inference.load import load_model
    from moai_llm.inference.speculate import DraftModel, PromptLookup

    drafter: Drafter | None = None
    if arguments.draft:
        drafter = DraftModel(load_model(arguments.draft, arguments.device, arguments.dtype), model)
    elif arguments.prompt_lookup:
        drafter = PromptLookup()
    return Engine(model, max_batch=batch, drafter=drafter, guesses=arguments.guesses)


def _stream(model: TextModel, prompt: str, arguments: argparse.Namespace) -> None:
    ids = model.tokenizer.encode(prompt)
    cache = kv_of(arguments, model, len(ids) + arguments.max_new_tokens)
    if cache is not None:
        from moai_llm.inference.session import Session, stream_text

        print(prompt, end="", flush=True)
        for piece in stream_text(Session(model, cache), ids, sampling_of(arguments)):
            print(piece, end="", flush=True)
        print()
        return
    engine = _engine(model, arguments, 1)
    engine.submit(ids, sampling_of(arguments))
    print(prompt, end="", flush=True)
    while engine.busy:
        for event in engine.step():
            print(event.text, end="", flush=True)
    print()
    _tell_guesses(engine)


def _tell_guesses(engine: Engine) -> None:
    counters = engine.counters
    if counters.guessed_tokens:
        share = counters.taken_tokens / counters.guessed_tokens
        print(
            f"guesses: {counters.taken_tokens} of {counters.guessed_tokens} taken ({share:.0%}), "
            f"{counters.generated_tokens / max(counters.decode_steps, 1):.2f} tokens a step",
            file=sys.stderr,
        )


def _samples(model: TextModel, prompt: str, arguments: argparse.Namespace) -> None:
    from moai_llm.inference.generate import stream_generated

    engine = _engine(model, arguments, arguments.batch_size)
    found = stream_generated(model, [prompt], sampling_of(arguments), samples=arguments.num_samples, engine=engine)
    for _, answers in found:
        for number, answer in enumerate(answers, 1):
            if len(answers) > 1:
                print(f"--- {number}")
            print(prompt + answer.text)
            _print_logprobs(model, answer)
    _tell_guesses(engine)


def _print_logprobs(model: TextModel, answer: Generated) -> None:
    for token, logprob, top in zip(answer.tokens, answer.logprobs or [], answer.top or []):
        others = "  ".join(f"{_shown(model, other)} {value:.3f}" for other, value in top)
        print(f"{_shown(model, token):>16} {logprob:8.3f}   {others}".rstrip())


def _shown(model: TextModel, token: int) -> str:
    return json.dumps(model.tokenizer.token_bytes(token).decode("utf-8", "backslashreplace"), ensure_ascii=False)


def _beams(model: TextModel, prompt: str, arguments: argparse.Namespace) -> None:
    from moai_llm.inference.beams import beam_search

    found = beam_search(
        model, model.tokenizer.encode(prompt), arguments.num_beams, arguments.max_new_tokens, arguments.length_penalty
    )
    for number, beam in enumerate(found[: arguments.num_samples], 1):
        if arguments.num_samples > 1:
            print(f"--- {number}, score {beam.score:.4f}")
        print(prompt + model.tokenizer.decode(beam.tokens))


def _perplexity(model: TextModel, text: str, console: Console) -> None:
    from moai_llm.evaluation.perplexity import evaluate_text

    found = evaluate_text(model, text)
    console.print(
        f"perplexity {found.perplexity:.2f}, loss {found.loss:.4f} nats a token, {found.bits_per_byte:.4f} bits per "
        f"byte, over {found.targets:,} tokens"
    )


def _file(model: TextModel, prompts: list[str], arguments: argparse.Namespace, console: Console) -> None:
    from moai_llm.inference.generate import stream_generated
    from moai_llm.inference.prompt_file import AnswerFile

    sampling, samples = sampling_of(arguments), arguments.num_samples
    settings = {"model": str(model.path.resolve()), "samples": samples, "dtype": arguments.dtype, **asdict(sampling)}
    answers = AnswerFile(arguments.output_file, prompts, settings, arguments.overwrite)
    left = [i for i in range(len(prompts)) if i not in answers.done]
    if answers.done:
        console.print(f"{len(answers.done)} of {len(prompts)} prompts are done")
    engine, start = _engine(model, arguments, arguments.batch_size), time.perf_counter()
    shown = Shown(console, len(prompts), len(answers.done))
    with answers.adding() as add:
        found = stream_generated(model, [prompts[i] for i in left], sampling, samples=samples, engine=engine)
        for place, generated in found:
            add(left[place], {"prompt": prompts[left[place]], **_record(generated)})
            shown.one_more(engine.counters.generated_tokens)
    seconds = time.perf_counter() - start
    count = engine.counters.generated_tokens
    console.print(f"{arguments.output_file}: {len(prompts)} prompts, {count:,} tokens, {count / seconds:,.1f} a second")
    _tell_guesses(engine)


def _record(generated: list[Generated]) -> dict[str, Any]:
    """What a file says of one prompt: `text` and how it ended, or with several samples a list of these."""
    found = []
    for one in generated:
        record: dict[str, Any] = {"text": one.text, "tokens": len(one.tokens), "finished": one.finished}
        if one.logprobs is not None:
            record |= {"ids": one.tokens, "logprobs": one.logprobs, "top": one.top}
        found.append(record)
    return found[0] if len(found) == 1 else {"samples": found}


class Shown:
    """Progress of a file: a line that changes on a terminal, elsewhere a line every few seconds."""

    EVERY = 10.0

    def __init__(self, console: Console, count: int, done: int) -> None:
        self.console, self.count, self.done, self.new = console, count, done, 0
        self.start = self.last = time.perf_counter()

    def one_more(self, tokens: int) -> None:
        self.done, self.new = self.done + 1, self.new + 1
        now = time.perf_counter()
        terminal = self.console.is_terminal
        if not terminal and now - self.last < self.EVERY:
            return
        self.last, seconds = now, now - self.start
        left = round(seconds / self.new * (self.count - self.done))
        line = f"{self.done} of {self.count} prompts, {tokens / seconds:,.1f} tokens a second, {left} s left"
        self.console.print(line, end="\r" if terminal and self.done < self.count else "\n")
