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


def run(arguments: argparse.Namespace) -> None:
    if arguments.name:
        recipe = recipes.load(arguments.name, arguments.overrides)
        counts = recipe.model.parameters()
        print("\n".join(f"# {part.replace('_', ' ')}: {count:,}" for part, count in counts.items()))
        print(recipes.dump(recipe), end="")
        return
    rows = [_row(name) for name in recipes.list_recipes() if arguments.tiny or not name.endswith("-tiny")]
    header = ("recipe", "parameters", "active", "layers", "what it is")
    if arguments.markdown:
        print("\n".join(f"| {' | '.join(row)} |" for row in (header, ("---", "--:", "--:", "--:", "---"), *rows)))
        return
    table = Table(*header, box=None, pad_edge=False)
    for column in table.columns[1:4]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    make_console().print(table)


def _row(name: str) -> tuple[str, ...]:
    recipe = recipes.load(name)
    counts = recipe.model.parameters()
    return (
        name, f"{counts['total']:,}", f"{counts['active']:,}", str(recipe.model.num_hidden_layers), recipe.description,
    )  # fmt: skip
