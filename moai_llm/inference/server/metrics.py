"""Counters and histograms in the text format of Prometheus. One thread writes them, that of the event loop."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Histogram:
    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self.bounds, self.counts, self.total = tuple(bounds), [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        return sum(self.counts)

    def lines(self, name: str) -> Iterator[str]:
        below = 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts):
            below += count
            yield f'{name}_bucket{{le="{"+Inf" if bound == float("inf") else f"{bound:g}"}"}} {below}'
        yield f"{name}_sum {self.total:.6f}"
        yield f"{name}_count {below}"


class Metrics:
    """What a server has done since it started."""

    def __init__(self) -> None:
        self.requests: dict[tuple[str, int], int] = defaultdict(int)
        self.finished: dict[str, int] = defaultdict(int)
        self.prompt_tokens = self.generated_tokens = self.refused = 0
        self.first_token, self.latency = Histogram(), Histogram()

    def text(self, gauges: Mapping[str, tuple[str, float]], counters: Mapping[str, float]) -> str:
        """
        Args:
            gauges: name -> (what it is, its value now).
            counters: further numbers that only grow, such as the engine's.
        """
        return "\n".join(self._lines(gauges, counters)) + "\n"

    def _lines(self, gauges: Mapping[str, tuple[str, float]], counters: Mapping[str, float]) -> Iterator[str]:
        yield from _head("moai_requests_total", "counter", "HTTP requests by route and status")
        for (route, status), count in sorted(self.requests.items()):
            yield f'moai_requests_total{{route="{route}",code="{status}"}} {count}'
        yield from _head("moai_answers_total", "counter", "answers by how they ended")
        for reason, count in sorted(self.finished.items()):
            yield f'moai_answers_total{{finish="{reason}"}} {count}'
        plain = {
            "moai_refused_total": ("requests refused because the queue was full", self.refused),
            "moai_prompt_tokens_total": ("tokens of prompts", self.prompt_tokens),
            "moai_generated_tokens_total": ("tokens of answers", self.generated_tokens),
        }
        for name, (what, value) in plain.items():
            yield from _head(name, "counter", what)
            yield f"{name} {value}"
        for name, number in sorted(counters.items()):
            yield from _head(f"moai_engine_{name}_total", "counter", f"the engine's {name.replace('_', ' ')}")
            yield f"moai_engine_{name}_total {number:g}"
        for name, (what, now) in gauges.items():
            yield from _head(name, "gauge", what)
            yield f"{name} {now:g}"
        yield from _head("moai_time_to_first_token_seconds", "histogram", "from a request to its first token")
        yield from self.first_token.lines("moai_time_to_first_token_seconds")
        yield from _head("moai_answer_seconds", "histogram", "from a request to the end of its answers")
        yield from self.latency.lines("moai_answer_seconds")


def _head(name: str, kind: str, what: str) -> Iterator[str]:
    yield f"# HELP {name} {what}"
    yield f"# TYPE {name} {kind}"
