"""Runs on mixtures and stages: resumed exactly in any stage, refused when the data differ, and never kept waiting."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path

import pytest

from moai_llm.commands.train import make_hooks
from moai_llm.data.loader import Batch, Loader, Source, Stage
from moai_llm.data.prepare import prepare
from moai_llm.data.shards import Store
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from moai_llm.training.events import read_metrics
from moai_llm.training.start import total_steps
from tests.training.conftest import MakeRecipe, train
from tests.training.test_run import Stop, same, stop_at


@pytest.fixture
def chats(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(f'{{"Q": "question {i}", "A": "the answer is {i * i}"}}\n' for i in range(30)))
    prepare([file], tokenizer, tmp_path / "chats", kind="chat")
    return tmp_path / "chats"


def stages(store: Path, chats: Path, weight: int = 1) -> str:
    """Steps of 128 tokens: three, three, and the rest."""
    both = f"[{{store: {store}, weight: {weight}}}, {{store: {chats}, weight: 2}}]"
    return f"data.stages=[{{train: {store}, until: 384}}, {{train: {both}, until: 7e2}}, {{train: [{chats}]}}]"


@pytest.mark.parametrize(("stop", "knobs"), [(2, ["data.workers=0"]), (5, ["data.workers=3", "data.prefetch=5"])])
def test_a_run_resumes_in_any_stage(
    make_recipe: MakeRecipe, store: Path, chats: Path, stop: int, knobs: list[str]
) -> None:
    plan = [stages(store, chats), "data.train=null", "checkpoint.every=1"]
    whole = train(make_recipe(*plan, out="whole"), quiet=True)
    broken = make_recipe(*plan, "eval.every=1", out="broken")
    with pytest.raises(Stop):
        train(broken, hooks=[stop_at(stop)], quiet=True)
    again = make_recipe(*plan, *knobs, out="broken")  # how data is read may change, what is read may not
    assert same(whole, train(again, resume=True, quiet=True))
    rows = [row for row in read_metrics(Path(again.train.out) / "metrics.jsonl") if "loss" in row]
    assert [row["stage"] for row in rows] == [1, 1, 1, 2, 2, 2, 3, 3]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("moai-data")]


def test_other_data_are_refused(make_recipe: MakeRecipe, store: Path, chats: Path, tokenizer: Tokenizer) -> None:
    plan = [stages(store, chats), "data.train=null"]
    train(make_recipe(*plan), quiet=True)
    with pytest.raises(MoaiError, match="another recipe; these differ: data.stages"):
        train(make_recipe(stages(store, chats, weight=2), "data.train=null"), resume=True, quiet=True)
    file = chats.parent / "chat.jsonl"
    file.write_text(file.read_text().replace("question", "a question"))
    prepare([file], tokenizer, chats, kind="chat", overwrite=True)
    with pytest.raises(MoaiError, match="trained on other data"):
        train(make_recipe(*plan), resume=True, quiet=True)


def test_a_run_says_what_it_reads(
    make_recipe: MakeRecipe, store: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(make_recipe(stages(store, chats), "data.train=null", out="a"))
    said = capsys.readouterr().out.replace(str(store), "TEXT").replace(str(chats), "CHATS")
    assert re.search(r"data, best-fit, TEXT: \d+ rows of 32 tokens, .* full.*; read 0\.\d\d times", said)
    assert "stage 1, steps 1 to 3: 100.00% TEXT\nstage 2, steps 4 to 6: 33.33% TEXT, 66.67% CHATS\n" in said
    assert "stage 3, steps 7 to 8: 100.00% CHATS\n" in said
    train(make_recipe(stages(store, chats), "data.train=null", "train.steps=4", out="b"))
    assert "stage 3, from step 7, which this run does not reach" in capsys.readouterr().out
    train(make_recipe(f"data.train=[{store}, {chats}]", "train.steps=1", out="c"))
    assert re.search(r"mixture: \d\d\.\d\d% .*store, \d\d\.\d\d% .*chats\n", capsys.readouterr().out)


def test_hooks_of_a_mixture(make_recipe: MakeRecipe, store: Path, chats: Path) -> None:
    recipe = make_recipe(f"data.train=[{chats}, {store}]", f"data.valid={store}", "eval.prompts=[A]", "train.steps=1")
    train(recipe, hooks=make_hooks(recipe), quiet=True)
    assert "eval_loss" in read_metrics(Path(recipe.train.out) / "metrics.jsonl")[-1]
    assert (Path(recipe.train.out) / "samples.txt").is_file()


def test_lengths_of_stages(make_recipe: MakeRecipe, store: Path, chats: Path) -> None:
    def steps(data: list[Stage], *overrides: str) -> int:
        recipe = make_recipe("train.steps=null", *overrides)
        return total_steps(recipe, Loader(data, 32, step_rows=4), 4)

    text, chat = (Source(Store(path), 1.0) for path in (store, chats))
    sequence = [Stage([text], epochs=2.0), Stage([chat], epochs=1.0)]
    rows = [len(Loader(source.store, 32)) for source in (text, chat)]
    assert steps(sequence, "train.epochs=1") == -(-2 * rows[0] // 4) + -(-rows[1] // 4)
    assert steps(sequence, "train.steps=5") == 5
    with pytest.raises(MoaiError, match="data.stages end after step .* leave out the end of the last stage, or set"):
        steps(sequence, "train.epochs=2")
    with pytest.raises(MoaiError, match="the last of data.stages has no end: give it `epochs` or `until`"):
        steps([*sequence, Stage([text])], "train.epochs=1")
    assert steps([Stage([text, chat])], "train.epochs=1") == round(sum(rows) / 4)


def test_training_does_not_wait_for_data(make_recipe: MakeRecipe, store: Path, chats: Path) -> None:
    """At most a fiftieth of the time; without the first step, which has nothing to read ahead of."""
    recipe = make_recipe(
        f"data.train=[{store}, {chats}]", "train.steps=20", "data.seq_len=128", "train.batch_tokens=512"
    )
    train(recipe, quiet=True)
    waits = [row["data_wait"] for row in read_metrics(Path(recipe.train.out) / "metrics.jsonl")][1:]
    assert len(waits) == 19 and sorted(waits)[len(waits) // 2] < 0.02
    assert all(0 <= wait < 1 for wait in waits)


def test_control_a_slow_store_is_waited_for_unless_it_is_read_ahead(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Loader.step

    def slow(loader: Loader, step: int) -> Batch:
        time.sleep(0.01)
        return read(loader, step)

    monkeypatch.setattr(Loader, "step", slow)
    middle = []
    for workers in (0, 1):
        recipe = make_recipe(f"data.workers={workers}", out=str(workers))
        train(recipe, quiet=True)
        waits = [row["data_wait"] for row in read_metrics(Path(recipe.train.out) / "metrics.jsonl")][1:]
        middle.append(sorted(waits)[len(waits) // 2])
    assert middle[1] < 0.02 < middle[0]


def test_pinned_memory_needs_a_cuda_device(make_recipe: MakeRecipe) -> None:
    with pytest.raises(MoaiError, match="pin_memory=true is for a CUDA device, and this run is on cpu: leave it out"):
        train(make_recipe("data.pin_memory=true"), quiet=True)
