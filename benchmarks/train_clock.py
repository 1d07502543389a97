"""The clock inside a real training run: a callback that times its steps, and the loader's waits."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import distributed

from benchmarks.meters import peak_gb, reset_peak, wait
from benchmarks.train_profile import StepProfile


class StepClock(Callback):
    """Times `steps` optimiser steps after `warmup` others.

    Attributes:
        seconds: None until all steps are done.
        table: their profile, if it was asked for.
        waits: seconds that the trainer waited for each batch of those steps.
    """

    def __init__(self, warmup: int, steps: int, profile: bool = False) -> None:
        self.warmup, self.steps = warmup, steps
        self.table = ""
        self._profile: StepProfile | None = None
        self._profiled = profile
        self.step = 0
        self.seconds: float | None = None
        self.waits: list[float] = []
        self.memory: dict[str, float] = {}
        self.loss = 0.0
        self.model: torch.nn.Module | None = None
        self._started = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.warmup == 0:
            self._begin(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.step = trainer.global_step
        if self.step == self.warmup:
            self._begin(pl_module)
        elif self.step == self.warmup + self.steps and self.seconds is None:
            wait(pl_module.device)
            self.seconds = time.perf_counter() - self._started
            if self._profile is not None:
                self.table = self._profile.table(self.steps)
            self.waits = self.waits[: self.steps]
            self.memory = peak_gb(pl_module.device)
            self.loss = float(outputs["loss"])
            self.model = pl_module

    def _begin(self, pl_module: LightningModule) -> None:
        wait(pl_module.device)
        reset_peak(pl_module.device)
        self.waits.clear()
        if self._profiled:
            self._profile = StepProfile(pl_module.device)
            self._profile.start()
            if distributed.is_initialized():
                distributed.barrier()  # ranks take seconds to start a profile, which is no waiting of a step's
                wait(pl_module.device)
        self._started = time.perf_counter()


@contextmanager
def timed_waits(loader: type, waits: list[float]) -> Iterator[None]:
    """Note how long each `next` of a loader's iterators takes, while the `with` lasts."""
    original = loader.__iter__  # type: ignore[attr-defined]

    def timed(self: Any) -> Iterator[Any]:
        batches = original(self)
        while True:
            started = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            waits.append(time.perf_counter() - started)
            yield batch

    loader.__iter__ = timed  # type: ignore[attr-defined]
    try:
        yield
    finally:
        loader.__iter__ = original  # type: ignore[attr-defined]
