"""A disk that refuses is told in one sentence, and costs nothing: the small set of `make chaos`, part faults."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos import faults

from pipeline.errors import UserError
from teacher_dump.engine import EngineOptions, TeacherEngine, TeacherEngineError
from teacher_dump.vllm_process import StartLog

pytestmark = pytest.mark.timeout(300)


def test_faults_are_told_and_mended() -> None:
    """Full, forbidden, failing, vanishing disks; bits that turn; claims, pipes and engines that fail."""
    figures = faults.run(seed=1, small=True)
    assert sum(figure.trials for figure in figures) > 60
    assert [(figure.what, figure.facts) for figure in figures if figure.failures] == []
    for name in ("ENOSPC", "EACCES", "EIO"):
        ends = next(figure.facts["ends"] for figure in figures if figure.what.startswith(f"{name} at one"))
        assert "refused with status 2" in ends, "the fault was not met"


def engine() -> TeacherEngine:
    """An engine that has not been started: only its messages are asked for."""
    made = TeacherEngine.__new__(TeacherEngine)
    made.model, made.length = Path("teacher"), 64
    made.options = EngineOptions(rows_per_step=8, gpu_memory_utilization=0.8)
    made._log = StartLog(quiet=False)
    return made


class OutOfMemoryError(RuntimeError):
    """As torch names it."""


@pytest.mark.parametrize(
    ("error", "option"),
    [
        (
            ValueError("Free memory on device (1/80 GiB) on startup is less than desired"),
            "engine.gpu_memory_utilization (now 0.8)",
        ),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 9.27 GiB."), "engine.rows_per_step (now 8)"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "engine.rows_per_step (now 8)"),
        (MemoryError(), "engine.rows_per_step (now 8)"),
    ],
)
def test_a_device_without_memory_names_the_option_to_lower(error: Exception, option: str) -> None:
    told = engine()._explained(error, "the teacher died")
    assert isinstance(told, UserError) and not isinstance(told, TeacherEngineError)
    assert option in str(told) and "free the device's memory" in str(told)


def test_another_death_of_the_engine_says_what_it_said() -> None:
    told = engine()._explained(RuntimeError("cancelled\nby somebody"), "the teacher died")
    assert isinstance(told, TeacherEngineError) and str(told) == "the teacher died: RuntimeError: cancelled"
