"""Training on two GPUs through NCCL, each with all weights (DDP) or a part of them (`--trainer.strategy fsdp`): as on
one, and a run that was killed there goes on with one. One GPU is enough for a case of FSDP: a rank alone goes the same
way.
"""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers_cache import write_toy_cache
from helpers_dump import REPOSITORY, environment

from student.runs.checkpoint import load_student

NATS = 0.005
"""Between the losses of the same step in float32, as between devices (test_training_on_gpu.py)."""


def train(cache: Path, run: Path, epochs_at_once: bool, *more: str) -> list[float]:
    """One sitting; the losses of all steps that the run has logged."""
    settings = {
        "cache": cache,
        "run": run,
        "data.batch_rows": 4,
        "model.student.blocks": 2,
        "model.student.heads": 2,
        "model.loss.beta": 0,
        "model.loss.gamma": 0.1,
        "seed_everything": 3,
        "trainer.accelerator": "gpu",
        "trainer.log_every_n_steps": 1,
        "trainer.max_epochs": 2,
    }
    words = [f"--{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "student", *words, *more]
    if epochs_at_once:
        done = subprocess.run(command, env=environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    else:  # killed after the first epoch's checkpoint
        process = subprocess.Popen(
            command, env=environment(), cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 6/"):
                break
        os.killpg(process.pid, signal.SIGKILL)  # rank 1 as well, which would wait for rank 0
        process.wait()
    with open(run / "metrics.csv", newline="") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


@pytest.mark.gpu
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("gpus", "strategy"), [(1, "fsdp"), (2, "fsdp"), (2, "ddp")])
def test_several_ranks_train_as_one_does(gpus: int, strategy: str, tmp_path: Path) -> None:
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    cache = write_toy_cache(tmp_path / "cache", units=2, heldout_units=1, rows=10, length=128, width=64)
    several = (f"--trainer.devices={gpus}", f"--trainer.strategy={strategy}")
    with ThreadPoolExecutor(3) as pool:  # side by side: most of their time is importing and compiling
        runs = [
            pool.submit(train, cache, tmp_path / "plain", True, "--trainer.devices=1"),
            pool.submit(train, cache, tmp_path / "together", True, *several),
            pool.submit(train, cache, tmp_path / "moved", False, *several),
        ]
        plain, together, _ = (run.result() for run in runs)
    assert len(plain) == len(together) == 10
    assert max(abs(a - b) for a, b in zip(plain, together, strict=True)) < NATS
    moved = train(cache, tmp_path / "moved", True, "--trainer.devices=1")
    assert max(abs(a - b) for a, b in zip(plain, moved, strict=True)) < NATS
    student, _ = load_student(tmp_path / "together")
    assert all(parameter.isfinite().all() for parameter in student.parameters())
