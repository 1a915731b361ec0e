"""Going back: to the last good checkpoint, and past the data that did the damage.

A rollback from step b to the checkpoint of step s leaves out the batches of the steps s to b: step s then reads what
step b + 1 would have read. How far the data is ahead of the steps is written down before the run goes on, because the
checkpoint of step s does not know it: a run that is killed right after a rollback resumes as if it had not been.
"""

from __future__ import annotations

import json
from pathlib import Path

from moai_llm.runtime import write_atomically

FILE = "rollbacks.json"


def steps_ahead(out: Path, step: int) -> int:
    """How many steps the data is ahead of a run that goes on from `step`."""
    # the last that leads to or before this step; one that leads behind it is of a future that is given up
    return next((entry["ahead"] for entry in reversed(read(out)) if entry["to"] <= step), 0)


def record(out: Path, *, to: int, bad: int, ahead: int) -> int:
    """Write down a rollback from the bad step to the checkpoint of step `to`; returns how far the data is ahead now.

    Args:
        bad: the first step that is not read any more is bad + 1, counted as the data was until now.
        ahead: how far the data was ahead before.
    """
    entry = {"to": to, "from": bad, "ahead": ahead + bad + 1 - to}
    write_atomically(out / FILE, json.dumps([*read(out), entry], indent=1))
    return entry["ahead"]


def read(out: Path) -> list[dict[str, int]]:
    """All rollbacks of a run, in the order they happened."""
    file = out / FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
