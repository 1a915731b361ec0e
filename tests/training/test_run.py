"""Whole runs: resume is exact to the bit, signals save, directories are not mixed, evaluation and logs are right."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moai_llm import recipe as recipes
from moai_llm.commands.train import make_hooks
from moai_llm.config import MoaiConfig
from moai_llm.inference.load import load_model
from moai_llm.runtime import MoaiError
from moai_llm.training import loop
from moai_llm.training.events import read_metrics
from moai_llm.training.live import duration
from moai_llm.training.state import STATE
from tests.training.conftest import MakeRecipe, train


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {**load_file(checkpoint / "model.safetensors"), **load_file(checkpoint / STATE / "optimizer.safetensors")}


def same(a: Path, b: Path) -> bool:
    left, right = tensors(a), tensors(b)
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


class Stop(Exception):
    pass


def stop_at(step: int):  # type: ignore[no-untyped-def]
    def hook(now: int, model: object) -> dict[str, float]:
        if now == step:
            raise Stop
        return {}

    return hook


@pytest.mark.parametrize("name", ["moai-hybrid-moe-0.8b-tiny", "blues-01-tiny", "khanh-692m-tiny"])
def test_resumed_equals_uninterrupted_bit_for_bit(make_recipe: MakeRecipe, name: str) -> None:
    whole = train(make_recipe(name=name, out="whole"), quiet=True)
    broken = make_recipe("eval.every=1", name=name, out="broken")
    with pytest.raises(Stop):
        train(broken, hooks=[stop_at(5)], quiet=True)  # after the checkpoint of step 3, in the middle of nothing
    resumed = train(broken, resume=True, quiet=True)
    assert resumed.name == whole.name == "step-00000008" and same(whole, resumed)
    other = train(make_recipe("train.seed=1", name=name, out="other"), quiet=True)  # control
    assert not same(whole, other)
    rows = [row for row in read_metrics(Path(broken.train.out) / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 9))
    reference = [row["loss"] for row in read_metrics(Path(make_recipe(out="whole").train.out) / "metrics.jsonl")]
    assert [row["loss"] for row in rows] == reference


def test_balanced_steps_resume_bit_for_bit(make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]) -> None:
    balanced = ["data.packing=balanced", "train.steps=12"]  # across the end of an epoch
    whole = train(make_recipe(*balanced, out="whole"))
    said = capsys.readouterr().out
    assert re.search(r"data, balanced: \d+ rows of 32 tokens, \d+\.\d% full; \d+ of 40 documents are cut", said)
    broken = make_recipe(*balanced, "eval.every=1", out="broken")
    with pytest.raises(Stop):
        train(broken, hooks=[stop_at(8)], quiet=True)
    assert same(whole, train(broken, resume=True, quiet=True))
    assert not same(whole, train(make_recipe("train.steps=12", out="other"), quiet=True))  # control
    with pytest.raises(MoaiError, match="another recipe; these differ: data.packing"):
        train(make_recipe("train.steps=12", out="broken"), resume=True, quiet=True)


def test_a_run_says_what_it_does_not_read(make_recipe: MakeRecipe, caplog: pytest.LogCaptureFixture) -> None:
    for way, what in (("truncate", "lose their end"), ("drop", "are left out")):
        caplog.clear()
        train(make_recipe(f"data.overlong={way}", "data.seq_len=64", "train.steps=1", out=way), quiet=True)
        assert re.search(rf"\d+ of 40 documents are longer than data.seq_len 64 and {what}: raise it", caplog.text)
    caplog.clear()
    train(make_recipe("train.steps=1", out="split"), quiet=True)
    assert not caplog.records


def test_a_run_learns_logs_and_keeps_checkpoints(make_recipe: MakeRecipe, store: Path) -> None:
    recipe = make_recipe(
        "train.steps=30",
        "optim.lr=1e-2",
        f"data.valid={store}",
        "eval.every=10",
        "eval.prompts=[Document]",
        "eval.prompt_tokens=4",
    )
    last = train(recipe, hooks=make_hooks(recipe), quiet=True)
    out = Path(recipe.train.out)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-00000027", "step-00000030"]
    rows = read_metrics(out / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] - 1
    evaluations = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == [10, 20, 30]
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"] and 0 < evaluations[-1]["bits_per_byte"] < 8
    assert {"aux_loss", "expert_cv", "grad_norm", "lr", "tokens", "tokens_per_second"} <= set(rows[0])
    with (out / "training_log.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(r["loss"]) for r in table if r["loss"]] == losses
    assert (out / "samples.txt").read_text().count("Document") == 3
    assert recipes.load(out / "recipe.yaml") == recipe
    model = load_model(out, dtype="fp32")
    assert model.path == last and model.model.generation_config.eos_token_id == model.tokenizer.stop_ids
    assert model.model.config.vocab_size == model.tokenizer.padded_vocab_size


def test_fine_tuning_goes_on_from_a_model(make_recipe: MakeRecipe) -> None:
    first = train(make_recipe(out="first"), quiet=True)
    tuned = make_recipe(f"train.init_from={first}", "train.steps=1", "optim.lr=0", out="tuned")
    before, after = (load_file(path / "model.safetensors") for path in (first, train(tuned, quiet=True)))
    assert all(torch.equal(before[key], after[key]) for key in before)
    with pytest.raises(MoaiError, match="init_from: /nowhere is not a model directory"):
        train(make_recipe("train.init_from=/nowhere", out="x"), quiet=True)


def test_the_recipe_of_fine_tuning_says_the_model_it_tunes(make_recipe: MakeRecipe) -> None:
    import shutil

    from moai_llm.architecture import Architecture

    first = train(make_recipe("model.num_hidden_layers=2", out="first"), quiet=True)
    tuned = make_recipe(f"train.init_from={first}", "train.steps=4", out="tuned")
    assert tuned.model.num_hidden_layers == 4
    last = train(tuned, quiet=True)
    config = MoaiConfig.from_pretrained(first)
    for file in (Path(tuned.train.out) / "recipe.yaml", last / "recipe.yaml"):
        written = recipes.load(file)
        assert written.model == Architecture(**{name: getattr(config, name) for name in asdict(written.model)})
    shutil.rmtree(first)  # what a resumed run needs lies in its checkpoint
    for again in (recipes.load(last / "recipe.yaml"), tuned):
        again.train.steps = (again.train.steps or 0) + 1
        assert train(again, resume=True, quiet=True).name == "step-00000005"


def test_a_failing_hook_loses_no_work(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("checkpoint.every=5", "eval.every=5")
    with pytest.raises(Stop):
        train(recipe, hooks=[stop_at(5)], quiet=True)
    assert (Path(recipe.train.out) / "checkpoints" / "step-00000005").is_dir()
    with pytest.raises(Stop):
        train(recipe, hooks=[stop_at(8)], resume=True, quiet=True)
    assert (Path(recipe.train.out) / "checkpoints" / "step-00000008").is_dir()


def test_validation_data_of_another_tokenizer_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    from moai_llm.data.prepare import prepare_texts
    from moai_llm.tokenizer.train import train_tokenizer

    text = "another text with other words " * 9
    prepare_texts([(text, "")], train_tokenizer([text], 270), tmp_path / "other", [])
    recipe = make_recipe(f"data.valid={tmp_path / 'other'}")
    with pytest.raises(MoaiError, match="other was prepared with another tokenizer than data.train"):
        make_hooks(recipe)


def test_another_tokenizer_is_refused(make_recipe: MakeRecipe) -> None:
    from moai_llm.tokenizer.train import train_tokenizer

    first = train(make_recipe(out="first"), quiet=True)
    train_tokenizer(["another text with other words " * 9], 270).save(first)
    with pytest.raises(MoaiError, match="prepared with another tokenizer"):
        train(make_recipe(f"train.init_from={first}", out="second"), quiet=True)


def test_two_runs_are_not_mixed(make_recipe: MakeRecipe) -> None:
    train(make_recipe(), quiet=True)
    with pytest.raises(MoaiError, match="already holds a run: pass --resume .* --fresh"):
        train(make_recipe(), quiet=True)
    with pytest.raises(MoaiError, match="started with another recipe; these differ: optim.lr"):
        train(make_recipe("optim.lr=0.5"), resume=True, quiet=True)
    assert train(make_recipe("log.every=7"), resume=True, quiet=True).name == "step-00000008"  # nothing left to do


def test_a_run_can_be_made_longer(make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]) -> None:
    train(make_recipe(), quiet=True)
    assert train(make_recipe("train.steps=10"), resume=True).name == "step-00000010"
    assert "continues to 10 steps, was 8" in capsys.readouterr().out
    longer = make_recipe("train.steps=null", "train.tokens=1408")  # 11 steps of 128
    assert train(longer, resume=True).name == "step-00000011"
    assert "continues to 11 steps, was 10" in capsys.readouterr().out
    assert train(longer, resume=True).name == "step-00000011"
    assert "continues" not in capsys.readouterr().out
    with pytest.raises(MoaiError, match="has done 11 steps, so this run cannot end after 9: make it longer"):
        train(make_recipe("train.steps=9"), resume=True, quiet=True)
    with pytest.raises(MoaiError, match="these differ: data.seq_len"):
        train(make_recipe("train.steps=20", "data.seq_len=16"), resume=True, quiet=True)


def test_fresh_deletes_a_run_and_nothing_else(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(out="run")
    out = Path(recipe.train.out)
    last = train(recipe, quiet=True)
    (out / "notes.txt").write_text("precious")
    with pytest.raises(MoaiError, match="pass one of them"):
        train(recipe, resume=True, fresh=True, quiet=True)
    with pytest.raises(MoaiError, match="would delete .*step-00000008, which train.init_from goes on from"):
        train(make_recipe(f"train.init_from={last}"), fresh=True, quiet=True)
    for wrong in ("data.train=/nowhere", "train.device=cuda:99", "train.tokens=5", "train.init_from=/nowhere"):
        with pytest.raises(MoaiError):
            train(make_recipe(wrong), fresh=True, quiet=True)
    assert last.is_dir()
    train(make_recipe("train.steps=2"), fresh=True, quiet=True)
    assert {p.name for p in (out / "checkpoints").iterdir()} == {"step-00000002"}
    assert (out / "notes.txt").read_text() == "precious"


def test_fresh_refuses_what_is_not_a_run(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    train(make_recipe("train.steps=1", out="mine"), fresh=True, quiet=True)  # an empty directory is nobody's
    other = tmp_path / "other"
    (other / "checkpoints").mkdir(parents=True)
    (other / "recipe.yaml").write_text("a recipe of mine")
    with pytest.raises(MoaiError, match="not empty and not a run, so --fresh does not delete it"):
        train(make_recipe(out="other"), fresh=True, quiet=True)
    assert (other / "recipe.yaml").read_text() == "a recipe of mine"


def test_changed_data_is_refused(make_recipe: MakeRecipe, store: Path, tokenizer, text_file: Path) -> None:  # type: ignore[no-untyped-def]
    from moai_llm.data.prepare import prepare

    train(make_recipe("train.steps=4"), quiet=True)
    text_file.write_text('{"text": "other words"}\n' * 50)
    prepare([text_file], tokenizer, store, overwrite=True)
    with pytest.raises(MoaiError, match="trained on other data"):
        train(make_recipe("train.steps=4"), resume=True, quiet=True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train=null"], "data.train is not set"),
        (["data.train=/nowhere"], "not a prepared store"),
        (["train.steps=null"], "exactly one of train.steps, train.tokens and train.epochs, got none"),
        (["train.tokens=5"], "exactly one of"),
        (["train.precision=fp16"], "fp16 on a CPU"),
        (["train.device=cuda:99"], "cannot be used here"),
    ],
)
def test_wrong_runs_say_what_to_do(make_recipe: MakeRecipe, overrides: list[str], message: str) -> None:
    with pytest.raises(MoaiError, match=message):
        train(make_recipe(*overrides), quiet=True)


def test_rows_longer_than_learned_positions(make_recipe: MakeRecipe) -> None:
    with pytest.raises(MoaiError, match="data.seq_len 256 is more than the 128 learned positions"):
        train(make_recipe("data.seq_len=256", "train.batch_tokens=256", name="khanh-692m-tiny"), quiet=True)


def test_lengths(make_recipe: MakeRecipe) -> None:
    from moai_llm.data.loader import Loader
    from moai_llm.data.shards import Store
    from moai_llm.training.start import total_steps

    loader = Loader(Store(make_recipe().data.train), 32)
    for overrides, expected in (
        (["train.tokens=1280"], 10),
        (["train.epochs=2"], round(len(loader) * 2 / 4)),
        (["train.steps=7"], 7),
    ):
        recipe = make_recipe("train.steps=null", *overrides)
        assert total_steps(recipe, loader, rows=4) == expected


def test_a_loss_that_is_not_finite_stops_the_run(make_recipe: MakeRecipe) -> None:
    with pytest.raises(
        MoaiError, match=r"step \d+ cannot be taken: loss nan.*the last checkpoint is step .*lower optim.lr"
    ):
        train(
            make_recipe(
                "optim.lr=1e30",
                "checkpoint.every=1",
                "schedule.warmup=0",
                "train.max_grad_norm=1e30",
                "health.nonfinite=stop",
            ),
            quiet=True,
        )


def test_activation_checkpointing_and_compile_change_nothing(make_recipe: MakeRecipe) -> None:
    plain = train(make_recipe(out="plain"), quiet=True)
    assert same(plain, train(make_recipe("train.activation_checkpointing=true", out="ac"), quiet=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_layers_train_to_the_same_loss(make_recipe: MakeRecipe) -> None:
    losses = []
    for value in ("false", "true"):
        recipe = make_recipe(f"train.compile={value}", out=value)
        train(recipe, quiet=True)
        losses.append([row["loss"] for row in read_metrics(Path(recipe.train.out) / "metrics.jsonl")])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_sigterm_saves_and_leaves_cleanly(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe("train.steps=5000", "checkpoint.every=100000")
    file = tmp_path / "recipe.yaml"
    file.write_text(recipes.dump(recipe))
    process = subprocess.Popen(
        [sys.executable, "-m", "moai_llm", "train", str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    log = Path(recipe.train.out) / "metrics.jsonl"
    for _ in range(600):
        if len(read_metrics(log)) > 2:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "stopped after step" in output and "--resume" in output
    (checkpoint,) = (Path(recipe.train.out) / "checkpoints").iterdir()
    state = json.loads((checkpoint / STATE / "state.json").read_text())
    assert state["step"] == read_metrics(log)[-1]["step"]


def test_a_signal_at_any_moment_of_a_step_saves(make_recipe: MakeRecipe) -> None:
    """Here while a hook runs, after the step was found not to be the last."""

    def hook(step: int, model: object) -> dict[str, float]:
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        return {}

    recipe = make_recipe("checkpoint.every=1000", "eval.every=2")
    trained = loop.train(recipe, hooks=[hook], quiet=True)
    assert not trained.finished and trained.checkpoint.name == "step-00000003"


def test_durations() -> None:
    assert [duration(s) for s in (0, 75, 4000)] == ["0:00", "1:15", "1:06:40"]
