"""Cleaning: every rule drops what it is for and keeps its neighbour; texts are repaired; personal data is masked."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moai_llm.data.clean import CleanConfig, Cleaner, Drop, broken_share, clean, config_from_tree, is_code, load_config
from moai_llm.data.documents import Document, read_documents
from moai_llm.data.language import by_script, identify
from moai_llm.data.language_model import Rows, language_model
from moai_llm.data.quality import BREAKS, Rules, broken_rule
from moai_llm.data.repetition import Repetition, Repetitions, duplicate_share, reference_repetition
from moai_llm.data.sources import Reading
from moai_llm.data.units import split_units
from moai_llm.runtime import MoaiError
from tests.conftest import shared_data

GOOD = {
    "en": "The old harbour lies at the end of a narrow road that winds between gardens and low stone walls. Fishermen "
    "still leave before dawn, and on quiet mornings their engines can be heard from the church. When a storm comes "
    "in, everybody helps to pull the smaller boats up the beach. Visitors who have read about it in a magazine "
    "expect more shops, yet most of them stay longer than they had planned.",
    "ko": "오래된 항구는 정원과 낮은 돌담 사이로 굽이치는 좁은 길 끝에 있습니다. 어부들은 여전"
    "히 동이 트기 전에 바다로 나가고, 조용한 아침이면 교회에서도 배의 엔진 소리를 들을 "
    "수 있습니다. 폭풍이 몰려오면 모두가 힘을 합쳐 작은 배들을 해변 위로 끌어 올립니다."
    " 잡지에서 이곳을 알게 된 방문객들은 더 많은 가게를 기대하지만, 대부분은 계획했던 것"
    "보다 오래 머무릅니다. 저녁이면 골목마다 생선 굽는 냄새가 퍼지고 아이들은 늦게까지 뛰"
    "어놉니다.",
    "ja": "古い港は、庭と低い石垣の間を曲がりくねる細い道の終わりにあります。漁師たちは今も夜明け前に出かけ"
    "、静かな朝には教会からもエンジンの音が聞こえます。嵐が来ると、みんなで小さな船を浜へ引き上げます"
    "。雑誌で読んだ人はもっと店があると思っていますが、たいていの人は予定より長く滞在します。",
    "zh": "古老的港口坐落在一条狭窄道路的尽头，道路在花园和低矮的石墙之间蜿蜒。渔民们仍然在黎明前出海，在安"
    "静的早晨，从教堂也能听到他们的马达声。暴风雨来临的时候，大家都会帮忙把较小的船拉上海滩。在杂志上"
    "读到过这里的游客期待有更多的商店，可是大多数人停留的时间比计划的更长，我也不例外。这是一个值得再"
    "来的地方。",
}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def varied(n: int, prefix: str = "", length: int = 6) -> list[str]:
    """Different words of the same length."""
    return [
        prefix + "".join(LETTERS[(i * 7 + 11 * k + i // 26 * (k + 3)) % 26] for k in range(length)) for i in range(n)
    ]


def lines(*texts: str) -> str:
    return "\n".join(texts)


PLAIN = [f"{w} {x} is what we have here." for w, x in zip(varied(40), varied(40, "q"))]
WORDS = GOOD["en"].split()
# rule -> (a text that it must drop, a neighbour that it must keep, limits other than the defaults)
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "min_words": (" ".join(WORDS[:49]), " ".join(WORDS[:50]), {}),
    "max_words": (" ".join(varied(1001)), " ".join(varied(1000)), {"max_words": 1000}),
    "min_mean_word": ("the be " + "a i " * 40, "the be " + "and with " * 40, {}),
    "max_mean_word": ("the be " + " ".join(varied(60, length=11)), "the be " + " ".join(varied(60, length=10)), {}),
    "max_symbols": (GOOD["en"] + " #" * 9, GOOD["en"] + " #" * 6, {}),
    "max_bullet_lines": (lines(*(f"- {p}" for p in PLAIN)), lines(*(f"- {p}" for p in PLAIN[:35]), *PLAIN[35:]), {}),
    "max_ellipsis_lines": (
        lines(*(p + ".." if i < 14 else p for i, p in enumerate(PLAIN))).replace("....", "..."),
        lines(*(p + ".." if i < 12 else p for i, p in enumerate(PLAIN))).replace("....", "..."),
        {},
    ),
    "min_alphabetic_words": (GOOD["en"] + " 12345" * 20, GOOD["en"] + " 12345" * 12, {}),
    "min_stop_words": (" ".join(["the", *varied(60)]), " ".join(["the", "and", *varied(60)]), {}),
    "max_duplicate_lines": (
        lines(*PLAIN[:20], *["same old line"] * 10, *["x"] * 5),
        lines(*PLAIN[:20], *["same old line"] * 5),
        {},
    ),
    "max_duplicate_line_characters": (
        lines(*PLAIN[:20], *["a line of many letters, quite a few more than the others of it have"] * 5),
        lines(*PLAIN[:20], *["a line of many letters, quite a few more than the others of it have"] * 3),
        {},
    ),
    "max_duplicate_paragraphs": (
        "\n\n".join([*(f"{p}\nmore of {p}" for p in PLAIN[:6]), *["it\nrepeats"] * 5]),
        "\n\n".join([*(f"{p}\nmore of {p}" for p in PLAIN[:6]), *["it\nrepeats"] * 3]),
        {},
    ),
    "max_duplicate_paragraph_characters": (
        "\n\n".join([*PLAIN[:20], GOOD["en"][:200], GOOD["en"][:200], GOOD["en"][:200]]),
        "\n\n".join([*PLAIN[:20], GOOD["en"][:200], GOOD["en"][:200]]),
        {},
    ),
    "max_top_grams": (GOOD["en"] + " knock knock" * 9, GOOD["en"] + " knock knock" * 2, {}),
    "max_duplicate_grams": (
        GOOD["en"] + " " + " ".join(WORDS[:14]),
        GOOD["en"] + " " + " ".join(WORDS[:8]),
        {},
    ),
    "no_lorem_ipsum": (GOOD["en"] + " Lorem ipsum dolor.", GOOD["en"] + " Lorem, ipsum dolor.", {}),
    "no_curly_bracket": (GOOD["en"] + " {", GOOD["en"] + " [", {"no_curly_bracket": True}),
    "min_sentences": (GOOD["en"], GOOD["en"] + " Really?", {"min_sentences": 5}),
    "min_terminal_lines": (lines(*PLAIN[:3], GOOD["en"], "Home", "About"), lines(*PLAIN[:3], GOOD["en"], "Home"),
                           {"min_terminal_lines": 0.8}),
    "max_line": ("x = 1\n" * 40 + "y = '" + "z" * 996 + "'", "x = 1\n" * 40 + "y = '" + "z" * 990 + "'", {}),
    "max_mean_line": (f"x = '{'a' * 96}'\n" * 9, f"x = '{'a' * 92}'\n" * 9, {}),
    "min_alphanumeric": ("[" * 16 + "abcde", "[" * 14 + "abcde", {}),
}  # fmt: skip
CODE = ("max_line", "max_mean_line", "min_alphanumeric")


def test_every_rule_has_a_case() -> None:
    assert set(CASES) == set(BREAKS) == {f.name for f in fields(Rules)}


@pytest.mark.parametrize("rule", CASES)
def test_a_rule_drops_its_text_and_keeps_the_neighbour(rule: str) -> None:
    bad, good, limits = CASES[rule]
    """Alone, so that no other rule can do its work; without it the same text is kept."""
    off = Rules(**dict.fromkeys(BREAKS))
    rules = replace(off, **{rule: getattr(Rules(), rule), **limits})
    assert broken_rule(bad, "en", rules, code=rule in CODE) == rule
    assert broken_rule(good, "en", rules, code=rule in CODE) is None
    assert broken_rule(bad, "en", off, code=rule in CODE) is None
    assert broken_rule(bad, "en", rules, code=rule not in CODE) is None


@pytest.mark.parametrize("language", GOOD)
def test_a_good_text_of_each_language_is_kept(language: str) -> None:
    cleaner = Cleaner(CleanConfig(language="script" if language != "en" else "en"))
    assert cleaner(GOOD[language]) == GOOD[language]
    short = GOOD[language][: len(GOOD[language]) // 4]
    assert cleaner(short) == Drop("min_words")
    lists = CleanConfig(language=language, rules=Rules(min_words=5))
    assert Cleaner(lists)(GOOD["en" if language == "ko" else "ko"]) in (Drop("min_stop_words"), Drop("max_mean_word"))
    repeated = short * 4
    assert Cleaner(CleanConfig(language=language))(repeated) in (Drop("max_top_grams"), Drop("max_duplicate_grams"))


def test_what_a_language_changes_and_what_the_user_says() -> None:
    """The words of Chinese are counted as letters; a limit that the user sets is not changed by habits."""
    assert Cleaner(CleanConfig(language="en"))(GOOD["zh"]) == Drop("min_words"), "the control: it has few spaces"
    assert Cleaner(CleanConfig(language="ko", rules=Rules(min_mean_word=5)))(GOOD["ko"]) == Drop("min_mean_word")
    strict = CleanConfig(language="script", by_language={"ko": {"min_words": 500}})
    assert Cleaner(strict)(GOOD["ko"]) == Drop("min_words") and Cleaner(strict)(GOOD["ja"]) == GOOD["ja"]


def test_repetition_is_that_of_the_definition() -> None:
    texts = ["", "a", "a b", "a b a b a b", "one two one two three one two one two four", GOOD["en"] + GOOD["en"][:200]]
    for text in [*texts, GOOD["zh"] + GOOD["zh"][:50], "aa bb cc aa bb cc aa bb"]:
        for n in (1, 2, 3, 5):
            mine, theirs = Repetitions(text).of(n), reference_repetition(split_units(text), n)
            assert mine == pytest.approx(theirs), (text, n)
    assert Repetitions("x y z x y z").of(3) == Repetition(1.0, 0.5)
    assert Repetitions("あいうえおあいうえお", gram=2).of(2) == reference_repetition(list("あいうえおあいうえお"), 4)
    assert duplicate_share(["aa", "b", "aa", "aa"]) == (0.5, pytest.approx(4 / 7)) and duplicate_share([]) == (0, 0)


def test_text_is_repaired() -> None:
    cleaner = Cleaner(CleanConfig(language="en", rules=Rules(**dict.fromkeys(BREAKS))))
    assert (
        cleaner("cafe\u0301\x00 one\r\ntwo\rthree\tfour\ufeff\x1b[0m\x85five") == "café one\ntwo\nthree\tfour[0m\nfive"
    )
    assert cleaner.changes["repaired"] == 1
    assert cleaner("family 👨\u200d👩\u200d👧 نمی\u200cخواهم") == "family 👨\u200d👩\u200d👧 نمی\u200cخواهم", (
        "joiners carry meaning"
    )
    as_is = Cleaner(replace(cleaner.config, nfc=False, control_characters=False))
    assert as_is("cafe\u0301 one\x07") == "cafe\u0301 one\x07"
    assert cleaner(" \x00\n") == Drop("empty")


@pytest.mark.parametrize("text", [GOOD["ko"], "naïve café – “quoted” façade… à l’été", "año Ñandú"])
def test_broken_encodings_are_told(text: str) -> None:
    """What is broken is known; the same text whole is the control."""
    assert broken_share(text) == 0
    latin = text.encode().decode("latin-1") if text == GOOD["ko"] else text.encode().decode("cp1252", "replace")
    assert broken_share(latin) > 0.1
    cleaner = Cleaner(CleanConfig(language="en", rules=Rules(min_words=1, min_stop_words=None)))
    assert cleaner(GOOD["en"] + "\ufffd" * 9).rule == "max_broken"  # type: ignore[union-attr]
    assert isinstance(cleaner(GOOD["en"] + "\ufffd" * 3), str)


def test_lines_are_taken_out() -> None:
    base, junk = (
        GOOD["en"],
        ["Please enable JavaScript to continue.", "We use cookies. Read our Privacy Policy.", "이용약관"],
    )
    cleaner = Cleaner(CleanConfig(language="en"))
    assert cleaner(lines(junk[0], base, *junk[1:])) == base
    assert cleaner.changes["lines: script"] == 1 and cleaner.changes["lines: policy"] == 2
    assert cleaner(lines(*junk)) == Drop("lines")
    off = Cleaner(config_from_tree({"language": "en", "lines": {"script": False, "policy": False}}))
    assert off(lines(junk[0], base)) == lines(junk[0], base)
    strict = Cleaner(config_from_tree({"language": "en", "lines": {"shortest": 5, "terminal": True}}))
    assert strict(lines("Home", "Only four words here", "A line of at least five words", base)) == base
    assert strict.changes["lines: shortest"] == 2 and strict.changes["lines: terminal"] == 1


def test_languages_by_script() -> None:
    for language in ("ko", "ja", "zh"):
        assert identify(GOOD[language], model=False).code == language
        assert identify(GOOD[language][:8] + " " + "code x" * 2, model=False).code == language
    assert by_script(GOOD["en"]) is None and identify("123 !?", model=False).code == "und"
    assert identify("他说の是日文。" + GOOD["zh"], model=False).code == "zh"
    assert identify(GOOD["en"] + " 김치, 寿司, 北京", model=False).code == "und", (
        "a few words do not make a text Korean"
    )
    keep = Cleaner(CleanConfig(language="script", keep_languages=["ko"]))
    assert keep(GOOD["ko"]) == GOOD["ko"]
    assert [keep(GOOD[c]).rule for c in ("en", "ja", "zh")] == ["keep_languages"] * 3  # type: ignore[union-attr]


def test_languages_by_the_library() -> None:
    pytest.importorskip("py3langid")
    german = "Der alte Hafen liegt am Ende einer schmalen Straße, die sich zwischen Gärten und niedrigen Mauern windet."
    french = "Le vieux port se trouve au bout d'une route étroite qui serpente entre des jardins et de petits murs."
    for code, text in {**GOOD, "de": german, "fr": french}.items():
        assert identify(text).code == code
    keep = Cleaner(CleanConfig(keep_languages=["en"], rules=Rules(min_words=5)))
    assert keep(GOOD["en"]) == GOOD["en"] and keep(german).rule == "keep_languages"  # type: ignore[union-attr]
    sure = Cleaner(CleanConfig(keep_languages=["en"], min_language=1.0))
    assert sure(GOOD["en"]).rule == "keep_languages"  # type: ignore[union-attr]


def test_the_model_read_from_its_file_says_what_the_library_says() -> None:
    """To the bit, for texts of any script, ends within an n-gram, and bytes that are no text."""
    library = pytest.importorskip("py3langid.langid")
    theirs = library.LanguageIdentifier.from_model_file(library.MODEL_FILE, norm_probs=True)
    ours, rng = language_model(), random.Random(0)
    texts = ["", "7", "é", "\ud800", "UNE ROUTE", "Une route étroite serpente entre des jardins.", *GOOD.values()]
    texts += [text[i : i + rng.randrange(1, 40)] for text in GOOD.values() for i in range(0, len(text), 31)]
    texts += ["".join(chr(rng.choice([rng.randrange(32, 1500), rng.randrange(0x3000, 0xD7FF)])) for _ in range(300))]
    for text in texts * 2:  # the second time with other rows in memory
        assert ours(text) == theirs.classify(text)


def test_rows_of_a_file_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where two of one call have the same place in memory, one of them there already."""
    monkeypatch.setattr("moai_llm.data.language_model.RECENT", 4)
    matrix = np.arange(60, dtype=np.float16).reshape(20, 3)
    np.save(tmp_path / "m.npy", matrix)
    rows = Rows(tmp_path / "m.npy", 3)
    assert np.array_equal(rows.block(5, 7), matrix[5:12])
    for wanted in (
        [3, 7, 3, 11],
        [7, 11, 15, 0],
        [15, 3],
        [3, 15, 3],
        [],
        *np.random.default_rng(0).integers(20, size=(50, 9)),
    ):
        index = np.array(wanted, np.int64)
        assert np.array_equal(rows[index], matrix[index])


def test_without_the_library_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    language_model.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(MoaiError, match=r"moai-llm\[clean\].*language: script"):
        Cleaner()
    language_model.cache_clear()
    assert Cleaner(CleanConfig(language="script"))(GOOD["en"]) == GOOD["en"]


def test_source_code_has_rules_of_its_own() -> None:
    cleaner, program = Cleaner(CleanConfig(language="script")), "def f(x):\n    return {x: 1}  # javascript\n"
    assert cleaner(program, "src/a.py") == program == cleaner(program, "git:repo:src/a.py:12")
    assert cleaner(program, "a.jsonl:3") == Drop("min_words")
    assert Cleaner(CleanConfig(language="script", code=True))(program) == program
    assert is_code("x.rs") and not is_code("x.md") and not is_code("a.py.jsonl:3") and not is_code("")


# kind -> (what must be masked, what looks like it and must not)
PERSONAL: dict[str, tuple[list[str], list[str]]] = {
    "email": (["kim.yuna@example.co.kr", "a+b@x-y.org"], ["@property", "user@", "a@b", "x @ y.com"]),
    "phone number": (
        ["010-1234-5678", "01012345678", "02-123-4567", "031) 123-4567", "+82 10-1234-5678", "+82-2-1234-5678",
         "070-1234-5678", "+1 (415) 555-2671", "(415) 555-2671", "03-1234-5678", "13812345678"],
        ["2024-01-31", "1,234,567", "3.14159265", "12345678901", "010-12-34", "1234-5678", "ISBN 978-89-123-4567-0"],
    ),
    "resident number": (
        ["900101-1234568", "9001011234568", "850505-5123456"],
        ["900101-1234567", "901301-1234568", "850505-5123459"],
    ),
    "card number": (
        ["4111 1111 1111 1111", "5500-0000-0000-0004", "378282246310005"],
        ["4111 1111 1111 1112", "0" * 16],
    ),
    "ip address": (
        ["8.8.8.8", "2001:4860:4860::8888"],
        ["127.0.0.1", "192.168.0.1", "1.2.3", "999.1.1.1", "12:30:45", "::"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PERSONAL)
def test_personal_data_is_masked_and_what_looks_like_it_is_not(kind: str) -> None:
    from moai_llm.data.pii import mask_simple

    found, others = PERSONAL[kind]
    for item in found:
        for text in ("{}", "call {} now.", "연락처: {}입니다", "({})"):
            masked, counts = mask_simple(text.format(item))
            assert masked == text.format(f"<{kind}>") and counts == {kind: 1}, (item, masked)
    for item in others:
        text = f"see {item} here"
        assert kind not in mask_simple(text)[1], (item, mask_simple(text))


def shout(text: str) -> tuple[str, dict[str, int]]:
    return text.replace("harbour", "HARBOUR"), {"harbour": text.count("harbour")}


def test_a_hook_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "mask.py").write_text("def mask(text):\n    return text.replace('old', '***'), {'old': 1}\nx = 1\n")
    for name, word in ((f"{__name__}:shout", "HARBOUR"), (f"{tmp_path}/mask.py:mask", "***")):
        cleaner = pickle.loads(pickle.dumps(Cleaner(CleanConfig(language="en", pii=name))))
        assert word in cleaner(GOOD["en"]) and sum(v for k, v in cleaner.changes.items() if k.startswith("masked")) == 1
    simple = Cleaner(CleanConfig(language="en", pii="simple"))
    assert simple(GOOD["en"] + " Write to me@example.org.") == GOOD["en"] + " Write to <email>."
    assert simple.changes["masked: email"] == 1
    for name, words in (("nothing", "write `simple`"), ("no_such_module_x:f", "no_such_module_x"),
                        (f"{tmp_path}/mask.py:x", "no function 'x'"), (f"{tmp_path}/no.py:f", "no file")):  # fmt: skip
        with pytest.raises(MoaiError, match=words):
            Cleaner(CleanConfig(language="en", pii=name))


def test_the_configuration_is_checked(tmp_path: Path) -> None:
    file = tmp_path / "clean.yaml"
    file.write_text("language: en\nrules: {min_words: 5, max_top_grams: {2: 0.5}}\nby_language: {ko: {min_words: 3}}\n")
    config = load_config(file)
    assert config.rules.min_words == 5 and config.rules.max_top_grams == {2: 0.5} and config.rules.max_words == 100_000
    assert load_config("default") == CleanConfig() == config_from_tree({})
    wrong: list[tuple[Any, str]] = [
        ({"rulez": {}}, "rulez is unknown.*did you mean 'rules'"),
        ({"rules": {"min_word": 5}}, "rules.min_word is unknown.*'min_words'"),
        ({"rules": {"min_words": "many"}}, r"rules\.min_words: .*'many'"),
        ({"by_language": {"ko": {"min_wordz": 1}}}, r"by_language\.ko\.min_wordz is unknown.*'min_words'"),
        ({"by_language": {"ko": {"min_words": "x"}}}, r"by_language\.ko\.min_words"),
        ({"max_broken": 7}, "max_broken"),
        (["a"], "not a mapping"),
    ]  # fmt: skip
    for tree, words in wrong:
        with pytest.raises(MoaiError, match=words):
            config_from_tree(tree)
    with pytest.raises(MoaiError, match="no.yaml: No such file"):
        load_config(tmp_path / "no.yaml")
    file.write_text("a: [")
    with pytest.raises(MoaiError, match="not readable YAML"):
        load_config(file)


def test_a_corpus_is_cleaned_and_counted(tmp_path: Path) -> None:
    texts = [GOOD["en"], "too short", GOOD["ko"], "\x00", "also short", GOOD["en"] + "\nEnable javascript!"]
    documents = [Document(text, f"f:{i}", {"id": i}) for i, text in enumerate(texts)]
    cleaner = pickle.loads(pickle.dumps(Cleaner(CleanConfig(language="script"))))
    report = clean(documents, cleaner, tmp_path / "out.jsonl")
    assert (report.read, report.kept, report.dropped) == (6, 3, Counter({"min_words": 2, "empty": 1}))
    assert report.examples["min_words"] == [("f:1", "", "too short"), ("f:4", "", "also short")]
    assert report.changes == {"repaired": 1, "lines: script": 1}
    back = list(read_documents([tmp_path / "out.jsonl"], Reading()))
    assert [(d.text, d.columns["id"]) for d in back] == [(GOOD["en"], 0), (GOOD["ko"], 2), (GOOD["en"], 5)]
    assert report.as_dict()["examples"]["empty"] == [{"document": "f:3", "detail": "", "text": "\x00"}]


@pytest.mark.parametrize(
    "name", ["en/rust_book.jsonl", "ko/rust_book.jsonl", "ja/rust_book.jsonl", "zh/rust_book.jsonl"]
)
def test_most_of_a_real_book_is_kept(name: str) -> None:
    """Prose about code, with code in it: the rules must not take it for rubbish."""
    documents = [d for d in read_documents([shared_data(name)], Reading()) if len(d.text) > 2000]
    language = name[:2] if name.startswith("en") else "script"
    cleaner = Cleaner(CleanConfig(language=language))
    dropped = Counter(c.rule for d in documents if isinstance(c := cleaner(d.text, d.place), Drop))
    assert dropped.total() <= len(documents) / 3, (dropped, len(documents))
    shuffled: Callable[[str], str] = lambda text: " ".join(sorted(text.split()))  # noqa: E731
    rubbish = [cleaner((shuffled(d.text)[:300] + "\n") * 20, d.place) for d in documents]
    assert all(isinstance(r, Drop) for r in rubbish), "the control"
