"""A loss that explodes, or a loss or gradient that is not finite, stops the run, and no weight is touched by it.

On a CPU the step is not taken. On a GPU the host would have to wait for the device to know, every step: instead the
device itself leaves the weights alone (`found_inf`, as a gradient scaler uses it), and the host learns of it some steps
later.

Legend: R ranks; M forward passes of an optimiser step (accumulated batches).
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import UserError

BEHIND = 16
"""Steps the host may be ahead of what it knows."""
WINDOW, FIRST = 100, 20
"""Steps that the mean loss is of, about, and those before it is trusted."""
MARGIN = 1.0
"""Nats that an exploding loss is above its limit at least: a divergence near 0 may well be many times another one."""


@dataclass
class _Step:
    """What a step was: its number, the sequences of each of this rank's batches, and on the way to the host the losses
    of all batches and ranks, the gradient's norm and the limit."""

    number: int
    batches: list[list[int]]
    ranks: int
    values: Tensor
    known: torch.cuda.Event | None


class FiniteWatch:
    """Watches one training run.

    Args:
        deferred: leave it to the device, as described above; None: where it is a GPU.

    Attributes:
        factor: a batch whose loss is more than so many times the mean of the last steps, and a nat, explodes; 0: none.
    """

    def __init__(self, deferred: bool | None = None) -> None:
        self.factor, self._deferred = 0.0, deferred
        self._rank = self._number = 0
        self._batches: list[tuple[list[int], Tensor]] = []
        self._steps: deque[_Step] = deque()
        self._mean: Tensor | None = None
        self._count = 0

    def loss(self, loss_R: Tensor, rank: int, number: int, sequences: list[int]) -> None:
        """The loss of a batch.

        Args:
            loss_R: each rank's, whose mean is the loss of the batch.
            rank: this one, which `sequences` are of.
            number: of the optimiser step.

        Raises:
            UserError: it explodes or is not finite (on a GPU: that of an earlier batch); names step and sequences.
        """
        self._rank, self._number = rank, number
        self._batches.append((sequences, loss_R.detach().float()))
        if self._defers(loss_R):
            self._look(BEHIND)
        else:
            self._judge(number, [sequences], loss_R[None].tolist(), 0.0, self._limit())

    def gradients(self, norm: Tensor | None, optimizer: torch.optim.Optimizer) -> None:
        """The gradient's norm, before the optimizer's step.

        Args:
            norm: None where a loss scaler takes infinite gradients in its stride, and leaves out such steps itself.

        Raises:
            UserError: it is not finite, on a CPU; a GPU's optimizer is told to do nothing.
        """
        batches, self._batches = self._batches, []
        loss_MR = torch.stack([loss_R for _, loss_R in batches])
        sequences, limit = [of for of, _ in batches], self._limit()
        if not self._defers(loss_MR):
            self._judge(self._number, sequences, [], 0.0 if norm is None else float(norm), limit)
            self._remember(loss_MR.mean(), torch.tensor(False))
            return
        # A number is filled in by the device: to copy it there the host would wait.
        limit_1 = limit.reshape(1) if isinstance(limit, Tensor) else loss_MR.new_full((1,), limit)
        norm_1 = torch.zeros_like(limit_1) if norm is None else norm.reshape(1).float()
        values = torch.cat((loss_MR.flatten(), norm_1))
        is_bad = ~(values.isfinite().all() & (loss_MR.mean(1).amax() <= limit_1[0]))
        if norm is not None:
            optimizer.found_inf = is_bad.float()  # type: ignore[attr-defined]
        self._remember(loss_MR.mean(), is_bad)
        there = _to_the_host(torch.cat((values, limit_1)))
        self._steps.append(_Step(self._number, sequences, loss_MR.shape[1], *there))

    def wait(self) -> None:
        """Know of every step; before a checkpoint is written.

        Raises:
            UserError: one was not finite, or exploded.
        """
        self._look(0)

    def _defers(self, loss: Tensor) -> bool:
        return loss.is_cuda if self._deferred is None else self._deferred

    def _limit(self) -> Tensor | float:
        """What a batch's loss may be now."""
        if self.factor <= 0 or self._mean is None or self._count < FIRST:
            return math.inf
        return self.factor * self._mean + MARGIN

    def _remember(self, loss: Tensor, is_bad: Tensor) -> None:
        """Take a step's loss into the mean, on the device."""
        self._count += 1
        before = torch.zeros_like(loss) if self._mean is None else self._mean
        self._mean = torch.where(is_bad, before, before + (loss - before) / min(self._count, WINDOW))

    def _look(self, behind: int) -> None:
        while self._steps and (len(self._steps) > behind or _is_known(self._steps[0])):
            step = self._steps.popleft()
            if step.known is not None:
                step.known.synchronize()
            *losses, norm, limit = step.values.tolist()
            loss_MR = [losses[first : first + step.ranks] for first in range(0, len(losses), step.ranks)]
            self._judge(step.number, step.batches, loss_MR, norm, limit)

    def _judge(
        self, number: int, batches: list[list[int]], loss_MR: list[list[float]], norm: float, limit: Tensor | float
    ) -> None:
        """Raise UserError if something of a step is not as it must be."""
        for sequences, loss_R in zip(batches, loss_MR, strict=False):
            for rank, loss in enumerate(loss_R):
                if not math.isfinite(loss):
                    raise _stop(f"the loss is {loss}", number, self._rows(rank, sequences))
        if not math.isfinite(norm):
            raise _stop(f"the gradient norm is {norm}", number, f"sequences {sum(batches, [])}")
        for sequences, loss_R in zip(batches, loss_MR, strict=False):
            if (loss := sum(loss_R) / len(loss_R)) > limit:
                rank = loss_R.index(max(loss_R))
                limits = f"more than --explosion {self.factor:g} times the mean before it and a nat"
                raise _stop(f"the loss is {loss:.4g}, {limits},", number, self._rows(rank, sequences))

    def _rows(self, rank: int, sequences: list[int]) -> str:
        return f"sequences {sequences}" if rank == self._rank else f"rank {rank}'s sequences, which it names itself"


def _to_the_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy that is under way, and what says that it is there."""
    if not values.is_cuda:
        return values.clone(), None
    pinned = torch.empty(len(values), pin_memory=True)
    pinned.copy_(values, non_blocking=True)
    known = torch.cuda.Event()
    known.record()
    return pinned, known


def _is_known(step: _Step) -> bool:
    return step.known is not None and bool(step.known.query())


def _stop(what: str, number: int, where: str) -> UserError:
    return UserError(
        f"{what} at step {number} on {where}: training stopped, and the last checkpoint is from before it. Look at "
        "these rows (make inspect SHARD=n, n = sequence >> 32) and verify the cache; a lower --model.optimizer.lr or "
        "another --trainer.gradient_clip_val needs a new --run, with --init_from this one"
    )
