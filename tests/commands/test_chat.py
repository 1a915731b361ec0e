"""`moai chat` on everything that can be talked to, and what it says to the rest."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from moai_llm.modeling.model import MoaiForCausalLM
from moai_llm.optimization import LoraConfig
from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.train import build_tokenizer
from moai_llm.training import lora
from tests.commands.conftest import Moai
from tests.conftest import tiny_config, tiny_model
from tests.export.conftest import KINDS, save

ASK = ("--once", "이자가 뭐예요?", "--temperature", 0, "--max-new-tokens", 12, "--device", "cpu", "--dtype", "fp32")


@pytest.fixture
def model(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    return save(tiny_config(), tokenizer, tmp_path / "model")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe", "mamba", "jamba"])
def test_an_export_answers_as_the_model_does(kind: str, moai: Moai, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = save(tiny_config(**KINDS[kind][0]), tokenizer, tmp_path / "made")
    moai("export", folder, "--format", "hf", "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [KINDS[kind][1]]
    answer = moai("chat", tmp_path / "out", *ASK)
    assert answer == moai("chat", folder, *ASK) and len(answer) > 4
    changed = MoaiForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        changed.get_output_embeddings().weight.add_(0.1 * torch.randn_like(changed.get_output_embeddings().weight))
    changed.save_pretrained(folder)
    assert moai("chat", folder, *ASK) != answer  # control


def test_adapters_and_their_sum_give_one_answer(moai: Moai, tokenizer: Tokenizer, tmp_path: Path) -> None:
    base, summed = tmp_path / "base", tmp_path / "step-1"
    save(tiny_config(), tokenizer, base)
    model = MoaiForCausalLM.from_pretrained(base)
    lora.add_adapters(model, LoraConfig(rank=2), str(base))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.3)
    weights, plain = lora.summed_weights(model), lora.plain_twin(model)
    plain.save_pretrained(summed, state_dict=weights)
    tokenizer.save(summed)
    lora.write_adapter(summed / lora.FOLDER, lora.adapter_tensors(model), lora.adapter_config(model))
    answer = moai("chat", summed, *ASK)
    assert answer == moai("chat", summed / lora.FOLDER, *ASK) != moai("chat", base, *ASK)


def test_once_loaded_and_piped(
    moai: Moai, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = moai("chat", model, *ASK).removesuffix("\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("이자가 뭐예요?\n"))
    assert moai("chat", model, "--once", "-", *ASK[2:]) == first + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"이자가 뭐예요?\n/save {tmp_path}/talk\nwhy?\n"))
    piped = moai("chat", model, *ASK[2:])
    assert piped.startswith(first + "\n") and "saved" not in piped
    talk = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))["messages"]
    assert [m["content"] for m in talk] == ["이자가 뭐예요?", first]
    answer = moai("chat", model, "--load", tmp_path / "talk.json", "--once", "why?", *ASK[2:])
    assert len(answer) > 1
    other = moai(
        "chat", model, "--load", tmp_path / "talk.json", "--system", "짧게 답해요.", "--once", "why?", *ASK[2:]
    )
    assert other != answer != moai("chat", model, "--once", "why?", *ASK[2:])  # both are seen


def test_the_saved_file_can_be_trained_on(moai: Moai, model: Path, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (tmp_path / "talk.json").write_text(json.dumps({"messages": talk}, indent=1))
    moai("data", "prepare", tmp_path / "talk.json", "--chat", "--tokenizer", model, "--out", tmp_path / "store")
    shown = moai("data", "show", tmp_path / "store", "--document", 0)
    assert "hi" in shown and "ho" in shown


def test_mistakes(fails: Moai, model: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    tiny_model(vocab_size=384).float().save_pretrained(plain)
    build_tokenizer([], ["<|endoftext|>", "<|pad|>"]).save(plain)
    message = fails("chat", plain)
    assert f"moai generate {plain}" in message and f"moai tokenizer template {plain} --set chatml" in message
    assert "--once needs a question" in fails("chat", model, "--once", " ")
    assert "top_p = 2.0 is out of range" in fails("chat", model, "--top-p", 2)
    assert "cannot be read: No such file" in fails("chat", model, "--load", tmp_path / "no.json")
    (tmp_path / "bad.json").write_text("{")
    assert "bad.json is not a JSON file" in fails("chat", model, "--load", tmp_path / "bad.json")
    assert "this model takes 128" in fails("chat", model, "--once", "interest " * 200)
