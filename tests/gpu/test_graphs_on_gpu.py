"""A training whose blocks are launched as CUDA graphs: the losses of one whose are not."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from helpers_cache import write_toy_cache
from lightning import Callback, LightningModule, Trainer

from student.__main__ import main
from student.blocks.graphed import GraphedBlocks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(900),
]

PACKAGE = {"model.student.blocks": 2, "model.student.heads": 2}
TRANSFORMER = PACKAGE | {
    "model.student.transformer.feedforward": 96,
    "model.student.transformer.kv_heads": 1,
    "model.student.transformer.rope_theta": 10000.0,
}
UNFROZEN = TRANSFORMER | {"model.student.train_embedding": True, "model.student.train_head": True}


class Losses(Callback):
    """The loss of each step, and whether blocks were recorded."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.recorded = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        self.values.append(float(trainer.callback_metrics["train/loss"]))
        self.recorded = pl_module.model.graphed is not None  # type: ignore[union-attr]


def losses(cache: Path, run: Path, shape: dict[str, object], graphs: bool, gamma: float, precision: str) -> Losses:
    settings = shape | {
        "cache": cache, "run": run, "data.batch_rows": 4, "model.loss.beta": 0, "model.loss.gamma": gamma,
        "model.graphs": graphs, "model.optimizer.lr": 1e-3, "trainer.accelerator": "gpu", "trainer.devices": 1,
        "trainer.precision": precision, "trainer.max_epochs": 3, "seed_everything": 3,
    }  # fmt: skip
    seen = Losses()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*--model.graphs.*")
        status = main([f"--{name}={value}" for name, value in settings.items()], callbacks=[seen])
    assert status == 0
    return seen


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("gamma", [0.0, 0.1])
@pytest.mark.parametrize("shape", [PACKAGE, TRANSFORMER, UNFROZEN], ids=["package", "transformer", "unfrozen"])
def test_the_losses_are_those_without(
    shape: dict[str, object], gamma: float, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches: list[int] = []
    run = GraphedBlocks.__call__

    def counted(self: GraphedBlocks, x_BTD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        launches.append(1)
        return run(self, x_BTD)

    monkeypatch.setattr(GraphedBlocks, "__call__", counted)
    cache = write_toy_cache(tmp_path / "cache", units=2, heldout_units=1, rows=16, length=128, width=64)
    plain = losses(cache, tmp_path / "plain", shape, False, gamma, precision)
    graphed = losses(cache, tmp_path / "graphed", shape, True, gamma, precision)
    assert graphed.recorded and not plain.recorded
    assert len(graphed.values) == len(plain.values) == len(launches) == 24
    apart = max(abs(a - b) for a, b in zip(plain.values, graphed.values, strict=True))
    print(f"losses at most {apart:.2g} nats apart, over which they fall by {plain.values[0] - plain.values[-1]:.2g}")
    assert apart < (0.005 if precision == "32-true" else 0.02)
