"""Benchmarks through lm-eval (extra `eval`), from files on this machine or, with --hub, with lm-eval's own data."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.table import Table

from moai_llm.commands.sampling import add_device
from moai_llm.commands.sources import ReadProgress
from moai_llm.runtime import MoaiError, make_console


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model directory or a run")
    parser.add_argument(
        "--tasks", required=True, metavar="NAME,...",
        help="mmlu, hellaswag, arc_challenge, truthfulqa, gsm8k, lambada, or YAML files of tasks",
    )  # fmt: skip
    parser.add_argument("--data", metavar="DIR", help="the folder of the tasks' files")
    parser.add_argument("--hub", action="store_true", help="lm-eval's tasks of these names; their data is downloaded")
    parser.add_argument("--limit", type=int, help="documents of each task at most")
    parser.add_argument("--num-fewshot", type=int, help="examples before each question (default: as each task says)")
    parser.add_argument("--seed", type=int, default=1234, help="of the choice of examples (default 1234)")
    parser.add_argument(
        "--apply-chat-template", action="store_true", help="ask a chat model in the form it was fine-tuned on"
    )
    parser.add_argument("--max-new-tokens", type=int, help="of answers, at most (default: as the task says, else 256)")
    parser.add_argument("--batch-tokens", type=int, help="tokens that go through the model at once")
    parser.add_argument(
        "--json", metavar="FILE", help="write the results after each task; tasks that are in it are not run again"
    )
    parser.add_argument("--fresh", action="store_true", help="begin the file anew")
    add_device(parser)


def run(arguments: argparse.Namespace) -> None:
    from moai_llm.evaluation.harness import library
    from moai_llm.evaluation.run_tasks import TaskOptions, run_tasks
    from moai_llm.evaluation.task_files import load_tasks
    from moai_llm.inference import load_model

    for name in ("limit", "num_fewshot", "max_new_tokens", "batch_tokens"):
        value = getattr(arguments, name)
        if value is not None and value < (0 if name == "num_fewshot" else 1):
            raise MoaiError(f"--{name.replace('_', '-')} {value} is too small")
    library()
    console = make_console()
    names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    data = Path(arguments.data) if arguments.data else None
    if data is not None and not data.is_dir():
        raise MoaiError(f"--data {data}: no such folder")
    tasks = list(load_tasks(names, data, hub=arguments.hub))
    if not tasks:
        raise MoaiError("--tasks names no task")
    model = load_model(arguments.model, arguments.device, arguments.dtype)
    options = TaskOptions(
        limit=arguments.limit,
        num_fewshot=arguments.num_fewshot,
        seed=arguments.seed,
        apply_chat_template=arguments.apply_chat_template,
        max_new_tokens=arguments.max_new_tokens,
        batch_tokens=arguments.batch_tokens,
    )
    position, kept = 0, list[str]()
    with ReadProgress(console, []) as bar:

        def finished(name: str, was_kept: bool) -> None:
            nonlocal position
            position += 1
            if was_kept:
                kept.append(name)

        def progress(what: str, done: int, total: int) -> None:
            name = tasks[min(position, len(tasks) - 1)].name
            bar.update(f"{name} ({position + 1} of {len(tasks)} tasks): {what} {done:,} of {total:,}")

        results = run_tasks(
            model,
            tasks,
            options,
            out=Path(arguments.json) if arguments.json else None,
            fresh=arguments.fresh,
            progress=progress,
            finished=finished,
        )
    table = Table("task", "examples", "metric", "value", "± stderr", "documents", box=None, pad_edge=False)
    for score in results.scores:
        if score.group is None:
            spread = _shown(score.stderr)
            shots = "" if score.num_fewshot is None else str(score.num_fewshot)
            table.add_row(score.task, shots, score.metric, _shown(score.value), spread, f"{score.documents:,}")
    console.print(table)
    if kept:
        console.print(f"kept from {arguments.json}: {len(kept)} of {len(tasks)} tasks", markup=False, soft_wrap=True)
    if arguments.json:
        console.print(f"written to {arguments.json}", markup=False, soft_wrap=True)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3e}"
