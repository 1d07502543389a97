"""Totals of a dump, whatever order the reports of several workers come in."""

from __future__ import annotations

import logging

import pytest

from pipeline.shard import ShardRecord
from teacher_dump.progress import DumpProgress


def record(name: str) -> ShardRecord:
    unit = int(name.removeprefix("shard-"))
    return ShardRecord(
        unit, "train", f"{name}.parquet", 900, "", "", 2, 100, False, {}, 1.0, 0.1, "c", "d", {}, "cpu", 1.0
    )


def test_shards_and_tokens_add_up(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "teacher_dump")
    progress = DumpProgress("toy", 5, 400, 1)
    progress.captured("shard-00001", 100)
    progress.captured("shard-00002", 60)
    progress.captured("shard-00002", -60)  # its worker died
    progress.committed(record("shard-00001"))
    assert (progress.done, progress.tokens, progress.planned) == (2, 100, 400)
    assert "shard-00001 committed (2 of 5): 2 rows, 100 tokens, 9 B/token" in caplog.text
    progress.by_other("shard-00004", 100)
    progress.by_other("shard-00004", 100)  # a second worker found it too
    assert (progress.done, progress.planned) == (3, 300)
    assert progress.written == {"shard-00001"} and progress.by_others == {"shard-00004": 100}


def test_a_worker_may_find_a_shard_before_its_writer_tells() -> None:
    first, second = DumpProgress("toy", 1, 100, 0), DumpProgress("toy", 1, 100, 0)
    first.by_other("shard-00000", 100)
    first.committed(record("shard-00000"))
    second.committed(record("shard-00000"))
    second.by_other("shard-00000", 100)
    for progress in (first, second):
        assert (progress.done, progress.planned) == (1, 100)
        assert progress.written == {"shard-00000"} and not progress.by_others


def test_waiting_is_told_once_for_each_number(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "teacher_dump")
    progress = DumpProgress("toy", 3, 100, 0)
    for shards in (2, 2, 2, 1, 1):
        progress.waits(shards)
    assert [entry.message for entry in caplog.records] == [
        "waiting for 2 shards that other processes are writing",
        "waiting for 1 shard that other processes are writing",
    ]


def test_a_process_without_a_standard_error_counts_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Started with `2>&-`, as some service managers do."""
    monkeypatch.setattr("sys.stderr", None)
    progress = DumpProgress("toy", 1, 100, 0)
    progress.captured("shard-00000", 100)
    progress.committed(record("shard-00000"))
    progress.close()
    assert (progress.done, progress.tokens) == (1, 100)
