"""What `--kv-keep` says: `window:N`, `sinks:S+window:N` or `heavy:K+window:N`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moai_llm.runtime import MoaiError

FORMS = "window:N, sinks:S+window:N or heavy:K+window:N"


@dataclass(frozen=True)
class Keep:
    """The latest `window` keys, and `sinks` first or `heavy` most used ones, not both."""

    window: int
    sinks: int = 0
    heavy: int = 0

    @property
    def count(self) -> int:
        """Keys that a query sees at most."""
        return self.window + self.sinks + self.heavy

    def __str__(self) -> str:
        other = f"sinks:{self.sinks}+" if self.sinks else f"heavy:{self.heavy}+" if self.heavy else ""
        return f"{other}window:{self.window}"


def parse_keep(text: str) -> Keep:
    """What a policy says.

    Raises:
        MoaiError: it is not one of the three forms, with numbers above 0.
    """
    found = re.fullmatch(r"(?:(sinks|heavy):(\d+)\+)?window:(\d+)", text)
    if found is None:
        raise MoaiError(f"--kv-keep {text!r} is not one of {FORMS}, as in sinks:4+window:1024")
    other, count, window = found.groups()
    if not int(window) or (other and not int(count)):
        raise MoaiError(f"--kv-keep {text!r}: a number must be at least 1")
    return Keep(int(window), **({other: int(count)} if other else {}))
