"""A cache on an S3-compatible server: written, claimed, read, verified and trained from, also where requests fail."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from helpers_dump import REPOSITORY, assert_same_rows, dump_command, environment, rows
from helpers_s3 import BUCKET, FaultyProxy, s3_environment, s3_here, s3_server

from pipeline.claim import try_claim
from pipeline.commit import commit_bytes, commit_json, read_json
from pipeline.local_copies import HELD
from pipeline.store import open_path
from pipeline.verify import verify_cache


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


def test_dump_verify_inspect_and_train_on_a_store(
    server: int, teacher: Path, corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """The commands a user types, with a URL in place of a folder; rows as on a local disk."""
    url = f"s3://{BUCKET}/dump"
    more = {**s3_environment(server), "DISTIL_XLSTM_CACHE": str(tmp_path / "copies")}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *words],
            env=environment(**more),
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=300,
        )

    command = dump_command(teacher, corpus, Path("cache"), 3)[2:]
    command[command.index("cache")] = url
    done = run(*command)
    assert done.returncode == 0, done.stderr
    again = run(*command)
    assert again.returncode == 0 and "0 of 4 shards" not in again.stderr, again.stderr
    verified = run("pipeline", "verify", "--cache", url)
    assert verified.returncode == 0 and "nothing is wrong" in verified.stdout, verified.stdout + verified.stderr
    inspected = run("pipeline", "inspect", "--cache", url)
    assert inspected.returncode == 0 and "shard-00000" in inspected.stdout, inspected.stderr
    with s3_here(server), pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTIL_XLSTM_CACHE", str(tmp_path / "copies"))
        found = rows(open_path(url))
        assert sorted(found) == ["heldout-00000", "shard-00000", "shard-00001", "shard-00002"]
        assert_same_rows(rows(undisturbed), found)
    trained = run(
        *("student", "--cache", url, "--run", str(tmp_path / "run"), "--config", "manifests/students/demo.yaml"),
        *("--trainer.max_epochs", "2", "--data.batch_rows", "4", "--model.student.heads", "4"),
        *("--model.loss.gamma", "0.0", "--model.loss.beta", "0.0"),
    )
    assert trained.returncode == 0, trained.stderr
    parts = [path for path in (tmp_path / "copies" / "parts").iterdir() if path.name != HELD]
    assert len(parts) >= 8, "a footer and a row group of each shard are kept"
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()


def test_dump_read_verify_and_train_through_requests_that_fail(
    server: int, teacher: Path, corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Requests go wrong five ways, one in eight, then three in ten: the dump goes on, and what it captured is read,
    verified and trained from. The last two do not wait for an answer as long as a silence lasts."""
    proxy = FaultyProxy(server, share=0.125, seed=5, silence=0.5)
    try:
        command = dump_command(teacher, corpus, Path("cache"), 3)
        command[command.index("cache")] = f"s3://{BUCKET}/faulty"
        done = subprocess.run(
            command,
            env=environment(**s3_environment(proxy.port)),
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stderr
        written = dict(proxy.faults)
        proxy.share = 0.3  # some 30 requests: without a fault once in 50,000 times
        with s3_here(proxy.port), pytest.MonkeyPatch.context() as patch:
            patch.setenv("DISTIL_XLSTM_CACHE", str(tmp_path / "copies"))
            assert_same_rows(rows(undisturbed), rows(open_path(f"s3://{BUCKET}/faulty")))
        read = dict(proxy.faults)
        proxy.share, proxy.silence, proxy.planned = 0.15, 2.0, ["silence"]
        impatient = {"config_kwargs": {"read_timeout": 1}}
        with s3_here(proxy.port), pytest.MonkeyPatch.context() as patch:
            patch.setenv("DISTIL_XLSTM_CACHE", str(tmp_path / "verified"))
            patch.setitem(fsspec.config.conf, "s3", impatient)
            verified = verify_cache(open_path(f"s3://{BUCKET}/faulty"))
        assert verified.ok and verified.shards == 4, verified.problems
        assert proxy.given_up >= 1
        checked, proxy.given_up, proxy.planned = dict(proxy.faults), 0, ["silence"]
        trained = subprocess.run(
            [
                *(sys.executable, "-m", "student", "--cache", f"s3://{BUCKET}/faulty", "--run", str(tmp_path / "run")),
                *("--config", "manifests/students/demo.yaml", "--trainer.max_epochs", "1"),
                *("--model.student.heads", "4", "--model.loss.gamma", "0.0", "--model.loss.beta", "0.0"),
            ],
            env=environment(
                **s3_environment(proxy.port),
                DISTIL_XLSTM_CACHE=str(tmp_path / "trained"),
                FSSPEC_S3=json.dumps(impatient),
            ),
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert trained.returncode == 0, trained.stderr
        assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file() and proxy.given_up >= 1
    finally:
        proxy.close()
    faults = [sum(kinds.values()) for kinds in (written, read, checked, proxy.faults)]
    assert faults[0] >= 5 and faults == sorted(set(faults)), faults
