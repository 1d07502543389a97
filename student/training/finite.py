"""A loss or a gradient that is not finite stops the run, and no weight is touched by it.

On a CPU the step is not taken. On a GPU the host would have to wait for the device to know, every step: instead the
device itself leaves the weights alone (`found_inf`, as a gradient scaler uses it), and the host learns of it some steps
later.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import UserError

BEHIND = 16
"""Steps the host may be ahead of what it knows."""


@dataclass
class _Step:
    number: int
    sequences: list[int]
    values_2: Tensor  # loss and gradient norm, pinned
    known: torch.cuda.Event


class FiniteWatch:
    """Watches one training run."""

    def __init__(self) -> None:
        self._loss: Tensor | None = None
        self._number, self._sequences = 0, list[int]()
        self._steps: deque[_Step] = deque()

    def loss(self, loss: Tensor, number: int, sequences: list[int]) -> None:
        """The loss of a batch.

        Raises:
            UserError: it is not finite (on a GPU: that of an earlier batch); names step and sequences.
        """
        self._number, self._sequences = number, sequences
        # Of several accumulated batches any may be the one: a sum keeps what is not finite.
        self._loss = loss if self._loss is None else self._loss + loss
        if loss.is_cuda:
            self._look(BEHIND)
        else:
            _require_finite("loss", float(loss), number, sequences)

    def gradients(self, norm: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """The gradient's norm, before the optimizer's step.

        Raises:
            UserError: it is not finite, on a CPU; a GPU's optimizer is told to do nothing.
        """
        loss, self._loss = self._loss, None
        assert loss is not None
        if not norm.is_cuda:
            _require_finite("gradient norm", float(norm), self._number, self._sequences)
            return
        values_2 = torch.stack((loss.float(), norm.float()))
        optimizer.found_inf = (~values_2.isfinite().all()).float()  # type: ignore[attr-defined]
        pinned_2 = torch.empty(2, pin_memory=True)
        pinned_2.copy_(values_2, non_blocking=True)
        known = torch.cuda.Event()
        known.record()
        self._steps.append(_Step(self._number, self._sequences, pinned_2, known))

    def wait(self) -> None:
        """Know of every step; before a checkpoint is written.

        Raises:
            UserError: one was not finite.
        """
        self._look(0)

    def _look(self, behind: int) -> None:
        while self._steps and (len(self._steps) > behind or self._steps[0].known.query()):
            step = self._steps.popleft()
            step.known.synchronize()
            for what, value in zip(("loss", "gradient norm"), step.values_2.tolist(), strict=True):
                _require_finite(what, value, step.number, step.sequences)


def _require_finite(what: str, value: float, number: int, sequences: list[int]) -> None:
    if value - value != 0:  # infinite or NaN
        raise UserError(
            f"the {what} is {value} at step {number} on sequences {sequences}: "
            "training stopped before the weights were touched; lower --model.optimizer.lr or set "
            "--trainer.gradient_clip_val, or look at these rows with inspect"
        )
