"""moai data verify: whether stores are what they were when they were written."""

from __future__ import annotations

import argparse
import json
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from moai_llm.commands.sources import EVERY
from moai_llm.runtime import MoaiError, logger, make_console

if TYPE_CHECKING:
    from moai_llm.data.verify import Verified


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stores", nargs="+", help="prepared stores; a merged one with all its parts")
    parser.add_argument("--quick", action="store_true", help="manifests, sizes and tokenizers only: no token is read")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON and nothing else")


def run(arguments: argparse.Namespace) -> None:
    """Print what was found.

    Raises:
        MoaiError: something is wrong; every problem was printed.
    """
    from moai_llm.data.verify import size_of, verify

    console, total, done, said = make_console(), sum(map(size_of, arguments.stores)), 0, time.monotonic()
    found = []
    with Console(stderr=True).status("reading ...") as status:

        def progress(size: int) -> None:
            nonlocal done, said
            done += size
            line = f"{done / max(1, total):.0%} of {total / 1e6:,.0f} MB read"
            status.update(line)
            if not console.is_terminal and time.monotonic() - said > EVERY:
                said = time.monotonic()
                logger.info(line)

        for store in arguments.stores:
            found.append(verify(store, quick=arguments.quick, progress=progress))
    if arguments.json:
        print(json.dumps([each.to_dict() for each in found], ensure_ascii=False, indent=1))
    else:
        for each in found:
            _show(each, console, arguments.quick)
    count = sum(len(each.all_problems()) for each in found)
    if count:
        broken = [each.path for each in found if each.all_problems()]
        raise MoaiError(f"{count:,} problem{'s' * (count > 1)} in {', '.join(broken)}: prepare the damaged data again")


def _show(found: Verified, console: Console, quick: bool) -> None:
    problems = found.all_problems()
    timed = not quick and found.seconds > 1
    speed = f", {found.bytes / 1e6 / found.seconds:,.0f} MB/s" if timed else ""
    verdict = f"{len(problems):,} problem{'s' * (len(problems) > 1)}" if problems else "sound"
    console.print(
        f"{found.path}: {verdict} ({found.bytes / 1e6:,.1f} MB{' not read' * quick}{speed})",
        markup=False,
        soft_wrap=True,
    )
    if found.kind:
        table = Table(box=None, show_header=False, pad_edge=False)
        for name, value in _facts(found).items():
            table.add_row(f"  {name}", value)
        console.print(table)
    for note in [*found.notes, *(f"{part.path}: {note}" for part in found.parts for note in part.notes)]:
        console.print(f"  note: {note}", markup=False, soft_wrap=True)
    for problem in problems:
        console.print(str(problem), markup=False, soft_wrap=True, style="red")


def _facts(found: Verified) -> dict[str, str]:
    from moai_llm.data.verify import quantiles

    merged = f", merged of {len(found.parts)}" if found.parts else ""
    facts = {"kind": found.kind + merged, "documents": f"{found.documents:,}", "tokens": f"{found.tokens:,}"}
    if found.lengths:
        p50, p90, p99, most = quantiles(found.lengths)
        facts["document length"] = f"p50 {p50:,}, p90 {p90:,}, p99 {p99:,}, max {most:,}"
    if found.learned is not None:
        facts["learned"] = f"{found.learned:,} tokens ({found.learned / found.tokens:.1%})"
    if found.repeated is not None:
        facts["repeated documents"] = f"{found.repeated.documents:,}"
        if found.repeated.documents:
            share = found.repeated.documents / found.documents
            first = f"document {found.repeated.first:,} is document {found.repeated.of:,} again"
            facts["repeated documents"] += f" ({share:.1%}), first: {first}"
    if found.unused_ids is not None:
        facts["ids never used"] = f"{found.unused_ids:,} of {found.vocab_size:,}"
    return facts
