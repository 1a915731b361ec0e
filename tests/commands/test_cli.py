"""The command line: every verb on small files, and the message each mistake gets."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from moai_llm.cli import COMMANDS, Parser
from moai_llm.commands import train
from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.fim import FIM_TOKENS
from moai_llm.tokenizer.train import SPECIAL_TOKENS, train_tokenizer
from tests.commands.conftest import Moai


def test_help(moai: Moai) -> None:
    for arguments in ((), ("--help",), ("help",)):
        output = moai(*arguments)
        assert all(verb in output for verb in COMMANDS)
    assert moai("--version").startswith("moai 0.")


def test_from_text_to_chat(moai: Moai, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The main job by its single commands."""
    chats = tmp_path / "chat.jsonl"
    chats.write_text("".join(f'{{"Q": "question {i % 3}", "A": "answer {i % 3}"}}\n' for i in range(30)))
    tok, text, talk, base, tuned = (tmp_path / name for name in ("tok", "text", "talk", "base", "tuned"))
    assert "300 tokens" in moai("tokenizer", "train", text_file, "--vocab-size", 300, "--out", tok)
    assert "bytes per token" in moai("tokenizer", "show", tok, "interest 이자")
    assert "40" in moai("data", "prepare", text_file, "--tokenizer", tok, "--out", text)
    moai("data", "prepare", chats, "--chat", "--tokenizer", tok, "--out", talk)
    info = moai("data", "info", talk, "--seq-len", 64)
    assert "chat" in info and "damage" in info and "none" in info
    info = moai("data", "info", text, "--seq-len", 100, "--packing", "balanced", "--overlong", "drop")
    assert re.search(r"documents dropped +[1-9]", info) and re.search(r"attention wait +\d", info)
    assert "<|im_start|>assistant" in moai("data", "show", talk, 0, "--seq-len", 64)
    small = ["data.seq_len=64", "train.batch_tokens=512", "train.device=cpu", "optim.lr=1e-2", "log.every=20"]
    output = moai(
        "train",
        "moai-3b-tiny",
        f"data.train={text}",
        f"data.valid={text}",
        "train.steps=20",
        f"train.out={base}",
        *small,
    )
    assert "train 20/20  loss" in output and "bits_per_byte" in output
    assert "Next: moai generate" in output and "moai chat" not in output
    output = moai(
        "train",
        "moai-3b-tiny",
        f"data.train={talk}",
        f"train.init_from={base}",
        "train.steps=60",
        f"train.out={tuned}",
        *small,
    )
    assert "Next: moai chat" in output and "moai generate" not in output
    assert moai("generate", base, "--prompt", "Document", "--max-new-tokens", 5, "--temperature", 0).startswith(
        "Document"
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("question 1\n"))
    assert "answer" in moai("chat", tuned, "--temperature", 0, "--max-new-tokens", 12)
    assert str(text_file) in moai("eval", "perplexity", base, text_file)
    assert "--text" in moai("eval", "perplexity", base, "--text", "interest is paid")
    monkeypatch.setattr("sys.stdin", io.StringIO("Document 3"))
    assert moai("generate", base, "--prompt", "-", "--max-new-tokens", 2).startswith("Document 3")


def test_a_tokenizer_is_not_overwritten(moai: Moai, fails: Moai, tmp_path: Path, text_file: Path) -> None:
    learn = ("tokenizer", "train", text_file, "--out", tmp_path / "tok", "--vocab-size")
    moai(*learn, 300)
    assert "holds a tokenizer already: choose another --out or pass --overwrite" in fails(*learn, 280)
    assert "280 tokens" in moai(*learn, 280, "--overwrite")


def test_conversations(moai: Moai, fails: Moai, tmp_path: Path, tokenizer: Tokenizer) -> None:
    chats, tok, out = tmp_path / "chats.jsonl", tokenizer.save(tmp_path / "tok"), tmp_path / "out"
    chats.write_text(json.dumps({"Question": "why", "Answer": "because " * 900}) + "\n")
    prepare = ("data", "prepare", chats, "--chat", "--tokenizer", tok, "--out", out)
    assert "1 of 1 conversations are longer than 1,024 tokens" in moai(*prepare)
    settings = json.loads((tok / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (tok / "tokenizer_config.json").write_text(json.dumps(settings))
    message = fails(*prepare, "--overwrite")
    assert "no pad_token: name one of its special tokens (<|endoftext|>, <|pad|>" in message
    assert (out / "manifest.json").is_file()


def test_a_part_is_held_out(moai: Moai, fails: Moai, tmp_path: Path, text_file: Path, tokenizer: Tokenizer) -> None:
    prepare = ("data", "prepare", text_file, "--tokenizer", tokenizer.save(tmp_path / "tok"), "--out", tmp_path / "out")
    held_out = ("--valid", tmp_path / "valid", "--valid-share", 0.1)
    output = moai(*prepare, *held_out)
    assert re.search(r"/out +36 +36 ", output) and re.search(r"/valid +4 +4 ", output)
    assert f"data.valid={tmp_path / 'valid'}" in output
    documents = [re.search(r"documents +(\d+)", moai("data", "info", tmp_path / name)) for name in ("out", "valid")]
    assert [int(found[1]) for found in documents if found] == [36, 4]
    assert "exists already" in fails(*prepare, *held_out)


def test_source_code(moai: Moai, fails: Moai, tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = "".join(f"def f{i}(a):\n    b = a + {i}\n    return b\n\n\n" for i in range(30))
    code, prose, out = tmp_path / "code.py", tmp_path / "prose.txt", tmp_path / "out"
    code.write_text(source)
    prose.write_text("no code")
    filling = train_tokenizer([source], 330, special_tokens=(*SPECIAL_TOKENS, *FIM_TOKENS), fewer=True)
    tail = ("--tokenizer", filling.save(tmp_path / "tok"), "--out", out, "--overwrite")
    output = moai("data", "prepare", code, prose, *tail, "--fim", 1, "--fim-order", "psm", "--code-chunk", 100)
    found = re.search(r"source code: (\d+); rearranged to fill in the middle: (\d+)", output)
    assert found and int(found[1]) > 3 and found[1] == found[2]
    assert "<|fim_prefix|>" in moai("data", "show", out)
    assert "none of the documents is source code" in moai("data", "prepare", prose, *tail, "--fim", 0.5)
    assert "source code: 1;" in moai("data", "prepare", prose, *tail, "--fim", 0.5, "--code-language", "python")
    chunk = ("--code-chunk", 100, "--fim-order", "spm")
    assert "--fim-order does nothing without --fim" in fails("data", "prepare", code, *tail, *chunk)
    assert "nothing without --fim or" in fails("data", "prepare", code, *tail, "--code-language", "c")
    assert "above 0 and be at most 1, got 2" in fails("data", "prepare", code, *tail, "--fim", 2)
    plain = ("--tokenizer", tokenizer.save(tmp_path / "plain"), "--out", tmp_path / "x")
    assert "this tokenizer has no <|fim_prefix|>" in fails("data", "prepare", code, *plain, "--fim", 0.5)
    assert not (tmp_path / "x").exists()


def test_the_examples_of_train_help(moai: Moai) -> None:
    """Each is taken as it stands, and says exactly once how long to train."""
    lines = [line for line in (train.__doc__ or "").splitlines() if line.startswith("moai train moai")]
    lines = [line for line in lines if not line.endswith("--test")]  # which says by itself how long
    assert len(lines) == 5
    for line in lines:
        tree = yaml.safe_load(moai(*shlex.split(line)[1:], "--show"))
        assert sum(tree["train"][name] is not None for name in ("steps", "tokens", "epochs")) == 1


def parsers_of(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from parsers_of(child)


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_argument_says_what_it_is(verb: str) -> None:
    parser = Parser(prog=verb)
    importlib.import_module(COMMANDS[verb][0]).configure(parser)
    arguments = [action for child in parsers_of(parser) for action in child._actions]
    assert not [a.dest for a in arguments if not a.help and not isinstance(a, argparse._SubParsersAction)]


def test_recipes(moai: Moai) -> None:
    output = moai("recipes")
    assert "3,001,401,088" in output and "-tiny" not in output
    assert "moai-3b-tiny" in moai("recipes", "--tiny")
    assert moai("recipes", "--markdown").startswith("| recipe | parameters |")
    shown = moai("recipes", "moai-3b", "model.num_hidden_layers=1")
    assert "# total: 559" in shown and "num_hidden_layers: 1" in shown
    assert "hidden_size: 3840" in moai("train", "moai-3b", "--show")


def test_overrides_stand_before_and_after_flags(moai: Moai) -> None:
    shown = moai("train", "moai-3b-tiny", "optim.lr=0.5", "--show", "train.epochs=7")
    assert "lr: 0.5" in shown and "epochs: 7" in shown and "steps: null" in shown


def test_ops(moai: Moai) -> None:
    output = moai("ops", "--device", "cpu")
    assert "selective_scan" in output and "split" in output
    built = re.search(r"selective_scan.cpp is built for this CPU: (\S+)", output)
    assert built and Path(built[1]).is_file() or "native (no: " in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "there is no command 'trian' (did you mean 'train'?)"),
        (["train", "moai-3"], "no recipe 'moai-3' (did you mean 'moai-3b'?)"),
        (["train", "moai-3b-tiny", "train.stps=3"], "did you mean 'steps'"),
        (["train", "moai-3b-tiny", "train.steps=3"], "data.train is not set"),
        (["data", "info", "nowhere"], "not a prepared store"),
        (["data", "prepare", "nowhere.txt", "--tokenizer", "x", "--out", "y"], "no tokenizer.json there"),
        (["tokenizer", "train", "nowhere.txt", "--out", "y"], "nowhere.txt: no such file or folder"),
        (["tokenizer", "show", "nowhere", "text"], "no tokenizer.json there"),
        (["generate", "nowhere", "--prompt", "x"], "nowhere: no such directory"),
        (["chat", "nowhere"], "nowhere: no such directory"),
        (["eval", "perplexity", "nowhere"], "give either files or --text"),
        (["train", "moai-3b-tiny", "--show", "optim.lr=-1"], "optim.lr: input should be greater than or equal to 0"),
    ],
)
def test_mistakes(fails: Moai, arguments: list[str], message: str) -> None:
    assert message in fails(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "required: recipe"),
        (["train", "moai-3b-tiny", "--resum"], "unknown argument '--resum' (did you mean '--resume'?)"),
        (["generate", "m", "--prompt", "x", "--temprature", "1"], "did you mean '--temperature'?"),
        (["data", "prepare", "x", "--tokeniser", "t", "--out", "o"], "required: --tokenizer"),
        (["eval", "perplexity", "m", "--windw", "3"], "did you mean '--window'?"),
        (["tokenizer", "trane"], "invalid choice: 'trane'"),
        (["tokenizer"], "required: {train,extend,show,report,transfer,template}"),
        (["data"], "required: {prepare,schema,merge,verify,info,show,clean,dedup,contamination,mine}"),
        (["eval"], "required: {perplexity,tasks,experts,long,retrieval,sts,compare,schema}"),
        (["generate", "m", "--prompt", "x", "--top-k", "many"], "invalid int value: 'many'"),
    ],
)
def test_wrong_command_lines(fails: Moai, arguments: list[str], message: str) -> None:
    assert message in fails(*arguments, code=2)
