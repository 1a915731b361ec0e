"""A model as a directory of transformers' own class: the same logits, tokenizer and stops, and nothing of ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open

from moai_llm.export import native
from moai_llm.export.native import export_native
from moai_llm.inference.load import load_model
from moai_llm.inference.sampling import Sampling
from moai_llm.inference.session import Session
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.chat import render
from tests.conftest import tiny_config
from tests.export.conftest import KINDS, save

TALK = [{"role": "user", "content": "이자가 뭐예요?"}, {"role": "assistant", "content": "Interest."},
        {"role": "user", "content": "Why?"}]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_what_was_written(kind: str, made: Callable[..., Path], tmp_path: Path) -> None:
    folder, out = made(kind), tmp_path / "out"
    done = export_native(folder, out)
    assert done.target == KINDS[kind][1] and done.rounding is None and done.tokenizer[1] == 0
    assert done.found is not None and done.found.largest < 1e-5 and done.found.longest == 128
    ours = load_model(folder, "cpu", "fp32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert type(theirs).__name__ == KINDS[kind][1]
    size = ours.tokenizer.vocab_size
    assert theirs.config.vocab_size == size < ours.model.config.vocab_size  # without the rows that no token uses
    ids = torch.randint(0, size, (2, 70))
    with torch.no_grad():
        expected = ours.model(ids).logits[..., :size]
        assert (theirs(ids).logits - expected).abs().max() < 1e-5
        assert (theirs(ids.flip(1)).logits - expected).abs().max() > 1e-2  # control


@pytest.mark.filterwarnings("ignore")
def test_what_lies_there_is_of_transformers_alone(made: Callable[..., Path], tmp_path: Path) -> None:
    folder, out = made("jamba"), tmp_path / "out"
    export_native(folder, out)
    assert {file.name for file in out.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja",
    }  # fmt: skip
    assert "moai" not in (out / "config.json").read_text()
    ours = load_model(folder, "cpu", "fp32")
    stops = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert stops == ours.tokenizer.stop_ids and len(stops) == 2
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    rendered = theirs.apply_chat_template(TALK, add_generation_prompt=True)["input_ids"]
    assert rendered == render(ours.tokenizer, TALK, add_generation_prompt=True).ids
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    got = model.generate(torch.tensor([rendered]), max_new_tokens=12, do_sample=False)[0, len(rendered) :].tolist()
    expected = list(Session(ours).stream(rendered, Sampling(max_new_tokens=12, temperature=0)))
    assert got[: len(expected)] == expected and got[len(expected) :] in ([], [got[-1]])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["qwen3", "jamba, no attention"])
def test_bf16_is_rounded_once_and_what_it_costs_is_said(kind: str, made: Callable[..., Path], tmp_path: Path) -> None:
    done = export_native(made(kind), tmp_path / "out", dtype="bf16")
    assert done.found is not None and done.found.largest < 1e-5
    assert done.rounding is not None and 1e-3 < done.rounding.largest < 1
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        types = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    kept = {name for name, dtype in types.items() if dtype == torch.float32}
    assert kept == {name for name in types if name.endswith(("A_log", ".D", "dt_proj.bias"))}
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_a_family_can_be_named(made: Callable[..., Path], tmp_path: Path) -> None:
    assert export_native(made(), tmp_path / "out", family="qwen3").target == "Qwen3ForCausalLM"
    with pytest.raises(MoaiError, match="llama: it does not normalise"):
        export_native(tmp_path / "made", tmp_path / "other", family="llama")
    with pytest.raises(MoaiError, match="did you mean 'llama'"):
        export_native(tmp_path / "made", tmp_path / "other", family="lama")


def test_what_no_class_computes_is_refused_before_it_is_loaded(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = save(tiny_config(position_embedding="learned"), tokenizer, tmp_path / "made")
    (folder / "model.safetensors").unlink()
    with pytest.raises(MoaiError) as caught:
        export_native(folder, tmp_path / "out")
    assert str(caught.value).count("it has no learned positions") == 8
    with pytest.raises(MoaiError, match="fp32 or bf16, not 'q8_0'"):
        export_native(folder, tmp_path / "out", dtype="q8_0")


def test_a_run_is_its_newest_checkpoint(made: Callable[..., Path], tmp_path: Path) -> None:
    folder = made()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    folder.rename(tmp_path / "run" / "checkpoints" / "step-00000004")
    (tmp_path / "run" / "checkpoints" / "step-00000002").mkdir()
    assert export_native(tmp_path / "run", tmp_path / "out").path == tmp_path / "out"


def test_nothing_is_replaced_by_accident(made: Callable[..., Path], tmp_path: Path) -> None:
    folder, out = made(), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(MoaiError, match="--overwrite"):
        export_native(folder, out)
    with pytest.raises(MoaiError, match="holds no exported model"):
        export_native(folder, out, overwrite=True)
    for place in (folder, folder / "inside", folder.parent):
        with pytest.raises(MoaiError, match="only read"):
            export_native(folder, place, overwrite=True)
    (out / "notes.txt").unlink()
    (out / "config.json").write_text("{}")
    export_native(folder, out, overwrite=True)
    assert (out / "model.safetensors").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"made", "out"}


def test_a_wrong_copy_is_found_and_not_kept(
    made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = made(), tmp_path / "out"
    export_native(folder, out)
    before = (out / "model.safetensors").read_bytes()

    def wrong(model, family):  # type: ignore[no-untyped-def]
        made = to_native(model, family)
        made.model.layers[0].self_attn.q_norm.weight.data.mul_(1.01)
        return made

    to_native = native.to_native
    monkeypatch.setattr(native, "to_native", wrong)
    with pytest.raises(MoaiError, match="Qwen3ForCausalLM that was written does not compute"):
        export_native(folder, out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"made", "out"}
