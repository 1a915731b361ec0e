"""`moai train RECIPE --test`: the whole way of a run in seconds, on made-up text, in a folder that is gone afterwards.

A preset stands for its tiny twin, which has the same bricks; a recipe that is small stands for itself. What is checked
is the machinery: it trains, saves, resumes, evaluates and generates. Whether a model becomes good is another matter.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moai_llm import recipe as recipes
from moai_llm.representation import CONTRASTIVE
from moai_llm.runtime import MoaiError, make_console

if TYPE_CHECKING:
    from moai_llm.recipe import Recipe
    from moai_llm.tokenizer import Tokenizer

STEPS, ROW, ROWS = 8, 64, 4  # of the run; the longest row; rows of a step
SMALL = 20e6  # parameters of a recipe that is run as it is
WORDS = (
    "river", "bank", "interest", "rate", "paper", "winter", "이자", "은행", "강", "利息", "银行", "川", "def", "42",
)  # fmt: skip


def smoke(name: str, overrides: Sequence[str]) -> None:
    """Run the test and print what was checked.

    Raises:
        MoaiError: the recipe cannot be tested this way, or a check failed.
    """
    console = make_console()
    chosen, recipe = _small(name, overrides)
    with tempfile.TemporaryDirectory(prefix="moai-test-", ignore_cleanup_errors=True) as folder:
        for what, seen in _checks(_shortened(recipe, Path(folder)), Path(folder)):
            console.print(f"  [green]ok[/green]  {what:<10} {seen}")
    console.print(f"{chosen}: everything works here. The text was made up and nothing was kept.")


def _small(name: str, overrides: Sequence[str]) -> tuple[str, Recipe]:
    twin = f"{name}-tiny"
    chosen = twin if twin in recipes.list_recipes() else name
    recipe = recipes.load(chosen, overrides)
    if recipe.loss.type in ("dpo", "ipo", "simpo", "distillation"):
        raise MoaiError(
            f"--test trains on text alone, and loss.type={recipe.loss.type} needs more: set another loss.type"
        )
    if (count := recipe.model.parameters()["total"]) > SMALL:
        raise MoaiError(
            f"{chosen} has {count / 1e6:,.0f}M parameters, too many for --test: make it smaller, for example with "
            "model.hidden_size and model.num_hidden_layers, or test a preset, which has a tiny twin"
        )
    return chosen, recipe


def _shortened(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe over the generated text, for a few steps; all it says of how to train stays."""
    row = min(recipe.data.seq_len, ROW, recipe.model.max_position_embeddings)
    schedule, warmup, size = recipe.schedule, recipe.schedule.warmup, recipe.train.micro_batch_size
    return replace(
        recipe,
        data=replace(recipe.data, train=str(folder / "train"), valid=str(folder / "valid"), stages=[], seq_len=row),
        train=replace(
            recipe.train, out=str(folder / "whole"), init_from=None, steps=STEPS, tokens=None, epochs=None,
            batch_tokens=ROWS * row, micro_batch_size=size if size == "auto" else min(size, ROWS // 2),
        ),
        schedule=replace(schedule, warmup=warmup if warmup < 1 else 0.1),
        checkpoint=replace(recipe.checkpoint, every=STEPS // 2),
        eval=replace(recipe.eval, every=STEPS // 2, rows=4, prompts=[]),
        log=replace(recipe.log, every=1, to=[]),
    )  # fmt: skip


def _checks(recipe: Recipe, folder: Path) -> Iterator[tuple[str, str]]:
    """(what works, what was seen) of each check, in the order of a run."""
    from moai_llm.commands.train import make_hooks
    from moai_llm.data.shards import Store
    from moai_llm.inference.generate import sample_text
    from moai_llm.inference.load import load_model
    from moai_llm.optimization import LoraConfig
    from moai_llm.training.checkpoint import problems
    from moai_llm.training.events import read_metrics
    from moai_llm.training.loop import train

    tokenizer = _prepare(folder, recipe.loss.type in CONTRASTIVE)
    recipe = replace(recipe, model=replace(recipe.model, vocab_size=tokenizer.padded_vocab_size))
    tokens = Store(folder / "train").manifest.tokens
    yield "data", f"a tokenizer of {tokenizer.vocab_size} tokens, {tokens:,} tokens of made-up text"
    if recipe.lora.rank:  # adapters need a model below them
        below = replace(recipe, lora=LoraConfig(), train=replace(recipe.train, out=str(folder / "below"), steps=2))
        start = train(below, hooks=make_hooks(below), quiet=True).checkpoint
        recipe = replace(recipe, train=replace(recipe.train, init_from=str(start)))
    whole = train(recipe, hooks=make_hooks(recipe), quiet=True).checkpoint
    rows = read_metrics(Path(recipe.train.out) / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    if not all(map(math.isfinite, losses)) or len(losses) != STEPS:
        raise MoaiError(f"training gave {len(losses)} losses in {STEPS} steps, not all of them numbers: {losses}")
    fell = "" if losses[-1] < losses[0] else ", not seen to fall in so few steps"
    yield "trains", f"{STEPS} steps, loss {losses[0]:.3f} to {losses[-1]:.3f}{fell}"
    if found := next(problems(whole), None):
        raise MoaiError(f"the checkpoint is damaged: {found}")
    yield "saves", f"{len(list(whole.iterdir()))} files and folders, and their digests agree"
    yield "resumes", _resume(recipe, folder, whole)
    evaluated = [row for row in rows if "eval_loss" in row][-1]
    if not math.isfinite(evaluated["eval_loss"]):
        raise MoaiError(f"the evaluation gave {evaluated['eval_loss']}")
    if recipe.loss.type in CONTRASTIVE:
        yield "evaluates", f"loss {evaluated['eval_loss']:.3f}, MRR {evaluated['mrr']:.3f} on held-out texts"
        yield "embeds", _embed(recipe)
        return
    yield (
        "evaluates",
        f"loss {evaluated['eval_loss']:.3f}, {evaluated['bits_per_byte']:.3f} bits per byte on held-out text",
    )
    model = load_model(recipe.train.out, device=recipe.train.device)
    text = sample_text(model, "river", 12, seed=0)
    yield "generates", repr(text)


def _embed(recipe: Recipe) -> str:
    from moai_llm.inference.embed import embed, load_embedder

    vectors = embed(load_embedder(recipe.train.out, device=recipe.train.device), ["river", "은행"])
    return f"{len(vectors)} vectors of {vectors.shape[1]} numbers"


def _prepare(folder: Path, related: bool) -> Tokenizer:
    from moai_llm.data.prepare import prepare_texts
    from moai_llm.tokenizer.train import train_tokenizer

    chance = random.Random(0)
    texts = [" ".join(chance.choices(WORDS, k=chance.randint(8, 30))) for _ in range(120)]
    tokenizer = train_tokenizer(texts, 300, fewer=True)
    if related:
        from moai_llm.data.prepare import prepare

        for name, part in (("train", texts[:100]), ("valid", texts[100:])):
            lines = (json.dumps({"anchor": text[:20], "positive": text[20:50]}) + "\n" for text in part)
            (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
            prepare([folder / f"{name}.jsonl"], tokenizer, folder / name, kind="embedding")
        return tokenizer
    prepare_texts([(text, "") for text in texts[:100]], tokenizer, folder / "train", ["made up"])
    prepare_texts([(text, "") for text in texts[100:]], tokenizer, folder / "valid", ["made up"])
    return tokenizer


class _Halfway(Exception):
    pass


def _resume(recipe: Recipe, folder: Path, whole: Path) -> str:
    """A run that breaks off in the middle and goes on ends with the weights of the whole one."""
    import torch
    from safetensors.torch import load_file

    from moai_llm.commands.train import make_hooks
    from moai_llm.training.loop import train

    def break_off(step: int, model: Any) -> dict[str, float]:
        if step == STEPS // 2:
            raise _Halfway
        return {}

    broken = replace(recipe, train=replace(recipe.train, out=str(folder / "broken")))
    with suppress(_Halfway):
        train(broken, hooks=[*make_hooks(broken), break_off], quiet=True)
    last = train(broken, hooks=make_hooks(broken), resume=True, quiet=True).checkpoint
    left, right = load_file(whole / "model.safetensors"), load_file(last / "model.safetensors")
    off = max(float((left[name] - right[name]).abs().max()) for name in left)
    if left.keys() != right.keys() or off > (0 if not torch.cuda.is_available() else 1e-3):
        raise MoaiError(f"a run that broke off and went on has other weights than one that did not: off by {off:.1e}")
    return f"broken off after step {STEPS // 2} and gone on: " + (
        "the same to the bit" if not off else f"off by {off:.0e}"
    )
