"""List the model presets with their exact parameter counts, or print one as YAML."""

from __future__ import annotations

import argparse

from rich.table import Table

from moai_llm import recipe as recipes
from moai_llm.runtime import make_console


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="a preset or a recipe file; without it all presets are listed")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="change keys before printing")
    parser.add_argument("--tiny", action="store_true", help="list the test-sized twins too")
    parser.add_argument("--markdown", action="store_true", help="print the list as a Markdown table")
    parser.add_argument(
        "--lr-guide", action="store_true", help="print which learning rates are usual, by kind of run and size of model"
    )


def run(arguments: argparse.Namespace) -> None:
    if arguments.name:
        recipe = recipes.load(arguments.name, arguments.overrides)
        counts = recipe.model.parameters()
        print("\n".join(f"# {part.replace('_', ' ')}: {count:,}" for part, count in counts.items()))
        print(recipes.dump(recipe), end="")
        return
    if arguments.lr_guide:
        from moai_llm.training.lr_guide import table

        _print(table(), markdown=arguments.markdown, right=range(1))
        return
    rows = [_row(name) for name in recipes.list_recipes() if arguments.tiny or not name.endswith("-tiny")]
    header = ("recipe", "parameters", "active", "layers", "what it is")
    _print([header, *rows], markdown=arguments.markdown, right=range(1, 4))


def _print(rows: list[tuple[str, ...]], *, markdown: bool, right: range) -> None:
    """A table with a header row, for Markdown or for people; the columns `right` hold numbers."""
    header, *body = rows
    if markdown:
        rule = tuple("--:" if i in right else "---" for i in range(len(header)))
        print("\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *body)))
        return
    table = Table(*header, box=None, pad_edge=False)
    for i in right:
        table.columns[i].justify = "right"
    for row in body:
        table.add_row(*row)
    make_console().print(table)


def _row(name: str) -> tuple[str, ...]:
    recipe = recipes.load(name)
    counts = recipe.model.parameters()
    return (
        name, f"{counts['total']:,}", f"{counts['active']:,}", str(recipe.model.num_hidden_layers), recipe.description,
    )  # fmt: skip
