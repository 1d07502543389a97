"""GPUs are divided among engines as CUDA_VISIBLE_DEVICES names them; too few are told with what was found."""

from __future__ import annotations

import os

import pytest
import torch

from pipeline.errors import UserError
from teacher_dump.gpus import THREADS, VISIBLE, EngineSlot, engine_slots


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Four GPUs, as torch counts them, and eight threads."""

    def count() -> int:
        named = os.environ.get(VISIBLE)
        names = named.split(",") if named is not None else list("0123")
        return len(names) if len(set(names)) == len(names) and named != "" else 0  # CUDA shows none if one is twice

    monkeypatch.setattr(torch.cuda, "device_count", count)
    monkeypatch.delenv(VISIBLE, raising=False)
    monkeypatch.setenv(THREADS, "8")
    return monkeypatch


def places(slots: list[EngineSlot]) -> list[str | None]:
    return [slot.environment.get(VISIBLE) for slot in slots]


def test_all_gpus_of_the_machine(machine: pytest.MonkeyPatch) -> None:
    slots = engine_slots(4, 1)
    assert places(slots) == ["0", "1", "2", "3"]
    assert [slot.label for slot in slots] == ["GPU 0", "GPU 1", "GPU 2", "GPU 3"]
    assert {slot.environment[THREADS] for slot in slots} == {"2"}


def test_engines_of_several_gpus(machine: pytest.MonkeyPatch) -> None:
    slots = engine_slots(4, 2)
    assert places(slots) == ["0,1", "2,3"] and slots[1].label == "GPUs 2,3"
    assert places(engine_slots(2, 2)) == ["0,1"]


def test_the_users_list_is_taken_as_it_stands(machine: pytest.MonkeyPatch) -> None:
    machine.setenv(VISIBLE, "3, 1,GPU-8a")
    assert places(engine_slots(3, 1)) == ["3", "1", "GPU-8a"]


def test_one_gpu_for_two_engines(machine: pytest.MonkeyPatch) -> None:
    """This process still sees the GPU: what is chosen by device must not depend on how often one is named."""
    machine.setenv(VISIBLE, "2,2")
    assert places(engine_slots(2, 1)) == ["2", "2"]
    assert os.environ[VISIBLE] == "2" and torch.cuda.device_count() == 1


def test_without_gpus_engines_share_the_cores(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.cuda, "device_count", lambda: 0)
    assert engine_slots(3, 1) == [EngineSlot("CPU", {THREADS: "2"})] * 3
    machine.setenv(VISIBLE, "0,0")
    assert len(engine_slots(16, 1)) == 16 and engine_slots(16, 1)[0].environment == {THREADS: "1"}


def test_by_default_one_engine_takes_what_it_finds(machine: pytest.MonkeyPatch) -> None:
    assert [slot.environment for slot in engine_slots(0, 1)] == [{}]
    assert [slot.environment for slot in engine_slots(0, 2)] == [{}]


@pytest.mark.parametrize(
    ("gpus", "tensor_parallel", "visible", "said"),
    [
        (5, 1, None, "--gpus 5: this machine has 4: ask for at most 4"),
        (2, 1, "3", "--gpus 2: CUDA_VISIBLE_DEVICES names 3: ask for at most 1"),
        (3, 2, None, "--gpus 3: each engine takes 2 GPUs (--engine.tensor_parallel): ask for a multiple"),
        (1, 2, None, "--gpus 1: each engine takes 2 GPUs"),
        (-1, 1, None, "--gpus -1: must not be negative"),
        (2, 0, None, "--engine.tensor_parallel 0: must be at least 1"),
        (0, -1, None, "--engine.tensor_parallel -1: must be at least 1"),
    ],
)
def test_what_cannot_be_divided_is_told(
    machine: pytest.MonkeyPatch, gpus: int, tensor_parallel: int, visible: str | None, said: str
) -> None:
    if visible is not None:
        machine.setenv(VISIBLE, visible)
    with pytest.raises(UserError) as raised:
        engine_slots(gpus, tensor_parallel)
    assert str(raised.value).startswith(said)
