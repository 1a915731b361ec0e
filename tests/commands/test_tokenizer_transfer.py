"""`moai tokenizer transfer`: the directory that comes of it is a whole model, and the source stays as it was."""

from __future__ import annotations

import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel

from moai_llm import recipe as recipes
from moai_llm.commands.tokenizer_transfer import OLD_IDS, Transfer, find_source
from moai_llm.commands.tokenizer_transfer_check import UNCHANGED, Trial
from moai_llm.data.embedded import library_texts
from moai_llm.data.prepare import prepare_texts
from moai_llm.evaluation.perplexity import evaluate_text
from moai_llm.inference import load_model
from moai_llm.inference.load import TextModel
from moai_llm.tokenizer import Tokenizer, load_tokenizer
from moai_llm.tokenizer.extend import extend_tokenizer
from moai_llm.tokenizer.train import build_tokenizer, train_tokenizer
from moai_llm.training.loop import train
from tests.commands.conftest import Moai
from tests.conftest import tiny_model
from tests.tokenizer.test_transfer import DOMAIN, permuted, with_special

TEXT = "Interest is paid on the deposit. 이자가 붙어요. " * 4


def write_model(directory: Path, tokenizer: Tokenizer, mixer: str = "full_attention", **changes: Any) -> Path:
    """A model directory in fp32, or in bf16 where `dtype` says so."""
    dtype = changes.pop("dtype", torch.float32)
    model = tiny_model(mixer, vocab_size=tokenizer.padded_vocab_size, **changes).to(dtype)
    model.config.eos_token_id, model.config.pad_token_id = tokenizer.eos_id, tokenizer.pad_id
    settings = {"do_sample": True, "top_k": 11, "suppress_tokens": [7]}
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.stop_ids, **settings)
    model.save_pretrained(directory)
    tokenizer.save(directory)
    return directory


@pytest.fixture
def source(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    return write_model(tmp_path / "source", tokenizer)


@pytest.fixture
def new(tokenizer: Tokenizer) -> Tokenizer:
    """60 tokens more, and other ids for all."""
    return permuted(extend_tokenizer(tokenizer, DOMAIN, 572))[0]


def digests(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_model_directory(
    moai: Moai, tmp_path: Path, tokenizer: Tokenizer, new: Tokenizer, tied: bool
) -> None:  # fmt: skip
    source, out = write_model(tmp_path / "source", tokenizer, tie_word_embeddings=tied), tmp_path / "a" / "out"
    before = digests(source)
    output = moai("tokenizer", "transfer", "--model", source, "--tokenizer", new.save(tmp_path / "new"), "--out", out)
    assert "572 tokens: 512 that the model has, 60 that are spelled in its own. Vocabulary 512 -> 640" in output
    assert f"moai train RECIPE train.init_from={out} data.train=STORE" in output
    assert digests(source) == before and [path.name for path in out.parent.iterdir()] == ["out"]
    assert load_tokenizer(out).fingerprint == new.fingerprint and load_tokenizer(out).roles == new.roles
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.vocab_size == 640 and model.config.tie_word_embeddings == tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert (model.config.eos_token_id, model.config.pad_token_id) == (new.eos_id, new.pad_id) != (508, 509)
    settings = model.generation_config
    assert settings.eos_token_id == new.stop_ids and settings.top_k == 11
    assert all(getattr(settings, name) is None for name in OLD_IDS)
    old = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        got = model.lm_head.weight[new.special_ids["<|im_end|>"]]
        assert torch.equal(got, old.lm_head.weight[tokenizer.special_ids["<|im_end|>"]])
    for name, tensor in old.state_dict().items():
        if "embed_tokens" not in name and "lm_head" not in name:
            assert torch.equal(tensor, model.state_dict()[name])
    assert AutoTokenizer.from_pretrained(out)("이자", add_special_tokens=False)["input_ids"] == new.encode("이자")
    assert moai("generate", out, "--prompt", "The balance sheet", "--max-new-tokens", 3).startswith("The balance")


@pytest.mark.parametrize("mixer", ["full_attention", "linear_attention"])
def test_the_dtype_is_kept(tmp_path: Path, tokenizer: Tokenizer, new: Tokenizer, mixer: str) -> None:
    source = write_model(tmp_path / "source", tokenizer, mixer, dtype=torch.bfloat16)
    Transfer(source, new).save(tmp_path / "out")
    before, after = (AutoModelForCausalLM.from_pretrained(p, dtype="auto") for p in (source, tmp_path / "out"))
    assert after.lm_head.weight.dtype == torch.bfloat16 and after.config.dtype == torch.bfloat16
    assert [p.dtype for p in before.parameters()] == [p.dtype for p in after.parameters()]


def test_other_ids_for_the_same_tokens_give_the_same_loss(tmp_path: Path, source: Path, tokenizer: Tokenizer) -> None:
    """The law, through the files; with the rows left where they are it does not hold."""
    new, _ = permuted(tokenizer)
    Transfer(source, new).save(tmp_path / "out")
    before, after = (load_model(path, "cpu", "fp32") for path in (source, tmp_path / "out"))
    old = evaluate_text(before, TEXT)
    assert evaluate_text(after, TEXT).nats == pytest.approx(old.nats, rel=1e-6)
    assert evaluate_text(TextModel(before.model, after.tokenizer, source), TEXT).nats != pytest.approx(
        old.nats, rel=0.01
    )


def test_training_and_chat_go_on_from_it(
    moai: Moai, fails: Moai, tmp_path: Path, text_file: Path, tokenizer: Tokenizer,
    new: Tokenizer, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """From a run, whose recipe comes along; its optimizer state does not."""
    old_tok, new_tok = tokenizer.save(tmp_path / "old-tok"), new.save(tmp_path / "new-tok")
    old_store, store, out = tmp_path / "old-store", tmp_path / "store", tmp_path / "out"
    moai("data", "prepare", text_file, "--tokenizer", old_tok, "--out", old_store)
    lengths = ["data.seq_len=64", "train.batch_tokens=128", "train.micro_batch_size=2", "train.steps=2"]
    stores = [f"data.train={old_store}", f"data.valid={old_store}"]
    moai("train", "moai-3b-tiny", *stores, f"train.out={tmp_path / 'base'}", "train.device=cpu", *lengths)
    run_before = digests(tmp_path / "base")
    output = moai("tokenizer", "transfer", "--model", tmp_path / "base", "--tokenizer", new_tok, "--out", out)
    assert f"moai train {out / 'recipe.yaml'} data.train=STORE" in output and "no optimizer state" in output
    assert not (out / "training_state").exists() and digests(tmp_path / "base") == run_before
    recipe = recipes.load(out / "recipe.yaml")
    assert recipe.model.vocab_size == 640 and recipe.train.init_from == str(out) and recipe.train.out == f"{out}-run"
    assert recipe.data.train is recipe.data.valid is None and recipe.data.seq_len == 64
    assert "data.train is not set" in fails("train", out / "recipe.yaml")
    assert "prepared with another tokenizer" in fails("train", out / "recipe.yaml", f"data.train={old_store}")
    moai("data", "prepare", text_file, "--tokenizer", out, "--out", store)
    assert "Next: moai generate" in moai("train", out / "recipe.yaml", f"data.train={store}")
    trained = load_model(f"{out}-run", "cpu", "fp32")
    assert trained.tokenizer.fingerprint == new.fingerprint and trained.model.config.vocab_size == 640
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert moai("chat", f"{out}-run", "--max-new-tokens", 2) is not None


def test_another_family(tmp_path: Path, tokenizer: Tokenizer, new: Tokenizer, fails: Moai) -> None:
    """Any causal language model that transformers loads; only --check is for ours."""
    source, out = tmp_path / "gpt2", tmp_path / "out"
    model = GPT2LMHeadModel(GPT2Config(vocab_size=515, n_embd=16, n_layer=1, n_head=2, n_positions=64))
    model.save_pretrained(source)
    with_special(tokenizer, {"<|pad|>": "<|x|>"}, {"eos_token": "<|endoftext|>"}).save(source)
    transfer = Transfer(source, new)
    transfer.save(out)
    after = AutoModelForCausalLM.from_pretrained(out)
    assert type(after) is GPT2LMHeadModel and after.config.vocab_size == 640 and after.config.eos_token_id == new.eos_id
    assert after.transformer.wte.weight.shape == (640, 16) and after.lm_head.weight is after.transformer.wte.weight
    rows = [(i, transfer.rows[i][0]) for i in range(640) if len(transfer.rows[i]) == 1]
    assert len(rows) == 511 + 68  # all tokens but the padding that they lack, and the padding rows
    here, there = zip(*rows)
    assert torch.equal(after.transformer.wte.weight[list(here)], model.transformer.wte.weight[list(there)])
    message = fails("tokenizer", "transfer", "--model", source, "--tokenizer", out, "--check", "nowhere.txt")
    assert "--check trains models of ours, this is a GPT2LMHeadModel" in message


def test_settings_that_contradict_each_other(tmp_path: Path, source: Path, new: Tokenizer) -> None:
    """Some published models have such: transformers loads them and does not write them again."""
    file = source / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "do_sample": False, "temperature": 0.5}))
    Transfer(source, new).save(tmp_path / "out")
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    assert settings.eos_token_id == new.stop_ids and settings.temperature is None and settings.top_k is None


def test_where_it_may_be_written(
    moai: Moai, fails: Moai, tmp_path: Path, source: Path, new: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    tok, out = new.save(tmp_path / "new"), tmp_path / "out"
    transfer = ("tokenizer", "transfer", "--model", source, "--tokenizer", tok)
    before = digests(source)
    for bad in (source, source / "inside", tmp_path, tok):
        assert "are only read; choose a directory apart" in fails(*transfer, "--out", bad, "--overwrite")
    moai(*transfer, "--out", out, "--init", "last")
    first = digests(out)
    assert "holds a model already: choose another --out or pass --overwrite" in fails(*transfer, "--out", out)
    assert digests(out) == first
    (out / "stale.txt").write_text("of the old one")
    moai(*transfer, "--out", out, "--overwrite", "--init", "first")
    assert digests(out) != first and not (out / "stale.txt").exists()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    moai(*transfer, "--out", ".")
    assert load_model(tmp_path / "here", "cpu").tokenizer.fingerprint == new.fingerprint
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("keep")
    assert "not a model directory, so it is not replaced" in fails(
        *transfer, "--out", tmp_path / "notes", "--overwrite"
    )
    assert "give --out to write the model, --check TEXT" in fails(*transfer)
    assert digests(source) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "new", "notes", "out", "source"]


def test_a_failed_write_leaves_what_was_there(
    tmp_path: Path, source: Path, new: Tokenizer, monkeypatch: pytest.MonkeyPatch, fails: Moai
) -> None:  # fmt: skip
    out = write_model(tmp_path / "out", new)
    before = digests(out)

    def full(self: Tokenizer, directory: Path) -> Path:
        raise OSError(28, "No space left on device")

    tok = new.save(tmp_path / "new")
    monkeypatch.setattr(Tokenizer, "save", full)
    transfer = ("tokenizer", "transfer", "--model", source, "--tokenizer", tok, "--out", out, "--overwrite")
    assert "cannot be written" in fails(*transfer)
    assert digests(out) == before and not [p for p in tmp_path.iterdir() if p.name.startswith(".tmp")]


def test_mistakes(fails: Moai, tmp_path: Path, source: Path, tokenizer: Tokenizer) -> None:
    tok, out = tokenizer.save(tmp_path / "tok"), tmp_path / "out"

    def message(model: Path, new: Path, *more: object) -> str:
        return fails("tokenizer", "transfer", "--model", model, "--tokenizer", new, "--out", out, *more)

    assert "nowhere: no such directory" in message(tmp_path / "nowhere", tok)
    assert "no tokenizer.json there" in message(source, tmp_path / "nowhere")
    spec = json.loads((tok / "tokenizer.json").read_text())
    pieces = tmp_path / "pieces"
    tokenizer.save(pieces)
    spec["model"]["vocab"]["▁the"] = 700
    (pieces / "tokenizer.json").write_text(json.dumps(spec))
    assert "the new tokenizer is not byte-level" in message(source, pieces)
    nameless = build_tokenizer([], ["<|x|>"]).save(tmp_path / "nameless")
    assert "this tokenizer has no eos_token" in message(source, nameless)
    steps = ("--check", tok / "tokenizer_config.json", "--steps", 0)
    assert "--steps 0: give numbers of training steps" in message(source, tok, *steps)
    larger = build_tokenizer([], ["<|endoftext|>", *[f"<|{i}|>" for i in range(300)]])
    larger.save(source)
    assert "has 512 rows in its embedding and its tokenizer ids up to 556" in message(source, tok)
    (source / "tokenizer.json").unlink()
    assert "holds a model but no tokenizer.json" in message(source, tok)
    assert not out.exists()


def test_the_table_of_a_check(
    moai: Moai, tmp_path: Path, source: Path, new: Tokenizer, text_file: Path
) -> None:  # fmt: skip
    before = digests(source)
    transfer = ("tokenizer", "transfer", "--model", source, "--tokenizer", new.save(tmp_path / "new"))
    output = moai(*transfer, "--check", text_file, "--steps", 3, 1, "--lr", 1e-2, "--device", "cpu")
    lines = output.splitlines()[1:]
    assert re.split(r"  +", lines[0]) == ["bits per byte", "at once", "1 steps", "3 steps", "held-out tokens"]
    table = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert list(table) == [UNCHANGED, "mean", "last", "first", "random"]
    for cells in table.values():
        once, one, three, tokens = float(cells[0]), float(cells[1]), float(cells[2]), int(cells[3].replace(",", ""))
        assert once > one > three > 0 and tokens > 100
    assert len({cells[0] for cells in table.values()}) == 5 and table[UNCHANGED][3] != table["mean"][3]
    assert digests(source) == before


def test_a_trial_repeats_and_leaves_its_model_alone(tmp_path: Path, source: Path, new: Tokenizer) -> None:
    transfer = Transfer(source, new)
    texts = [(TEXT * 3 + str(i), "") for i in range(20)]
    trial = Trial(transfer, texts, [2], tmp_path / "trial", device="cpu", lr=1e-2)
    first = trial.bits_per_byte("random", seed=1)
    assert trial.bits_per_byte("random", seed=1) == first != trial.bits_per_byte("random", seed=2)
    fresh = AutoModelForCausalLM.from_pretrained(source)
    assert torch.equal(transfer.model.lm_head.weight, fresh.lm_head.weight)
    found = trial.bits_per_byte(UNCHANGED)[0]
    held_out = [text for i, (text, _) in enumerate(texts) if i % 10 == 0]
    total = sum((evaluate_text(TextModel(fresh, transfer.old, source), text) for text in held_out[1:]),
                evaluate_text(TextModel(fresh, transfer.old, source), held_out[0]))  # fmt: skip
    assert found == pytest.approx(total.bits_per_byte, rel=0.05)  # that one also counts the ends of text


@pytest.mark.slow
def test_a_trained_model_starts_better_from_the_old_tokens_than_from_chance(tmp_path: Path) -> None:
    """Trained on one half of the standard library's documents, moved to a tokenizer extended on the other."""
    texts = [text for text, place in library_texts() if not place.startswith("source")]
    base, domain = texts[::2], texts[1::2]
    old = train_tokenizer(base, 1024)
    prepare_texts(((text, "") for text in base), old, tmp_path / "store", [])
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 128}  # fmt: skip
    train(recipes.from_tree({
        "model": sizes, "data": {"train": str(tmp_path / "store"), "seq_len": 128}, "optim": {"lr": 4e-3},
        "train": {"out": str(tmp_path / "run"), "steps": 600, "batch_tokens": 1024, "device": "cpu"},
    }))  # fmt: skip
    new = extend_tokenizer(old, [text for i, text in enumerate(domain) if i % 10], 1536)
    transfer = Transfer(find_source(str(tmp_path / "run")), new)
    trial = Trial(transfer, ((text, "") for text in domain), [20], tmp_path / "trial", device="cpu", lr=1e-3)
    found = {name: trial.bits_per_byte(name) for name in (UNCHANGED, "mean", "random")}
    for mean, random in zip(found["mean"], found["random"]):
        assert mean < 0.98 * random, found
    assert trial.held_out_tokens("mean") < 0.9 * trial.held_out_tokens(UNCHANGED)
