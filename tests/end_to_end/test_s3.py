"""A cache on an S3-compatible server: written, claimed, read, verified and trained from, also where requests fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_s3 import BUCKET, FaultyProxy, s3_here, s3_server

from pipeline.claim import try_claim
from pipeline.commit import commit_bytes, commit_json, read_json
from pipeline.store import open_path


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with s3_server() as port:
        yield port


@pytest.fixture
def bucket(server: int) -> Iterator[Path]:
    with s3_here(server):
        yield open_path(f"s3://{BUCKET}")


def test_commits_and_claims(bucket: Path) -> None:
    cache = bucket / "commits"
    commit_json(cache / "manifest.json", {"a": 1}, exclusive=True)
    with pytest.raises(FileExistsError):
        commit_json(cache / "manifest.json", {"a": 2}, exclusive=True)
    commit_bytes(cache / "deep" / "data.bin", bytes(range(256)) * 1000)
    assert read_json(cache / "manifest.json") == {"a": 1}
    assert (cache / "deep" / "data.bin").read_bytes() == bytes(range(256)) * 1000
    first = try_claim(cache, "shard-00000")
    assert first is not None and try_claim(cache, "shard-00000") is None
    first.release()
    second = try_claim(cache, "shard-00000")
    assert second is not None and second.id != first.id
    second.release()


def test_requests_that_fail_are_made_again(server: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.store.LONGEST_WAIT", 0.1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    proxy = FaultyProxy(server, share=0.25, seed=3, silence=0.2)
    try:
        with s3_here(proxy.port):
            cache = open_path(f"s3://{BUCKET}/faults")
            for number in range(30):
                commit_bytes(cache / f"data-{number}.bin", bytes([number]) * 5000)
                commit_json(cache / f"record-{number}.json", {"number": number}, exclusive=True)
    finally:
        proxy.close()
    with s3_here(server):
        cache = open_path(f"s3://{BUCKET}/faults")
        for number in range(30):
            assert (cache / f"data-{number}.bin").read_bytes() == bytes([number]) * 5000
            assert read_json(cache / f"record-{number}.json") == {"number": number}
    assert sum(proxy.faults.values()) > 20 and len(proxy.faults) == 5, proxy.faults
