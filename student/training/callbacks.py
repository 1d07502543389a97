"""What happens around the steps: checkpoints at safe points, a stop on request, and lines for a log file."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, TQDMProgressBar

from pipeline.commit import commit_file, new_claim_id, temporary_path
from student.runs.seal import check_seal, seal
from student.training.ranks import AnyRank

LAST, BEST = "last.ckpt", "best.ckpt"


class Interrupted(Exception):
    """Training stopped on request after saving; `signal_number` says which signal asked for it."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


class RunCheckpoint(Checkpoint):
    """`last.ckpt` every N optimiser steps, at every epoch's end and when asked to stop; `best.ckpt` by val/ce.

    A checkpoint is committed as every file is, with its seal, so a kill at any moment leaves a whole one. It is taken
    only between optimiser steps: with accumulated gradients, what a half-collected step holds is not in it. The last
    step of an epoch is saved after validation, where resuming is exact. The first Ctrl-C (or SIGTERM) stops after the
    step at hand (during validation: after the epoch's checkpoint), a second one at once.

    Args:
        folder: where the checkpoints go.
        every_steps: N.
    """

    def __init__(self, folder: Path, every_steps: int) -> None:
        self.folder, self.every_steps = Path(folder), every_steps
        self.best: float | None = None
        self._step = 0
        self._signal = 0
        self._saved_to_stop = False
        self._any_rank = AnyRank()
        self._former: dict[int, Any] = {}
        self._loader_state: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self.folder.is_dir():
            for leftover in self.folder.glob(".*.tmp"):  # of a killed run: nobody else writes in this folder
                leftover.unlink()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore_signals()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore_signals()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        # Not earlier: Lightning installs its own just before, whose SIGTERM would end an epoch before it is saved.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._ask_to_stop)
        # Lightning asks all ranks at every step whether it has caught a SIGTERM, and waits for the device's answer.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        # Lightning gives a loader its state back within an epoch only; after an epoch's end it would begin at epoch 0.
        if self._loader_state is not None:
            trainer.train_dataloader.load_state_dict(self._loader_state)  # type: ignore[union-attr]
            self._loader_state = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Lightning's count for loggers is one too high after some resumptions: lines would get a wrong step.
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
        if self._saved_to_stop:
            raise Interrupted(self._signal or signal.SIGTERM)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        if not stepped or trainer.is_last_batch:
            return
        stop = self._asked_to_stop(trainer, pl_module.device)
        if stop or self._step % self.every_steps == 0:
            self._save(trainer, LAST)
        self._saved_to_stop = stop  # the stop itself waits until this step's line is logged

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        value = trainer.callback_metrics.get("val/ce")
        improved = value is not None and (self.best is None or float(value) < self.best)
        if improved:
            self.best = float(value)  # type: ignore[arg-type]
        self._save(trainer, LAST)
        if improved and trainer.is_global_zero:
            self._link(self.folder / LAST, self.folder / BEST)
        if self._stop(trainer):
            raise Interrupted(self._signal or signal.SIGTERM)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["train_loader"] = trainer.train_dataloader.state_dict()  # type: ignore[union-attr]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loader_state = checkpoint["train_loader"]

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        # A second Ctrl-C ends the run at once. A second SIGTERM (torchrun and Slurm may send one each) changes nothing:
        # Lightning's own handler, which stood here before, would call the other ranks in the middle of a step.
        if number == signal.SIGINT and number in self._former:
            signal.signal(number, self._former.pop(number))

    def _restore_signals(self) -> None:
        while self._former:
            number, handler = self._former.popitem()
            signal.signal(number, handler)

    def _asked_to_stop(self, trainer: Trainer, device: torch.device) -> bool:
        """Whether any rank was; all ranks answer the same. Several GPUs may answer a step late."""
        asked = bool(self._signal)
        return asked if trainer.world_size == 1 else self._any_rank(asked, device)

    def _stop(self, trainer: Trainer) -> bool:
        """Whether any rank was asked to stop until now; all ranks answer the same."""
        if trainer.world_size == 1:
            return bool(self._signal)
        return trainer.strategy.reduce_boolean_decision(bool(self._signal), all=False)

    def _save(self, trainer: Trainer, name: str) -> None:
        final = self.folder / name
        claim = trainer.strategy.broadcast(new_claim_id())
        trainer.save_checkpoint(temporary_path(final, claim))
        if trainer.is_global_zero:
            commit_file(final, seal, claim=claim, check=check_seal)
        trainer.strategy.barrier()

    def _link(self, source: Path, final: Path) -> None:
        """A second name for a checkpoint: a hard link where the file system has them, else a copy."""

        def place(temporary: Path) -> None:
            try:
                os.link(source, temporary)
            except OSError:
                shutil.copyfile(source, temporary)

        commit_file(final, place, check=check_seal)


class TrainBar(TQDMProgressBar):
    """The bar of a terminal; reads the device only when it is drawn anew."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        shown = {"loss": "train/loss", "tokens/s": "tokens_per_second"}
        return {
            label: float(trainer.callback_metrics[name])
            for label, name in shown.items()
            if name in trainer.callback_metrics
        }


class LogLines(Callback):
    """One line every `log_every_n_steps`, for output that goes to a file."""

    def __init__(self) -> None:
        self.total_steps = 0
        self._first, self._step, self._since = 0, 0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first = self._step = trainer.global_step
        self._since = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        every = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if step == self._step or (step % every and step != self.total_steps):
            return
        self._step = step
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if isinstance(v, torch.Tensor)}
        terms = ("loss", "ce", "kl_k1", "kl_renormalised", "kl_sampled")
        shown = [name for name in terms if f"train/{name}" in metrics]
        named = [f"{name} {metrics[f'train/{name}']:.3f}" for name in shown]
        left = (self.total_steps - step) * (time.monotonic() - self._since) / max(1, step - self._first)
        speed = f"{metrics.get('tokens_per_second', 0.0):.0f} tokens/s"
        self._print(trainer, f"step {step}/{self.total_steps}  {'  '.join(named)}  {speed}  {left / 60:.1f} min left")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        value = trainer.callback_metrics.get("val/ce")
        if value is not None:
            self._print(trainer, f"epoch {trainer.current_epoch + 1}  held-out ce {float(value):.4f} nats per token")

    def _print(self, trainer: Trainer, line: str) -> None:
        if trainer.is_global_zero:
            with contextlib.suppress(BrokenPipeError):
                print(line, flush=True)
