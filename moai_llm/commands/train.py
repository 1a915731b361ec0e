"""Train a recipe: a preset name or a YAML file, with any key overridden.

moai train moai-3b-tiny data.train=data/wiki train.steps=500 train.out=runs/first
moai train moai-3b-tiny data.train=data/chat train.init_from=runs/first train.epochs=3 train.out=runs/chat
moai train runs/first/recipe.yaml --resume
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moai_llm import recipe as recipes
from moai_llm.runtime import MoaiError

if TYPE_CHECKING:
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
    parser.add_argument(
        "--profile", action="store_true", help="trace a few steps and say which operators take the time"
    )
    parser.add_argument("--trace-export", metavar="FILE", help="with --profile: write the timeline there, as JSON")
    parser.add_argument("--memory-profile", action="store_true", help="say now and then what takes the memory")
    parser.add_argument(
        "--report-interval", type=int, metavar="STEPS", help="with --memory-profile: how often (default 100)"
    )


def run(arguments: argparse.Namespace) -> None:
    recipe = recipes.load(arguments.recipe, arguments.overrides)
    if arguments.show:
        print(recipes.dump(recipe), end="")
        return
    _check_profiling(arguments)
    from moai_llm.data.shards import Store
    from moai_llm.inference.generate import resolve_model
    from moai_llm.training.loop import train
    from moai_llm.training.profile import ProfileOptions

    if recipe.train.init_from and not (arguments.resume and not Path(recipe.train.init_from).exists()):
        recipe.train.init_from = str(resolve_model(recipe.train.init_from))
    profile = ProfileOptions(
        time=arguments.profile,
        trace=Path(arguments.trace_export) if arguments.trace_export else None,
        memory=arguments.memory_profile,
        interval=arguments.report_interval or 100,
    )
    trained = train(recipe, hooks=make_hooks(recipe), resume=arguments.resume, fresh=arguments.fresh, profile=profile)
    if trained.finished and recipe.data.train:
        chats = Store(recipe.data.train).manifest.kind == "chat"
        use = f"moai chat {recipe.train.out}" if chats else f"moai generate {recipe.train.out} --prompt TEXT"
        print(f"saved {trained.checkpoint}. Next: {use}")


def _check_profiling(arguments: argparse.Namespace) -> None:
    if arguments.trace_export and not arguments.profile:
        raise MoaiError("--trace-export writes what --profile traces: pass both")
    if arguments.report_interval is not None and not arguments.memory_profile:
        raise MoaiError("--report-interval says how often --memory-profile reports: pass both")
    if arguments.report_interval is not None and arguments.report_interval < 1:
        raise MoaiError(f"--report-interval is a number of steps, at least 1, got {arguments.report_interval}")


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
    loader, lengths = Loader(store, recipe.data.seq_len, seed=None), store.tokenizer().byte_lengths()

    def hook(step: int, model: Any) -> dict[str, float]:
        precision = make_precision(recipe.train.precision, model.device, recipe.train.tf32)
        batches = loader.epoch(recipe.train.micro_batch_size, recipe.eval.rows)
        found = evaluate(model, batches, lengths, precision.autocast())
        return {"eval_loss": found.loss, "bits_per_byte": found.bits_per_byte}

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
