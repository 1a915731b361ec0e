"""What a check found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Verdict = Literal["ok", "warn", "fail"]
ORDER: tuple[Verdict, ...] = ("ok", "warn", "fail")


@dataclass(frozen=True)
class Finding:
    """`seen` is one sentence, `advice` what to do about it: empty only where all is well. `numbers` are for
    programs.
    """

    check: str
    verdict: Verdict
    seen: str
    advice: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.verdict == "ok" or self.advice, f"{self.check}: a complaint without advice"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def worst(findings: Iterable[Finding]) -> Verdict:
    """The worst verdict; ok where there is none."""
    return max((finding.verdict for finding in findings), key=ORDER.index, default="ok")
