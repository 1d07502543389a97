"""Commits on an object store: an object is right or is not there, whatever the store does with an upload."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from helpers_cache import toy_columns, write_toy_cache

from pipeline import store, store_claim
from pipeline.claim import clear_dead_claims, try_claim
from pipeline.claim_file import EXPIRY_SECONDS, holder_record
from pipeline.commit import commit_bytes, commit_file, commit_json, file_sha256, read_json
from pipeline.errors import UserError
from pipeline.manifest import read_manifest
from pipeline.shard import commit_shard, read_record
from pipeline.store import ATTEMPTS, StoreError, again, is_remote, make_folder, open_path, upload
from pipeline.store_drivers import EXCLUSIVE, require_exclusive, unusable


class TroubledStore(MemoryFileSystem):
    """A store in memory whose uploads go through `trouble` (None: all is well)."""

    protocol = "troubled"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    trouble: Callable[[int, bytes], bytes] | None = None
    uploads = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("troubled://", "memory://"))

    def _troubled(self, data: bytes) -> bytes:
        TroubledStore.uploads += 1
        trouble = type(self).trouble
        return data if trouble is None else trouble(TroubledStore.uploads, data)

    def put_file(self, lpath: str, rpath: str, **more: Any) -> None:
        super().pipe_file(rpath, self._troubled(Path(lpath).read_bytes()))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **more: Any) -> None:
        super().pipe_file(path, self._troubled(value), mode=mode)


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(store, "LONGEST_WAIT", 0.0)
    fsspec.register_implementation("troubled", TroubledStore, clobber=True)
    TroubledStore.store.clear()
    TroubledStore.trouble, TroubledStore.uploads = None, 0
    yield open_path("troubled://cache")
    TroubledStore.store.clear()


def names() -> list[str]:
    return sorted(name.rsplit("/", 1)[-1] for name in TroubledStore.store)


def flip(data: bytes) -> bytes:
    changed = bytearray(data)
    changed[len(changed) // 2] ^= 4
    return bytes(changed)


LIES: dict[str, Callable[[bytes], bytes]] = {
    "a flipped bit": flip,
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
}


def test_paths_and_urls(remote: Path) -> None:
    assert is_remote(remote) and not is_remote(open_path("caches/demo")) and open_path("a/b") == Path("a/b")
    with pytest.raises(UserError, match="nosuch://x"):
        open_path("nosuch://x")


def test_a_file_url_is_a_folder(tmp_path: Path) -> None:
    assert open_path(f"file://{tmp_path}/c") == tmp_path / "c" and not is_remote(open_path(f"file://{tmp_path}"))


def test_a_driver_that_is_not_there_is_named() -> None:
    told = str(unusable("gs://bucket/c", ImportError("Please install gcsfs to access Google Storage")))
    assert "gs://bucket/c" in told and "pip install gcsfs" in told and "--cache" in told
    dlopen = "Unable to load libjvm: \ndlopen(/usr/lib/libjvm.so) failed\ndlopen(/usr/libjvm.so) failed"
    told = str(unusable("hdfs://host/c", OSError(dlopen)))
    assert "does not start here (Unable to load libjvm" in told and "dlopen" not in told and "--cache" in told


def test_what_does_not_create_exclusively_is_read_but_not_written(
    remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit_json(remote / "manifest.json", {"a": 1}, exclusive=True)
    monkeypatch.delitem(EXCLUSIVE, "fsspec.implementations.memory.MemoryFileSystem")
    assert read_json(remote / "manifest.json") == {"a": 1}
    for write in (
        lambda: commit_bytes(remote / "data.bin", b"x"),
        lambda: commit_json(remote / "manifest.json", {"a": 2}, exclusive=True),
        lambda: try_claim(remote, "shard-00000"),
        lambda: make_folder(remote),
    ):
        with pytest.raises(UserError, match=r"cannot be written through TroubledStore.*s3://.*--cache.*reading"):
            write()
    assert names() == ["manifest.json"]


@pytest.mark.parametrize(("version", "right"), [("2024.12.0", False), ("2025.5.1", False), ("2025.7.0", True)])
def test_the_drivers_version_counts(version: str, right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda package: version)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    if right:
        require_exclusive(open_path("s3://bucket/c"))
        return
    with pytest.raises(UserError, match="pip install 's3fs>=2025.7'"):
        require_exclusive(open_path("s3://bucket/c"))


def test_a_drivers_own_kind_of_error_is_the_stores(remote: Path) -> None:
    kind = type("ConnectError", (Exception,), {"__module__": "httpx2"})

    def fail() -> None:
        raise kind("Name or service not known")

    with pytest.raises(StoreError, match="does not answer.*Name or service not known") as told:
        again(fail, remote)
    assert told.value.filename == str(remote)
    with pytest.raises(ZeroDivisionError):  # a mistake of ours
        again(lambda: 1 // 0, remote)


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_that_lasts_is_an_error_and_leaves_nothing(remote: Path, lie: str) -> None:
    TroubledStore.trouble = lambda count, data: LIES[lie](data)
    with pytest.raises(OSError, match="does not return what was uploaded"):
        commit_bytes(remote / "data.bin", bytes(range(256)) * 10)
    with pytest.raises(OSError, match="does not return what was uploaded"):
        commit_json(remote / "record.json", {"a": 1}, exclusive=True)
    assert names() == [] and TroubledStore.uploads == 2 * ATTEMPTS


@pytest.mark.parametrize("lie", LIES)
def test_a_passing_lie_is_mended(remote: Path, lie: str) -> None:
    TroubledStore.trouble = lambda count, data: LIES[lie](data) if count in (1, 3) else data
    commit_bytes(remote / "data.bin", b"some content")
    commit_json(remote / "record.json", {"a": 1}, exclusive=True)
    assert (remote / "data.bin").read_bytes() == b"some content" and read_json(remote / "record.json") == {"a": 1}
    assert TroubledStore.uploads == 4


def test_a_store_that_fails_is_asked_again_and_then_named(remote: Path) -> None:
    def fail_twice(count: int, data: bytes) -> bytes:
        if count <= 2:
            raise ConnectionResetError("connection was reset")
        return data

    def refuse(count: int, data: bytes) -> bytes:
        raise PermissionError(13, "Access denied")

    TroubledStore.trouble = fail_twice
    commit_bytes(remote / "data.bin", b"some content")
    assert TroubledStore.uploads == 3
    TroubledStore.trouble = refuse
    with pytest.raises(PermissionError):
        commit_bytes(remote / "other.bin", b"some content")
    assert TroubledStore.uploads == 4 and names() == ["data.bin"]


def test_exclusive_creation_is_the_stores(remote: Path, tmp_path: Path) -> None:
    commit_json(remote / "manifest.json", {"a": 1}, exclusive=True)
    with pytest.raises(FileExistsError):
        commit_json(remote / "manifest.json", {"a": 2}, exclusive=True)
    assert read_json(remote / "manifest.json") == {"a": 1}
    (tmp_path / "same").write_bytes(b"same")
    for _ in range(2):  # as when the answer to the first upload was lost
        upload(tmp_path / "same", remote / "same", file_sha256(tmp_path / "same"), exclusive=True)


def test_check_runs_before_anything_is_uploaded(remote: Path) -> None:
    def check(path: Path) -> None:
        raise ValueError("not what was meant")

    with pytest.raises(ValueError, match="not what was meant"):
        commit_file(remote / "data.bin", lambda path: path.write_bytes(b"x"), check=check)
    assert names() == []


@pytest.mark.parametrize("fails_at", [None, 1, 2])
def test_a_shard_appears_with_its_json(remote: Path, tmp_path: Path, fails_at: int | None) -> None:
    """Parquet first: where it or the JSON cannot be stored, there is no shard."""
    manifest = read_manifest(write_toy_cache(tmp_path / "local", units=1, rows=4, length=32))
    columns = toy_columns(manifest.spec, 0, 4)
    record = read_record(tmp_path / "local" / "shard-00000.json")
    decided = {k: v for k, v in vars(record).items() if k not in ("unit", "file", "bytes", "sha256", "footer_sha256")}

    def trouble(count: int, data: bytes) -> bytes:
        if count == fails_at:
            raise PermissionError(13, "Access denied")
        return data

    def commit() -> None:
        commit_shard(remote, 0, manifest.spec, {"split": "train"}, [columns], lambda: decided, "host-1-0")

    TroubledStore.trouble = trouble
    if fails_at is not None:
        with pytest.raises(PermissionError):
            commit()
        assert not (remote / "shard-00000.json").is_file()
        return
    commit()
    assert names() == ["shard-00000.json", "shard-00000.parquet"]
    found = read_record(remote / "shard-00000.json")
    assert found.bytes == (remote / found.file).stat().st_size and file_sha256(remote / found.file) == found.sha256
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        (tmp_path / found.file).write_bytes((remote / found.file).read_bytes())
        from pipeline.shard import ShardFile

        with ShardFile(tmp_path, found, manifest.spec) as shard:
            np.testing.assert_array_equal(shard.read_group(0)["input_ids"], columns["input_ids"])


def others_claim(remote: Path, name: str, age: float, **changes: object) -> Path:
    """A claim of another machine, last written `age` seconds ago."""
    path = remote / "claims" / name
    record = {**holder_record("other-1-00000000"), "machine": "other", **changes}
    upath: Any = path
    upath.fs.pipe_file(upath.path, json.dumps(record).encode())
    file = TroubledStore.store[upath.path]
    file.modified = file.modified - timedelta(seconds=age)
    return path


def test_a_claim_is_held_by_one(remote: Path) -> None:
    with try_claim(remote, "shard-00000") as claim:  # type: ignore[union-attr]
        assert try_claim(remote, "shard-00000") is None
        other = try_claim(remote, "shard-00001")
        assert other is not None and claim is not None and other.id != claim.id
        other.release()
    again = try_claim(remote, "shard-00000")
    assert again is not None
    again.release()
    assert names() == []


@pytest.mark.parametrize(("age", "free"), [(0.5 * EXPIRY_SECONDS, False), (1.5 * EXPIRY_SECONDS, True)])
def test_a_claim_of_another_machine_expires(remote: Path, age: float, free: bool) -> None:
    others_claim(remote, "shard-00000.4.json", age)
    claim = try_claim(remote, "shard-00000")
    assert (claim is not None) == free
    assert names() == (["shard-00000.5.json"] if free else ["shard-00000.4.json"])
    if claim is not None:
        claim.release()


def test_of_two_that_find_a_dead_claim_one_gets_it(remote: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one takes it over between this one's look and its own attempt."""
    others_claim(remote, "shard-00000.0.json", 2 * EXPIRY_SECONDS)
    real = store_claim.is_dead

    def is_dead(path: Path) -> bool:
        others_claim(remote, "shard-00000.1.json", 0.0, id="faster-2-00000000")
        return real(path)

    monkeypatch.setattr(store_claim, "is_dead", is_dead)
    assert try_claim(remote, "shard-00000") is None
    assert "shard-00000.1.json" in names()


def test_a_live_claim_is_written_again_and_a_lost_one_left_alone(remote: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.claim_file.REFRESH_SECONDS", 0.02)
    claim = try_claim(remote, "shard-00000")
    assert claim is not None
    place: Any = claim.path
    first = TroubledStore.store[place.path].modified
    deadline = time.monotonic() + 10
    while TroubledStore.store[place.path].modified == first and time.monotonic() < deadline:
        time.sleep(0.01)
    assert TroubledStore.store[place.path].modified > first
    others_claim(remote, claim.path.name, 0.0)
    time.sleep(0.1)
    claim.release()
    assert json.loads(claim.path.read_bytes())["machine"] == "other"


def test_dead_claims_are_cleared_and_live_ones_stay(remote: Path) -> None:
    others_claim(remote, "shard-00000.0.json", 2 * EXPIRY_SECONDS)
    others_claim(remote, "shard-00001.0.json", 0.0)
    others_claim(remote, "shard-00002.0.json", 0.0, **{**holder_record("x"), "pid": 0})  # of this machine, and gone
    clear_dead_claims(remote)
    assert names() == ["shard-00001.0.json"]
