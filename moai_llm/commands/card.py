"""Write a model card: README.md of a model directory in the form of the Hugging Face Hub, from what its files say."""

from __future__ import annotations

import argparse
from pathlib import Path

from moai_llm.runtime import MoaiError, make_console, write_atomically


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model directory or a run")
    parser.add_argument(
        "--results", nargs="+", default=[], metavar="JSON", help="files of `moai eval ... --json` of this model"
    )
    parser.add_argument("--run", metavar="DIR", help="the run that trained it (default: the one it lies in)")
    parser.add_argument("--name", help="of the model (default: that of its folder)")
    parser.add_argument("--license", metavar="ID", help="as the Hub writes it: apache-2.0, mit, cc-by-4.0, ...")
    parser.add_argument("--languages", metavar="CODE,...", help="languages of the model: ko,en,...")
    parser.add_argument("--tags", metavar="TAG,...", help="beside those that follow from the model")
    parser.add_argument("--base-model", metavar="ORG/NAME", help="the model of the Hub that it was made from")
    parser.add_argument("--datasets", metavar="ORG/NAME,...", help="data sets of the Hub that it was trained on")
    parser.add_argument("--out", metavar="FILE", help="where to write (default: README.md in the model); - prints it")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")


def run(arguments: argparse.Namespace) -> None:
    from moai_llm.evaluation.card import About, card, check, read_facts, require_of
    from moai_llm.evaluation.results import read_results
    from moai_llm.inference import resolve_model

    path = resolve_model(arguments.model)
    out = None if arguments.out == "-" else Path(arguments.out) if arguments.out else path / "README.md"
    if out is not None and out.exists() and not arguments.overwrite:
        raise MoaiError(f"{out} is there already: --overwrite replaces it, --out names another file")
    facts = read_facts(path, Path(arguments.run) if arguments.run else None)
    results = [(name, read_results(name)) for name in arguments.results]
    require_of(facts, results)
    about = About(
        name=arguments.name,
        license=arguments.license,
        languages=_list(arguments.languages),
        tags=_list(arguments.tags),
        base_model=arguments.base_model,
        datasets=_list(arguments.datasets),
    )
    text = card(facts, about, [found for _, found in results])
    check(text)
    if out is None:
        print(text)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, text)
    make_console().print(f"written to {out}", markup=False, soft_wrap=True)
    if not arguments.license:
        make_console().print("it names no license: --license ID")


def _list(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]
