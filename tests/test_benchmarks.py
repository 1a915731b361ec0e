"""The benchmarks refuse wrong candidates and measure what they say."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from benchmarks import harness, run, scan, training_step, transfer
from moai_llm.ops.dispatch import use
from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.extend import extend_tokenizer
from tests.conftest import tiny_model


def test_a_wrong_candidate_is_refused_and_a_right_one_is_not() -> None:
    with use(selective_scan="torch"):
        scan.check({"right": scan.ours("torch"), "loop": scan.indexing_loop})
    with pytest.raises(harness.Disagreement, match="no skip is off by"):
        scan.check({"no skip": lambda x, delta, A, B, C, D: scan.indexing_loop(x, delta, A, B, C, 0 * D)})
    with pytest.raises(harness.Disagreement):
        harness.require_close("nan", torch.tensor([float("nan")]), torch.ones(1), 1.0)


def test_training_steps_must_agree() -> None:
    training_step.require_same_losses({"a": lambda: 2.0, "b, bf16": lambda: 2.01})
    with pytest.raises(harness.Disagreement, match="losses of b"):
        training_step.require_same_losses({"a": lambda: 2.0, "b": lambda: 2.01})


def test_candidates_take_turns() -> None:
    order: list[str] = []
    slow = harness.interleave(
        {"a": lambda: order.append("a"), "b": lambda: (order.append("b"), time.sleep(0.01))}, rounds=3, warmup=1
    )
    assert order == ["a", "b"] * 4 and len(slow["b"].walls) == 3
    assert slow["a"].times_faster_than(slow["b"]) > 2 and slow["b"].wall >= 0.01 > slow["b"].cpu


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("mib", [32, 96])
def test_peak_memory_sees_what_was_freed_before(mib: int) -> None:
    torch.empty(2**24).fill_(1)  # 64 MiB, freed at once
    grown = harness.peak_memory(lambda: torch.empty(mib * 2**18).fill_(1)) / 2**20
    assert mib - 1 < grown < mib + 16


def test_goals_say_met_or_missed() -> None:
    table = harness.Table("t", ("a", "b"))
    table.add("row", 1.23456)
    table.goal("fast", 3.0, at_least=2)
    table.goal("small", 3.0, at_most=2)
    text = table.markdown()
    assert "| row | 1.23 |" in text and "- met: fast: 3.00 (goal >= 2)" in text and "- MISSED: small" in text


def test_every_start_of_a_transfer_is_in_the_table(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = tiny_model(vocab_size=512).float()
    model.save_pretrained(tokenizer.save(tmp_path / "model"))
    texts = [f"Net interest income of {i} million, and deposits of {i * 7}. " * 4 for i in range(30)]
    new = extend_tokenizer(tokenizer, texts, 532)
    table = transfer.compare("a title", tmp_path / "model", new, texts, tmp_path / "stores", (1, 2), (0, 1))
    assert [row[0] for row in table.rows] == ["unchanged", "mean", "last", "first", "random"]
    assert all(len(row) == len(table.columns) == 6 for row in table.rows) and len(table.verdicts) == 3
    at_once, *_, per_seed, _ = table.rows[1][1:]
    assert float(at_once) > max(map(float, per_seed.split(", ")))  # a step at this size already helps
    assert "20 new tokens" in table.title


@pytest.mark.parametrize("name", run.BENCHMARKS)
def test_every_benchmark_is_there(name: str) -> None:
    module = __import__(f"benchmarks.{name}", fromlist=["run"])
    assert callable(module.run) and module.__doc__
