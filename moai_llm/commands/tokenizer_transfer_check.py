"""`moai tokenizer transfer --check`: which start is best for this model on this text. Each way to make the new rows is
measured on held-out text, right after the transfer and after training on the rest, beside the model as it was. Bits per
byte do not depend on the tokenizer.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from rich.status import Status

from moai_llm.commands.sources import read_options, show_skipped
from moai_llm.commands.tokenizer_transfer import INITS, Transfer
from moai_llm.runtime import MoaiError, keep_freed_memory, make_console, pick_device, seed_everything

UNCHANGED = "unchanged"
ROWS, LONGEST = 8, 512  # a step trains on so many rows, of so many tokens at most
EVERY = 10  # one document in so many is held out
WARMUP = 5  # steps


def run_check(transfer: Transfer, arguments: argparse.Namespace) -> None:
    """Print the table, each line as soon as it is known."""
    from moai_llm.data.sources import Skipped, read_texts

    steps = sorted(set(arguments.steps))
    if steps[0] < 1:
        raise MoaiError(f"--steps {steps[0]}: give numbers of training steps, from 1 on")
    console = make_console()
    with tempfile.TemporaryDirectory() as folder:
        skipped = Skipped(arguments.skip_bad)
        texts = read_texts(arguments.check, reading=read_options(arguments), skipped=skipped)
        trial = Trial(transfer, texts, steps, Path(folder), device=arguments.device, lr=arguments.lr)
        heads = ["at once", *(f"{n:,} steps" for n in steps), "held-out tokens"]
        console.print("bits per byte" + "".join(f"{head:>17}" for head in heads))
        for name in (UNCHANGED, *INITS):
            with console.status(name) as status:
                found = trial.bits_per_byte(name, arguments.seed, _reporter(status, name))
            cells = [*(f"{value:.4f}" for value in found), f"{trial.held_out_tokens(name):,}"]
            console.print(f"{name:<13}" + "".join(f"{cell:>17}" for cell in cells))
    show_skipped(console, skipped)


def _reporter(status: Status, name: str) -> Callable[[int], None]:
    return lambda step: status.update(f"{name}, step {step}")


class Trial:
    """Short trainings of one model from different starts, all on the same text in the same order.

    Args:
        texts: (text, place) pairs; one in ten is held out, or the last tenth of each where there are few.
        steps: when to measure, ascending.
        folder: for the stores of both tokenizers.

    Raises:
        MoaiError: the model is not one of ours, or there is too little text.
    """

    def __init__(
        self, transfer: Transfer, texts: Iterable[tuple[str, str]], steps: Sequence[int], folder: Path, *,
        device: str = "auto", lr: float = 3e-4, rows: int = ROWS, longest: int = LONGEST,
    ) -> None:  # fmt: skip
        from moai_llm.data.prepare import prepare_texts, split_texts
        from moai_llm.modeling.model import MoaiForCausalLM

        if not isinstance(transfer.model, MoaiForCausalLM):
            raise MoaiError(f"--check trains models of ours, this is a {type(transfer.model).__name__}: leave it out")
        self.transfer, self.steps, self.folder = transfer, steps, folder
        self.device, self.lr, self.rows = pick_device(device), lr, rows
        self.length = min(longest, transfer.model.config.max_position_embeddings)
        kept = list(_first(texts, max(1 << 20, 8 * steps[-1] * rows * self.length)))
        for which, tokenizer in (("old", transfer.old), ("new", transfer.new)):
            for part in ("train", "valid"):
                prepare_texts(split_texts(kept, part, EVERY), tokenizer, folder / f"{which}-{part}", [])

    def bits_per_byte(
        self, name: str, seed: int = 0, progress: Callable[[int], None] = lambda step: None
    ) -> list[float]:
        """On the held-out text: at once, and after each of `steps`.

        Args:
            name: an init, or `unchanged` for the model with its own tokenizer.
            seed: of random rows and of the order of the data.
        """
        import torch

        from moai_llm.data.loader import Loader
        from moai_llm.data.shards import Store
        from moai_llm.evaluation.perplexity import evaluate
        from moai_llm.recipe import OptimConfig
        from moai_llm.training.clipping import Clip
        from moai_llm.training.loop import train_step
        from moai_llm.training.optim import make_optimizer
        from moai_llm.training.precision import make_precision

        seed_everything(seed)
        if self.device.type == "cpu":
            keep_freed_memory()
        model = copy.deepcopy(self.transfer.model)
        if name != UNCHANGED:
            self.transfer.apply(model, name, seed)
        model.to(device=self.device, dtype=torch.float32)
        which = "old" if name == UNCHANGED else "new"
        held_out = Loader(Store(self.folder / f"{which}-valid"), self.length, seed=None)
        data = Loader(Store(self.folder / f"{which}-train"), self.length, seed)
        tokenizer, precision = held_out.sources[0].store.tokenizer(), make_precision("auto", self.device)
        optimizer, clip, load = make_optimizer(model, OptimConfig(lr=self.lr)), Clip(model), None

        def measure() -> float:
            model.eval()
            found = evaluate(model, held_out.epoch(self.rows), tokenizer, precision.autocast())
            model.train()
            return found.bits_per_byte

        found = [measure()]
        for step in range(self.steps[-1]):
            batch = data.rows(step * self.rows, self.rows)
            lr = self.lr * min(1.0, (step + 1) / WARMUP)
            result = train_step(
                model, optimizer, precision, [batch], lr=lr, clip=clip,
                router_load=load, noise_seed=(seed, step),
            )  # fmt: skip
            load = result.expert_load
            progress(step + 1)
            if step + 1 in self.steps:
                found.append(measure())
        return found

    def held_out_tokens(self, name: str) -> int:
        from moai_llm.data.shards import Store

        return Store(self.folder / f"{'old' if name == UNCHANGED else 'new'}-valid").manifest.tokens


def _first(texts: Iterable[tuple[str, str]], characters: int) -> Iterator[tuple[str, str]]:
    """Texts up to about so many characters in all: enough for every step without repeating."""
    for text, place in texts:
        yield text, place
        characters -= len(text)
        if characters <= 0:
            return
