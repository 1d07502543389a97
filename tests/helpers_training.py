"""Short trainings through the command line on a device of choice, for tests that compare devices."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

import student.__main__ as command
from pipeline.cache import Cache
from student.model import DistilXLSTM, StudentConfig

SHAPE = {"blocks": 2, "heads": 2}
"""On a teacher of width 64: an sLSTM of head width 32 and an mLSTM of 64, which its GPU kernel takes."""


class Stopped(Exception):
    """Ends a training as a kill would, between two steps."""


@dataclass
class Trained:
    """What a training leaves.

    Attributes:
        losses: of every step that this sitting took.
        sequences: the sequence ids of their batches.
        weights: the trained parameters after the last step, on the CPU.
    """

    losses: list[float] = field(default_factory=list)
    sequences: list[list[int]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


class _Record(Callback):
    def __init__(self, initial: dict[str, Tensor], stop_after: int) -> None:
        self.initial, self.stop_after, self.found = initial, stop_after, Trained()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:
            state = pl_module.model.state_dict()  # type: ignore[union-attr, operator]
            assert all(torch.equal(state[name].cpu(), value) for name, value in self.initial.items())

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self.stop_after and trainer.global_step == self.stop_after:
            raise Stopped

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.found.losses.append(float(outputs["loss"]))
        self.found.sequences.append(batch.sequence_id_B.tolist())
        state = pl_module.model.state_dict()  # type: ignore[union-attr, operator]
        self.found.weights = {name: value.detach().cpu().clone() for name, value in state.items()}


def initial_weights(cache: Path) -> dict[str, Tensor]:
    """A student's weights before the first step, the same whatever it is trained on."""
    teacher = Cache(cache).teacher
    torch.manual_seed(0)
    model = DistilXLSTM(StudentConfig(**SHAPE), teacher.facts, teacher.tensors(), Cache(cache).spec.length)
    return model.state_dict()


def train_on(
    device: str, cache: Path, run: Path, *, precision: str = "32-true", epochs: int = 2, stop_after: int = 0
) -> Trained:
    """Train for `epochs` epochs of batches of 4 rows, or until `stop_after` steps are done and saved.

    Args:
        device: cpu or cuda.
        run: a new run, or one to go on with.
    """
    record = _Record(initial_weights(cache), stop_after)
    settings = {
        "cache": cache,
        "run": run,
        "checkpoint_every": stop_after or 1000,
        "seed_everything": 0,
        "data.batch_rows": 4,
        **{f"model.student.{name}": value for name, value in SHAPE.items()},
        "model.loss.beta": 0.0,
        "model.loss.gamma": 0.1,
        "model.optimizer.lr": 0.003,
        "trainer.accelerator": "gpu" if device == "cuda" else device,
        "trainer.devices": 1,
        "trainer.max_epochs": epochs,
        "trainer.precision": precision,
    }
    with mock.patch.dict(command.TRAINER_DEFAULTS, {"callbacks": [record]}):
        words = [f"--{name}={value}" for name, value in settings.items()]
        if stop_after:
            with pytest.raises(Stopped):
                command.main(words)
        else:
            assert command.main(words) == 0
    return record.found


def deviation(found: dict[str, Tensor], expected: dict[str, Tensor], initial: dict[str, Tensor]) -> float:
    """Distance of two trained students as a share of the way that training went."""

    def distance(other: dict[str, Tensor]) -> float:
        return float(torch.stack([(expected[name] - other[name]).double().norm() for name in expected]).norm())

    assert found.keys() == expected.keys() == initial.keys()
    return distance(found) / distance(initial)


def apart(found: list[float], expected: list[float]) -> float:
    """Largest difference between the losses of the same steps."""
    return max(abs(a - b) for a, b in zip(found, expected, strict=True))
