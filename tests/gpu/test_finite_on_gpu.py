"""A batch that is no good: the step is not taken, the run stops and names its rows, the last checkpoint goes on.

Without a GPU the same tests run on a CPU.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_cache import write_toy_cache
from lightning import Callback, LightningModule, Trainer

import student.__main__ as command
from pipeline.errors import UserError
from student.data.batch import Batch

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            pytest.mark.timeout(900),
        ],
    ),
]
STEP = 25
"""Of 32 in four epochs: checkpoints are written after every 8."""


class Weights(Callback):
    """The trained weights before and after each optimiser step."""

    def __init__(self) -> None:
        self.before: dict[int, torch.Tensor] = {}
        self.after: dict[int, torch.Tensor] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.before[trainer.global_step] = flat(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.after[trainer.global_step - 1] = flat(pl_module)


def flat(module: LightningModule) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad]).clone()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 rows: 8 steps an epoch."""
    folder = tmp_path_factory.mktemp("finite") / "cache"
    return write_toy_cache(folder, units=2, rows=16, length=64, width=64, window=4)


def train(device: str, cache: Path, run: Path, *more: str, callbacks: tuple[Callback, ...] = ()) -> int:
    settings = {
        "cache": cache, "run": run, "checkpoint_every": 8, "data.batch_rows": 4, "model.student.blocks": 2,
        "model.student.heads": 2, "model.loss.beta": 0.1, "trainer.accelerator": {"cuda": "gpu"}.get(device, device),
        "trainer.devices": 1, "trainer.max_epochs": 4, "trainer.limit_val_batches": 0,
    }  # fmt: skip
    words = [*(f"--{name}={value}" for name, value in settings.items()), *more]
    return command.main(words, callbacks=callbacks)


def spoil(monkeypatch: pytest.MonkeyPatch, number: int, factor: float) -> list[list[int]]:
    """Multiply what the teacher said of the batch of that number (from 0), its hidden states or, for a NaN, which the
    Frobenius term takes for padding, its logits; returns the sequences of all batches so far."""
    seen: list[list[int]] = []
    whole = Batch.to

    def moved(batch: Batch, *args: Any, **kwargs: Any) -> Batch:
        result = whole(batch, *args, **kwargs)
        seen.append(batch.sequence_id_B.tolist())
        if len(seen) == number + 1:
            assert result.hidden_BWD is not None
            if math.isnan(factor):
                result.topk_logits_BTK, result.lse_BT = result.topk_logits_BTK * factor, result.lse_BT * factor
            else:
                result.hidden_BWD = result.hidden_BWD * factor
        return result

    monkeypatch.setattr(Batch, "to", moved)
    return seen


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("factor", [math.nan, 1e6], ids=["nan", "explosion"])
def test_a_bad_batch(device: str, factor: float, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        seen = spoil(patch, STEP, factor)
        what = "the loss is nan" if math.isnan(factor) else r"the loss is \S+, more than --explosion 5 times"
        with pytest.raises(UserError, match=rf"{what}.* at step {STEP} on sequences") as raised:
            train(device, cache, run)
    assert f"sequences {seen[STEP]}:" in str(raised.value)
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)
    assert checkpoint["global_step"] == 24
    assert train(device, cache, run) == 0


@pytest.mark.parametrize("device", DEVICES)
def test_the_step_is_not_taken(device: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = Weights()
    spoil(monkeypatch, STEP, math.nan)
    with pytest.raises(UserError, match=f"at step {STEP} "):
        train(device, cache, tmp_path / "run", callbacks=(weights,))
    before = weights.before[STEP]
    after = weights.after.get(STEP)  # on a CPU the run ended in it
    assert (after is None) == (device == "cpu")
    assert after is None or torch.equal(before, after)
    assert before.isfinite().all() and not torch.equal(before, weights.before[STEP - 1])


@pytest.mark.parametrize("device", DEVICES)
def test_of_several_batches_of_a_step_it_is_the_right_one(
    device: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = spoil(monkeypatch, 2 * 10, math.nan)
    with pytest.raises(UserError, match="the loss is nan at step 10 on sequences") as raised:
        train(device, cache, tmp_path / "run", "--trainer.accumulate_grad_batches=2")
    assert f"sequences {seen[20]}:" in str(raised.value)


@pytest.mark.parametrize("device", DEVICES)
def test_an_explosion_may_be_allowed(device: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, STEP, 1e6)
    assert train(device, cache, tmp_path / "run", "--explosion=0") == 0


@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_float16_with_its_loss_scaler(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Infinite gradients are its own affair; a loss that is not a number is not."""
    assert train("cuda", cache, tmp_path / "good", "--trainer.precision=16-mixed") == 0
    spoil(monkeypatch, STEP, math.nan)
    with pytest.raises(UserError, match="the loss is nan at step"):
        train("cuda", cache, tmp_path / "bad", "--trainer.precision=16-mixed")
