"""Stage two through its command line: a run that was killed mid-epoch ends with the weights of an undisturbed one."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers_cache import write_toy_cache
from helpers_dump import REPOSITORY, environment

STEPS = 12
"""24 rows and batches of 4: 6 steps an epoch, two epochs."""


def train_command(cache: Path, run: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "student", "--cache", str(cache), "--run", str(run), "--checkpoint_every", "4"),
        *("--trainer.max_epochs", "2", "--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1"),
        *("--model.student.blocks", "2", "--model.student.heads", "2", "--model.loss.beta", "0"),
        *("--model.loss.gamma", "0.1", "--data.batch_rows", "4", "--seed_everything", "3"),
    ]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "toy"
    write_toy_cache(path, units=3, heldout_units=1, rows=8, length=64, width=32, heads=2)
    return path


def finished_weights(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == STEPS
    weights: dict[str, torch.Tensor] = checkpoint["state_dict"]
    return weights


def run_to_end(cache: Path, run: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        train_command(cache, run), env=environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def whole(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    done = run_to_end(cache, run)
    assert done.returncode == 0, done.stderr
    return run


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_resumed_run_ends_with_equal_weights(cache: Path, whole: Path, tmp_path: Path, how: signal.Signals) -> None:
    cut = tmp_path / "cut"
    process = subprocess.Popen(
        train_command(cache, cut),
        env=environment(),
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job would inherit it ignored
    )
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen = line
        if line.startswith("step 5/"):  # past the checkpoint of step 4, within the first epoch
            break
    process.send_signal(how)
    process.stdout.read()
    process.wait(timeout=120)
    assert seen.startswith("step 5/"), seen
    assert process.returncode != 0
    deadline = time.monotonic() + 5
    while not (cut / "checkpoints" / "last.ckpt").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    resumed = run_to_end(cache, cut)
    assert resumed.returncode == 0, resumed.stderr
    expected, found = finished_weights(whole), finished_weights(cut)
    assert expected.keys() == found.keys()
    assert not any("embedding_VD" in name or "head_VD" in name for name in found), "frozen weights were stored again"
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def test_other_settings_on_an_existing_run_are_refused(cache: Path, whole: Path) -> None:
    again = run_to_end(cache, whole)
    assert again.returncode == 0
    assert "finished" in again.stdout
    command = [*train_command(cache, whole), "--model.optimizer.lr", "0.5"]
    other = subprocess.run(command, env=environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert other.returncode == 2
    assert "lr" in other.stderr and "0.5" in other.stderr
    assert "Traceback" not in other.stderr
