"""`moai export` and `moai import` at the command line, and the tables of docs/export.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from moai_llm.export.gguf_file import TYPES
from moai_llm.export.layout import ARCHITECTURES, refusals
from moai_llm.modeling.convert import refusals as in_transformers
from moai_llm.modeling.families import FAMILIES
from moai_llm.recipe import get_config, list_recipes
from moai_llm.tokenizer import Tokenizer
from tests.commands.conftest import Moai
from tests.conftest import ROOT, tiny_config
from tests.export.conftest import KINDS, save

PAGE = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    return save(tiny_config(**KINDS["jamba, no attention"][0]), tokenizer, tmp_path / "chat")


def test_export_says_what_it_found(folder: Path, tmp_path: Path, moai: Moai) -> None:
    out = moai("export", folder, "--format", "hf", "--out", tmp_path / "hf")
    assert "JambaForCausalLM, fp32, " in out and "read again, it says what the model says: largest difference" in out
    assert "tokenizer: 0 of 56 sample texts get other ids" in out and "note: one attention layer of zeros" in out
    out = moai("export", folder, "--format", "hf", "--dtype", "bf16", "--out", tmp_path / "hf", "--overwrite")
    assert "what bf16 costs: largest difference" in out and "read again" in out
    out = moai("export", folder, "--format", "gguf", "--dtype", "q8_0", "--out", tmp_path / "gguf")
    assert "jamba, q8_0, " in out and "what q8_0 costs" in out and "read again, it" not in out
    assert 'TEMPLATE """' in (tmp_path / "gguf" / "Modelfile").read_text()
    moai("export", folder, "--format", "gguf", "--as", "jamba", "--split", "gpt-4o", "--out", tmp_path / "one.gguf")
    assert {path.name for path in tmp_path.iterdir()} == {"chat", "hf", "gguf", "one.gguf"}


def test_list_takes_models_and_presets(folder: Path, moai: Moai) -> None:
    for name in (folder, "moai-mamba-2b"):
        rows = [line.split(maxsplit=3) for line in moai("export", name, "--list").splitlines()[1:]]
        assert {(row[0], row[1]) for row in rows} == {
            *(("hf", family) for family in FAMILIES), *(("gguf", architecture) for architecture in ARCHITECTURES),
        }  # fmt: skip
        assert [row[:3] for row in rows if row[2] == "yes"] == [["hf", "jamba", "yes"], ["gguf", "jamba", "yes"]]
        assert all(row[3] for row in rows if row[2] == "no")


def test_mistakes_get_a_message(folder: Path, tmp_path: Path, fails: Moai) -> None:
    out = tmp_path / "out"
    assert "--list shows" in fails("export", folder, "--format", "hf")
    assert "mamba: it is Mamba layers alone" in fails("export", folder, "--format", "hf", "--out", out, "--as", "mamba")
    assert "fp32 or bf16" in fails("export", folder, "--format", "hf", "--dtype", "q4_0", "--out", out)
    assert "int4 or int8" in fails("export", folder, "--format", "compressed-tensors", "--dtype", "bf16", "--out", out)
    assert "--group-size belongs to" in fails("export", folder, "--format", "hf", "--group-size", "32", "--out", out)
    assert "--split belongs to --format gguf" in fails("export", folder, "--format", "hf", "--split", "x", "--out", out)
    assert "rules for this tokenizer are" in fails("export", folder, "--format", "gguf", "--split", "x", "--out", out)
    assert "no such directory" in fails("export", tmp_path / "none", "--format", "hf", "--out", out)
    assert "--overwrite" in fails("export", folder, "--format", "hf", "--out", ROOT / "docs")
    assert "invalid choice: 'onnx'" in fails("export", folder, "--format", "onnx", "--out", out, code=2)
    assert "ours already" in fails("import", folder, "--out", out)
    assert not out.exists()


def test_a_model_of_others_is_sent_to_import(folder: Path, tmp_path: Path, moai: Moai, fails: Moai) -> None:
    moai("export", folder, "--format", "hf", "--out", tmp_path / "hf")
    message = fails("export", tmp_path / "hf", "--format", "hf", "--out", tmp_path / "again")
    assert "bring it here with `moai import`" in message
    out = moai("import", tmp_path / "hf", "--out", tmp_path / "back")
    assert "read again, it says what the JambaForCausalLM says" in out


def rows(header: str) -> list[list[str]]:
    """The rows of the table whose header begins so, without backticks."""
    lines = PAGE.split(f"| {header} |", 1)[1].splitlines()[2:]
    table = lines[: next(i for i, line in enumerate([*lines, ""]) if not line.startswith("|"))]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table]


def test_the_page_lists_what_there_is() -> None:
    assert {row[0]: row[1] for row in rows("`--format hf`")} == {n: f.model_class for n, f in FAMILIES.items()}
    assert [row[0] for row in rows("`--format gguf`")] == list(ARCHITECTURES)
    assert {row[0] for row in rows("`--dtype`")} == set(TYPES)
    presets = {row[0]: row[1:] for row in rows("preset")}
    texts = [name for name in list_recipes() if not name.startswith("moai-embed")]  # vectors have a page of their own
    assert list(presets) == [name for name in texts if not name.endswith("-tiny")]
    for name, found in presets.items():
        config = get_config(name)
        first = [
            next((target for target, reason in reasons.items() if reason is None), "no")
            for reasons in (in_transformers(config), refusals(config))
        ]
        assert found == first, name
