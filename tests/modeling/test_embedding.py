"""Laws of MoaiForEmbedding for every token mixer: alone, padded and packed are the same; saving, loading, settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForTextEncoding

from moai_llm.modeling.embedding import LARGEST_SCALE, MoaiForEmbedding, Settings, load_for_vectors
from moai_llm.runtime import MoaiError
from tests.conftest import TOKEN_MIXERS, tiny_config, tiny_model

LENGTHS = (5, 1, 13, 3)


def vector_model(mixer: str = "full_attention", mlp: str = "dense", **embedding: object) -> MoaiForEmbedding:
    torch.manual_seed(0)
    model = MoaiForEmbedding(tiny_config(mixer, mlp, embedding=embedding)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 61, (length,), generator=generator) for length in LENGTHS]


def packed(documents: list[Tensor], padding: int = 4) -> dict[str, Tensor]:
    """One row, and padding of zeros behind."""
    pieces = [*documents, torch.zeros(padding, dtype=torch.long)]
    return {
        "input_ids": torch.cat(pieces)[None],
        "seq_idx": torch.cat([torch.full((len(p),), i) for i, p in enumerate(pieces)])[None].int(),
        "position_ids": torch.cat([torch.arange(len(p)) for p in pieces])[None],
    }


@pytest.mark.parametrize("mixer", TOKEN_MIXERS)
@pytest.mark.parametrize("pooling", ["mean", "last", "first"])
@pytest.mark.parametrize("both_ways", [False, True])
def test_nothing_leaks(mixer: str, pooling: str, both_ways: bool) -> None:
    model, documents = vector_model(mixer, pooling=pooling, projection=7, bidirectional=both_ways), texts()
    alone = torch.stack([model(document[None]).embeddings[0] for document in documents])
    assert torch.allclose(alone.norm(dim=1), torch.ones(4, dtype=torch.float64))
    for left in (False, True):
        ids, mask = torch.zeros(2, 4, 13, dtype=torch.long)
        for row, document in enumerate(documents):
            place = slice(13 - len(document), 13) if left else slice(0, len(document))
            ids[row, place], mask[row, place] = document, 1
        assert (model(ids, attention_mask=mask).embeddings - alone).abs().max() < 1e-10
    row = packed(documents)
    assert (model(**row, documents=4).embeddings[0] - alone).abs().max() < 1e-10
    if pooling != "first":  # control: one document; its first token need not notice
        leaking = model(**{**row, "seq_idx": row["seq_idx"] * 0}, documents=1).embeddings[0]
        assert (leaking[0] - alone[0]).abs().max() > 1e-3


@pytest.mark.parametrize("mixer", TOKEN_MIXERS)
def test_gradients_of_packed_texts(mixer: str) -> None:
    model, documents = vector_model(mixer, "sparse", bidirectional=True), texts()
    weight = torch.randn(4, 32, dtype=torch.float64)
    sum((model(d[None]).embeddings[0] * w).sum() for d, w in zip(documents, weight)).backward()  # type: ignore[union-attr]
    separate = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    (model(**packed(documents), documents=6).embeddings[0, :4] * weight).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or (parameter.grad - separate[name]).abs().max() < 1e-9


def test_attention_both_ways_sees_what_comes() -> None:
    ids = texts()[2][None]
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % 61
    for both_ways in (False, True):
        model = vector_model(pooling="first", bidirectional=both_ways)
        differs = (model(ids).embeddings - model(changed).embeddings).abs().max() > 1e-6
        assert differs == both_ways


def test_dropout_makes_twins() -> None:
    model, key = vector_model(dropout=0.2).train(), torch.tensor([5])
    ids = texts()[2]
    row = packed([ids, ids])
    one, other = model(**row, documents=2, noise_key=key).embeddings[0]
    assert (one - other).abs().max() > 1e-2  # the same text twice in a row
    assert torch.equal(model(**row, documents=2, noise_key=key).embeddings[0, 0], one)
    assert torch.equal(*model.eval()(**packed([ids, ids]), documents=2).embeddings[0].round(decimals=10))


def test_saving_and_loading(tmp_path: Path) -> None:
    model = vector_model(pooling="last", projection=7, temperature=0.05).float()
    with torch.no_grad():
        model.log_scale.fill_(1.25)  # type: ignore[union-attr]
    model.save_pretrained(tmp_path / "vectors")
    again = AutoModelForTextEncoding.from_pretrained(tmp_path / "vectors")
    assert isinstance(again, MoaiForEmbedding) and again.settings == model.settings and again.width == 7
    assert again.log_scale.item() == 1.25  # type: ignore[union-attr]
    ids = texts()[0][None]
    assert torch.allclose(again(ids).embeddings, model(ids).embeddings, atol=1e-5)
    with pytest.raises(MoaiError, match="cannot be loaded as a model that makes vectors"):
        load_for_vectors(tmp_path / "vectors", Settings(projection=9))
    language = tiny_model().float()
    language.save_pretrained(tmp_path / "language")
    fresh = load_for_vectors(tmp_path / "language", Settings(projection=5, temperature=0.07))
    assert torch.equal(fresh.model.norm.weight, language.model.norm.weight)
    assert 0 < fresh.projection.weight.std().item() < 0.05  # type: ignore[union-attr]
    assert fresh.scale().item() == pytest.approx(1 / 0.07)  # type: ignore[union-attr]
    with torch.no_grad():
        fresh.log_scale.fill_(9.0)  # type: ignore[union-attr]
    fresh.bound_scale()
    assert fresh.scale().item() == pytest.approx(LARGEST_SCALE)  # type: ignore[union-attr]


def test_settings_and_arguments_that_contradict() -> None:
    with pytest.raises(ValueError, match="pooling 'cls' is not one of mean, last, first"):
        Settings(pooling="cls")  # type: ignore[arg-type]
    model, row = vector_model(), packed(texts())
    with pytest.raises(ValueError, match="leave attention_mask out"):
        model(**row, documents=4, attention_mask=torch.ones_like(row["input_ids"]))
