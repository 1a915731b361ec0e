"""From text to a chat model in a few minutes, on a CPU.

Trains a tokenizer, prepares the data, pretrains a small hybrid of attention, Mamba and mixture of experts, fine-tunes
it on a small multilingual instruction set, evaluates it and asks it three questions. Without --text the text is what
every Python brings along: the standard library's documentation and source.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moai_llm import recipe as recipes
from moai_llm.runtime import MoaiError, make_console, write_atomically

if TYPE_CHECKING:
    from moai_llm.recipe import Recipe

STAGES = ("tokenizer", "data", "pretrain", "sft", "model")
QUESTIONS = ("복리가 뭐예요?", "What is inflation?", "日本の首都はどこですか?")
ONE_OF = 20  # documents is held out
# fine-tuning: the same recipe, short rows, a few dozen passes over a few hundred conversations
SFT_ROW = 192
SFT = (
    f"data.seq_len={SFT_ROW}", "train.micro_batch_size=21", "schedule.decay=0.5", "eval.every=0",
)  # fmt: skip


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", nargs="+", metavar="PATH", help="your text: files, folders, or other sources")
    parser.add_argument("--out", default="runs/quickstart", help="the folder to write (default runs/quickstart)")
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokens of the tokenizer (default 4096)")
    parser.add_argument("--steps", type=int, default=200, help="pretraining steps (default 200)")
    parser.add_argument("--sft-epochs", type=float, default=14, help="passes over the instruction set (default 14)")
    parser.add_argument("--fresh", action="store_true", help="delete what an earlier quickstart left in --out")


def run(arguments: argparse.Namespace) -> None:
    from moai_llm.data.sources import expand

    out, console, began = Path(arguments.out), make_console(), time.perf_counter()
    # a text that is not there is said before anything is deleted
    if any(source.once for source in expand(arguments.text or [])):
        raise MoaiError("standard input can be read once, and quickstart reads its text three times: give it a file")
    _claim(out, arguments)

    def say(number: int, text: str) -> None:
        console.print(f"\n[bold]{number}/6[/bold] {text}")

    say(1, "tokenizer: learning how to cut this text into tokens")
    tokenizer = _tokenizer(out, arguments, console)
    say(2, "data: tokenising and storing")
    _data(out, arguments, tokenizer, console)
    say(3, "pretraining: the model reads")
    pretrained = _train(_pretraining(out, arguments), "pretrain")
    say(4, "fine-tuning: the model learns to answer")
    tuned = _train(_fine_tuning(out, arguments, pretrained), "fine-tune")
    _publish(tuned, out / "model")
    say(5, "evaluation")
    _evaluate(out, console)
    say(6, "three questions")
    _ask(out, console)
    seconds = time.perf_counter() - began
    console.print(f"\nDone in {int(seconds // 60)}:{int(seconds % 60):02d}. Everything lies in {out}:")
    for name, what in (
        ("tokenizer", "tokenizer.json, for any tool that reads Hugging Face tokenizers"),
        ("data", "the token stores: pretrain, valid, sft"),
        ("pretrain", "the pretraining run: recipe.yaml, training_log.csv, checkpoints"),
        ("sft", "the fine-tuning run"),
        ("model", "the chat model, a Hugging Face directory"),
    ):
        console.print(f"  {out / name!s:<28} {what}")
    console.print(
        f"\nNext:\n  moai chat {out}\n  moai generate {out / 'pretrain'} --prompt 'def main('\n"
        "  moai quickstart --text YOUR_FOLDER --out runs/mine\n  moai recipes"
    )


def _claim(out: Path, arguments: argparse.Namespace) -> None:
    """Make --out ours: begin, go on with the same options, or refuse to mix two runs."""
    note = out / "quickstart.json"
    options = {name: getattr(arguments, name) for name in ("text", "vocab_size", "steps", "sft_epochs")}
    if arguments.fresh and note.is_file():
        for name in (*STAGES, note.name):
            target = out / name
            shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
    if note.is_file():
        before = json.loads(note.read_text(encoding="utf-8"))
        if before != options:
            changed = ", ".join(
                f"{name} {before.get(name)} -> {value}" for name, value in options.items() if before.get(name) != value
            )
            raise MoaiError(
                f"{out} holds a quickstart with other options ({changed}): pass --fresh to delete it or choose --out"
            )
        print(f"going on with what is in {out} (--fresh begins anew)")
    elif out.exists() and any(out.iterdir()):
        raise MoaiError(f"{out} is not empty and not a quickstart: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(note, json.dumps(options, ensure_ascii=False))


def _texts(arguments: argparse.Namespace) -> Iterable[tuple[str, str]]:
    from moai_llm.data.embedded import library_texts
    from moai_llm.data.sources import read_texts

    return read_texts(arguments.text) if arguments.text else library_texts()


def _tokenizer(out: Path, arguments: argparse.Namespace, console: Any) -> Any:
    from moai_llm.data.embedded import instructions
    from moai_llm.tokenizer import load_tokenizer
    from moai_llm.tokenizer.train import train_tokenizer

    if (out / "tokenizer").is_dir():
        tokenizer = load_tokenizer(out / "tokenizer")
    else:
        # the instructions are few: repeated, so that their languages get merges of their own
        spoken = [m["content"] for messages, _ in instructions() for m in messages]
        texts = [*(text for text, _ in _texts(arguments)), *(spoken * 8)]
        tokenizer = train_tokenizer(texts, arguments.vocab_size, fewer=True)
        temporary = out / ".tmp-tokenizer"
        tokenizer.save(temporary)
        temporary.rename(out / "tokenizer")
    console.print(f"{tokenizer.vocab_size:,} tokens in {out / 'tokenizer'}")
    return tokenizer


def _data(out: Path, arguments: argparse.Namespace, tokenizer: Any, console: Any) -> None:
    from moai_llm.commands.data import show_report
    from moai_llm.data.prepare import Part, prepare_chats, prepare_texts, split_texts
    from moai_llm.data.shards import Store

    def part(name: Part) -> Iterable[tuple[str, str]]:
        return split_texts(_texts(arguments), name, ONE_OF)

    sources = arguments.text or ["the Python standard library"]
    jobs = {
        "valid": lambda path: prepare_texts(part("valid"), tokenizer, path, sources),
        "sft": lambda path: prepare_chats(_conversations(tokenizer), tokenizer, path, ["embedded instructions"]),
        "pretrain": lambda path: prepare_texts(part("train"), tokenizer, path, sources),
    }
    for name, job in jobs.items():
        path = out / "data" / name
        if path.is_dir():
            console.print(f"{name}: {Store(path).manifest.tokens:,} tokens")
        else:
            console.print(f"{name}:")
            show_report(console, job(path))


def _conversations(tokenizer: Any) -> Iterable[tuple[Any, str]]:
    """The instructions, alone and strung together three at a time, or as many as fit into a row: in a chat a question
    follows on others.
    """
    from moai_llm.data.embedded import instructions
    from moai_llm.tokenizer.chat import render

    single = list(instructions())
    yield from single
    order = random.Random(0).sample(single, len(single))
    for group in zip(*[iter(order)] * 3):
        turns = [m for messages, _ in group for m in messages if m["role"] != "system"]
        while len(turns) > 2 and len(render(tokenizer, turns).ids) > SFT_ROW:
            del turns[-2:]
        yield turns, ", ".join(place for _, place in group)


def _pretraining(out: Path, arguments: argparse.Namespace) -> Recipe:
    return recipes.load("quickstart", [
        f"data.train={out / 'data' / 'pretrain'}", f"data.valid={out / 'data' / 'valid'}",
        f"train.out={out / 'pretrain'}", f"train.steps={arguments.steps}",
    ])  # fmt: skip


def _fine_tuning(out: Path, arguments: argparse.Namespace, pretrained: Path) -> Recipe:
    return recipes.load("quickstart", [
        *SFT, f"data.train={out / 'data' / 'sft'}", f"train.init_from={pretrained}", f"train.out={out / 'sft'}",
        f"train.epochs={arguments.sft_epochs}",
    ])  # fmt: skip


def _train(recipe: Recipe, title: str) -> Path:
    from moai_llm.commands.train import make_hooks
    from moai_llm.training.loop import train

    resume = (Path(recipe.train.out) / "recipe.yaml").is_file()
    trained = train(recipe, hooks=make_hooks(recipe), resume=resume, title=title)
    if not trained.finished:
        raise MoaiError("stopped; the same command goes on from here")
    return trained.checkpoint


def _publish(checkpoint: Path, model: Path) -> None:
    """Copy the model files of a checkpoint, without what only a resumed run needs."""
    temporary = model.with_name(".tmp-model")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(checkpoint, temporary, ignore=shutil.ignore_patterns("training_state", "MANIFEST.*"))
    shutil.rmtree(model, ignore_errors=True)
    temporary.rename(model)


def _evaluate(out: Path, console: Any) -> None:
    from rich.table import Table

    from moai_llm.data.loader import Loader
    from moai_llm.data.shards import Store
    from moai_llm.evaluation.perplexity import evaluate
    from moai_llm.inference.load import load_model

    table = Table("model", "on", "loss", "perplexity", "bits per byte", box=None, pad_edge=False)
    for run, data, what in (("pretrain", "valid", "held-out text"), ("sft", "sft", "the instructions it learned")):
        model, store = load_model(out / run, dtype="fp32"), Store(out / "data" / data)
        loader = Loader(store, 256, seed=None)
        found = evaluate(model.model, loader.epoch(16, 64), model.tokenizer)
        table.add_row(run, what, f"{found.loss:.3f}", f"{found.perplexity:.2f}", f"{found.bits_per_byte:.3f}")
    console.print(table)


def _ask(out: Path, console: Any) -> None:
    from moai_llm.inference.chat import Chat
    from moai_llm.inference.load import load_model
    from moai_llm.inference.sampling import Sampling

    model = load_model(out / "model", dtype="fp32")
    for question in QUESTIONS:
        answer = "".join(Chat(model, Sampling(max_new_tokens=96, temperature=0)).say(question))
        console.print(f"  [bold]>[/bold] {question}")
        console.print(f"    {answer}", markup=False)
