"""What training does differently on a GPU, as far as a CPU can show it: fused AdamW, what is logged from the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_cache import write_toy_cache
from lightning import Callback, LightningModule, Trainer

import student.__main__ as command
from student.losses.attention import attention_alignment
from student.training.module import DistillModule


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_cache(tmp_path_factory.mktemp("device") / "cache", units=1, rows=16, length=32, block=8)


def options(cache: Path, run: Path, *extra: str) -> list[str]:
    settings = {
        "cache": cache,
        "run": run,
        "checkpoint_every": 1,
        "data.batch_rows": 4,
        "model.student.blocks": 2,
        "model.student.heads": 4,
        "model.loss.beta": 0.0,
        "model.loss.gamma": 0.1,
        "trainer.accelerator": "cpu",
        "trainer.precision": "bf16-mixed",
        "trainer.max_epochs": 1,
    }
    return [*(f"--{name}={value}" for name, value in settings.items()), *extra]


class Watch(Callback):
    """Notes what a step leaves: the gradients' norm after clipping, whether AdamW is fused, what was logged where."""

    def __init__(self, stop_after: int = 0) -> None:
        self.stop_after = stop_after
        self.norms: list[float] = []
        self.largest: list[float] = []
        self.fused: list[Any] = []
        self.on_host: dict[str, bool] = {}
        self.broadcast: list[torch.Tensor] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.broadcast = getattr(trainer.strategy.model, "modules_buffers", None)

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        if gradients:
            self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))
            self.largest.append(max(float(g.abs().max()) for g in gradients))
            self.fused.append({group["fused"] for group in optimizer.param_groups})

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        logged = trainer.callback_metrics
        self.on_host = {name: value.dtype == torch.float64 for name, value in logged.items()}
        if self.stop_after and trainer.global_step == self.stop_after:
            raise KeyError("stopped")


def train(arguments: list[str], monkeypatch: pytest.MonkeyPatch, fused: bool, stop_after: int = 0) -> Watch:
    watch = Watch(stop_after)
    monkeypatch.setattr(command, "TRAINER_DEFAULTS", {**command.TRAINER_DEFAULTS, "callbacks": [watch]})
    monkeypatch.setattr(DistillModule, "_fused", lambda self: True if fused else None)
    if stop_after:
        with pytest.raises(KeyError, match="stopped"):
            command.main(arguments)
    else:
        assert command.main(arguments) == 0
    return watch


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_clipped_for_a_fused_optimizer(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    extra = (f"--trainer.gradient_clip_algorithm={algorithm}", "--trainer.gradient_clip_val=0.001")
    watch = train(options(cache, tmp_path / "run", *extra), monkeypatch, fused=True)
    kept = watch.norms if algorithm == "norm" else watch.largest
    assert watch.fused and all(fused == {True} for fused in watch.fused)
    assert kept == pytest.approx([0.001] * len(kept), rel=1e-3)


@pytest.mark.parametrize("first", [True, False])
def test_a_checkpoint_goes_on_with_the_optimizer_of_the_device_it_is_on(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    train(options(cache, tmp_path / "run"), monkeypatch, fused=first, stop_after=2)
    watch = train(options(cache, tmp_path / "run"), monkeypatch, fused=not first)
    assert watch.fused == [{None if first else True}] * len(watch.fused) and watch.fused


def test_numbers_of_the_schedule_are_logged_from_the_host(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = train(options(cache, tmp_path / "run"), monkeypatch, fused=False)
    assert all(watch.on_host[name] for name in ("alpha", "tau", "lr", "tokens_per_second")), watch.on_host
    assert not watch.on_host["train/loss"]


def test_autocast_does_not_round_the_teachers_map() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.rand(2, 6, 4, 4, generator=generator).tril()
    maps = {1: torch.rand(2, 4, 4, generator=generator).tril()}
    arguments = (maps, teacher, torch.tensor([64, 64]), 16, 4)
    expected = attention_alignment(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention_alignment(*arguments), expected)


def test_ranks_do_not_send_the_frozen_teacher_round(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank over gloo: what DistributedDataParallel would broadcast before every step."""
    extra = ("--trainer.strategy=ddp", "--trainer.devices=1", "--trainer.max_steps=1")
    try:
        watch = train(options(cache, tmp_path / "run", *extra), monkeypatch, fused=False)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert watch.broadcast == []
