"""--kv-cache, --kv-keep and moai bench kv at the door: what they print, and the message each mistake gets."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest

from moai_llm.cli import main
from moai_llm.tokenizer import Tokenizer
from tests.conftest import tiny_model

DEVICE = ["--device", "cpu", "--dtype", "fp32"]
SHORT = ["--prompt-tokens", "40", "--new-tokens", "3", "--rounds", "1", *DEVICE]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> str:
    folder = tmp_path_factory.mktemp("model")
    bricks = {"layer_types": ["linear_attention", "full_attention"], "mlp_layer_types": ["dense", "dense"]}
    tiny_model(vocab_size=512, **bricks).float().save_pretrained(folder)
    tokenizer.save(folder)
    return str(folder)


@pytest.fixture
def moai(capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    def run(*arguments: str) -> str:
        assert not main(arguments)
        return capsys.readouterr().out

    return run


def failure(*arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return str(ended.value.code)


def test_exact_kinds_generate_the_same(moai, model: str) -> None:  # type: ignore[no-untyped-def]
    greedy = ["generate", model, "--prompt", "Interest is", "--temperature", "0", "--max-new-tokens", "6", *DEVICE]
    expected = moai(*greedy)
    for kind in ("dynamic", "static", "int4", "mmap"):  # the residual of int4 holds them all
        assert moai(*greedy, "--kv-cache", kind) == expected
    assert moai(*greedy, "--kv-keep", "sinks:2+window:60") == expected
    assert moai(*greedy, "--kv-keep", "window:1") != expected  # control: the option does something


def test_a_chat_over_a_cache(moai, model: str, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    said = []
    for options in ([], ["--kv-cache", "int8"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n"))
        said.append(moai("chat", model, "--temperature", "0", "--max-new-tokens", "5", *options, *DEVICE))
    assert said[0] == said[1] and said[0].strip()


def test_a_table_of_kinds(moai, model: str) -> None:  # type: ignore[no-untyped-def]
    out = moai("bench", "kv", model, "--kv-residual", "4", *SHORT)
    lines = [line.split() for line in out.splitlines()]
    rows = {line[0]: line for line in lines if line and re.fullmatch(r"[\d.,]+x", line[-1])}
    assert list(rows) == ["dynamic", "static", "int8", "int4", "fp8", "mmap"]
    assert rows["dynamic"][3] == rows["dynamic"][-1] == "1.00x"
    assert "on disk" in " ".join(rows["mmap"])
    for row in rows.values():
        numbers = [word for word in row if word not in ("on", "disk")]
        assert numbers[1] == numbers[2]  # counted and predicted
    assert "over 43 tokens, 32 at a time" in out


def test_rows_as_json(moai, model: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    out = moai("bench", "kv", model, "--text", str(file), "--kinds", "int4,heavy:3+window:5,static", "--chunk", "5",
               "--kv-residual", "0", "--json", *SHORT)  # fmt: skip
    rows = {row["name"]: row for row in json.loads(out)["rows"]}
    assert list(rows) == ["dynamic", "int4", "heavy:3+window:5", "static"]
    assert all(row["bytes_per_token"] == row["predicted"] and row["tokens_per_second"] > 0 for row in rows.values())
    assert rows["dynamic"]["change"] == 0 and abs(rows["static"]["change"]) < 1e-4
    assert abs(rows["int4"]["change"]) > 1e-6 and abs(rows["heavy:3+window:5"]["change"]) > 1e-3
    assert rows["int4"]["bytes_per_token"] < rows["dynamic"]["bytes_per_token"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--kv-cache", "int4", "--kv-keep", "window:3"], "does not go with int4: choose one"),
        (["--kv-keep", "window"], "is not one of window:N"),
        (["--kv-residual", "4"], "--kv-residual is a setting of int4 and int8: name the kind as well"),
        (["--kv-cache", "int4", "--kv-window", "4"], "--kv-window is a setting of sliding"),
        (["--kv-cache", "mmap", "--kv-dir", "/nowhere"], "no such directory"),
        (["--kv-cache", "offload"], "this model is there already"),
        (["--kv-cache", "sliding"], "add --kv-window N"),
        (["--kv-cache", "sliding", "--kv-window", "0"], "must be at least 1"),
        (["--kv-cache", "int8", "--num-samples", "2"], "leave out --num-samples"),
        (["--kv-keep", "window:4", "--prompt-lookup"], "--prompt-lookup needs the engine's own cache"),
    ],
)
def test_mistakes(model: str, options: list[str], says: str) -> None:
    assert says in failure("generate", model, "--prompt", "a", *options, *DEVICE)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--kinds", "int5"], "'int5' is neither one of dynamic"),
        (["--kinds", "dynamic", "--kv-dir", "/tmp"], "--kv-dir is a setting of mmap"),
        (["--kinds", "sliding"], "add --kv-window N"),
        (["--rounds", "0"], "--rounds 0: at least 1"),
        (["--prompt-tokens", "200"], "this model takes 128"),
        (["--text", "/nowhere.txt"], "No such file"),
    ],
)
def test_mistakes_of_the_benchmark(model: str, options: list[str], says: str) -> None:
    assert says in failure("bench", "kv", model, *SHORT, *options)


def test_a_short_context_makes_the_prompt_shorter(moai, model: str) -> None:  # type: ignore[no-untyped-def]
    out = moai("bench", "kv", model, "--kinds", "static", "--new-tokens", "3", "--rounds", "1", *DEVICE)
    assert "bytes after 128 tokens; speed of 3 tokens after 125" in " ".join(out.split())


def test_a_text_that_is_none(model: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8 text" in failure("bench", "kv", model, "--text", str(tmp_path / "x"), *SHORT)
    (tmp_path / "x").write_text("")
    assert "fewer than two tokens" in failure("bench", "kv", model, "--text", str(tmp_path / "x"), *SHORT)
