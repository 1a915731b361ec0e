"""A process that has everything imported and forks a trainer for each line it is given, so that killing a hundred of
them takes seconds each and not a start of Python.

A line of JSON: {"overrides": [...], "resume": bool}. It prints the pid of the trainer and, when
that has ended, its exit status.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

import torch

from moai_llm import recipe as recipes
from moai_llm.runtime import MoaiError
from moai_llm.training.loop import train

FAILED = 3  # exit status of a trainer that ended with a MoaiError
RECIPE = "moai-3b-tiny"


def run(order: dict) -> int:  # type: ignore[type-arg]
    torch.set_num_threads(1)
    try:
        recipe = recipes.load(RECIPE, order["overrides"])
        train(recipe, resume=order["resume"], quiet=True)
    except MoaiError as error:
        print(f"error {error}".replace("\n", " "), flush=True)
        return FAILED
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os._exit(run(order))
        print(f"pid {pid}", flush=True)
        _, status = os.waitpid(pid, 0)
        print(f"end {os.waitstatus_to_exitcode(status)}", flush=True)


if __name__ == "__main__":
    main()
