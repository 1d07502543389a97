"""Training on a GPU against training on a CPU, resuming there, and checkpoints that move between the two.

Without a GPU the same tests run with a CPU in both places, where every difference must be nothing.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers_cache import write_toy_cache
from helpers_training import Trained, apart, deviation, initial_weights, train_on

CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        pytest.mark.timeout(900),  # kernels are compiled at their first use
    ],
)
DEVICES = ["cpu", CUDA]

NATS = {"32-true": 0.005, "bf16-mixed": 0.02}
"""How far losses of the same step may lie apart on two devices. On a CPU, noise of 1e-3 in the mLSTM cells (whose
kernel multiplies float32 in TF32) moved them by 9e-5, and bf16-mixed instead of float32 by 4e-3."""
SAME_DEVICE = 0.02
"""How far a resumed run's weights may lie from an undisturbed one's, of the way training went."""
STOP = 5


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 rows: 8 steps an epoch."""
    return write_toy_cache(tmp_path_factory.mktemp("gpu") / "cache", units=2, rows=16, length=128, width=64)


@pytest.fixture(scope="module", params=sorted(NATS))
def on_cpu(
    request: pytest.FixtureRequest, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Trained]:
    """The precision, and what two epochs on a CPU give."""
    run = tmp_path_factory.mktemp("cpu") / "run"
    return request.param, train_on("cpu", cache, run, precision=request.param)


@pytest.mark.parametrize("device", DEVICES)
def test_a_short_training_follows_the_cpus(
    device: str, on_cpu: tuple[str, Trained], cache: Path, tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    precision, expected = on_cpu
    found = train_on(device, cache, tmp_path / "run", precision=precision)
    assert found.sequences == expected.sequences and len(found.losses) == 16
    difference = apart(found.losses, expected.losses)
    fall = expected.losses[0] - expected.losses[-1]
    record_property("nats apart", difference)
    print(f"{device}, {precision}: losses at most {difference:.2g} nats apart, over which they fall by {fall:.2g}")
    assert fall > 5 * NATS[precision]
    assert difference <= (0 if device == "cpu" else NATS[precision])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", sorted(NATS))
def test_a_resumed_run_reads_the_same_rows_and_ends_near_the_same_weights(
    device: str, precision: str, cache: Path, tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    whole = train_on(device, cache, tmp_path / "whole", precision=precision)
    first = train_on(device, cache, tmp_path / "cut", precision=precision, stop_after=STOP)
    rest = train_on(device, cache, tmp_path / "cut", precision=precision)
    assert first.sequences + rest.sequences == whole.sequences and len(first.sequences) == STOP
    found = deviation(rest.weights, whole.weights, initial_weights(cache))
    record_property("deviation", found)
    print(f"{device}, {precision}: a resumed run's weights are {found:.2g} of the way from an undisturbed one's")
    assert found <= (0 if device == "cpu" else SAME_DEVICE)


@pytest.mark.parametrize(
    ("first", "second"),
    [("cpu", "cpu"), pytest.param("cpu", "cuda", marks=CUDA.marks), pytest.param("cuda", "cpu", marks=CUDA.marks)],
)
def test_a_run_goes_on_on_another_device(
    first: str, second: str, on_cpu: tuple[str, Trained], cache: Path, tmp_path: Path
) -> None:
    precision, expected = on_cpu
    begun = train_on(first, cache, tmp_path / "run", precision=precision, stop_after=STOP)
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True, map_location="cpu")
    assert checkpoint["global_step"] == STOP
    stored = {name.removeprefix("model."): value for name, value in checkpoint["state_dict"].items()}
    assert all(torch.equal(stored[name], value) for name, value in begun.weights.items())
    ended = train_on(second, cache, tmp_path / "run", precision=precision)
    assert begun.sequences + ended.sequences == expected.sequences
    assert apart(begun.losses + ended.losses, expected.losses) <= (0 if first == second else NATS[precision])
