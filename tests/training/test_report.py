"""The page of runs: whole, self-contained, its numbers those of the files, drawn by a real browser."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from moai_llm import recipe as recipes
from moai_llm.runtime import MoaiError
from moai_llm.training.report.charts import LOSS, OTHERS, maps, plot
from moai_llm.training.report.page import final_loss, page, summary
from moai_llm.training.report.record import Record, find_runs, read_run, read_samples, smooth
from tests.browser import MEASURE, Page, measured, outside, screenshot

EVIL = "</script><script>alert('x')</script><img src=x onerror=alert(1)>"


def write_run(folder: Path, steps: int = 120, *, rate: float = 3e-4, experts: bool = True) -> Path:
    """A run's folder as training writes it, with numbers of a known shape."""
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        wave = ((step * 7919) % 13 - 6) / 30
        row = {"step": step, "tokens": 1000 * step, "loss": 3 + 5 / (1 + step * rate * 300) + wave, "lr": rate,
               "grad_norm": 0.5 + abs(wave), "tokens_per_second": 5000 + 100 * wave, "memory_mb": 700.0,
               "seconds": 40.0 * step}  # fmt: skip
        if experts:
            row |= {
                "aux_loss": 0.02,
                "expert_cv": 0.3,
                "expert_load": [[0.25] * 4, [0.4, 0.3, 0.3 - step / 1e3, step / 1e3]],
            }
        rows.append(row)
        if step % 30 == 0:
            rows.append({"step": step, "eval_loss": 3.2 + 1 / step, "bits_per_byte": 1.1 + 1 / step})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipes.load("moai-3b-tiny", [f"optim.lr={rate}", f"train.out={folder}", f"train.steps={steps}"])
    (folder / "recipe.yaml").write_text(recipes.dump(recipe))
    session = {"from_step": 0, "at": "2026-01-01T00:00:00Z", "command": ["moai", "train", EVIL], "cpu": "a CPU",
               "packages": {"torch": "2.13.0"}}  # fmt: skip
    (folder / "environment.json").write_text(json.dumps({"id": "abc", "sessions": [session]}))
    samples = "".join(f"step {step}: {text!r}\n" for step in (30, 60) for text in (f"옛날에 {step}", EVIL))
    (folder / "samples.txt").write_text(samples, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    folder = tmp_path_factory.mktemp("runs")
    first = write_run(folder / "one")
    second = write_run(folder / "two", 90, rate=1e-3, experts=False)
    return [read_run(first, "one"), read_run(second, EVIL)]


@pytest.fixture(scope="module")
def text(runs: list[Record]) -> str:
    return page(runs)


def test_it_is_whole_and_fetches_nothing(text: str) -> None:
    parsed = Page(text)
    assert outside(text) == []
    assert len(parsed.ids) == len(set(parsed.ids)) and "prefers-color-scheme: dark" in text
    assert EVIL not in text and EVIL in parsed.words  # as text, it is what it was
    for control in ("<script>go()</script>", "<img src='https://x.y/z.png'>"):
        assert outside(text.replace("</main>", f"{control}</main>"))


def test_the_numbers_are_those_of_the_files(runs: list[Record], text: str) -> None:
    parsed = Page(text)
    held = json.loads(parsed.data)
    assert held == json.loads(json.dumps(summary(runs)))
    assert [run["steps"] for run in held] == [120, 90]
    assert [run["eval_loss"] for run in held] == [3.2 + 1 / 120, 3.2 + 1 / 90]
    for run, record in zip(held, runs):
        last = [value for _, value in record.points("loss")][-20:]
        assert min(last) < run["loss"] < max(last) and f"{run['loss']:.3f}" in parsed.words
    assert "3.208" in parsed.words and "0.70 GB" in parsed.words
    assert [run["seconds"] for run in held] == [4800.0, 3600.0]
    assert "1:20:00" in parsed.words and "1:00:00" in parsed.words
    different = parsed.tables["Keys that differ between the runs"]
    assert different[0] == ["key", "one", EVIL]
    assert dict((row[0], row[1:]) for row in different[1:]) == {
        "optim.lr": ["0.0003", "0.001"], "train.steps": ["120", "90"],
    }  # fmt: skip
    assert ["torch", "2.13.0", "2.13.0"] in parsed.tables["What it ran on"]
    assert parsed.tables["Samples of one"][1:] == [["30", f"옛날에 30{EVIL}"], ["60", f"옛날에 60{EVIL}"]]


def test_runs_lie_over_each_other_in_their_colours(runs: list[Record]) -> None:
    svg = plot(LOSS, runs)
    assert svg.count('<polyline class="c0"') == svg.count('<polyline class="c1"') == 1
    assert svg.count("raw") == 2 and f"<title>{'one'}</title>" in svg
    balance = next(chart for chart in OTHERS if chart.key == "expert_cv")
    assert "c0" in plot(balance, runs) and "c1" not in plot(balance, runs)
    assert plot(balance, runs[1:]) == ""  # nothing there, nothing drawn
    second = plot(LOSS, [runs[1], runs[0]], log_x=True)
    assert 'class="c0"' in second and second != plot(LOSS, [runs[1], runs[0]])


def test_maps_of_the_experts(runs: list[Record]) -> None:
    found = list(maps(runs[0], 0))
    assert [title for title, _ in found] == ["sparse layer 1 of 2", "sparse layer 2 of 2"]
    cells = found[1][1].split("<rect")[1:]
    assert len(cells) == 36 * 4
    opacity = [float(cell.split('fill-opacity="')[1].split('"')[0]) for cell in cells]
    assert opacity[3] < opacity[-1] and opacity[0] > 0.7  # the fourth expert grows, the first has most
    assert list(maps(runs[1], 1)) == []


def test_what_the_doctor_says_is_on_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "dead")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if "expert_load" in row:
            row["expert_load"] = [[0.25] * 4, [0.5, 0.5, 0.0, 0.0]]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = Page(page([read_run(run, "dead")])).words
    assert "2 of 8 experts are as good as dead" in words and "Keys that are not the default" in words


def test_checkpoints_and_their_digests(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for name in ("step-00000060", "damaged-step-00000030"):
        folder = run / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"x" * 2_000_000)
        (folder / "MANIFEST.json").write_text('{"files": {"model.safetensors": "0"}}')
        own = hashlib.sha256((folder / "MANIFEST.json").read_bytes()).hexdigest()
        (folder / "MANIFEST.sha256").write_text(f"{own}  MANIFEST.json\n")
    kept = read_run(run, "run").checkpoints
    assert [k.name for k in kept] == ["damaged-step-00000030", "step-00000060"] and all(k.problem for k in kept)
    parsed = Page(page([read_run(run, "run")]))
    assert ["run", "step-00000060", "2.0 MB", "model.safetensors does not match its digest"] in parsed.tables[
        "What was kept"
    ]
    unread = Page(page([read_run(run, "run", digests=False)]))
    assert unread.tables["What was kept"][1][3] == "not looked at"


def test_a_run_that_lost_most_of_its_files(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for name in ("recipe.yaml", "environment.json", "samples.txt"):
        (run / name).unlink()
    Page(page([read_run(run, "run")]))
    (run / "recipe.yaml").write_text("a: [")
    (run / "environment.json").write_text("[1]")
    (run / "samples.txt").write_bytes(b"step 1: '\xff'")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 121, "loss": float("nan"), "lr": 1e-3}) + "\n")
    parsed = Page(page([read_run(run, "run")]))
    assert "not a number at step 121" in parsed.words
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0, "lr": 0.0}\n')
    Page(page([read_run(run, "run")]))  # a single row
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(MoaiError, match="no row yet"):
        read_run(run, "run")


def test_samples_of_a_resumed_run(tmp_path: Path) -> None:
    lines = [(10, "a"), (10, "b"), (20, "c"), (20, "d"), (30, "e"), (20, "C"), (20, "D"), (30, "E")]
    file = tmp_path / "samples.txt"
    file.write_text("".join(f"step {step}: {text!r}\n" for step, text in lines) + "step 40: 'cut o")
    assert read_samples(tmp_path) == [(10, ["a", "b"]), (20, ["C", "D"]), (30, ["E"])]


def test_finding_runs(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "a" / "pretrain", 3), write_run(tmp_path / "a" / "sft", 3)
    assert find_runs([str(tmp_path / "a")]) == [one, two] == find_runs([str(one), str(two), str(one)])
    for wrong, message in (
        ("nowhere", "no such folder"),
        ("a/sft/checkpoints", "no such folder"),
        (".", "no run in it"),
    ):
        with pytest.raises(MoaiError, match=message):
            find_runs([str(tmp_path / wrong)])


def test_smoothing() -> None:
    flat = [(float(i), 2.0) for i in range(100)]
    assert all(value == pytest.approx(2) for _, value in smooth(flat))  # no bias at the beginning
    noisy = [(float(i), 2.0 + (-1) ** i) for i in range(400)]
    assert max(abs(value - 2) for _, value in smooth(noisy)[50:]) < 0.2
    assert smooth([]) == []


def test_a_real_run(tmp_path: Path, make_recipe: Any) -> None:
    from tests.training.conftest import train

    recipe = make_recipe("train.steps=5", "log.every=2")
    train(recipe, quiet=True)
    record = read_run(Path(recipe.train.out), "real")
    parsed = Page(page([record]))
    spent = [value for _, value in record.points("seconds")]
    assert len(spent) == 4 and 0 < spent[0] < spent[-1] < 600 and spent == sorted(spent)
    assert record.steps == 5 and final_loss(record) is not None and len(record.checkpoints) == 2
    assert not any(kept.problem for kept in record.checkpoints)
    assert yaml.safe_load((Path(recipe.train.out) / "recipe.yaml").read_text()) == record.recipe
    assert "every file has its digest" in parsed.words and "sparse layer" in parsed.words
    shutil.rmtree(Path(recipe.train.out) / "checkpoints")
    assert "What was kept" not in page([read_run(Path(recipe.train.out), "real")])


@pytest.mark.parametrize("width", [360, 1280])
def test_in_a_browser(text: str, tmp_path: Path, width: int) -> None:
    """No wider than the screen, its letters large enough; the switches show one scale at a time."""
    script = f"""Object.assign({MEASURE}, {{
        shown: [...d.querySelectorAll(".linear")].map(e => e.offsetHeight > 50),
        hidden: [...d.querySelectorAll(".log")].map(e => e.offsetHeight),
        after: (d.getElementById("x-log").click(), [...d.querySelectorAll(".linear")].map(e => e.offsetHeight)),
        raw: (d.getElementById("raw").click(), d.querySelector("polyline.raw").getBoundingClientRect().width)}})"""
    seen = measured(text, tmp_path, width, script)
    assert seen["wide"] <= width and seen["plots"] > 10 and seen["smallest"] > 10
    assert all(seen["shown"]) and seen["shown"] and not any(seen["hidden"])
    assert not any(seen["after"]) and seen["raw"] == 0


def test_a_screenshot(text: str, tmp_path: Path) -> None:
    """A picture of the size that was asked for, with the colours of both runs in it."""
    image = pytest.importorskip("PIL.Image").open(io.BytesIO(screenshot(text, tmp_path, 1000, 1400)))
    assert image.size == (1000, 1400)
    pixels = np.asarray(image.convert("RGB")).astype(int)
    for color in ((0x35, 0x65, 0xC9), (0xC4, 0x66, 0x1A)):
        assert int((abs(pixels - np.array(color)).max(-1) < 12).sum()) > 300, color
    assert len(np.unique(pixels @ [65536, 256, 1])) > 100  # not an empty page
