"""Run tasks of lm-eval on a model and keep what each gave: a run that was stopped goes on where it was."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from moai_llm.evaluation.harness import Progress, adapter, offline_and_quiet, require_chat, silent
from moai_llm.evaluation.results import Item, Results, Score, digest, facts_of, identity, read_results
from moai_llm.evaluation.task_files import Loaded
from moai_llm.inference import TextModel
from moai_llm.runtime import MoaiError


@dataclass(frozen=True)
class TaskOptions:
    """How tasks are run. What is None is as each task says.

    Attributes:
        limit: documents of each task at most, from its beginning.
        seed: of the choice of examples.
    """

    limit: int | None = None
    num_fewshot: int | None = None
    seed: int = 1234
    apply_chat_template: bool = False
    max_new_tokens: int | None = None
    batch_tokens: int | None = None

    def settings(self) -> dict[str, Any]:
        """What changes results."""
        return {
            "limit": self.limit, "num_fewshot": self.num_fewshot, "seed": self.seed,
            "apply_chat_template": self.apply_chat_template, "max_new_tokens": self.max_new_tokens,
        }  # fmt: skip


def run_tasks(
    text_model: TextModel,
    tasks: Iterable[Loaded],
    options: TaskOptions | None = None,
    *,
    out: Path | None = None,
    fresh: bool = False,
    progress: Progress = silent,
    finished: Callable[[str, bool], None] = lambda name, kept: None,
) -> Results:
    """Run tasks in their order.

    Args:
        out: a JSON file, written after each task. Tasks that it holds are kept, and those that are asked for again are
            not run again.
        fresh: begin the file anew.
        finished: called with each task and whether it was kept.

    Raises:
        MoaiError: a chat template was asked for and there is none; the file holds something else, or results of another
            model or of other options.
    """
    options = options or TaskOptions()
    if options.apply_chat_template:
        require_chat(text_model)
    facts = facts_of(text_model)
    results = Results("tasks", [facts], options.settings(), [], details={"tasks": {}})
    if out is not None and out.exists() and not fresh:
        _go_on(results, out)
    lm = adapter(
        text_model, batch_tokens=options.batch_tokens, max_new_tokens=options.max_new_tokens, progress=progress
    )
    for loaded in tasks:
        source = Path(loaded.source)
        about = {
            "source": source.name if source.is_file() else loaded.source,
            "sha256": digest([source]) if source.is_file() else None,
            "version": _version(loaded.task),
            "config": _config(loaded.task),
        }
        kept = results.details["tasks"].get(loaded.name) == about
        if not kept:
            scores, items = _run(lm, loaded, options)
            results.scores = [score for score in results.scores if score.task != loaded.name] + scores
            results.items = [item for item in results.items if item.task != loaded.name] + items
        results.details["tasks"][loaded.name] = about
        if out is not None and not kept:
            _with_groups(results).save(out)
        finished(loaded.name, kept)
    results = _with_groups(results)
    if out is not None:
        results.save(out)
    return results


def _go_on(results: Results, out: Path) -> None:
    """Take over what the file holds of an earlier run.

    Raises:
        MoaiError: that was of another model, had other options, or is something else.
    """
    before = read_results(out)
    if before.kind != "tasks":
        raise MoaiError(f"{out} holds results of `moai eval {before.kind}`: give another file")
    mine, theirs = results.models[0], before.models[0]
    for what, now, then in (
        ("another model", (mine.weights, mine.tokenizer, mine.dtype), (theirs.weights, theirs.tokenizer, theirs.dtype)),
        ("other options", results.settings, before.settings),
        ("another lm-eval", results.versions.get("lm_eval"), before.versions.get("lm_eval")),
    ):
        if now != then:
            raise MoaiError(f"{out} holds results of {what}: give another file, or --fresh to begin it anew")
    results.scores, results.items = before.scores, before.items
    results.details["tasks"] = before.details["tasks"]


def _run(lm: Any, loaded: Loaded, options: TaskOptions) -> tuple[list[Score], list[Item]]:
    from lm_eval.evaluator import evaluate

    task, group = loaded.task, loaded.group if loaded.group != loaded.name else None
    if options.num_fewshot is not None and task.get_config("num_fewshot") != 0:
        task.set_config(key="num_fewshot", value=options.num_fewshot)
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=options.seed)
    try:
        with offline_and_quiet():
            found = evaluate(
                lm,
                {"tasks": {loaded.name: task}, "groups": {}},
                limit=options.limit,
                apply_chat_template=options.apply_chat_template,
                fewshot_as_multiturn=options.apply_chat_template,
                bootstrap_iters=0,  # it would start processes for what a formula gives
            )
    except AssertionError as error:
        raise MoaiError(f"{loaded.name}: {error}") from error
    assert found is not None
    samples, numbers = found["samples"][loaded.name], found["results"][loaded.name]
    higher = found.get("higher_is_better", {}).get(loaded.name, {})
    documents = len({sample["doc_id"] for sample in samples})
    scores, items = [], _items(loaded, samples)
    for key, value in numbers.items():
        metric, _, chosen = key.partition(",")
        if isinstance(value, (int, float)) and not isinstance(value, bool) and chosen and "_stderr" not in metric:
            name = _name(metric, chosen)
            scores.append(
                Score(
                    loaded.name, name, float(value), documents, _stderr(name, float(value), items),
                    higher_is_better=higher.get(metric), num_fewshot=task.get_config("num_fewshot"), group=group,
                )
            )  # fmt: skip
    return scores, items


def _stderr(metric: str, value: float, items: list[Item]) -> float | None:
    """Of a mean over documents, and of a perplexity by the derivative of exp; None for any other."""
    name = "log_prob" if metric == "perplexity" else metric
    values = [item.values[name] for item in items if name in item.values]
    if len(values) < 2:
        return None
    spread = stdev(values) / math.sqrt(len(values))
    if metric == "perplexity":
        return value * spread
    return spread if math.isclose(mean(values), value, rel_tol=1e-9, abs_tol=1e-12) else None


def _items(loaded: Loaded, samples: list[dict[str, Any]]) -> list[Item]:
    items: dict[int, Item] = {}
    for sample in samples:
        one = items.setdefault(sample["doc_id"], Item(_identity(sample), loaded.name, {}))
        if loaded.group != loaded.name:
            one.labels["group"] = loaded.group
        for metric in sample["metrics"]:
            value = _number(sample.get(metric))
            if value is not None:
                name = "log_prob" if metric == "perplexity" else _name(metric, sample["filter"])
                one.values[name] = value
    return list(items.values())


def _identity(sample: dict[str, Any]) -> str:
    return identity(json.dumps(sample["doc"], sort_keys=True, default=str, ensure_ascii=False))


def _name(metric: str, chosen: str) -> str:
    """A metric, with the filter it was computed after where there are several."""
    return metric if chosen == "none" else f"{metric},{chosen}"


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):  # "N/A", a tuple for an aggregation over all documents
        return None
    return number if math.isfinite(number) else None


def _version(task: Any) -> str:
    return str(getattr(task, "VERSION", None))


def _config(task: Any) -> str:
    """A hash of what the task asks and how."""
    return identity(json.dumps(task.dump_config(), sort_keys=True, default=lambda value: type(value).__name__))


def _with_groups(results: Results) -> Results:
    """A score of each group: the mean over the documents of its tasks, behind them."""
    scores = [score for score in results.scores if score.group is not None or score.task not in _groups(results)]
    for group in _groups(results):
        parts = [score for score in scores if score.group == group]
        names = {score.task for score in parts}
        for metric in dict.fromkeys(score.metric for score in parts):
            values = [i.values[metric] for i in results.items if i.task in names and metric in i.values]
            if values:
                spread = _stderr(metric, mean(values), [i for i in results.items if i.task in names])
                shots, better = parts[0].num_fewshot, parts[0].higher_is_better
                scores.append(Score(group, metric, mean(values), len(values), spread, None, None, better, shots))
    results.scores = scores
    return results


def _groups(results: Results) -> list[str]:
    return list(dict.fromkeys(score.group for score in results.scores if score.group is not None))
