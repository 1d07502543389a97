"""Delta-distillation (arXiv 2503.18565): how the weight and the temperature of the distillation fall.

Within an epoch, after k optimiser steps of it,

    alpha_k = alpha_end + (alpha_i - alpha_end) / (1 + ln(k + 1))

and the same for tau; after each epoch alpha_i <- max(alpha_i - delta, alpha_end), and the same for tau. k starts at 0
in every epoch, counts optimiser steps (not batches, not ranks) and is checkpointed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class DeltaSchedule:
    """One quantity's course. `delta=None` holds it fixed at `start`."""

    start: float
    end: float
    delta: float | None

    def __post_init__(self) -> None:
        if self.delta is not None and (self.delta < 0 or self.start < self.end):
            raise ValueError(f"a schedule falls: start {self.start} >= end {self.end} and delta {self.delta} >= 0")

    def at(self, epoch: int, k: int) -> float:
        """The value for the optimiser step that follows k steps of `epoch` (both from 0)."""
        if self.delta is None:
            return self.start
        initial = max(self.start - epoch * self.delta, self.end)
        return self.end + (initial - self.end) / (1.0 + math.log(k + 1))


@dataclass
class StepCounter:
    """Where training stands, in the schedule's own terms: the epoch and its optimiser steps so far."""

    epoch: int = 0
    k: int = 0

    def enter(self, epoch: int) -> None:
        """Begin `epoch`, or go on with it if it is the one already begun (after a resume)."""
        if epoch != self.epoch:
            self.epoch, self.k = epoch, 0

    def step(self) -> None:
        """One optimiser step was taken."""
        self.k += 1

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "k": self.k}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.k = state["epoch"], state["k"]
