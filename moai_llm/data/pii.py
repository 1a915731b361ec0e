"""Personal data in texts: patterns with checks, masked by what they were.

Simple and honest about it: it finds what has a form (addresses, numbers), never names or postal addresses. A hook in
the clean.yaml puts a better one in its place.
"""

from __future__ import annotations

import importlib
import importlib.util
import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

from moai_llm.runtime import MoaiError

Mask = Callable[[str], tuple[str, Mapping[str, int]]]  # text -> (masked text, how many of what)

_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[a-zA-Z]{2,24}(?![\w@])", re.ASCII)
_RESIDENT = re.compile(r"(?<!\d)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])[- ]?[1-8]\d{6}(?!\d)", re.ASCII)
_CARD = re.compile(
    r"(?<![\w.-])(?:[2-6]\d{3}([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{3})?|3\d{3}([ -])\d{6}\2\d{5}|4\d{12}|[2-6]\d{13,18})"
    r"(?![\w-])",
    re.ASCII,
)
_PHONE = re.compile(
    r"""(?<![\w.+-])(?:
      (?:\+82[ .-]?(?:\(0\))?[ .-]?|0)(?:1[016-9]|2|[3-6][1-5]|70|50\d|80)[ ).-]{0,2}\d{3,4}[ .-]?\d{4}  # Korea
    | \+\d{1,3}[ .-]?\(?\d{1,4}\)?(?:[ .-]?\d{2,4}){2,4}                                            # with a country
    | \(?[2-9]\d{2}\)?[ .-]\d{3}[.-]\d{4}                                                          # North America
    | 0\d{1,4}-\d{1,4}-\d{4}                                                                        # Japan
    | 1[3-9]\d{9}                                                                                   # China, mobile
    )(?![\w-])""",
    re.VERBOSE | re.ASCII,
)
_IP4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\d)", re.ASCII)
_IP6 = re.compile(r"(?<![\w:.])[0-9a-fA-F]{0,4}(?::[0-9a-fA-F]{0,4}){2,7}(?![\w:])", re.ASCII)


def is_resident_number(text: str) -> bool:
    """The check digit of a Korean resident registration number; those of foreigners end otherwise."""
    digits = [int(c) for c in text if c.isdigit()]
    if len(digits) != 13:
        return False
    total = sum(d * w for d, w in zip(digits, (2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5)))
    return ((13 if digits[6] >= 5 else 11) - total % 11) % 10 == digits[12]


def is_card_number(text: str) -> bool:
    """The check digit of Luhn (ISO/IEC 7812-1)."""
    digits = [int(c) for c in reversed(text) if c.isdigit()]
    total = sum(digits[::2]) + sum(sum(divmod(2 * d, 10)) for d in digits[1::2])
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and total % 10 == 0


def is_public_address(text: str) -> bool:
    """An IP address that can be somebody's: not one of a private network, nor of documentation."""
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False


_KINDS: tuple[tuple[str, re.Pattern[str], Callable[[str], bool] | None], ...] = (
    ("email", _EMAIL, None),
    ("resident number", _RESIDENT, is_resident_number),
    ("card number", _CARD, is_card_number),
    ("ip address", _IP6, is_public_address),
    ("ip address", _IP4, is_public_address),
    ("phone number", _PHONE, lambda found: 8 <= sum(c.isdigit() for c in found) <= 15),
)


def mask_simple(text: str) -> tuple[str, Mapping[str, int]]:
    """Emails, phone numbers, Korean resident numbers, card numbers and public IP addresses become `<email>`, ..."""
    counts: Counter[str] = Counter()
    for kind, pattern, check in _KINDS:

        def replaced(found: re.Match[str], kind: str = kind, check: Callable[[str], bool] | None = check) -> str:
            if check is not None and not check(found.group()):
                return found.group()
            counts[kind] += 1
            return f"<{kind}>"

        text = pattern.sub(replaced, text)
    return text, counts


@lru_cache(maxsize=8)
def load_mask(name: str) -> Mask:
    """`simple`, or a function of the user's: `package.module:function` or `path/to/file.py:function`.

    Raises:
        MoaiError: there is no such function.
    """
    if name == "simple":
        return mask_simple
    module, sign, function = name.rpartition(":")
    if not sign or not module or not function:
        raise MoaiError(f"pii: {name}: write `simple`, package.module:function or path/to/file.py:function")
    try:
        if module.endswith(".py"):
            if not Path(module).is_file():
                raise MoaiError(f"pii: {name}: there is no file {module}")
            spec = importlib.util.spec_from_file_location(f"moai_pii_{Path(module).stem}", module)
            assert spec is not None and spec.loader is not None
            loaded = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded)
        else:
            loaded = importlib.import_module(module)
    except ImportError as error:
        raise MoaiError(f"pii: {name}: {error}") from None
    found = getattr(loaded, function, None)
    if not callable(found):
        raise MoaiError(f"pii: {name}: {module} has no function {function!r}")
    return found
