"""Policies that forget keys, against attention written out over the keys that are kept."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from moai_llm.inference import Session
from moai_llm.inference.kv import KVOptions, kv_cache, make_cache, parse_keep
from moai_llm.inference.kv.heavy import HeavyLayer
from moai_llm.inference.kv.ring import RingLayer
from moai_llm.inference.kv.size import held_bytes, predicted_bytes
from moai_llm.inference.kv.window import WindowLayer
from moai_llm.ops.rotary import apply_rotary, rotary_table
from tests.conftest import tiny_model
from tests.inference.conftest import alone, greedy, ids_model
from tests.inference.test_kv import LENGTH, MODELS, text, through, uncached

D, HEADS = 8, 4
FREQUENCIES = 100.0 ** (-torch.arange(0, D, 2) / D)
TOKENS = 23
CUTS = ([TOKENS], [11, 1, 1, 6, *[1] * 4], [1] * TOKENS)


def tensors(groups: int, length: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(7)
    q = 2 * torch.randn(1, HEADS, length, D, dtype=torch.float64)
    k, v = (2 * torch.randn(1, groups, length, D, dtype=torch.float64) for _ in range(2))
    return q, k, v


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    return apply_rotary(x, *rotary_table(positions[None], FREQUENCIES))


def turn(q: Tensor, positions: Tensor) -> Tensor:
    cos, sin = rotary_table(positions[None], FREQUENCIES)
    return apply_rotary(q, cos, -sin)


def through_layer(layer: Any, q: Tensor, k: Tensor, v: Tensor, cuts: list[int]) -> Tensor:
    return torch.cat([layer.attend(*piece) for piece in zip(*(t.split(cuts, 2) for t in (q, k, v)))], 2)


def one_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(d,) of one head's query (d,) over the keys (n, d)."""
    return (k @ q / D**0.5).softmax(0) @ v


@cache
def over_kept(groups: int, sinks: int, window: int, in_cache: bool) -> Tensor:
    """Each query alone over the keys it may see, rotated by their places in the text, or in the cache (StreamingLLM,
    section 3.2).
    """
    q, k, v = tensors(groups)
    y = torch.empty_like(q)
    for head in range(HEADS):
        group = head * k.shape[1] // HEADS
        for i in range(q.shape[2]):
            kept = torch.tensor([j for j in range(i + 1) if j < sinks or j > i - window])
            places = torch.arange(len(kept)) if in_cache else kept
            keys = rotated(k[:, group : group + 1, kept], places)[0, 0]
            query = rotated(q[:, head : head + 1, i : i + 1], places[-1:])[0, 0, 0]
            y[0, head, i] = one_query(query, keys, v[0, group, kept])
    return y


@pytest.mark.parametrize("cuts", CUTS, ids=("at once", "chunks", "one by one"))
@pytest.mark.parametrize("groups", (1, 2))
@pytest.mark.parametrize(("sinks", "window"), [(0, 7), (3, 7), (1, 1), (3, 20), (5, 2)])
def test_windows_and_sinks(sinks: int, window: int, groups: int, cuts: list[int]) -> None:
    q, k, v = tensors(groups)
    at = torch.arange(q.shape[2])
    layer = WindowLayer(window, sinks, turn)
    y = through_layer(layer, rotated(q, at), rotated(k, at), v, cuts)
    torch.testing.assert_close(y, over_kept(groups, sinks, window, in_cache=True), rtol=0, atol=1e-6)
    if sinks and sinks + window < q.shape[2]:  # control: places in the text are something else
        assert not torch.allclose(y, over_kept(groups, sinks, window, in_cache=False), atol=1e-3)
    if sinks + window < q.shape[2]:  # control: so is a key more
        assert not torch.allclose(y, over_kept(groups, sinks, window + 1, in_cache=True), atol=1e-3)
    assert layer.get_seq_length() == TOKENS
    assert layer.keys is not None and layer.keys.shape[2] == min(window - 1, TOKENS - sinks)


@pytest.mark.parametrize("cuts", CUTS, ids=("at once", "chunks", "one by one"))
@pytest.mark.parametrize("window", (1, 7, 23, 40))
def test_a_ring_is_a_window(window: int, cuts: list[int]) -> None:
    q, k, v = tensors(2)
    expected = through_layer(WindowLayer(window), q, k, v, [TOKENS])
    torch.testing.assert_close(through_layer(RingLayer(window), q, k, v, cuts), expected)
    torch.testing.assert_close(expected, _plain(q, k, v, window))


def _plain(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Without any rotation."""
    y = torch.empty_like(q)
    for head in range(HEADS):
        group = head * k.shape[1] // HEADS
        for i in range(q.shape[2]):
            kept = slice(max(0, i - window + 1), i + 1)
            y[0, head, i] = one_query(q[0, head, i], k[0, group, kept], v[0, group, kept])
    return y


def heavy_by_hand(q: Tensor, k: Tensor, v: Tensor, heavy: int, window: int, cuts: list[int]) -> tuple[Tensor, list]:
    """Sets of positions and a dict of masses for each head of keys; everything one query at a time."""
    y, size = torch.empty_like(q), HEADS // k.shape[1]
    every = []
    for group in range(k.shape[1]):
        kept, mass, start = [], {}, 0
        for cut in cuts:
            for i in range(start, start + cut):
                kept.append(i)
                mass[i] = 0.0
            for i in range(start, start + cut):
                seen = [j for j in kept if j <= i]
                for head in range(group * size, (group + 1) * size):
                    weights = (k[0, group, seen] @ q[0, head, i] / D**0.5).softmax(0)
                    y[0, head, i] = weights @ v[0, group, seen]
                    for j, weight in zip(seen, weights.tolist()):
                        mass[j] += weight
            start += cut
            older = kept[: max(0, len(kept) - window)]
            best = sorted(older, key=lambda j: -mass[j])[:heavy]
            kept = sorted(best) + kept[len(older) :]
        every.append(kept)
    return y, every


@pytest.mark.parametrize("cuts", CUTS, ids=("at once", "chunks", "one by one"))
@pytest.mark.parametrize("groups", (1, 2, 4))
@pytest.mark.parametrize(("heavy", "window"), [(3, 5), (1, 1), (12, 11)])
def test_heavy_hitters(heavy: int, window: int, groups: int, cuts: list[int]) -> None:
    q, k, v = tensors(groups)
    layer = HeavyLayer(heavy, window)
    expected, kept = heavy_by_hand(q, k, v, heavy, window, cuts)
    torch.testing.assert_close(through_layer(layer, q, k, v, cuts), expected)
    assert layer.keys is not None
    for group in range(groups):
        torch.testing.assert_close(layer.keys[0, group], k[0, group, kept[group]])
    if heavy + window < TOKENS:
        latest = [list(range(TOKENS - heavy - window, TOKENS))] * groups
        assert kept != latest  # control: it is not a window
        assert layer.get_seq_length() == TOKENS and layer.keys.shape[2] == heavy + window


# ---------------------------------------------------------------- in models


@pytest.mark.parametrize("keep", ("window:34", "window:90", "sinks:3+window:31", "heavy:2+window:32"))
@pytest.mark.parametrize("name", MODELS)
def test_room_for_all_is_full_attention(name: str, keep: str) -> None:
    model, ids = tiny_model(**MODELS[name]), text()
    held = make_cache(model.config, "dynamic", keep)
    torch.testing.assert_close(through(model, held, ids), uncached(model, ids))
    assert held.get_seq_length() == LENGTH


@pytest.mark.parametrize("keep", ("window:9", "sinks:3+window:9"))
@pytest.mark.parametrize("name", MODELS)
def test_chunks_do_not_matter(name: str, keep: str) -> None:
    model, ids = tiny_model(**MODELS[name]), text()
    found = through(model, make_cache(model.config, "dynamic", keep), ids)
    torch.testing.assert_close(through(model, make_cache(model.config, "dynamic", keep), ids, [LENGTH]), found)
    assert not torch.allclose(found, uncached(model, ids), atol=1e-3)  # control: something was forgotten
    torch.testing.assert_close(found[:, :9], uncached(model, ids)[:, :9])


def test_a_window_is_a_model_of_sliding_layers() -> None:
    """Another program that says the same: our own sliding attention."""
    model, ids = tiny_model(), text()
    other = tiny_model("sliding_attention", sliding_window=9)
    other.load_state_dict(model.state_dict())
    expected = uncached(other, ids)
    torch.testing.assert_close(through(model, make_cache(model.config, "dynamic", "window:9"), ids), expected)
    ring = make_cache(model.config, "sliding", None, KVOptions(window=9))
    torch.testing.assert_close(through(model, ring, ids), expected)


@pytest.mark.parametrize("keep", ("window:9", "sinks:3+window:9", "heavy:3+window:9"))
@pytest.mark.parametrize("name", ("grouped", "hybrid"))
def test_bytes_are_as_predicted(name: str, keep: str) -> None:
    model = tiny_model(**MODELS[name]).float().to(torch.bfloat16)
    held = make_cache(model.config, "dynamic", keep)
    through(model, held, text())
    assert held_bytes(held) == predicted_bytes(model.config, "dynamic", LENGTH, 2, parse_keep(keep))


def test_a_text_may_become_longer_than_the_context() -> None:
    """With sinks no distance grows; all other caches stop at the context, as the engine does."""
    text_model = ids_model(seed=1)
    context, prompt = text_model.context, text(3, 100)[0].tolist()
    session = Session(text_model, kv_cache(text_model, keep="sinks:2+window:20"))
    assert len(list(session.stream(prompt, greedy(40)))) == 40 > context - 100
    for keep in (None, "heavy:2+window:20"):
        session = Session(text_model, kv_cache(text_model, keep=keep))
        assert len(list(session.stream(prompt, greedy(40)))) == context - 100
    learned = ids_model("learned")
    session = Session(learned, kv_cache(learned, keep="sinks:2+window:20"))
    assert len(list(session.stream(prompt, greedy(40)))) == context - 100


def test_a_session_with_a_wide_window() -> None:
    text_model, prompt = ids_model("hybrid"), [3, 1, 4, 1, 5, 9, 2, 6]
    session = Session(text_model, kv_cache(text_model, keep="sinks:2+window:30"))
    assert list(session.stream(prompt, greedy(12))) == alone(text_model, prompt, 12)
