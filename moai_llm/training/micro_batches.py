"""How many rows of a step go through the model at once, and how that follows the memory there is.

The step is the same however it is cut: its loss is a sum over its targets divided by their number, and the routing
noise is a function of the row. Only the rounding of the sums differs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moai_llm.data.loader import Batch
from moai_llm.runtime import MoaiError

HIGH, LOW = 0.85, 0.65  # shares of the memory above which micro-batches shrink, and below which they grow


def split_rows(batch: Batch, size: int) -> list[Batch]:
    """Micro-batches of at most `size` rows."""
    count = batch["input_ids"].shape[0]
    return [{key: t[i : i + size] for key, t in batch.items()} for i in range(0, count, size)]


@dataclass
class MicroBatchSize:
    """Rows of a forward pass.

    Attributes:
        rows: now.
        most: rows of a step.
        too_many: the fewest rows that were found to be too many in this run; it does not grow so far again.
        notes: lines for people that nobody has taken yet.
    """

    rows: int
    most: int
    too_many: int | None = None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rows = min(self.rows, self.most)

    def split(self, batch: Batch) -> list[Batch]:
        return split_rows(batch, self.rows)

    def split_smaller(self, batch: Batch) -> list[Batch]:
        """The same rows in micro-batches of half the size, which stays; asked for when memory ran out.

        Raises:
            MoaiError: they have one row already.
        """
        if self.rows == 1:
            raise MoaiError(
                "the device's memory does not hold a single row: set train.activation_checkpointing=full, lower "
                "data.seq_len, or take an optimizer with smaller states (optim.name=adamw_8bit); "
                "`moai plan` says what each of them brings"
            )
        self._shrink("out of memory")
        return self.split(batch)

    def follow(self, taken: float) -> None:
        """Take half or twice the rows after a step that took this share of the memory."""
        larger = min(2 * self.rows, self.most)
        if taken > HIGH and self.rows > 1:
            self._shrink(f"{taken:.0%} of the memory was taken")
        elif taken < LOW and larger > self.rows and (self.too_many is None or larger < self.too_many):
            self._set(larger, f"{taken:.0%} of the memory was taken")

    def take_notes(self) -> list[str]:
        notes, self.notes = self.notes, []
        return notes

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "too_many": self.too_many}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the size of a checkpoint: a resumed run sums in the same order, and is the same to the bit."""
        self.rows, self.too_many = state["rows"], state["too_many"]

    def _shrink(self, reason: str) -> None:
        self.too_many = self.rows
        self._set(self.rows // 2, reason)

    def _set(self, rows: int, reason: str) -> None:
        self.notes.append(
            f"{reason}: micro-batches of {rows} rows instead of {self.rows}, {-(-self.most // rows)} a step; the step "
            "stays the same"
        )
        self.rows = rows
