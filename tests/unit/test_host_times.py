"""Timers around the calls of a dump: what they count, and that they are gone afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import host_times
from benchmarks.measured import file_system
from teacher_dump import shard_loop
from teacher_dump.engine import TeacherEngine
from teacher_dump.writer import ShardWriter


def test_time_is_counted_from_the_beginning_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(host_times.time, "perf_counter", lambda: clock[0])
    times = host_times.HostTimes()

    def work(seconds: float, begin: bool = False) -> float:
        if begin:
            clock[0] += 5
            times.begin()
        clock[0] += seconds
        return seconds

    def items() -> Iterator[float]:
        yield work(1)
        yield work(2)
        work(4)

    timed = times.calls(host_times.STEP, work)
    assert timed(100) == 100
    assert timed(3, begin=True) == 3 and times.spent == {host_times.STEP: 3}
    for _ in times.items(host_times.TEXT, items)():
        clock[0] += 50
    assert times.spent == {host_times.STEP: 3, host_times.TEXT: 7}
    times.add(host_times.IDLE, clock[0] - 2)
    times.add(host_times.COMMIT, clock[0] - 6)
    lines = {line[:45].strip(): line.split()[-2:] for line in times.table(12.0, 24).splitlines()[4:]}
    assert lines[f"engine   {host_times.STEP}"] == ["3", "0.25"] and lines["engine   the rest"] == ["9", "0.75"]
    assert lines["writers  encoding, reading back, committing"] == ["4", "0.3333"]


def test_what_was_timed_is_as_before() -> None:
    before = (shard_loop.ahead, shard_loop.packed_rows, TeacherEngine._launch, ShardWriter.put)
    with host_times.host_times():
        assert shard_loop.ahead is not before[0] and ShardWriter.put is not before[3]
    assert before == (shard_loop.ahead, shard_loop.packed_rows, TeacherEngine._launch, ShardWriter.put)


def test_the_file_system_of_a_path(tmp_path: Path) -> None:
    assert file_system(Path("/proc/self")) == "proc" and file_system(tmp_path / "not yet") not in ("proc", "unknown")
