"""`moai tokenizer transfer`: give a trained model another tokenizer. Which old rows a new one is made from is said by
tokenizer/transfer.py, how by modeling/vocabulary.py; here is the directory that comes of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moai_llm.commands.sources import add_reading_options
from moai_llm.export.place import written_beside
from moai_llm.runtime import MoaiError, logger, make_console

if TYPE_CHECKING:
    from moai_llm.tokenizer import Tokenizer

INITS = ("mean", "last", "first", "random")  # of modeling/vocabulary.py, which imports torch
# settings of transformers' generation that hold ids of the old tokenizer
OLD_IDS = ("bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id",
           "forced_eos_token_id", "decoder_start_token_id")  # fmt: skip


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a model directory or a run; it is only read")
    parser.add_argument("--tokenizer", required=True, help="the new tokenizer: a directory, or a name like o200k_base")
    parser.add_argument("--out", help="model directory to write")
    parser.add_argument(
        "--init", default="mean", choices=INITS,
        help="a new token's row, from the rows of the old tokens that spell it: their mean (default), the last, the "
        "first, or a random draw",
    )  # fmt: skip
    parser.add_argument("--overwrite", "--force", action="store_true", help="replace a model that is in --out")
    parser.add_argument(
        "--check", nargs="+", metavar="TEXT",
        help="compare every --init on these sources: bits per byte right after the transfer and after training",
    )  # fmt: skip
    add_reading_options(parser)
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[50], help="training steps after which --check measures (default 50)"
    )
    parser.add_argument("--lr", type=float, default=3e-4, help="learning rate of --check (default 3e-4)")
    parser.add_argument("--device", default="auto", help="where --check trains: auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--seed", type=int, default=0, help="of random rows and of the data's order in --check")


def run(arguments: argparse.Namespace) -> None:
    from moai_llm.tokenizer import load_tokenizer

    if not arguments.out and not arguments.check:
        raise MoaiError("give --out to write the model, --check TEXT to compare the ways to make it, or both")
    source, new = find_source(arguments.model), load_tokenizer(arguments.tokenizer)
    if arguments.out:
        require_free(Path(arguments.out), source, Path(arguments.tokenizer), arguments.overwrite)
    transfer = Transfer(source, new)
    console = make_console()
    console.print(transfer.summary())
    if arguments.check:
        from moai_llm.commands.tokenizer_transfer_check import run_check

        run_check(transfer, arguments)
    if arguments.out:
        out = Path(arguments.out)
        transfer.save(out, arguments.init, arguments.seed)
        recipe = out / "recipe.yaml" if (out / "recipe.yaml").is_file() else f"RECIPE train.init_from={out}"
        console.print(
            f"written to {out} ({arguments.init}). It has no optimizer state: train it on, beginning with\n"
            f"  moai data prepare FILES --tokenizer {out} --out STORE\n"
            f"  moai train {recipe} data.train=STORE"
        )


class Transfer:
    """A model on its way from its own tokenizer to another.

    Args:
        source: a model directory of ours, or any causal language model that transformers loads; only read.

    Raises:
        MoaiError: it cannot be loaded, or does not belong to its tokenizer; one of the tokenizers is not byte-level;
            the new one has no end of text.
    """

    def __init__(self, source: Path, new: Tokenizer) -> None:
        from transformers import AutoModelForCausalLM

        import moai_llm.modeling.model  # noqa: F401 - the Auto class must know our models
        from moai_llm.tokenizer import load_tokenizer
        from moai_llm.tokenizer.transfer import ids_of, vocabulary_rows

        self.source, self.old, self.new = source, load_tokenizer(source), new
        _ = new.eos_id  # refused without one
        try:
            self.model: Any = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise MoaiError(f"{source} cannot be loaded: {error}") from None
        self.old_size = int(self.model.get_input_embeddings().weight.shape[0])
        self.rows, self.used = vocabulary_rows(self.old, new, self.old_size), ids_of(self.old)

    def summary(self) -> str:
        from moai_llm.tokenizer.transfer import ids_of

        named = [self.rows[i] for i in ids_of(self.new)]
        carried, made = sum(len(row) == 1 for row in named), sum(len(row) > 1 for row in named)
        unknown = len(named) - carried - made
        rest = f", {unknown:,} that it knows nothing of" if unknown else ""
        return (
            f"{len(named):,} tokens: {carried:,} that the model has, {made:,} that are spelled in its own{rest}. "
            f"Vocabulary {self.old_size:,} -> {len(self.rows):,}"
        )

    def apply(self, model: Any, init: str, seed: int = 0) -> None:
        """Give `model`, this one or a copy of it, the new vocabulary and token ids in place."""
        from moai_llm.modeling.vocabulary import resize_vocabulary

        resize_vocabulary(model, self.rows, init=init, used=self.used, seed=seed)
        new = self.new
        ids: dict[str, int | None] = {
            "eos_token_id": new.eos_id,
            "bos_token_id": new.special_ids.get(new.roles.get("bos_token", ""), new.eos_id),
            "pad_token_id": new.special_ids.get(new.roles.get("pad_token", "")),
        }
        for config in (model.config, model.config.get_text_config()):
            for name, value in ids.items():
                setattr(config, name, value)
        model.generation_config = _renewed(model.generation_config, {**ids, "eos_token_id": new.stop_ids})

    def save(self, out: Path, init: str = "mean", seed: int = 0) -> None:
        """Transfer the model and write the whole directory: it appears in one piece, in place of one that is there.

        The recipe of the source, where it has one, comes along: for the new vocabulary, going on from `out`, without
        its stores, which hold ids of the old tokenizer.

        Raises:
            MoaiError: it cannot be written; what was there is untouched.
        """
        self.apply(self.model, init, seed)
        recipe = self._recipe(out)
        with written_beside(out) as place:
            self.model.save_pretrained(place)
            self.new.save(place)
            if recipe is not None:
                (place / "recipe.yaml").write_text(recipe, encoding="utf-8")

    def _recipe(self, out: Path) -> str | None:
        from moai_llm import recipe as recipes
        from moai_llm.config import MoaiConfig
        from moai_llm.training.start import with_model_of

        if not (self.source / "recipe.yaml").is_file() or not isinstance(self.model.config, MoaiConfig):
            return None
        recipe = with_model_of(recipes.load(self.source / "recipe.yaml"), self.model.config)
        recipe.train.init_from, recipe.train.out = str(out), f"{out}-run"
        recipe.data.train = recipe.data.valid = None
        recipe.data.stages = []
        return recipes.dump(recipe)


def _renewed(old: Any, ids: dict[str, Any]) -> Any:
    """How a model generates by default, with the new tokenizer's ids. transformers refuses to write settings that
    contradict each other, which published models have, once they are changed: then only the ids are kept.
    """
    from transformers import GenerationConfig

    settings = {name: value for name, value in old.to_dict().items() if name not in OLD_IDS}
    renewed = GenerationConfig(**{**settings, **ids})
    try:
        renewed.validate(strict=True)
    except ValueError:
        logger.warning("the model's generation settings contradict each other: only the token ids are kept of them")
        return GenerationConfig(**ids)
    return renewed


def find_source(path: str) -> Path:
    """The model directory that `path` means, with its tokenizer.

    Raises:
        MoaiError: no model there, or one without a tokenizer.
    """
    from moai_llm.inference.load import resolve_model

    source = resolve_model(path)
    if not (source / "tokenizer.json").is_file():
        raise MoaiError(
            f"{source} holds a model but no tokenizer.json, so what its rows stand for is not known: put the tokenizer "
            "it was trained with beside it"
        )
    return source


def require_free(out: Path, source: Path, tokenizer: Path, overwrite: bool) -> None:
    """Refuse an `out` that holds something, unless that is a model and `overwrite` is set, or that what is read lies
    in. Nothing is written into the source.
    """
    place, read = out.resolve(), source.resolve()
    if read.is_relative_to(place) or place.is_relative_to(read) or tokenizer.resolve().is_relative_to(place):
        raise MoaiError(f"--out {out}: {source} and {tokenizer} are only read; choose a directory apart from them")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "config.json").is_file():
        raise MoaiError(f"{out} is there and not a model directory, so it is not replaced: choose another --out")
    if not overwrite:
        raise MoaiError(f"{out} holds a model already: choose another --out or pass --overwrite")
