"""The job array of scripts/slurm, run without Slurm: its variables are set by hand and its signals sent by us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers_dump import REPOSITORY, SHARDS, assert_same_rows, dump_command, environment, rows
from helpers_ray import within

SCRIPT = REPOSITORY / "scripts" / "slurm" / "dump.sbatch"


def task(number: int, cache: Path, **more: str) -> dict[str, Any]:
    """How Slurm would start a task of an array of three."""
    variables = environment(
        SLURM_SUBMIT_DIR=str(REPOSITORY),
        SLURM_ARRAY_TASK_ID=str(number),
        SLURM_ARRAY_TASK_COUNT="3",
        SLURM_JOB_ID="4711",
        SHARDS=str(SHARDS),
        DUMP="demo",
        CACHE=str(cache),
        PY=sys.executable,
        **more,
    )
    return {"args": ["bash", str(SCRIPT)], "env": variables, "text": True}


def arguments(teacher: Path, corpus: Path) -> str:
    words = dump_command(teacher, corpus, Path("unused"), SHARDS)[3:]
    for option in ("--cache", "--shards"):
        at = words.index(option)
        del words[at : at + 2]
    return " ".join(words)


def test_a_task_near_its_time_limit_goes_on_after_a_requeue(
    teacher: Path, corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    cache, tools = tmp_path / "cache", tmp_path / "bin"
    tools.mkdir()
    for name, body in (("srun", 'shift 1\nexec "$@"'), ("scontrol", f'echo "$@" > {tmp_path}/scontrol')):
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    start = task(1, cache, PATH=path, ARGS=arguments(teacher, corpus))
    process = subprocess.Popen(**start, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert within(120, lambda: bool(list(cache.glob(".shard-00008.parquet.*.tmp"))), process)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "run the same command to go on" in output and "this task is put back in the queue" in output
    assert (tmp_path / "scontrol").read_text() == "requeue 4711\n"
    assert not list(cache.rglob(".*.tmp")) and not list((cache / "claims").glob("*.json")), "another machine can go on"
    before = set(rows(cache))
    assert before < {f"shard-{i:05d}" for i in range(8, 16)}

    done = subprocess.run(**start, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert f"({8 - len(before)} shards written now" in done.stdout
    found = rows(cache)
    assert set(found) == {f"shard-{i:05d}" for i in range(8, 16)}, "neither shards of other tasks nor held-out ones"
    assert_same_rows(rows(undisturbed), found)


@pytest.mark.parametrize(
    "number, more, status, told",
    [
        (3, {}, 2, "task 3 of 3: number the tasks from 0"),
        (2, {"SHARDS": "2"}, 0, "nothing is left for it of 2 shards"),
        (0, {"PY": "missing/python"}, 2, "missing/python is missing: run make setup"),
    ],
)
def test_tasks_that_have_nothing_to_do(
    number: int, more: dict[str, str], status: int, told: str, tmp_path: Path
) -> None:
    start = task(number, tmp_path)
    start["env"].update(more)
    done = subprocess.run(**start, capture_output=True, timeout=240)
    assert done.returncode == status and told in done.stdout + done.stderr
