"""The four training recipes of the older documents, with what they promise, to be planned instead of believed."""

from __future__ import annotations

from typing import NamedTuple


class Scenario(NamedTuple):
    """Ranges as published: devices, tokens, days, and dollars in total."""

    title: str
    device: str
    devices: tuple[int, int]
    tokens: tuple[float, float]
    days: tuple[float, float]
    cost: tuple[float, float]
    recipe: str = "moai-3b"


SCENARIOS = {
    "basic": Scenario("Basic (budget)", "A100-80GB", (1, 2), (20e9, 30e9), (10, 15), (3e3, 5e3)),
    "intermediate": Scenario("Intermediate (production)", "A100-80GB", (8, 8), (60e9, 100e9), (5, 7), (10e3, 20e3)),
    "advanced": Scenario("Advanced (SOTA)", "H100-SXM", (16, 32), (100e9, 300e9), (2, 4), (30e3, 60e3)),
    "ultra-efficient": Scenario("Ultra-efficient", "RTX-4090", (4, 4), (30e9, 30e9), (15, 20), (2e3, 3e3)),
}
