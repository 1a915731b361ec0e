"""What a run tells: one stream of numbers, the panel and the plain lines, trackers, what it ran on, profiles."""

from __future__ import annotations

import csv
import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from moai_llm import recipe as recipes
from moai_llm.planning.hardware import GIB
from moai_llm.runtime import MoaiError
from moai_llm.training import environment, sinks
from moai_llm.training.events import CSV_COLUMNS, Events, read_metrics
from moai_llm.training.live import LiveView, sparkline
from moai_llm.training.monitor import LOADS, Monitor, peak, work
from moai_llm.training.precision import Precision
from moai_llm.training.profile import ProfileOptions, operators, table
from tests.training.conftest import MakeRecipe, train


def events_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) of TensorBoard's files, as TensorBoard itself reads them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


# ---------------------------------------------------------------- the stream


def test_rows_and_their_table(tmp_path: Path) -> None:
    events = Events(tmp_path)
    for step in range(1, 6):
        events.write({"step": step, "loss": 6.0 - step, "expert_load": [[0.5, 0.5]]})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed in the middle of a row
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    again = Events(tmp_path, start=3)  # resumed at step 3
    again.write({"step": 4, "loss": 1.5})
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    with (tmp_path / "training_log.csv").open() as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == list(CSV_COLUMNS)
    assert [(row["step"], row["loss"]) for row in table] == [("1", "5.0"), ("2", "4.0"), ("3", "3.0"), ("4", "1.5")]


def test_maps_of_load_are_few(tmp_path: Path) -> None:
    load = torch.tensor([[0.75, 0.25]])
    total = 5 * LOADS
    with Monitor(tmp_path, total, quiet=True) as monitor:
        for step in range(1, total + 1):
            monitor.log(step, load, loss=1.0)
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "expert_load" in row]
    assert LOADS <= len(rows) <= LOADS + 2
    assert rows[0]["step"] == 1 and rows[-1]["step"] == total and rows[0]["expert_load"] == [[0.75, 0.25]]


# ---------------------------------------------------------------- what is shown


def screen(width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, highlight=False)


def drawn(view: LiveView) -> str:
    console = screen()
    console.print(view)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_panel() -> None:
    view = LiveView("train", 200)
    assert "0/200" in drawn(view)  # before the first number
    for step in range(1, 51):
        view.update(step, {"step": step, "loss": 8.0 - step / 10, "lr": 3e-4, "grad_norm": 0.5, "mfu": 0.41,
                           "tokens_per_second": 12345.6, "memory_mb": 2500.0}, [[0.5, 0.5, 0.0, 0.0]])  # fmt: skip
    view.update(50, {"step": 50, "eval_loss": 3.25, "bits_per_byte": 1.5})
    text = drawn(view)
    for part in ("50/200", "25%", "eta ", "loss 3.0000", "tok/s 12,346", "MFU 41.0%", "memory 2.50 GB", "lr 3.00e-04",
                 "eval at 50 3.2500", "bits per byte 1.5000", "█", "▁", "experts  1", "2 dead"):  # fmt: skip
        assert part in text, part
    assert max(map(len, text.splitlines())) <= 100
    unknown = LiveView("train", 10)
    unknown.update(1, {"step": 1, "loss": 2.0})
    assert "MFU" not in drawn(unknown)  # control: nothing is guessed


def test_long_runs_keep_few_losses() -> None:
    view = LiveView("train", 10**6)
    for step in range(1, 30_000):
        view.update(step, {"step": step, "loss": 1 / step})
    assert len(view._losses) <= 4097 and drawn(view).count("▁") > 20


def test_sparklines() -> None:
    assert sparkline([3, 2, 1], 8) == "█▅▁"
    assert sparkline([1.0, float("nan"), 2.0], 8) == "▁ █"
    assert sparkline([2.0] * 5, 8) == "▁" * 5
    assert len(sparkline(list(range(1000)), 48)) <= 48


def test_a_terminal_gets_the_panel_and_a_pipe_lines(tmp_path: Path) -> None:
    for console, expected in ((screen(), "╭─ train"), (Console(file=io.StringIO()), "train 1/2  loss 2.500  7 tok/s")):
        with Monitor(tmp_path / expected[:2], 2, console=console) as monitor:
            monitor.log(1, loss=2.5, tokens_per_second=7.0)
            monitor.note("step 1: a note")
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert expected in text and "step 1: a note" in text


def test_the_time_of_a_run_is_that_of_all_its_sessions(tmp_path: Path) -> None:
    quiet = Console(quiet=True)
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "seconds": 70.5}\n{"step": 4, "seconds": 90.0}\n')
    with Monitor(tmp_path, 6, 3, console=quiet) as monitor:  # killed after a step that its checkpoint did not have
        monitor.log(4, tokens_per_second=1.0)
    assert 70.5 <= read_metrics(tmp_path / "metrics.jsonl")[-1]["seconds"] < 80
    with Monitor(tmp_path, 6, 0, console=quiet) as monitor:
        monitor.log(1, tokens_per_second=1.0)
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["seconds"] < 10


def test_mfu_only_where_the_peak_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = recipes.load("moai-3b").model
    of_step = work(model, 4096)
    assert of_step == 3 * model.flops(4096)["total"]

    class Properties:
        total_memory = 80 * GIB

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")

    def peak_in(precision: str, device: str = "cuda") -> float | None:
        return peak(Precision(precision, torch.device(device), torch.amp.GradScaler("cpu", enabled=False)))

    assert peak_in("bf16") == peak_in("fp16") == 989.5e12
    assert peak_in("fp32") is None and peak_in("bf16", "cpu") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A device of next year")
    assert peak_in("bf16") is None
    with Monitor(tmp_path, 1, quiet=True, flops=of_step, peak=989e12) as monitor:
        monitor.log(1, loss=1.0, tokens_per_second=20_000.0)
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert row["mfu"] == pytest.approx(20_000 * of_step / 989e12) and row["memory_mb"] > 50


# ---------------------------------------------------------------- trackers


def test_tensorboard_hears_every_number_and_resumes(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("log.to=[tensorboard]", "train.steps=4")
    train(recipe, quiet=True)
    folder = Path(recipe.train.out) / "tensorboard"
    found = events_of(folder)
    rows = read_metrics(Path(recipe.train.out) / "metrics.jsonl")
    assert [step for step, _ in found["loss"]] == [1, 2, 3, 4]
    assert [value for _, value in found["loss"]] == pytest.approx([row["loss"] for row in rows])
    assert {"lr", "grad_norm", "tokens_per_second", "memory_mb"} <= set(found) and "expert_load" not in found
    train(make_recipe("log.to=[tensorboard]", "train.steps=6"), resume=True, quiet=True)
    assert [step for step, _ in events_of(folder)["loss"]] == [1, 2, 3, 4, 5, 6]


def test_no_tracker_is_imported_unasked(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorboard", "wandb", "trackio", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it would fail
    train(make_recipe("train.steps=1"), quiet=True)
    with pytest.raises(MoaiError, match=r"'wandb': pip install 'moai-llm\[wandb\]'"):
        train(make_recipe("train.steps=1", "log.to=[wandb]", out="other"), quiet=True)
    assert not (Path(make_recipe().train.out).parent / "other").exists()  # said before anything is written
    with pytest.raises(MoaiError, match="log.to"):
        make_recipe("log.to=[excel]")


class FakeTracker(types.ModuleType):
    """As much of wandb and trackio as is used, with what it was told."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.told: list[tuple[int, dict[str, float]]] = []
        self.begun: list[dict[str, Any]] = []
        self.finished = 0
        self.broken = False

    def Settings(self, **options: Any) -> dict[str, Any]:
        return options

    def init(self, **options: Any) -> FakeTracker:
        self.begun.append(options)
        return self

    def log(self, numbers: dict[str, float], step: int) -> None:
        if self.broken and step > 1:
            raise ConnectionError("no route to host")
        self.told.append((step, numbers))

    def finish(self) -> None:
        self.finished += 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_numbers_and_one_id(name: str, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTracker(name)
    monkeypatch.setitem(sys.modules, name, fake)
    train(make_recipe(f"log.to=[{name}]", "log.project=mine", "train.steps=3"), quiet=True)
    train(make_recipe(f"log.to=[{name}]", "log.project=mine", "train.steps=4"), resume=True, quiet=True)
    assert [step for step, _ in fake.told] == [1, 2, 3, 4] and fake.finished == 2
    assert all({"loss", "lr", "memory_mb"} <= set(numbers) for _, numbers in fake.told)
    first, second = fake.begun
    assert first["project"] == "mine" and first["config"]["train"]["seed"] == 0
    key = "id" if name == "wandb" else "name"
    assert first[key] == second[key] and first["resume"] == "allow"


def test_a_tracker_that_fails_does_not_end_the_run(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeTracker("wandb")
    fake.broken = True
    monkeypatch.setitem(sys.modules, "wandb", fake)
    recipe = make_recipe("log.to=[wandb]", "train.steps=4")
    train(recipe, quiet=True)
    assert [step for step, _ in fake.told] == [1]
    assert caplog.text.count("no route to host") == 1
    assert len(read_metrics(Path(recipe.train.out) / "metrics.jsonl")) == 4


def test_a_tracker_that_does_not_begin(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTracker("wandb")
    monkeypatch.setattr(fake, "init", lambda **_: 1 / 0)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(MoaiError, match="wandb does not begin: division by zero. Leave it out of log.to"):
        train(make_recipe("log.to=[wandb]", "train.steps=1"), quiet=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_trackers_themselves_offline(
    name: str, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip(name)
    recipe = make_recipe(f"log.to=[{name}]", "train.steps=2")
    train(recipe, quiet=True)
    place = Path(recipe.train.out) / "wandb" if name == "wandb" else tmp_path / "trackio"
    assert any(file.stat().st_size for file in place.rglob("*") if file.is_file())


def test_every_tracker_of_the_recipe_has_a_sink_and_an_extra() -> None:
    from typing import get_args, get_type_hints

    from moai_llm.recipe import LogConfig
    from tests.conftest import ROOT

    names = set(get_args(get_args(get_type_hints(LogConfig)["to"])[0]))
    assert names == set(sinks.SINKS)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(f"\n{name} = [" in project for name in names)


# ---------------------------------------------------------------- what it ran on


def test_the_environment_of_each_session(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("train.steps=2")
    out = Path(recipe.train.out)
    train(recipe, quiet=True)
    first = environment.read(out)
    train(make_recipe("train.steps=3"), resume=True, quiet=True)
    held = environment.read(out)
    assert held["id"] == first["id"] and [s["from_step"] for s in held["sessions"]] == [0, 2]
    session = held["sessions"][0]
    assert session["packages"]["torch"] == torch.__version__ and session["device"] == "cpu" and session["cores"] >= 1
    assert session["memory_gb"] > 0 and isinstance(session["command"], list)
    train(make_recipe("train.steps=1"), fresh=True, quiet=True)
    assert len(environment.read(out)["sessions"]) == 1 and environment.read(out)["id"] != first["id"]
    (out / "environment.json").write_text("{")
    assert environment.read(out) == {}


def test_the_commit_is_that_of_the_package(tmp_path: Path) -> None:
    import subprocess

    repository = tmp_path / "repo"
    (repository / "pkg").mkdir(parents=True)
    assert environment.commit(repository / "pkg") is None
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b"]
    (repository / "pkg" / "x.py").write_text("1")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    clean = environment.commit(repository / "pkg")
    assert clean is not None and len(clean) == 12
    (repository / "pkg" / "x.py").write_text("2")
    assert environment.commit(repository / "pkg") == clean + "+"
    (repository / "venv" / "lib" / "pkg").mkdir(parents=True)  # installed inside someone's repository
    assert environment.commit(repository / "venv" / "lib" / "pkg") is None


# ---------------------------------------------------------------- profiles


def test_a_trace_is_not_empty(make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = {"name": "moai-3b-tiny"}
    plain = train(make_recipe("train.steps=8", out="plain", **short), quiet=True)
    recipe = make_recipe("train.steps=8", out="traced", **short)
    traced = train(recipe, profile=ProfileOptions(time=True, trace=tmp_path / "deep" / "timeline.json"))
    assert (traced / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    events = json.loads((tmp_path / "deep" / "timeline.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep#")}
    assert len(steps) == 3 and sum(event.get("name") == "aten::mm" for event in events) > 30
    said = capsys.readouterr().out
    assert "operator" in said and "aten::mm" in said and "timeline in" in said
    assert "aten::mm" in (Path(recipe.train.out) / "profile.txt").read_text()
    with pytest.raises(MoaiError, match="--profile needs at least 2 steps to look at, and this run has 1 left"):
        train(
            make_recipe("train.steps=9", out="traced", **short),
            resume=True,
            profile=ProfileOptions(time=True),
            quiet=True,
        )


def test_the_shares_of_a_table_add_up() -> None:
    with torch.profiler.profile() as tracer:
        for _ in range(3):
            torch.randn(64, 64) @ torch.randn(64, 64)
    found = operators(tracer, torch.device("cpu"))
    assert sum(o.share for o in found) == pytest.approx(1) and found == sorted(found, key=lambda o: -o.time)
    lines = table(found * 10)
    assert len(lines) == 1 + 15 + 1 and lines[-1].split()[1] == "others" and len({len(line) for line in lines}) == 1


def test_memory_by_kind(make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make_recipe("train.steps=5", "log.every=100")
    last = train(recipe, profile=ProfileOptions(memory=True, interval=2))
    found = [row for row in read_metrics(Path(recipe.train.out) / "metrics.jsonl") if "memory_weights_mb" in row]
    assert [row["step"] for row in found] == [2, 4] and "step 4 memory:  weights" in capsys.readouterr().out
    size = (last / "model.safetensors").stat().st_size / 1e6
    for row in found:
        assert row["memory_weights_mb"] == pytest.approx(size, abs=0.2)
        assert row["memory_optimizer_mb"] == pytest.approx(2 * size, abs=0.4)  # the two averages of AdamW
        assert row["memory_peak_mb"] >= row["memory_process_mb"] * 0.9 > 50
    assert not [row for row in found if "loss" in row]
