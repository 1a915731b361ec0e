"""Clean documents one at a time: repair the text, tell its language, ask the rules, mask personal data.

A `Cleaner` knows nothing but its configuration, so copies of it in several processes do the same. What needs the whole
corpus (duplicates, shared lines) is `dedup`.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from annotated_types import Ge, Le

from moai_llm.data.contamination import EvaluationIndex, index_evaluations
from moai_llm.data.documents import Document, DocumentWriter
from moai_llm.data.language import UNKNOWN, Language, identify
from moai_llm.data.pii import load_mask
from moai_llm.data.quality import TERMINAL, Facts, Rules, broken_rule, rules_for
from moai_llm.data.sources.languages import CODE
from moai_llm.runtime import MoaiError, did_you_mean

EXAMPLES = 3  # shown of each rule
Share = Annotated[float, Ge(0), Le(1)]

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufdd0-\ufdef\ufffe\uffff]")
_NEWLINES = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_LINE = re.compile(r":\d+$")
_SURROGATES = re.compile("[\ud800-\udfff]")
_CP1252 = "\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"  # what the bytes 0x80 to 0xbf become when read as cp1252
_MOJIBAKE = re.compile(f"[\xc2-\xdf][{_CP1252}]|[\xe0-\xef][{_CP1252}]{{2}}|[\xf0-\xf4][{_CP1252}]{{3}}")
_POLICY = re.compile(
    r"terms of use|privacy policy|cookie policy|use of cookies|uses cookies|use cookies|개인정보\s?처리방침|이용\s?약관"
    r"|プライバシーポリシー|利用規約|隐私政策|使用条款",
    re.IGNORECASE,
)


class Drop(NamedTuple):
    """Why a document is left out: the name of a rule, and more of it."""

    rule: str
    detail: str = ""


@dataclass(frozen=True)
class Lines:
    """Lines that are taken out, after C4 (arXiv 1910.10683, section 2.2).

    script: lines that mention JavaScript; policy: that point to terms of use, privacy policy, cookies.
    shortest: words a line must have, or letters over `Habits.letters_a_word`. terminal: lines must end as sentences do.
    """

    script: bool = True
    policy: bool = True
    shortest: int | None = None
    terminal: bool = False


@dataclass(frozen=True)
class Contamination:
    """Evaluation sets; documents that share an n-gram with them are dropped."""

    against: list[str] = field(default_factory=list)
    words: int = 13
    characters: int = 26


@dataclass(frozen=True)
class CleanConfig:
    """A clean.yaml.

    nfc: compose characters (Unicode NFC). control_characters: take them out, all but newline and tab.
    max_broken: share of characters that came of a wrong encoding: U+FFFD, and UTF-8 that was read as Latin.
    language: `auto`, `script` (only what the script tells), or one code for all documents.
    keep_languages: all others are dropped; `und` stands for those nobody can tell.
    min_language: how sure the language must be, where `keep_languages` asks for it.
    code: all documents are source code; else the suffix of the file says which ones are.
    by_language: rules that differ for a language.
    pii: `simple`, or a function of yours, see `pii.load_mask`.
    """

    nfc: bool = True
    control_characters: bool = True
    max_broken: Share | None = 0.01
    language: str = "auto"
    keep_languages: list[str] | None = None
    min_language: Share = 0.0
    code: bool = False
    lines: Lines = field(default_factory=Lines)
    rules: Rules = field(default_factory=Rules)
    by_language: dict[str, dict[str, Any]] = field(default_factory=dict)
    contamination: Contamination = field(default_factory=Contamination)
    pii: str | None = None


class Cleaner:
    """text, place -> cleaned text, or why it is dropped. It can be pickled.

    `changes` counts what was done to texts: `lines: script`, `masked: email`, ...

    Raises:
        MoaiError: a hook or evaluation sets that are not there.
    """

    def __init__(self, config: CleanConfig | None = None) -> None:
        self.config = config = config or CleanConfig()
        self.changes: Counter[str] = Counter()
        self._rules: dict[str, Rules] = {}
        self._evaluations: EvaluationIndex | None = None
        if config.contamination.against:
            given = config.contamination
            self._evaluations = index_evaluations(given.against, words=given.words, characters=given.characters)
        if config.pii is not None:
            load_mask(config.pii)
        if config.language == "auto":
            identify("Is the library that tells languages there?")

    def __call__(self, text: str, place: str = "") -> str | Drop:
        config = self.config
        text = self._repaired(text)
        if not text.strip():
            return Drop("empty")
        if config.max_broken is not None and (share := broken_share(text)) > config.max_broken:
            return Drop("max_broken", f"{share:.1%}")
        code = config.code or is_code(place)
        language = Language(UNKNOWN, 0.0) if code else self._language(text)
        if not code and not self._is_wanted(language):
            return Drop("keep_languages", f"{language.code} {language.share:.2f}")
        if not code:
            text = self._filtered(text, language.code)
            if not text.strip():
                return Drop("lines")
        rules = self._rules.get(language.code)
        if rules is None:
            rules = self._rules[language.code] = rules_for(config.rules, language.code, config.by_language)
        rule = broken_rule(text, language.code, rules, code=code)
        if rule is not None:
            return Drop(rule)
        if self._evaluations is not None and (items := self._evaluations.items_in(text)):
            return Drop("contamination", self._evaluations.names[self._evaluations.set_of(items[0])])
        if config.pii is not None:
            text, masked = load_mask(config.pii)(text)
            self.changes.update({f"masked: {kind}": count for kind, count in masked.items()})
        return text

    def _repaired(self, text: str) -> str:
        before = text
        text = _SURROGATES.sub("\ufffd", text)
        if self.config.control_characters:
            text = _CONTROL.sub("", _NEWLINES.sub("\n", text))
        if self.config.nfc:
            text = unicodedata.normalize("NFC", text)
        self.changes["repaired"] += text != before
        return text

    def _language(self, text: str) -> Language:
        if self.config.language not in ("auto", "script"):
            return Language(self.config.language, 1.0)
        return identify(text, model=self.config.language == "auto")

    def _is_wanted(self, language: Language) -> bool:
        wanted = self.config.keep_languages
        return wanted is None or (language.code in wanted and language.share >= self.config.min_language)

    def _filtered(self, text: str, language: str) -> str:
        """The text without the lines that are not wanted."""
        wanted, kept = self.config.lines, []
        asked = wanted.shortest is not None or wanted.terminal
        if not asked and "javascript" not in text.lower() and not _POLICY.search(text):
            return text  # as nearly all are
        for line in text.split("\n"):
            why, bare = "", line.strip()
            if wanted.script and "javascript" in bare.lower():
                why = "script"
            elif wanted.policy and _POLICY.search(bare):
                why = "policy"
            elif wanted.shortest is not None and bare and Facts(bare, language).words < wanted.shortest:
                why = "shortest"
            elif wanted.terminal and bare and not bare.endswith(TERMINAL):
                why = "terminal"
            if why:
                self.changes[f"lines: {why}"] += 1
            else:
                kept.append(line)
        return "\n".join(kept)


def broken_share(text: str) -> float:
    """Share of the characters that came of a wrong encoding: U+FFFD, and sequences that are UTF-8 read as cp1252."""
    broken = text.count("\ufffd") + sum(len(found.group()) for found in _MOJIBAKE.finditer(text))
    return broken / max(1, len(text))


def is_code(place: str) -> bool:
    """Whether a document is a file of source code; a record of a table is not, whatever the table is called."""
    return Path(_LINE.sub("", place)).suffix.lower() in CODE


def load_config(path: str | Path) -> CleanConfig:
    """A clean.yaml; `default` is the one with nothing in it.

    Raises:
        MoaiError: no such file, keys that are not known, values of the wrong type.
    """
    import yaml

    if str(path) == "default":
        return CleanConfig()
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise MoaiError(f"{path}: {error.strerror}; `default` is the name of the built-in rules") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MoaiError(f"{path} is not readable YAML: {error}") from None
    return config_from_tree({} if tree is None else tree, str(path))


def config_from_tree(tree: Any, name: str = "clean.yaml") -> CleanConfig:
    """Validate a nested mapping; raises `MoaiError` like `load_config`."""
    if not isinstance(tree, Mapping):
        raise MoaiError(f"{name} is not a mapping of options: write e.g. `keep_languages: [ko, en]`")
    problems = [f"  {problem}" for problem in _problems(tree)]
    if problems:
        raise MoaiError(f"{name} is not valid:\n" + "\n".join(problems))
    config: CleanConfig = _adapter(CleanConfig).validate_python(dict(tree))
    return config


def _problems(tree: Mapping[str, Any]) -> Iterator[str]:
    from pydantic import ValidationError

    parts: dict[str, tuple[type, Any]] = {"": (CleanConfig, tree)}
    by_language = tree.get("by_language")
    if isinstance(by_language, Mapping):
        parts.update({f"by_language.{k}.": (Rules, v) for k, v in by_language.items()})
    for where, (cls, given) in parts.items():
        try:
            _adapter(cls).validate_python(dict(given) if isinstance(given, Mapping) else given)
        except ValidationError as error:
            for problem in error.errors():
                *parents, key = (str(part) for part in problem["loc"]) if problem["loc"] else ("",)
                at = where + ".".join([*parents, key])
                if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
                    known = {"": CleanConfig, "rules": Rules, "lines": Lines, "contamination": Contamination}
                    names = [f.name for f in fields(Rules if where else known.get(".".join(parents), CleanConfig))]
                    yield f"{at} is unknown{did_you_mean(key, names)}"
                else:
                    yield f"{at}: {problem['msg']}, got {problem['input']!r}"


@lru_cache
def _adapter(cls: type) -> Any:
    from pydantic import TypeAdapter

    for each in (CleanConfig, Rules, Lines, Contamination):
        each.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[union-attr]
    return TypeAdapter(cls)


@dataclass
class CleanReport:
    """Counts of documents; of each rule the first few it dropped: (place, detail, beginning of the text)."""

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[tuple[str, str, str]]] = field(default_factory=dict)

    def add_drop(self, drop: Drop, place: str, text: str) -> None:
        self.dropped[drop.rule] += 1
        examples = self.examples.setdefault(drop.rule, [])
        if len(examples) < EXAMPLES:
            examples.append((place, drop.detail, " ".join(text[:400].split())[:120]))

    def as_dict(self) -> dict[str, Any]:
        rows = {
            rule: [dict(zip(("document", "detail", "text"), row)) for row in found]
            for rule, found in self.examples.items()
        }
        return {**vars(self), "examples": rows}


def clean(documents: Iterable[Document], cleaner: Cleaner, out: str | Path, *, overwrite: bool = False) -> CleanReport:
    """Write the documents that the cleaner keeps, in their order."""
    report = CleanReport()
    with DocumentWriter(out, overwrite=overwrite) as writer:
        for document in documents:
            report.read += 1
            cleaned = cleaner(document.text, str(document.columns.get("path") or document.place))
            if isinstance(cleaned, Drop):
                report.add_drop(cleaned, document.place, document.text)
            else:
                writer.write(cleaned, document.columns)
                report.kept += 1
    report.changes = +cleaner.changes
    return report


def cleaned_texts(
    texts: Iterable[tuple[str, str]], cleaner: Cleaner, dropped: Counter[str]
) -> Iterator[tuple[str, str]]:
    """(text, place) of what the cleaner keeps; `dropped` counts the others by rule.

    Raises:
        MoaiError: it keeps nothing.
    """
    kept = 0
    for text, place in texts:
        cleaned = cleaner(text, place)
        if isinstance(cleaned, Drop):
            dropped[cleaned.rule] += 1
        else:
            kept += 1
            yield cleaned, place
    if dropped and not kept:
        rules = ", ".join(f"{count:,} {rule}" for rule, count in dropped.most_common())
        raise MoaiError(f"the rules of cleaning drop all documents: {rules}; `moai data clean` shows examples")
