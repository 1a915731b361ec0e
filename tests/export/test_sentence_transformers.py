"""What sentence-transformers makes of an export is what our model makes; what cannot be exported is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from moai_llm.export import sentence_transformers as export
from moai_llm.export.sentence_transformers import export_sentence_transformers
from moai_llm.inference.embed import embed, load_embedder
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from tests.commands.conftest import Moai, fails, moai  # noqa: F401
from tests.inference.test_embed import TEXTS, make_embedder

library = pytest.importorskip("sentence_transformers")


@pytest.mark.parametrize(
    ("mixer", "embedding", "target"),
    [
        ("full_attention", {}, "Qwen3Model"),
        ("full_attention", {"pooling": "last", "projection": 12}, "Qwen3Model"),
        ("linear_attention", {"pooling": "last", "normalize": False}, "JambaModel"),
    ],
)
def test_equal_vectors(
    tmp_path: Path, tokenizer: Tokenizer, mixer: str, embedding: dict[str, object], target: str
) -> None:
    path = make_embedder(tmp_path / "model", tokenizer, mixer, **embedding)
    made = export_sentence_transformers(path, tmp_path / "out")
    assert made.target == target and made.largest <= 1e-5 and made.texts > 100
    again = library.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    ours, theirs = embed(load_embedder(path, "cpu", "fp32"), TEXTS), again.encode(TEXTS)
    assert theirs.shape == ours.shape and np.abs(ours - theirs).max() < 1e-5
    assert "moai" not in json.loads((tmp_path / "out" / "config.json").read_text())["model_type"]


def test_what_differs_is_not_kept(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: one weight is changed between writing and comparing; another time the end of a text is forgotten."""
    path, out = make_embedder(tmp_path / "model", tokenizer), tmp_path / "out"
    real = export._write_modules

    def damaging(place: Path, *rest: object) -> None:
        real(place, *rest)  # type: ignore[arg-type]
        weights = load_file(place / "model.safetensors")
        save_file({**weights, "norm.weight": weights["norm.weight"] * 1.5 + 0.1}, place / "model.safetensors")

    monkeypatch.setattr(export, "_write_modules", damaging)
    with pytest.raises(MoaiError, match="what sentence-transformers makes of it differs by"):
        export_sentence_transformers(path, out)
    monkeypatch.setattr(export, "_write_modules", real)
    monkeypatch.setattr(export, "_write_tokenizer", lambda place, tokenizer, context: tokenizer.save(place))
    with pytest.raises(MoaiError, match="differs by"):
        export_sentence_transformers(path, out)
    assert not out.exists() and [p.name for p in tmp_path.iterdir()] == ["model"]


def test_what_cannot_leave(tmp_path: Path, tokenizer: Tokenizer, moai: Moai, fails: Moai) -> None:  # noqa: F811
    path = make_embedder(tmp_path / "both", tokenizer, bidirectional=True)
    asked = ("--format", "sentence-transformers", "--out", tmp_path / "out")
    assert "its attention looks both ways" in fails("export", path, *asked)
    path = make_embedder(tmp_path / "sliding", tokenizer, "sliding_attention")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "position_embedding": "none"}))
    assert "is read by sentence-transformers only where moai_llm is installed" in fails("export", path, *asked)
    path = make_embedder(tmp_path / "model", tokenizer)
    assert "vectors are written in fp32" in fails("export", path, *asked, "--dtype", "bf16")
    said = moai("export", path, *asked)
    assert "it gives the same vectors: largest difference" in said and "vectors of 32 numbers" in said
    assert "exists already" in fails("export", path, *asked)
