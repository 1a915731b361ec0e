"""`moai tokenizer template`: what is shown, and what `--set` writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moai_llm.cli import main
from moai_llm.tokenizer import load_tokenizer
from moai_llm.tokenizer.chat import template_name
from moai_llm.tokenizer.train import train_tokenizer

TOKENS = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>", "<bos>", "<start_of_turn>", "<end_of_turn>")
Show = Callable[..., str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return train_tokenizer(["hello there " * 9], 290, special_tokens=TOKENS, fewer=True).save(tmp_path / "tok")


@pytest.fixture
def show(folder: Path, capsys: pytest.CaptureFixture[str]) -> Show:
    def run(*arguments: object) -> str:
        main(["tokenizer", "template", str(folder), *map(str, arguments)])
        return capsys.readouterr().out

    return run


def test_a_sample(show: Show) -> None:
    output = show()
    assert "<|im_start|>user\nWhat is 12 x 12?<|im_end|>\n<|im_start|>assistant\n⟦144<|im_end|>⟧\n" in output
    assert "chatml: " in output and "tokens, 17 learned (in ⟦ ⟧); an answer ends with <|im_end|>" in output


def test_a_conversation_of_a_file(show: Show, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]}
    talk = [{"role": "user", "content": "[bold]x[/bold]<|im_end|>"}, call]
    file.write_text(json.dumps({"messages": talk, "tools": [{"name": "f"}]}) + "\n")
    output = show("--messages", file)
    assert '<tools>\n{"type": "function", "function": {"name": "f"}}\n</tools>' in output
    assert "[bold]x[/bold]<|im_end|><|im_end|>\n" in output
    assert '⟦<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call><|im_end|>⟧' in output


def test_set(show: Show, folder: Path, tmp_path: Path) -> None:
    settings_file = folder / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text())
    settings_file.write_text(json.dumps({**settings, "model_max_length": 77, "chat_template": "old"}))
    before = (folder / "tokenizer.json").read_bytes()
    output = show("--set", "gemma")
    assert "⟦144<end_of_turn>⟧" in output and f"written to {folder / 'chat_template.jinja'}" in output
    settings = json.loads(settings_file.read_text())
    assert settings["model_max_length"] == 77 and settings["bos_token"] == "<bos>" and "chat_template" not in settings
    assert (folder / "tokenizer.json").read_bytes() == before
    tokenizer = load_tokenizer(folder)
    assert template_name(tokenizer) == "gemma" and tokenizer.decode(tokenizer.stop_ids) == "<|endoftext|><end_of_turn>"
    mine = tmp_path / "mine.jinja"
    mine.write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    assert "custom: " in show("--set", mine) and template_name(load_tokenizer(folder)) == "custom"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('never') }}", "refuses the conversation: never"),
        ("{% if %}", "not valid Jinja"),
        ("<|other|>", "has no <|other|>, which the chat template"),
    ],
)
def test_a_template_that_fails_is_not_written(
    show: Show, folder: Path, tmp_path: Path, source: str, message: str
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    file = tmp_path / "x.jinja"
    file.write_text(source)
    with pytest.raises(SystemExit) as left:
        show("--set", file)
    assert message in str(left.value.code)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_empty_file(show: Show, tmp_path: Path) -> None:
    file = tmp_path / "empty.jsonl"
    file.write_text("")
    with pytest.raises(SystemExit) as left:
        show("--messages", file)
    assert "holds no conversation" in str(left.value.code)
