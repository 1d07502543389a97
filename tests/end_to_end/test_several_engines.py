"""Several engines on one cache: the rows are the same, a lost worker costs no shard, and nothing outlives the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from helpers_dump import REPOSITORY, SHARDS, assert_same_rows, dump, dump_command, environment, rows

from pipeline.claim import TEMPORARY
from pipeline.verify import verify_cache


def start(teacher: Path, corpus: Path, cache: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        dump_command(teacher, corpus, cache, SHARDS, "--gpus", "2", *more),
        env=environment(),
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job would inherit it ignored
    )


def within(seconds: float, condition: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> bool:
    """Whether `condition` came true in time, and while `process` ran."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline and (process is None or process.poll() is None):
        time.sleep(0.001)
    return condition()


def claimants(cache: Path) -> set[int]:
    """Processes that hold shards."""
    found = set()
    for path in (cache / "claims").glob("*.json"):
        try:
            found.add(int(json.loads(path.read_text())["pid"]))
        except FileNotFoundError:
            continue
    return found


def both_loading(process: subprocess.Popen[str], cache: Path) -> set[int]:
    """Wait until two workers have claimed a shard and load the teacher."""
    assert within(120, lambda: len(claimants(cache)) == 2, process)
    time.sleep(1.0)
    return claimants(cache)


def lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_killed_worker_costs_no_shard_and_no_bit(
    teacher: Path, corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """SIGKILL while it writes: told at once and at the end, its shards are written by the other, all rows the same."""
    cache = tmp_path / "cache"
    process = start(teacher, corpus, cache)
    written: list[Path] = []

    def writes() -> bool:
        written[:] = cache.glob(".shard-0000[2-9].parquet.*.tmp")
        return bool(written)

    assert within(240, writes, process)
    match = TEMPORARY.search(written[0].name)
    assert match is not None
    os.kill(int(match["pid"]), signal.SIGKILL)
    there = len(list(cache.glob("*.json"))) - 2  # manifest and plan
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert there < SHARDS, "the dump was over before its worker was killed"
    told = [line for line in errors.splitlines() if "(CPU) stopped while it held " in line]
    assert len(told) == 2 and all("SIGKILL" in line for line in told), errors
    assert "the others go on" in told[0] and told[1].startswith("note: worker ")
    assert told[1] == [line for line in errors.splitlines() if line][-1]
    found = rows(cache)
    assert set(found) == {"heldout-00000", *(f"shard-{i:05d}" for i in range(SHARDS))}
    assert_same_rows(rows(undisturbed), found)
    assert verify_cache(cache).problems == []
    assert not list(cache.glob(".*.tmp")) and claimants(cache) == set()
    assert f"{SHARDS + 1} shards" in output


def test_without_any_worker_left_the_run_fails_with_the_cause(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    process = start(teacher, corpus, cache)
    for pid in both_loading(process, cache):
        os.kill(pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 2
    assert f"error: all 2 workers stopped with {SHARDS + 1} shards left: it was killed (SIGKILL" in errors
    assert "Traceback" not in errors


def test_what_every_worker_refuses_is_told_once_more_at_the_end(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    done = dump(teacher, corpus, tmp_path / "cache", SHARDS, "--gpus", "3", "--engine.enforce_eager", "false")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: all 3 workers stopped with 25 shards left: enforce_eager:")
    # As the run's error, and before, when the first one stops, unless all have ended within one look.
    assert done.stderr.count("set it to true") in (1, 2), done.stderr
    assert "Traceback" not in done.stderr


def test_interrupt_stops_all_workers(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    process = start(teacher, corpus, cache)
    workers = both_loading(process, cache)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 130, errors
    assert "run the same command to go on" in errors and "Traceback" not in errors
    assert not any(lives(pid) for pid in workers)
    assert claimants(cache) == set() and not list(cache.rglob(".*.tmp"))


def test_workers_do_not_outlive_a_killed_driver(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    process = start(teacher, corpus, cache)
    workers = both_loading(process, cache)
    process.kill()
    process.communicate(timeout=240)
    assert within(60, lambda: not any(lives(pid) for pid in workers))
