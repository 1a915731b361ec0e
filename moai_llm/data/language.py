"""Which language a text is in, and what that changes for counting its words.

The script decides where it can: Hangul, kana, Han. For the rest py3langid (extra `clean`) does, whose model is small
and comes within the package. It takes source code for English, as its peers do, so code is told by its suffix instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moai_llm.data.language_model import language_model
from moai_llm.data.units import code_points, tables

UNKNOWN = "und"  # undetermined, as in ISO 639
_SAMPLE = 2000  # characters from the beginning and from the middle that are looked at
_LEAST = 0.3  # share of the letters that makes a script the text's own; such texts quote a lot of English


@dataclass(frozen=True)
class Habits:
    """How a language is written.

    letters_a_word: where there are no spaces, how many characters count as a word; 0 where spaces part words.
    gram: characters that weigh as much as one word in an n-gram, where single characters are the units.
    stop: words that hardly any text of some length lacks; where words take endings, their endings.
    """

    letters_a_word: int = 0
    gram: int = 2
    stop: tuple[str, ...] = ()
    endings: bool = False


def _list(words: str) -> tuple[str, ...]:
    return tuple(words.split())


HABITS = {
    "en": Habits(stop=_list("the be to of and that have with")),  # those of Gopher, arXiv 2112.11446 appendix A
    "ko": Habits(gram=3, stop=_list("은 는 이 가 을 를 에 의 도 로 고 다 요"), endings=True),
    "ja": Habits(letters_a_word=2, stop=_list("の は に を が で と た")),
    "zh": Habits(letters_a_word=2, stop=_list("的 是 在 了 不 和 有 一 這 这 我")),
    "th": Habits(letters_a_word=4, gram=4, stop=_list("ที่ และ การ เป็น ของ ใน มี ได้")),
    "de": Habits(stop=_list("der die das und ist in nicht mit zu den")),
    "fr": Habits(stop=_list("le la les de et est un une des que")),
    "es": Habits(stop=_list("el la los de y en es que un una")),
    "it": Habits(stop=_list("il la di e che è un una per non")),
    "pt": Habits(stop=_list("o a os de e que em um uma não")),
    "nl": Habits(stop=_list("de het een en van is dat in niet te")),
    "ru": Habits(stop=_list("и в не на что с по как это а")),
    "vi": Habits(stop=_list("và của là có trong được cho không")),
    "id": Habits(stop=_list("yang dan di ini itu dengan untuk dari")),
}
_NO_HABITS = Habits()


class Language(NamedTuple):
    code: str  # ISO 639-1, `und` where nobody can tell
    share: float  # of the letters in its script, or the probability of the model


def habits_of(language: str) -> Habits:
    return HABITS.get(language, _NO_HABITS)


def identify(text: str, model: bool = True) -> Language:
    """The language of a text, by its beginning and its middle.

    Args:
        model: ask py3langid where the script leaves it open; else such texts are `und`.

    Raises:
        MoaiError: py3langid is needed and not installed.
    """
    if len(text) > 2 * _SAMPLE:
        middle = len(text) // 2
        text = text[:_SAMPLE] + "\n" + text[middle : middle + _SAMPLE]
    found = by_script(text)
    if found is not None:
        return found
    if not any(c.isalpha() for c in text):
        return Language(UNKNOWN, 0.0)
    if not model:
        return Language(UNKNOWN, 0.0)
    return Language(*language_model()(text))


def by_script(text: str) -> Language | None:
    """ko, ja or zh by their letters; None where the script does not tell."""
    codes = code_points(text)
    letters = int((tables()[0][codes] != 0).sum())
    if not letters or not (codes > 0x2FFF).any():
        return None
    hangul = _between(codes, 0xAC00, 0xD7A3) + _between(codes, 0x1100, 0x11FF) + _between(codes, 0x3130, 0x318F)
    kana = _between(codes, 0x3040, 0x30FF) + _between(codes, 0xFF66, 0xFF9F)
    han = _between(codes, 0x3400, 0x9FFF) + _between(codes, 0x20000, 0x3FFFF)
    if hangul >= max(_LEAST * letters, kana + han):
        return Language("ko", hangul / letters)
    if kana + han < _LEAST * letters:
        return None
    # Chinese quotes a kana now and then; Japanese prose without a tenth of kana there is hardly any
    return Language("ja" if kana >= 0.1 * (kana + han) else "zh", (kana + han) / letters)


def _between(codes: np.ndarray, first: int, last: int) -> int:
    return int(((codes >= first) & (codes <= last)).sum())
