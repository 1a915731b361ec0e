"""Laws every pair of bricks obeys, in fp64, each with a control that must fail.

Causality: changing a token never changes logits before it. Cached == uncached. Packed == separate. Left padding
changes nothing.
"""

from __future__ import annotations

import pytest
import torch

from moai_llm.modeling.model import new_cache
from tests.conftest import PAIRS, tiny_config, tiny_model

TOLERANCE = 1e-9  # fp64: a law holds to about 1e-13, a broken one is off by more than 1e-3
LEAK = 1e-4


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids, **arguments):  # type: ignore[no-untyped-def]
    return model(ids, use_cache=False, **arguments).logits


@pytest.mark.parametrize(("mixer", "mlp"), PAIRS)
class TestLaws:
    def test_causality(self, mixer: str, mlp: str) -> None:
        model, ids = tiny_model(mixer, mlp), tokens(2, 23)
        before = logits(model, ids)
        for t in (0, 7, 16, 22):
            changed = ids.clone()
            changed[:, t] = (changed[:, t] + 1) % 61
            after = logits(model, changed)
            assert t == 0 or (after[:, :t] - before[:, :t]).abs().max() < TOLERANCE
            assert (after[:, t] - before[:, t]).abs().max() > LEAK  # control: the token itself matters

    def test_cached_is_uncached(self, mixer: str, mlp: str) -> None:
        model, ids = tiny_model(mixer, mlp), tokens(2, 21)
        whole = logits(model, ids)
        cache = new_cache(model.config)
        pieces, at = [], 0
        with torch.no_grad():
            for length in (6, 1, 1, 7, 1, 2, 3):  # prefill, steps, and chunks longer than one
                pieces.append(model(ids[:, at : at + length], past_key_values=cache, use_cache=True).logits)
                at += length
        assert at == 21
        assert (torch.cat(pieces, 1) - whole).abs().max() < TOLERANCE

    def test_the_cache_law_sees_a_forgotten_cache(self, mixer: str, mlp: str) -> None:
        model, ids = tiny_model(mixer, mlp), tokens(2, 21)
        alone = logits(model, ids[:, 10:])
        assert (alone - logits(model, ids)[:, 10:]).abs().max() > LEAK

    def test_packed_is_separate(self, mixer: str, mlp: str) -> None:
        model = tiny_model(mixer, mlp)
        documents = [tokens(1, length, seed) for seed, length in enumerate((9, 1, 13, 2))]
        row = torch.cat(documents, 1)
        positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
        numbers = torch.cat([torch.full((d.shape[1],), i) for i, d in enumerate(documents)])[None]
        separate = torch.cat([logits(model, d) for d in documents], 1)
        packed = logits(model, row, position_ids=positions, seq_idx=numbers)
        assert (packed - separate).abs().max() < TOLERANCE
        from_positions = logits(model, row, position_ids=positions)  # as transformers packs
        assert (from_positions - separate).abs().max() < TOLERANCE
        leaking = logits(model, row)  # control: without borders
        assert (leaking[:, 9:] - separate[:, 9:]).abs().max() > LEAK

    def test_packed_gradients_are_separate_gradients(self, mixer: str, mlp: str) -> None:
        model = tiny_model(mixer, mlp, router_aux_loss_coef=0.0)
        documents = [tokens(1, length, seed) for seed, length in enumerate((9, 13))]
        count = sum(d.shape[1] - 1 for d in documents)
        for document in documents:
            model(document, labels=document, num_items_in_batch=count).loss.backward()
        separate = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        labels = torch.cat(documents, 1).clone()
        labels[0, 9] = -100
        positions = torch.cat([torch.arange(9), torch.arange(13)])[None]
        model(torch.cat(documents, 1), labels=labels, position_ids=positions, num_items_in_batch=count).loss.backward()
        worst = max((p.grad - separate[name]).abs().max() for name, p in model.named_parameters())
        assert worst < TOLERANCE

    def test_left_padding_changes_nothing(self, mixer: str, mlp: str) -> None:
        model, long, short = tiny_model(mixer, mlp), tokens(1, 17), tokens(1, 3, seed=1)
        ids = torch.zeros(2, 17, dtype=torch.long)
        mask = torch.zeros(2, 17, dtype=torch.long)
        ids[0], ids[1, 14:] = long, short
        mask[0], mask[1, 14:] = 1, 1
        together = logits(model, ids, attention_mask=mask)
        assert (together[:1] - logits(model, long)).abs().max() < TOLERANCE
        assert (together[1, 14:] - logits(model, short)[0]).abs().max() < TOLERANCE
        unmasked = logits(model, ids)  # control
        assert (unmasked[1, 14:] - logits(model, short)[0]).abs().max() > LEAK

    def test_recomputed_layers_give_the_same_gradients(self, mixer: str, mlp: str) -> None:
        model, ids = tiny_model(mixer, mlp).train(), tokens(2, 15)
        model(ids, labels=ids).loss.backward()
        plain = {name: p.grad.clone() for name, p in model.named_parameters()}
        counts = model.model.take_expert_counts()
        model.zero_grad()
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model(ids, labels=ids).loss.backward()
        assert all(torch.equal(p.grad, plain[name]) for name, p in model.named_parameters())
        assert torch.equal(model.model.take_expert_counts(), counts)  # recomputing does not count twice


@pytest.mark.parametrize("kind", ["learned", "none"])
def test_laws_without_rope(kind: str) -> None:
    model, ids = tiny_model(position_embedding=kind), tokens(2, 18)
    whole, cache = logits(model, ids), new_cache(model.config)
    with torch.no_grad():
        pieces = [
            model(ids[:, a:b], past_key_values=cache, use_cache=True).logits for a, b in ((0, 5), (5, 6), (6, 18))
        ]
    assert (torch.cat(pieces, 1) - whole).abs().max() < TOLERANCE
    if kind == "learned":
        with pytest.raises(ValueError, match="128 learned positions"):
            model(tokens(1, 129))


def test_packed_rows_cannot_be_cached() -> None:
    model, ids = tiny_model("linear_attention"), tokens(1, 6)
    with pytest.raises(ValueError, match="packed rows"):
        model(ids, seq_idx=torch.tensor([[0, 0, 0, 1, 1, 1]]), past_key_values=new_cache(model.config))


def test_routing_noise_depends_on_the_key_alone() -> None:
    torch.manual_seed(0)
    model, ids = tiny_model("full_attention", "sparse", router_noise=True).train(), tokens(2, 15)

    def loss(key: int) -> torch.Tensor:
        return model(ids, labels=ids, noise_key=torch.tensor(key)).loss.detach()

    torch.manual_seed(1)
    first = loss(5)
    torch.manual_seed(2)
    assert torch.equal(loss(5), first)
    assert not torch.equal(loss(6), first)
    assert not torch.equal(model(ids, labels=ids).loss, model(ids, labels=ids).loss)  # without a key it counts calls
    model.eval()
    assert torch.equal(logits(model, ids), logits(model, ids))


def test_noisy_routing_is_recomputed_alike() -> None:
    model, ids = tiny_model("full_attention", "sparse", router_noise=True).train(), tokens(2, 15)
    key = torch.tensor(9)
    model(ids, labels=ids, noise_key=key).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model(ids, labels=ids, noise_key=key).loss.backward()
    assert all(torch.equal(p.grad, plain[name]) for name, p in model.named_parameters())


def test_config_of_a_tiny_model_is_what_it_says() -> None:
    config = tiny_config("linear_attention", "sparse")
    assert config.layer_types == ["linear_attention"] * 2
    assert config.mlp_layer_types == ["sparse"] * 2
