"""A file is visible whole and checked, or not at all."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import commit
from pipeline.commit import (
    commit_bytes,
    commit_file,
    commit_json,
    file_sha256,
    new_claim_id,
    read_json,
    temporary_path,
)
from pipeline.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = ["write", "check", "file_sha256", "fsync", "replace"]


class Crash(BaseException):
    """Stands for the end of the process: no `except Exception` may swallow it."""


def crash(*args: object, **more: object) -> None:
    raise Crash


def write_new(path: Path) -> None:
    path.write_bytes(b"new content")


@pytest.mark.parametrize("old", [None, b"old content"])
@pytest.mark.parametrize("step", STEPS)
def test_failure_in_any_step_leaves_the_final_name_as_it_was(
    step: str, old: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "data.bin"
    if old is not None:
        final.write_bytes(old)

    def half_write(path: Path) -> None:
        path.write_bytes(b"new con")
        raise Crash

    if step == "file_sha256":
        monkeypatch.setattr(commit, "file_sha256", crash)
    elif step in ("fsync", "replace"):
        monkeypatch.setattr(os, step, crash)
    with pytest.raises(Crash):
        commit_file(final, half_write if step == "write" else write_new, check=crash if step == "check" else None)
    assert (final.read_bytes() if final.exists() else None) == old
    assert [p for p in tmp_path.iterdir() if p != final] == [], "a temporary was left"


def test_the_same_commit_succeeds_without_a_failure(tmp_path: Path) -> None:
    final = tmp_path / "folder" / "data.bin"
    digest = commit_file(final, write_new)
    assert final.read_bytes() == b"new content"
    assert (digest.bytes, digest.sha256) == (11, file_sha256(final))
    assert list(final.parent.iterdir()) == [final]


def test_steps_come_in_the_order_of_the_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(handle: int) -> None:
        order.append("fsync folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "fsync file")
        real_fsync(handle)

    def replace(a: Path, b: Path) -> None:
        order.append("rename")
        real_replace(a, b)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)

    def write(path: Path) -> None:
        order.append("write")
        write_new(path)

    commit_file(tmp_path / "a", write, check=lambda path: order.append("read back"))
    assert order == ["write", "fsync file", "read back", "rename", "fsync folder"]


@pytest.mark.parametrize("harm", ["flip", "cut"])
def test_a_disk_that_keeps_something_else_is_noticed(
    harm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the sync and the read-back the file changes, as on a disk that lies."""
    real_fsync = os.fsync

    def fsync(handle: int) -> None:
        real_fsync(handle)
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if path.suffix == ".tmp":
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data if harm == "flip" else data[:-1])

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="reads back differently"):
        commit_bytes(tmp_path / "data.bin", b"x" * 1000)
    with pytest.raises(OSError, match="reads back differently"):
        commit_json(tmp_path / "record.json", {"a": 1})
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys
from pathlib import Path
from pipeline.commit import commit_bytes, commit_json
folder = Path(sys.argv[1])
for n in range(10**9):
    commit_bytes(folder / "data.bin", bytes([n % 251]) * 300_000)
    commit_json(folder / "record.json", {"n": n, "text": "x" * 5000})
    print(n, flush=True)
"""


@pytest.mark.parametrize("seed", range(3))
def test_killed_writer_leaves_only_whole_files(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()  # the first pair is committed
    time.sleep(rng.uniform(0.0, 0.1))
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    data = (tmp_path / "data.bin").read_bytes()
    assert len(data) == 300_000 and len(set(data)) == 1
    assert read_json(tmp_path / "record.json")["text"] == "x" * 5000
    others = {p.name for p in tmp_path.iterdir()} - {"data.bin", "record.json"}
    assert all(name.startswith(".") and name.endswith(".tmp") for name in others)


def test_exclusive_commit_keeps_what_is_there(tmp_path: Path) -> None:
    final = tmp_path / "manifest.json"
    commit_json(final, {"a": 1}, exclusive=True)
    with pytest.raises(FileExistsError):
        commit_json(final, {"a": 2}, exclusive=True)
    assert read_json(final) == {"a": 1}
    assert list(tmp_path.iterdir()) == [final]


RECORD = {"text": "Grüße", "n": 3, "x": 0.1, "none": None, "yes": True, "list": [1, 2, {"deep": "value"}], "nan": "NaN"}


def test_json_round_trip(tmp_path: Path) -> None:
    commit_json(tmp_path / "a.json", RECORD)
    assert read_json(tmp_path / "a.json") == RECORD
    assert list(json.loads((tmp_path / "a.json").read_text()))[-1] == "digest"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"n": 3', '"n": 4'),
        ('"n": 3', '"n": 3.0'),
        ('"x": 0.1', '"x": 0.10000000000000002'),
        ('"x": 0.1', '"x": NaN'),
        ("null", "false"),
        ("true", "1"),
        ('"value"', '"Value"'),
        ("Grüße", "Grusse"),
        ('"none": null,', ""),
        ('"n": 3', '"n": 3, "m": 0'),
        ('"digest": "', '"digest": "0'),
    ],
)
def test_json_digest_catches_an_edited_value(old: str, new: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    commit_json(path, RECORD)
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=r"a\.json"):
        read_json(path)


def test_json_digest_catches_every_flipped_bit_and_every_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    commit_json(path, {"name": "shard-00000.parquet", "rows": 17, "loss": 1e-5})
    good = path.read_bytes()
    for position in range(len(good)):
        cut, damaged = good[:position], bytearray(good)
        damaged[position] ^= 1 << (position % 8)
        for bad in (cut, bytes(damaged), good + b"\n"):
            path.write_bytes(bad)
            with pytest.raises(UserError, match=r"a\.json"):
                read_json(path)
    path.write_bytes(good)
    assert read_json(path)["loss"] == 1e-5


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"{", b"\xff\xfe", b'{"a": 1}'])
def test_no_record_is_a_user_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


def test_missing_record_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.json is missing"):
        read_json(tmp_path / "a.json")


def test_partial_hash(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    (tmp_path / "b").write_bytes(b"345")
    assert file_sha256(tmp_path / "a", start=3, length=3) == file_sha256(tmp_path / "b")
    assert file_sha256(tmp_path / "a", start=3) != file_sha256(tmp_path / "b")


def test_claim_ids_are_unique_and_safe_in_names(tmp_path: Path) -> None:
    ids = {new_claim_id() for _ in range(100)}
    assert len(ids) == 100
    for claim in list(ids)[:3]:
        path = temporary_path(tmp_path / "shard-00000.parquet", claim)
        assert path.parent == tmp_path and path.name == f".shard-00000.parquet.{claim}.tmp"
