"""Counts of what routers choose against an independent count, and a model whose experts do specialise."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moai_llm.evaluation import experts, experts_report
from moai_llm.evaluation.experts import choices, information, layers, lift, null, observe, together
from moai_llm.evaluation.token_classes import CLASSES, class_of, token_classes
from moai_llm.inference import TextModel
from moai_llm.modeling.moe import MoE
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from tests.browser import MEASURE, Page, measured, outside
from tests.conftest import tiny_model

KOREAN = [f"이자는 {i}번 붙어요. 예금과 적금은 은행에서 가입할 수 있어요." for i in range(6)]
ENGLISH = [f"Interest is paid {i} times on the deposit of the lazy dog." for i in range(6)]
TEXTS = [(text, {"file": "ko.txt", "language": "ko"}) for text in KOREAN]
TEXTS += [(text, {"file": "en.txt", "language": "en"}) for text in ENGLISH]


def mixture(tokenizer: Tokenizer, **changes: object) -> TextModel:
    model = tiny_model(mlp="sparse", vocab_size=512, mlp_layer_types=["sparse", "dense", "sparse"], num_hidden_layers=3,
                       **changes)  # fmt: skip
    return TextModel(model, tokenizer, Path("here"))


def planted(tokenizer: Tokenizer) -> TextModel:
    """The router of the first layer sees the embedding alone, and that says the class of the token."""
    text_model = mixture(tokenizer, num_experts_per_tok=1, norm_topk_prob=False)
    model, classes = text_model.model, token_classes(tokenizer)
    latin = np.isin(classes, [CLASSES.index("latin"), CLASSES.index("punctuation"), CLASSES.index("digits")])
    with torch.no_grad():
        model.model.layers[0].mixer.o_proj.weight.zero_()
        model.model.embed_tokens.weight.zero_()
        model.model.embed_tokens.weight[: len(latin), 0] = torch.from_numpy(np.where(latin, 1.0, -1.0))
        router = model.model.layers[0].mlp.router.weight
        router.zero_()
        router[2, 0], router[1, 0] = 5.0, -5.0
        model.model.layers[0].mlp_norm.weight.fill_(1.0)
    return text_model


def router_inputs(model: Any, routers: list[Any], window: list[int]) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    hooks = [router.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for router in routers]
    with torch.no_grad():
        model(torch.tensor([window]))
    for hook in hooks:
        hook.remove()
    return seen


def test_counts_are_those_of_an_independent_count(tokenizer: Tokenizer) -> None:
    """Each text by itself, the router's input caught and its choice written out, one token after the other."""
    text_model = mixture(tokenizer, max_position_embeddings=16)  # texts of several windows
    counts = observe(text_model, TEXTS, batch_tokens=40)
    routers = [m.router for m in text_model.model.modules() if isinstance(m, MoE)]
    selected, pairs = np.zeros((2, 4), int), np.zeros((2, 4, 4), int)
    by_class, by_language = (
        np.zeros((2, len(CLASSES), 4), int),
        {"ko": np.zeros((2, 4), int), "en": np.zeros((2, 4), int)},
    )
    entropy, first, tokens = np.zeros(2), np.zeros(2), 0
    for text, labels in TEXTS:
        ids = tokenizer.encode(text)
        for window in (ids[i : i + 16] for i in range(0, len(ids), 16)):
            for layer, (router, x) in enumerate(zip(routers, router_inputs(text_model.model, routers, window))):
                for token, row in zip(window, x):
                    p = torch.softmax(router.weight.detach() @ row, 0).tolist()
                    best = sorted(range(4), key=lambda e: -p[e])[:2]
                    for e in best:
                        selected[layer, e] += 1
                        by_language[labels["language"]][layer, e] += 1
                        by_class[layer, CLASSES.index(class_of(tokenizer.token_bytes(token))), e] += 1
                        pairs[layer, e, best[0]] += 1
                        pairs[layer, e, best[1]] += 1
                    entropy[layer] -= sum(q * math.log(q) for q in p)
                    first[layer] += p[best[0]] / (p[best[0]] + p[best[1]])
            tokens += len(window)
    assert counts.tokens == tokens and counts.layers == [0, 2] and counts.k == 2
    assert (counts.selected == selected).all() and (counts.pairs == pairs).all() and (counts.classes == by_class).all()
    names, tables = counts.by_label("language")
    assert names == ["en", "ko"] and all((tables[:, i] == by_language[name]).all() for i, name in enumerate(names))
    assert counts.entropy == pytest.approx(entropy) and counts.first == pytest.approx(first)
    assert counts.selected.sum() == 2 * 2 * tokens  # padding is not counted


def test_specialisation_that_was_planted_is_seen(tokenizer: Tokenizer) -> None:
    counts = observe(planted(tokenizer), TEXTS)
    names, tables = counts.by_label("language")
    told, chance = [information(table) for table in tables], null(counts, "language")
    assert told[0] > 0.4 and told[0] > 2 * chance[:, 0].max()
    liked = lift(tables[0])
    assert liked[names.index("en")].argmax() == 2 and liked[names.index("ko")].argmax() == 1
    classes, by_class = counts.by_label("token class")
    assert information(by_class[0]) > 0.35 and by_class[0][classes.index("latin")].argmax() == 2
    assert by_class[0][classes.index("latin")][[0, 1, 3]].sum() == 0
    assert layers(counts)[0].dead == 2 and layers(counts)[0].cv > 0.9


def test_control_a_random_router_tells_little(tokenizer: Tokenizer) -> None:
    counts = observe(mixture(tokenizer), TEXTS)
    planted_told = information(observe(planted(tokenizer), TEXTS).by_label("language")[1][0])
    assert all(information(table) < 0.5 * planted_told for table in counts.by_label("language")[1])
    rng = np.random.default_rng(0)
    independent = rng.multinomial(4000, np.full(8, 1 / 8), size=3)  # labels that choose alike
    assert information(independent) < 0.003
    assert 0.05 < information(np.array([[900, 100], [100, 900]])) < 1 == information(np.diag([5, 7]))


def test_values_by_hand() -> None:
    fair = experts.Counts([0], 2, np.full((1, 8), 10), np.zeros((1, 8, 8), int), np.array([40 * math.log(8)]),
                          np.array([20.0]), np.zeros((1, len(CLASSES), 8), int), tokens=40)  # fmt: skip
    (layer,) = layers(fair)
    assert layer.cv == 0 and layer.dead == 0 and layer.effective == pytest.approx(8)
    assert layer.max_violation == pytest.approx(0) and layer.entropy == pytest.approx(1) and layer.first == 0.5
    fair.selected[:] = [[40, 40, 0, 0, 0, 0, 0, 0]]
    (layer,) = layers(fair)  # all tokens on K of E: the coefficient of variation is sqrt(E / K - 1)
    assert (
        layer.cv == pytest.approx(math.sqrt(8 / 2 - 1)) and layer.dead == 6 and layer.max_violation == pytest.approx(3)
    )


def test_who_is_chosen_together() -> None:
    rng = np.random.default_rng(0)
    chosen = np.zeros((8_000, 6))
    for row in chosen:
        row[rng.choice(6, 2, replace=False)] = 1
    free = together(chosen.T @ chosen, 2)
    assert np.abs(free - 1).max() < 0.12  # drawn without a relation
    bound = np.zeros((3000, 6))
    for i, row in enumerate(bound):
        row[[2 * (i % 3), 2 * (i % 3) + 1]] = 1  # always the same two
    found = together(bound.T @ bound, 2)
    assert found[0, 1] > 4 and found[0, 2] == 0 and (np.diag(found) == 1).all()


def test_hooks_are_gone_afterwards(tokenizer: Tokenizer) -> None:
    model = mixture(tokenizer).model
    with choices(model) as heard:
        model(torch.tensor([[1, 2, 3]]))
        assert len(heard) == 2 and heard[0].ids.shape == (3, 2)
    model(torch.tensor([[1, 2, 3]]))
    assert len(heard) == 2


def test_a_model_without_experts_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(MoaiError, match="no mixture of experts"):
        observe(TextModel(tiny_model(vocab_size=512), tokenizer, Path("here")), TEXTS)
    with pytest.raises(MoaiError, match="no tokens"):
        observe(mixture(tokenizer), [("", {})])


@pytest.mark.parametrize(
    ("piece", "expected"),
    [
        (" the", "latin"), ("은행", "hangul"), ("です", "kana"), ("ッ", "kana"), ("東京", "han"), ("да", "cyrillic"),
        ("אב", "other letters"), ("42", "digits"), (" ,", "punctuation"), ("。", "punctuation"), (") {", "code"),
        ("\n    ", "white space"), ("日本の", "han"), ("3rd", "latin"), ("", "control"), ("é", "latin"),
    ],
)  # fmt: skip
def test_classes_of_tokens(piece: str, expected: str) -> None:
    assert class_of(piece.encode()) == expected
    assert class_of("한".encode()[:2]) == "part of a character"


def test_the_page(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text_model = mixture(tokenizer)
    found = experts_report.results(text_model, observe(text_model, TEXTS), {})
    found.save(tmp_path / "e.json")
    text = experts_report.page(found)
    parsed = Page(text)
    assert not outside(text) and {"Load and router", "What an expert tells of the language"} <= set(parsed.tables)
    assert parsed.tables["Load and router"][1][1] == f"{layers(observe(text_model, TEXTS))[0].cv:.3f}"
    assert text.count("<svg") == 1 + 3 * 2 + 2
    for width in (360, 1100):
        seen = measured(text, tmp_path, width, MEASURE)
        assert seen["wide"] <= width and seen["smallest"] > 6
