"""Fill in the middle: middles are whole pieces of syntax, the three parts come back, and a seed gives one result."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.fim import FIM_TOKENS, Fim, fim_document, fim_example, fim_prompt, fim_spans
from moai_llm.tokenizer.syntax_python import parses
from moai_llm.tokenizer.train import SPECIAL_TOKENS, train_tokenizer
from tests.tokenizer.stdlib import stdlib_sources

SOURCE = "def add(a, b):\n    total = a + b\n    return total\n\n\nprint(add(1, 2))\n"


@pytest.fixture(scope="module")
def filling() -> Tokenizer:
    return train_tokenizer([SOURCE * 20], 330, special_tokens=(*SPECIAL_TOKENS, *FIM_TOKENS), fewer=True)


def alone(source: str, start: int, end: int) -> bool:
    """Whether a middle parses where it stands in its line, or as an expression in brackets."""
    line = source.rfind("\n", 0, start) + 1
    blank = source[line:start] if not source[line:start].strip() else ""
    return parses(blank + source[start:end]) or parses(f"({source[start:end]}\n)")


def test_middles_parse_alone_and_random_ones_do_not() -> None:
    parsing = by_chance = middles = 0
    for source in stdlib_sources(8):
        rng = random.Random(0)
        for start, end in fim_spans(source, rng, count=8):
            assert 0 <= start < end <= len(source) and end - start <= len(source) / 2
            if end - start >= 10:  # a few letters parse by chance
                middles += 1
                parsing += alone(source, start, end)
                random_start = rng.randrange(len(source) - (end - start))
                by_chance += alone(source, random_start, random_start + end - start)
    assert middles > 300
    assert parsing / middles >= 0.95
    assert by_chance / middles < 0.3


def test_middles_are_of_every_kind() -> None:
    rng = random.Random(1)
    middles = {SOURCE[start:end] for start, end in fim_spans(SOURCE, rng, count=400)}
    assert {"a + b", "total", "return total", "add(1, 2)", "print(add(1, 2))"} <= middles
    assert "total = a + b\n    return total" in middles  # a block
    assert not any(middle.startswith("def") for middle in middles)  # more than half of the text


@pytest.mark.parametrize(
    "source",
    ["def f(:\n  pass\nx = = 1\ny\n", "plain prose\nin lines\n\nof text", "a\x00b\nc", "\ud800 x\ny\nz", "\n\n)\n\n"],
)
def test_text_that_does_not_parse_gives_whole_lines(source: str) -> None:
    for start, end in fim_spans(source, random.Random(0), language="python", count=50):
        assert 0 <= start < end <= len(source)
        longest_line = max(map(len, source.splitlines(keepends=True)))
        if longest_line <= len(source) / 2:
            assert start == 0 or source[start - 1] == "\n"
            assert end == len(source) or source[end - 1] == "\n"


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="ab (:=\n\r\t'#\\é😀\x0c", max_size=60), st.integers(0, 99))
def test_any_text(source: str, seed: int) -> None:
    for language in ("python", None):
        spans = fim_spans(source, random.Random(seed), language=language, count=3)
        assert spans == fim_spans(source, random.Random(seed), language=language, count=3)
        assert all(0 <= start < end <= len(source) for start, end in spans)
        assert bool(spans) == bool(source.strip())


def test_other_languages() -> None:
    pytest.importorskip("tree_sitter", reason="needs the extra `code`")
    source = "int add(int a, int b) {\n  int total = a + b;\n  return total;\n}\n\nint one(void) { return 1; }\n" * 2
    spans = fim_spans(source, random.Random(0), language="c", count=200)
    middles = {source[start:end] for start, end in spans}
    assert {"return total;", "a + b", "{ return 1; }"} & middles and "int total = a + b;\n  return total;" in middles
    assert fim_spans("var a=1;" * 3000, random.Random(0), language="javascript", count=3)


# ---------------------------------------------------------------- ids


def test_orders(filling: Tokenizer) -> None:
    pre, suf, mid = (filling.special_ids[f"<|fim_{name}|>"] for name in ("prefix", "suffix", "middle"))
    a, b, c = (filling.encode(text) for text in ("def add(", "a, b", "):\n"))
    psm = fim_example(filling, "def add(", "a, b", "):\n")
    assert psm.ids == [pre, *a, suf, *c, mid, *b, filling.eos_id] and all(psm.learn)
    spm = fim_example(filling, "def add(", "a, b", "):\n", "spm", learn="middle")
    assert spm.ids == [pre, suf, *c, mid, *a, *b, filling.eos_id]
    assert [i for i, learn in zip(spm.ids, spm.learn) if learn] == [*b, filling.eos_id]
    for example, order in ((psm, "psm"), (spm, "spm")):
        prompt = fim_prompt(filling, "def add(", "):\n", order)  # type: ignore[arg-type]
        assert example.ids == [*prompt, *b, filling.eos_id]


def test_a_prompt_in_spm_order_grows_at_its_end(filling: Tokenizer) -> None:
    before, after = "def add(a, b):\n", "    return total\n"
    spm, longer = (fim_prompt(filling, prefix, after, "spm") for prefix in (before, before + "    "))
    assert longer[: len(spm)] == spm
    psm, longer = (fim_prompt(filling, prefix, after, "psm") for prefix in (before, before + "    "))
    assert longer[: len(psm)] != psm


def restored(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of a rearranged document in psm order."""
    pre, suf, mid = (tokenizer.special_ids[f"<|fim_{name}|>"] for name in ("prefix", "suffix", "middle"))
    assert ids[0] == pre and ids[-1] == tokenizer.eos_id
    parts = [ids[1 : ids.index(suf)], ids[ids.index(mid) + 1 : -1], ids[ids.index(suf) + 1 : ids.index(mid)]]
    return "".join(tokenizer.decode(part) for part in parts)


def test_documents_are_rearranged_and_nothing_is_lost(filling: Tokenizer) -> None:
    hard = SOURCE.replace("\n", "\r\n").replace("total", "합계😀") + "# <|fim_middle|> stays text\n"
    for index in range(30):
        ids = fim_document(filling, hard, Fim(rate=1.0, order="psm"), index)
        assert ids is not None and restored(filling, ids) == hard


def test_rate_order_and_seed(filling: Tokenizer) -> None:
    suffix = filling.special_ids["<|fim_suffix|>"]
    made = [fim_document(filling, SOURCE, Fim(0.5), index) for index in range(400)]
    assert made == [fim_document(filling, SOURCE, Fim(0.5), index) for index in range(400)]
    assert made != [fim_document(filling, SOURCE, Fim(0.5, seed=1), index) for index in range(400)]
    rearranged = [ids for ids in made if ids is not None]
    assert 0.42 < len(rearranged) / 400 < 0.58
    spm = sum(ids[1] == suffix for ids in rearranged)
    assert 0.4 < spm / len(rearranged) < 0.6
    for order, wanted in (("psm", False), ("spm", True)):
        ids = fim_document(filling, SOURCE, Fim(1.0, order), 0)  # type: ignore[arg-type]
        assert ids is not None and (ids[1] == suffix) == wanted
    assert fim_document(filling, SOURCE, Fim(1.0), 0) != fim_document(filling, SOURCE, Fim(1.0), 0, part=1)
    assert fim_document(filling, " \n", Fim(1.0), 0) is None


def test_the_draws_stay_what_they_are() -> None:
    """A store that is made again by another version is the same store."""
    assert fim_spans(SOURCE, random.Random("0:0:0"), count=4) == [(52, 68), (37, 49), (52, 57), (19, 32)]


def test_mistakes(tokenizer: Tokenizer) -> None:
    with pytest.raises(MoaiError, match=r"no <\|fim_prefix\|>, <\|fim_suffix\|>, <\|fim_middle\|>.*--special-tokens"):
        fim_example(tokenizer, "a", "b", "c")
    with pytest.raises(MoaiError, match="above 0 and be at most 1, got 0"):
        Fim(0)
    with pytest.raises(MoaiError, match="both, psm or spm, got 'mps'"):
        Fim(0.5, "mps")  # type: ignore[arg-type]
