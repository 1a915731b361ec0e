"""Whether a step may be taken: numbers that are not finite, and spikes far above the steps before.

A bad step is skipped: its gradients are thrown away, the weights stay. Too many in a row are no accident, and the run
goes back to its last good checkpoint (`rollback.py`), takes the new level for normal, or stops, as the recipe says.
What is remembered is part of a checkpoint, so a resumed run judges as one that was never stopped.

The rule of spikes is that of OLMo-core's skip-step optimizers: a loss or gradient norm more than six standard
deviations above the mean of the last 128 steps.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any, Literal, NamedTuple

from moai_llm.recipe import HealthConfig

LEAST_RISE = 0.1  # of the mean: where all values are nearly equal, six deviations are nothing


class Verdict(NamedTuple):
    action: Literal["take", "skip", "rollback", "stop"]
    reason: str = ""


class Health:
    """The last steps, and what to do about the next one.

    Attributes:
        skipped: steps that were not taken, in the whole run.
        in_a_row: bad steps since the last good one.
    """

    def __init__(self, config: HealthConfig) -> None:
        self.config = config
        self.skipped = self.in_a_row = 0
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        self._norms: deque[float] = deque(maxlen=config.spike_window)

    def judge(self, loss: float, grad_norm: float, *, scaled: bool = False) -> Verdict:
        """What to do with a step of this loss and gradient norm; called once for each, in order.

        Args:
            scaled: the gradients were scaled (fp16): a norm that is not finite then means that the scale is too large,
                which the scaler answers by itself. It is skipped, and only very many in a row are an error.
        """
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        reason = "" if finite else f"loss {loss:.4g}, gradient norm {grad_norm:.4g}"
        if finite:
            reason = self._spike("loss", loss, self._losses) or self._spike("gradient norm", grad_norm, self._norms)
        if not reason:
            self._losses.append(loss)
            self._norms.append(grad_norm)
            self.in_a_row = 0
            return Verdict("take")
        self.in_a_row += 1
        if not finite and self.config.nonfinite == "stop" and not (scaled and math.isfinite(loss)):
            return Verdict("stop", reason)
        patience = self.config.patience * (5 if scaled else 1)
        if self.in_a_row <= patience:
            self.skipped += 1
            return Verdict("skip", reason)
        if self.config.rollback:
            return Verdict("rollback", reason)
        if not finite:
            return Verdict("stop", reason)
        self._losses.clear()  # so many in a row are a new level, not a spike
        self._norms.clear()
        self._losses.append(loss)
        self._norms.append(grad_norm)
        self.in_a_row = 0
        return Verdict("take", f"{reason}; {patience} in a row: taken for the new level")

    def _spike(self, what: str, value: float, before: deque[float]) -> str:
        sigma = self.config.spike_sigma
        if sigma is None or len(before) < max(2, self.config.spike_window // 2):
            return ""
        mean = statistics.fmean(before)
        limit = mean + max(sigma * statistics.pstdev(before, mean), LEAST_RISE * abs(mean))
        return f"{what} {value:.4g} above {limit:.4g}" if value > limit else ""

    def state_dict(self) -> dict[str, Any]:
        return {
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "losses": list(self._losses),
            "norms": list(self._norms),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        self._losses = deque(state["losses"], maxlen=self.config.spike_window)
        self._norms = deque(state["norms"], maxlen=self.config.spike_window)
