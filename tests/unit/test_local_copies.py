"""Parts of remote files on a local disk: fetched once, bounded in size, removed by last use."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.local_copies import LocalCopies


def test_a_part_is_fetched_once(tmp_path: Path) -> None:
    fetched: list[str] = []

    def fetch() -> bytes:
        fetched.append("a")
        time.sleep(0.05)
        return b"content"

    copies = LocalCopies(tmp_path / "copies", 1000)
    answers: list[bytes] = []
    threads = [threading.Thread(target=lambda: answers.append(copies.get("a", fetch))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [b"content"] * 8 and fetched == ["a"]
    assert LocalCopies(tmp_path / "copies", 1000).get("a", fetch) == b"content" and fetched == ["a"]
    copies.forget("a")
    assert copies.get("a", fetch) == b"content" and fetched == ["a", "a"]


def test_the_limit_holds_and_the_longest_unused_goes_first(tmp_path: Path) -> None:
    copies = LocalCopies(tmp_path, 1000)
    for number in range(9):
        copies.get(f"part-{number}", lambda: bytes(100))
        os.utime(tmp_path / f"part-{number}", (number, number))
    copies.get("part-0", lambda: pytest.fail("it is there"))  # used now: part-1 is the oldest
    for number in range(9, 30):
        copies.get(f"part-{number}", lambda: bytes(100))
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1000
        if number < 12:
            assert (tmp_path / "part-0").exists() and not (tmp_path / "part-1").exists() or number < 10
    assert copies.get("large", lambda: bytes(2000)) == bytes(2000)
    assert not (tmp_path / "large").exists()


def test_two_processes_share_a_folder_and_its_limit(tmp_path: Path) -> None:
    one, two = LocalCopies(tmp_path, 1000), LocalCopies(tmp_path, 1000)
    for number in range(40):
        (one if number % 2 else two).get(f"part-{number}", lambda: bytes(100))
    # Each counts what it added itself and counts anew when that reaches the limit.
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2 * 1000


def test_a_disk_that_is_full_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = LocalCopies(tmp_path / "copies", 1000)

    def refuse(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    assert copies.get("a", lambda: b"content") == b"content"
    assert list((tmp_path / "copies").iterdir()) == []


def test_a_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/copies"):
        LocalCopies(tmp_path / "file" / "copies", 1000)
