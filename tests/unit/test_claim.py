"""Claims: a live writer's is respected, a dead one's is cleared with its temporaries and nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import claim as claims
from pipeline import claim_file
from pipeline.claim import clear_dead_claims, try_claim
from pipeline.claim_file import EXPIRY_SECONDS, Claim
from pipeline.commit import machine_digest, new_claim_id, temporary_path

REPOSITORY = Path(__file__).resolve().parents[2]

HOLD = """
import sys, time
from pathlib import Path
from pipeline.claim import try_claim
from pipeline.commit import temporary_path
cache = Path(sys.argv[1])
claim = try_claim(cache, "shard-00000")
temporary_path(cache / "shard-00000.parquet", claim.id).write_bytes(b"half a shard")
print(claim.id, flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that holds shard-00000 and has begun to write it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def path_of(cache: Path, name: str = "shard-00000") -> Path:
    return cache / "claims" / f"{name}.json"


def set_age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def foreign(path: Path, **change: object) -> None:
    """Make a claim look like another machine's."""
    path.write_text(json.dumps({**json.loads(path.read_text()), "machine": "elsewhere", **change}))


def held(claim: Claim | None) -> Claim:
    assert claim is not None
    return claim


def test_live_claim_is_respected_and_released(tmp_path: Path) -> None:
    with held(try_claim(tmp_path, "shard-00000")):
        assert try_claim(tmp_path, "shard-00000") is None
        with held(try_claim(tmp_path, "shard-00001")):
            pass
    with held(try_claim(tmp_path, "shard-00000")):
        assert [p.name for p in (tmp_path / "claims").iterdir()] == ["shard-00000.json"], "a draft was left"


def test_process_that_lives_keeps_its_claim_however_old(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    set_age(path_of(tmp_path), 10 * EXPIRY_SECONDS)
    clear_dead_claims(tmp_path)
    assert try_claim(tmp_path, "shard-00000") is None
    assert len(list(tmp_path.glob(".*.tmp"))) == 1


def test_killed_process_loses_its_claim_and_its_temporaries_only(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    mine = held(try_claim(tmp_path, "shard-00001"))
    kept = temporary_path(tmp_path / "shard-00001.parquet", mine.id)
    kept.write_bytes(b"a live writer's")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    clear_dead_claims(tmp_path)
    assert list(tmp_path.glob(".*.tmp")) == [kept]
    assert not path_of(tmp_path).exists() and path_of(tmp_path, "shard-00001").exists()
    with held(try_claim(tmp_path, "shard-00000")):
        mine.release()


def test_killed_process_is_replaced_without_a_clearing_first(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with held(try_claim(tmp_path, "shard-00000")):
        assert list(tmp_path.glob(".*.tmp")) == []


@pytest.mark.parametrize(("age", "free"), [(EXPIRY_SECONDS - 30, False), (EXPIRY_SECONDS + 30, True)])
def test_claim_of_another_machine_expires_by_age(age: float, free: bool, tmp_path: Path) -> None:
    held(try_claim(tmp_path, "shard-00000")).release()
    path = path_of(tmp_path)
    path.write_text(json.dumps({"id": "far-1-00000000", "machine": "elsewhere", "pid": os.getpid()}))
    leftover = temporary_path(tmp_path / "shard-00000.parquet", "far-1-00000000")
    leftover.write_bytes(b"half")
    set_age(path, age)
    claim = try_claim(tmp_path, "shard-00000")
    assert (claim is not None) == free
    assert leftover.exists() != free
    if claim is not None:
        claim.release()


def test_process_number_used_again_is_not_the_old_process(tmp_path: Path) -> None:
    """After a reboot or a wrap-around another process may run under a dead writer's number."""
    held(try_claim(tmp_path, "shard-00000"))
    path = path_of(tmp_path)
    record = json.loads(path.read_text())
    assert record["started"], "Linux tells when a process started"
    path.write_text(json.dumps({**record, "started": "1"}))
    with held(try_claim(tmp_path, "shard-00000")):
        pass


def test_live_claim_is_refreshed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim_file, "REFRESH_SECONDS", 0.01)
    with held(try_claim(tmp_path, "shard-00000")):
        set_age(path_of(tmp_path), 1000)
        deadline = time.monotonic() + 60
        while time.time() - path_of(tmp_path).stat().st_mtime > 100:
            assert time.monotonic() < deadline, "the claim was not refreshed"
            time.sleep(0.01)


def test_claim_that_was_taken_over_is_neither_refreshed_nor_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim_file, "REFRESH_SECONDS", 0.01)
    first = held(try_claim(tmp_path, "shard-00000"))
    foreign(path_of(tmp_path), id="other-1-00000000")
    set_age(path_of(tmp_path), 1000)
    time.sleep(0.1)
    assert time.time() - path_of(tmp_path).stat().st_mtime > 100
    first.release()
    assert path_of(tmp_path).exists()


def test_slower_clearer_leaves_the_claim_of_the_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two see the same dead claim; one replaces it before the other removes what it saw."""
    (tmp_path / "claims").mkdir()
    path = path_of(tmp_path)
    dead = {"id": "gone-1-00000000", "machine": "elsewhere", "pid": 1}
    path.write_text(json.dumps(dead))
    set_age(path, 2 * EXPIRY_SECONDS)
    faster: list[Claim] = []
    real = claims.take_away

    def between(path: Path, holder: dict[str, object]) -> bool:
        if not faster:
            monkeypatch.setattr(claims, "take_away", real)
            faster.append(held(try_claim(tmp_path, "shard-00000")))
        return real(path, holder)

    monkeypatch.setattr(claims, "take_away", between)
    assert try_claim(tmp_path, "shard-00000") is None
    assert json.loads(path.read_text())["id"] == faster[0].id
    faster[0].release()
    assert not path.exists()


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_damaged_claim_expires_by_age(content: str, tmp_path: Path) -> None:
    (tmp_path / "claims").mkdir()
    path_of(tmp_path).write_text(content)
    assert try_claim(tmp_path, "shard-00000") is None
    set_age(path_of(tmp_path), EXPIRY_SECONDS + 30)
    with held(try_claim(tmp_path, "shard-00000")):
        pass


def test_temporaries_of_writers_without_a_claim_are_cleared_once_those_are_gone(tmp_path: Path) -> None:
    """A dump killed while it wrote the teacher folder held no claim; of another machine only the age is known."""
    folder = tmp_path / "teacher"
    folder.mkdir()
    mine = new_claim_id()
    live = temporary_path(folder / "head.safetensors", mine)
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    dead_id = mine.replace(f"-{os.getpid()}-", f"-{process.pid}-")
    dead = temporary_path(folder / "head.safetensors", dead_id)
    young = temporary_path(folder / "config.json", dead_id)
    elsewhere = mine.replace(machine_digest(), "0" * 6)  # a process of ours has its number, but it is not ours
    far, far_young = (temporary_path(folder / name, elsewhere) for name in ("head.safetensors", "config.json"))
    unknown = folder / ".something-else.tmp"
    for path in (live, dead, young, far, far_young, unknown):
        path.write_bytes(b"half")
        if path not in (young, far_young):
            set_age(path, 2 * EXPIRY_SECONDS)
    clear_dead_claims(tmp_path)
    assert {p for p in (live, dead, young, far, far_young, unknown) if p.exists()} == {live, far_young, unknown}


def test_killed_process_that_nobody_reaped_is_dead(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    """Its number is still taken, by what the kernel calls a zombie."""
    holder.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while claim_file._process_state(holder.pid)[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.001)
    with held(try_claim(tmp_path, "shard-00000")):
        assert list(tmp_path.glob(".*.tmp")) == []
