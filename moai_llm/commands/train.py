"""Train a recipe: a preset name or a YAML file, with any key overridden.

moai train moai-3b-tiny data.train=data/wiki train.steps=500 train.out=runs/first
moai train moai-3b-tiny data.train=data/chat train.init_from=runs/first train.epochs=3 train.out=runs/chat
moai train moai-3b-tiny data.train=data/pairs train.init_from=runs/chat loss.type=dpo train.epochs=1 train.out=runs/dpo
moai train runs/first/recipe.yaml --resume
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moai_llm import recipe as recipes
from moai_llm.runtime import MoaiError

if TYPE_CHECKING:
    from moai_llm.data.shards import Store
    from moai_llm.recipe import Recipe
    from moai_llm.training.loop import Hook


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a preset (see `moai recipes`) or a recipe file")
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="keys to change, e.g. train.steps=1000 optim.lr=1e-3"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of train.out")
    parser.add_argument("--fresh", action="store_true", help="delete the run in train.out and begin anew")
    parser.add_argument("--show", action="store_true", help="print the resolved recipe and stop")


def run(arguments: argparse.Namespace) -> None:
    recipe = recipes.load(arguments.recipe, arguments.overrides)
    if arguments.show:
        print(recipes.dump(recipe), end="")
        return
    from moai_llm.data.shards import Store
    from moai_llm.inference.generate import resolve_model
    from moai_llm.training.loop import train

    if recipe.train.init_from and not (arguments.resume and not Path(recipe.train.init_from).exists()):
        recipe.train.init_from = str(resolve_model(recipe.train.init_from))
    if recipe.loss.teacher:
        recipe.loss.teacher = str(resolve_model(recipe.loss.teacher))
    trained = train(recipe, hooks=make_hooks(recipe), resume=arguments.resume, fresh=arguments.fresh)
    if trained.finished and recipe.data.train:
        chats = Store(recipe.data.train).manifest.kind != "text"
        use = f"moai chat {recipe.train.out}" if chats else f"moai generate {recipe.train.out} --prompt TEXT"
        print(f"saved {trained.checkpoint}. Next: {use}")


def make_hooks(recipe: Recipe) -> list[Hook]:
    """Evaluation on data.valid and samples of eval.prompts, as the recipe asks."""
    hooks: list[Hook] = []
    if not recipe.data.train:  # training says so
        return hooks
    if recipe.data.valid:
        hooks.append(_evaluation(recipe))
    if recipe.eval.prompts:
        hooks.append(_samples(recipe))
    return hooks


def _evaluation(recipe: Recipe) -> Hook:
    from moai_llm.data.loader import Loader
    from moai_llm.data.shards import Store
    from moai_llm.evaluation.perplexity import evaluate
    from moai_llm.training.precision import make_precision

    assert recipe.data.train is not None and recipe.data.valid is not None
    store = Store(recipe.data.valid)
    if store.manifest.tokenizer != Store(recipe.data.train).manifest.tokenizer:
        raise MoaiError(
            f"data.valid {store.path} was prepared with another tokenizer than data.train: prepare it again with "
            f"--tokenizer {recipe.data.train}/tokenizer"
        )
    if store.manifest.kind == "preference":
        return _evaluation_of_pairs(recipe, store)
    loader, lengths = Loader(store, recipe.data.seq_len, seed=None), store.tokenizer().byte_lengths()

    def hook(step: int, model: Any) -> dict[str, float]:
        precision = make_precision(recipe.train.precision, model.device, recipe.train.tf32)
        batches = loader.epoch(recipe.train.micro_batch_size, recipe.eval.rows)
        found = evaluate(model, batches, lengths, precision.autocast())
        return {"eval_loss": found.loss, "bits_per_byte": found.bits_per_byte}

    return hook


def _evaluation_of_pairs(recipe: Recipe, store: Store) -> Hook:
    from moai_llm.data.pair_loader import PairLoader
    from moai_llm.evaluation.preference import evaluate_pairs
    from moai_llm.training.build import build_objective
    from moai_llm.training.precision import make_precision
    from moai_llm.training.preference import Preference

    objective = build_objective(recipe, store.tokenizer())
    if not isinstance(objective, Preference):
        raise MoaiError(
            f"data.valid {store.path} holds preference pairs, and loss.type={recipe.loss.type} compares no answers: "
            "set another data.valid, or loss.type=dpo"
        )
    loader = PairLoader(store, recipe.data.seq_len, seed=None, overlong=recipe.data.overlong)
    batches = list(loader.epoch(recipe.train.micro_batch_size, recipe.eval.rows))

    def hook(step: int, model: Any) -> dict[str, float]:
        precision = make_precision(recipe.train.precision, model.device, recipe.train.tf32)
        objective.read_reference(store, precision)
        found = evaluate_pairs(objective, model, batches, precision)
        return {f"eval_{name}": found[name] for name in ("loss", "reward_margin", "reward_accuracy")}

    return hook


def _samples(recipe: Recipe) -> Hook:
    from moai_llm.data.shards import Store
    from moai_llm.inference.generate import Sampling, TextModel, sample_text

    assert recipe.data.train is not None
    tokenizer, out = Store(recipe.data.train).tokenizer(), Path(recipe.train.out)

    def hook(step: int, model: Any) -> dict[str, float]:
        text_model = TextModel(model, tokenizer, out)
        with (out / "samples.txt").open("a", encoding="utf-8") as file:
            for prompt in recipe.eval.prompts:
                text = sample_text(text_model, prompt, Sampling(recipe.eval.prompt_tokens).max_new_tokens, seed=0)
                print(f"  {text!r}")
                file.write(f"step {step}: {text!r}\n")
        return {}

    return hook
