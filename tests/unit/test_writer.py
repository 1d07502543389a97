"""The writers' threads: order, bounded memory, two shards at once, and what becomes of exceptions and claims."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.claim import try_claim
from pipeline.claim_file import Claim
from pipeline.commit import commit_file
from pipeline.errors import UserError
from teacher_dump.writer import SHARDS_AT_ONCE, ShardWriter, ShardWriters

pytestmark = pytest.mark.timeout(60)  # what these tests look for would hang


def claimed(cache: Path, name: str) -> Claim:
    claim = try_claim(cache, name)
    assert claim is not None
    return claim


def free(cache: Path, name: str) -> bool:
    return not (cache / "claims" / f"{name}.json").exists()


def as_file(cache: Path, name: str, claim: Claim, group: int = 2) -> Callable[[ShardWriter], Any]:
    """Write rows (here: integers) as lines of a committed file, `group` at a time; its record is the name."""

    def write(writer: ShardWriter) -> Any:
        def lines(path: Path) -> None:
            with open(path, "w") as file:
                waiting = 0
                for row in writer.rows():
                    file.write(f"{row}\n")
                    waiting += 1
                    if waiting == group:
                        writer.encoded(waiting)
                        waiting = 0
                writer.encoded(waiting)

        commit_file(cache / name, lines, claim=claim.id)
        return name

    return write


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    return condition()


def test_shards_are_whole_in_order_and_their_claims_end_after_the_commit(tmp_path: Path) -> None:
    seen: list[Any] = []

    def committed(name: Any) -> None:
        seen.append((name, (tmp_path / name).exists(), free(tmp_path, name)))

    with ShardWriters(4, committed) as writers:
        for shard in range(5):
            name = f"shard-{shard}"
            claim = claimed(tmp_path, name)
            writer = writers.open(claim, as_file(tmp_path, name, claim))
            for row in range(7):
                writer.put(10 * shard + row)  # type: ignore[arg-type]
            writer.finish()
    assert sorted(seen) == [(f"shard-{shard}", True, False) for shard in range(5)]
    for shard in range(5):
        assert (tmp_path / f"shard-{shard}").read_text().split() == [str(10 * shard + row) for row in range(7)]
        assert free(tmp_path, f"shard-{shard}")
    assert writers.held == 0


def test_rows_wait_in_bounded_memory(tmp_path: Path) -> None:
    """A slow disk holds the engine back at exactly the limit; nothing is lost when it goes on."""
    limit, rows = 6, 40
    disk, most, put = threading.Event(), 0, 0
    writers = ShardWriters(limit, lambda record: None)

    def write(writer: ShardWriter) -> Any:
        nonlocal most
        written = 0
        for _ in writer.rows():
            disk.wait()
            most = max(most, writers.held)
            written += 1
            writer.encoded(1)
        return written

    def engine() -> None:
        nonlocal put
        with writers:
            writer = writers.open(claimed(tmp_path, "a"), write)
            for _ in range(rows):
                writer.put(object())  # type: ignore[arg-type]
                put += 1
            writer.finish()

    thread = threading.Thread(target=engine)
    thread.start()
    assert eventually(lambda: put == limit)
    time.sleep(0.2)
    assert (put, writers.held) == (limit, limit)
    disk.set()
    thread.join()
    assert put == rows and most <= limit and writers.held == 0


def test_the_next_shard_begins_while_others_are_written_but_no_fourth(tmp_path: Path) -> None:
    disk = threading.Event()

    def slow(writer: ShardWriter) -> Any:
        list(writer.rows())
        disk.wait()

    opened = []

    def engine() -> None:
        with ShardWriters(9, lambda record: None) as writers:
            for shard in range(SHARDS_AT_ONCE + 1):
                writers.wait_for_place()
                opened.append(shard)
                writers.open(claimed(tmp_path, str(shard)), slow).finish()

    thread = threading.Thread(target=engine)
    thread.start()
    assert eventually(lambda: len(opened) == SHARDS_AT_ONCE)
    time.sleep(0.2)
    assert len(opened) == SHARDS_AT_ONCE == 3
    disk.set()
    thread.join()
    assert len(opened) == 4


@pytest.mark.parametrize("error", [UserError("the disk is full: make room"), OSError(28, "No space left"), KeyError(1)])
def test_an_exception_of_a_writer_is_the_dumps(tmp_path: Path, error: Exception) -> None:
    """It reaches the engine's thread as it was raised, even while that waits for room; the other shard is given up."""

    def failing(writer: ShardWriter) -> Any:
        next(writer.rows())
        raise error

    committed: list[Any] = []
    with pytest.raises(type(error)) as raised, ShardWriters(3, committed.append) as writers:
        first = claimed(tmp_path, "first")
        other = writers.open(first, as_file(tmp_path, "first", first, group=100))
        other.put(0)  # type: ignore[arg-type]
        writer = writers.open(claimed(tmp_path, "second"), failing)
        for row in range(50):
            writer.put(row)  # type: ignore[arg-type]
    assert raised.value is error
    assert committed == []
    assert free(tmp_path, "first") and free(tmp_path, "second")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


def test_an_exception_after_the_last_row_is_raised_too(tmp_path: Path) -> None:
    def failing(writer: ShardWriter) -> Any:
        list(writer.rows())
        raise UserError("read back differently")

    with pytest.raises(UserError, match="read back"), ShardWriters(3, lambda record: None) as writers:
        writers.open(claimed(tmp_path, "a"), failing).finish()
    assert free(tmp_path, "a")


@pytest.mark.parametrize("error", [RuntimeError("the engine died"), KeyboardInterrupt()])
def test_an_exception_of_the_engine_aborts_without_committing(tmp_path: Path, error: BaseException) -> None:
    committed: list[Any] = []
    with pytest.raises(type(error)), ShardWriters(8, committed.append) as writers:
        claim = claimed(tmp_path, "a")
        writer = writers.open(claim, as_file(tmp_path, "a", claim))
        writer.put(1)  # type: ignore[arg-type]
        assert eventually(lambda: any(tmp_path.glob(".a.*.tmp")))
        raise error
    assert committed == []
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("write-")]
