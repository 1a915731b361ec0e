"""Train a recipe: a preset name or a YAML file, with any key overridden.

moai train moai-3b-tiny data.train=data/wiki train.steps=500 train.out=runs/first
moai train moai-3b-tiny data.train=data/chat train.init_from=runs/first train.epochs=3 train.out=runs/chat
moai train moai-3b-tiny 'data.train=[{store: data/wiki, weight: 3}, {store: data/code, weight: 1}]' train.steps=500
moai train moai-3b-tiny data.train=data/pairs train.init_from=runs/chat loss.type=dpo train.epochs=1 train.out=runs/dpo
moai train moai-embed-0.1b-tiny data.train=data/texts train.init_from=runs/first train.epochs=3 train.out=runs/vectors
moai train runs/first/recipe.yaml --resume
moai train moai-mamba-2b --test
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moai_llm import recipe as recipes
from moai_llm.commands.smoke import smoke
from moai_llm.representation import CONTRASTIVE
from moai_llm.runtime import MoaiError, make_console

if TYPE_CHECKING:
    from moai_llm.data.shards import Store
    from moai_llm.recipe import Recipe
    from moai_llm.training.loop import Hook


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a preset (see `moai recipes`) or a recipe file")
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="keys to change, e.g. train.steps=1000 optim.lr=1e-3"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="always",
        metavar="auto",
        help="go on from the newest checkpoint of train.out; `--resume auto` begins the run where there is none yet",
    )
    parser.add_argument("--fresh", action="store_true", help="delete the run in train.out and begin anew")
    parser.add_argument(
        "--find-lr", action="store_true", help="test learning rates for a few steps, print what they do, and stop"
    )
    parser.add_argument(
        "--test", action="store_true", help="try the whole way of a run in seconds, on made-up text and a tiny model"
    )
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
    resume, overrides = arguments.resume, arguments.overrides
    if resume is not None and "=" in resume:  # `--resume a.b=c`: what follows is not its value
        resume, overrides = "always", [resume, *overrides]
    if resume not in (None, "always", "auto"):
        raise MoaiError(f"--resume {resume}: write --resume, or --resume auto")
    if arguments.test:
        if others := [flag for flag in ("resume", "fresh", "find_lr", "show", "profile") if getattr(arguments, flag)]:
            raise MoaiError(f"--test begins and ends by itself: leave out --{others[0].replace('_', '-')}")
        smoke(arguments.recipe, overrides)
        return
    recipe = recipes.load(arguments.recipe, overrides)
    if resume == "auto" and not (Path(recipe.train.out) / "recipe.yaml").is_file():
        resume = None
    if arguments.show:
        print(recipes.dump(recipe), end="")
        return
    _check_profiling(arguments)
    from moai_llm.data.shards import Store
    from moai_llm.training.loop import train
    from moai_llm.training.profile import ProfileOptions

    resolve_models(recipe, resume=resume is not None)
    if arguments.find_lr:
        _find_lr(recipe, resume=resume is not None, fresh=arguments.fresh)
        return
    profile = ProfileOptions(
        time=arguments.profile,
        trace=Path(arguments.trace_export) if arguments.trace_export else None,
        memory=arguments.memory_profile,
        interval=arguments.report_interval or 100,
    )
    hooks = make_hooks(recipe)
    trained = train(recipe, hooks=hooks, resume=resume is not None, fresh=arguments.fresh, profile=profile)
    if trained.finished:
        kind = Store(recipe.data.stores()[-1]).manifest.kind
        use = f"moai chat {recipe.train.out}"
        if kind in ("text", "embedding"):
            use = f"moai generate {recipe.train.out} --prompt TEXT"
        if recipe.loss.type in CONTRASTIVE:
            use = f"moai eval retrieval {recipe.train.out} FILE"
        print(f"saved {trained.checkpoint}. Next: {use}")


def resolve_models(recipe: Recipe, *, resume: bool) -> None:
    """In place of a run or a quickstart that the recipe names, the model directory in it."""
    from moai_llm.inference.load import resolve_model

    if recipe.train.init_from and not (resume and not Path(recipe.train.init_from).exists()):
        recipe.train.init_from = str(resolve_model(recipe.train.init_from))
    if recipe.loss.teacher:
        recipe.loss.teacher = str(resolve_model(recipe.loss.teacher))


def _find_lr(recipe: Recipe, *, resume: bool, fresh: bool) -> None:
    from moai_llm.training.lr_finder import STEPS, find_lr, plot, write_csv
    from moai_llm.training.start import LR_TEST

    if resume or fresh:
        raise MoaiError("--find-lr tests the beginning of a run and changes none: leave out --resume and --fresh")
    console, file = make_console(), Path(recipe.train.out) / LR_TEST
    with console.status("testing learning rates") as status:

        def progress(step: int, lr: float, loss: float) -> None:
            text = f"step {step}/{STEPS}  lr {lr:.1e}  loss {loss:.3f}"
            status.update(text)
            if not console.is_terminal and step % 10 == 0:
                console.print(text)

        found = find_lr(recipe, progress)
    write_csv(found, file)
    console.print(plot(found), markup=False)
    if found.suggested is None:
        console.print(f"The loss did not fall at any of these rates: look at the data and at {file}")
    else:
        console.print(f"suggested: optim.lr={found.suggested:.1e}, the recipe has {recipe.optim.lr:.1e}. Steps: {file}")


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
    if not recipe.data.stores():  # training says so
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
    from moai_llm.training.fitting import rows_of
    from moai_llm.training.precision import make_precision

    assert recipe.data.valid is not None
    store, first = Store(recipe.data.valid), recipe.data.stores()[0]
    if store.manifest.tokenizer != Store(first).manifest.tokenizer:
        raise MoaiError(
            f"data.valid {store.path} was prepared with another tokenizer than data.train: prepare it again with "
            f"--tokenizer {first}/tokenizer"
        )
    if store.manifest.kind == "preference":
        return _evaluation_of_pairs(recipe, store)
    if store.manifest.kind == "embedding" or recipe.loss.type in CONTRASTIVE:
        return _evaluation_of_texts(recipe, store)
    loader, tokenizer = Loader(store, recipe.data.seq_len, seed=None), store.tokenizer()

    def hook(step: int, model: Any) -> dict[str, float]:
        precision = make_precision(recipe.train.precision, model.device, recipe.train.tf32)
        batches = loader.epoch(rows_of(recipe), recipe.eval.rows)
        found = evaluate(model, batches, tokenizer, precision.autocast())
        return {"eval_loss": found.loss, "bits_per_byte": found.bits_per_byte}

    return hook


def _evaluation_of_pairs(recipe: Recipe, store: Store) -> Hook:
    from moai_llm.data.pair_loader import PairLoader
    from moai_llm.evaluation.preference import evaluate_pairs
    from moai_llm.training.build import build_objective
    from moai_llm.training.fitting import rows_of
    from moai_llm.training.precision import make_precision
    from moai_llm.training.preference import Preference

    objective = build_objective(recipe, store.tokenizer())
    if not isinstance(objective, Preference):
        raise MoaiError(
            f"data.valid {store.path} holds preference pairs, and loss.type={recipe.loss.type} compares no answers: "
            "set another data.valid, or loss.type=dpo"
        )
    loader = PairLoader(store, recipe.data.seq_len, seed=None, overlong=recipe.data.overlong)
    batches = list(loader.epoch(rows_of(recipe), recipe.eval.rows))

    def hook(step: int, model: Any) -> dict[str, float]:
        precision = make_precision(recipe.train.precision, model.device, recipe.train.tf32)
        objective.read_reference(store, precision)
        found = evaluate_pairs(objective, model, batches, precision)
        return {f"eval_{name}": found[name] for name in ("loss", "reward_margin", "reward_accuracy")}

    return hook


def _evaluation_of_texts(recipe: Recipe, store: Store) -> Hook:
    from moai_llm.data.embedding_loader import EmbeddingLoader
    from moai_llm.evaluation.embedding import evaluate_texts
    from moai_llm.training.build import build_objective
    from moai_llm.training.contrastive import Contrastive
    from moai_llm.training.fitting import rows_of
    from moai_llm.training.precision import make_precision

    objective = build_objective(recipe, store.tokenizer())
    if not isinstance(objective, Contrastive):
        raise MoaiError(
            f"data.valid {store.path} holds texts that belong together, and loss.type={recipe.loss.type} compares no "
            "texts: set another data.valid, or loss.type=info_nce"
        )
    loader = EmbeddingLoader(
        store, recipe.data.seq_len, seed=None, overlong=recipe.data.overlong,
        augment=recipe.embedding.augment, augment_share=recipe.embedding.augment_share,
    )  # fmt: skip
    batches = list(loader.epoch(rows_of(recipe), recipe.eval.rows))

    def hook(step: int, model: Any) -> dict[str, float]:
        precision = make_precision(recipe.train.precision, model.device, recipe.train.tf32)
        return evaluate_texts(objective, model, batches, precision)

    return hook


def _samples(recipe: Recipe) -> Hook:
    from moai_llm.data.shards import Store
    from moai_llm.inference.generate import sample_text
    from moai_llm.inference.load import TextModel
    from moai_llm.inference.sampling import Sampling

    tokenizer, out = Store(recipe.data.stores()[0]).tokenizer(), Path(recipe.train.out)

    def hook(step: int, model: Any) -> dict[str, float]:
        text_model = TextModel(model, tokenizer, out)
        with (out / "samples.txt").open("a", encoding="utf-8") as file:
            for prompt in recipe.eval.prompts:
                text = sample_text(text_model, prompt, Sampling(recipe.eval.prompt_tokens).max_new_tokens, seed=0)
                print(f"  {text!r}")
                file.write(f"step {step}: {text!r}\n")
        return {}

    return hook
