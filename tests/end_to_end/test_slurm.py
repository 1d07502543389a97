"""The job array of scripts/slurm, run without Slurm: its variables are set by hand and its signals sent by us."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers_dump import REPOSITORY, SHARDS, assert_same_rows, dump_command, environment, rows
from helpers_ray import within

from pipeline.verify import verify_cache

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


@pytest.mark.skipif(shutil.which("srun") is not None, reason="this machine has a Slurm of its own")
def test_three_tasks_two_at_once_and_one_preempted(
    teacher: Path, corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Without srun: the script's own child gets the signal. What all tasks wrote is what one dump writes."""
    cache, words = tmp_path / "cache", arguments(teacher, corpus)
    starts = [task(number, cache, ARGS=words) for number in range(3)]

    def begun(number: int) -> subprocess.Popen[str]:
        return subprocess.Popen(**starts[number], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    first, preempted = begun(0), begun(1)
    assert within(240, lambda: bool(list(cache.glob(".shard-00008.parquet.*.tmp"))), preempted)
    preempted.send_signal(signal.SIGTERM)
    output, _ = preempted.communicate(timeout=240)
    assert preempted.returncode == 130, output
    assert "run the same command to go on" in output and "put back in the queue" not in output, "Slurm itself does that"
    assert len(list(cache.glob("shard-000*.json"))) < 16
    output, _ = first.communicate(timeout=240)
    assert first.returncode == 0 and "9 shards written now" in output, output
    found = set(rows(cache))
    assert {"heldout-00000", *names(range(8))} <= found < {"heldout-00000", *names(range(16))}
    assert not list(cache.rglob(".*.tmp")) and not list((cache / "claims").glob("*.json"))

    for process in (begun(1), begun(2)):
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
    found_rows = rows(cache)
    assert set(found_rows) == set(rows(undisturbed))
    assert_same_rows(rows(undisturbed), found_rows)
    assert verify_cache(cache).problems == []


def names(units: range) -> set[str]:
    return {f"shard-{unit:05d}" for unit in units}


@pytest.mark.parametrize(
    "number, more, told",
    [
        (0, {}, "--shards 24 --units 0:8 --cache {c}"),
        (2, {"SLURM_ARRAY_TASK_COUNT": "1", "TASKS": "3"}, "--shards 24 --units 16:24 --cache {c}"),
        (4, {"SLURM_ARRAY_TASK_COUNT": "5", "SLURM_CPUS_PER_TASK": "4"}, "--shards 24 --units 20:24 --cache {c}"),
        (0, {"TP": "2", "SLURM_GPUS_ON_NODE": "8"}, "--cache {c} --gpus 8 --engine.tensor_parallel 2 --k 32"),
        (0, {"SHARDS": ""}, "--shards {demo} --units 0:2 --cache {c}"),
    ],
)
def test_the_command_of_a_task(number: int, more: dict[str, str], told: str, tmp_path: Path) -> None:
    """What it would run: a script in the place of srun prints it."""
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    start = task(number, tmp_path / "c", ARGS="--k 32", PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    start["env"] |= more
    done = subprocess.run(**start, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    demo = yaml.safe_load((REPOSITORY / "manifests" / "dumps" / "demo.yaml").read_text())["shards"]
    assert told.format(c=tmp_path / "c", demo=demo) in done.stdout
    cpus = f" --cpus-per-task={more['SLURM_CPUS_PER_TASK']}" if "SLURM_CPUS_PER_TASK" in more else ""
    start_of_it = f"--ntasks=1{cpus} {sys.executable} -m teacher_dump --manifest manifests/dumps/demo.yaml --shards "
    assert done.stdout.startswith(start_of_it) and done.stdout.endswith(" --k 32\n")


@pytest.mark.parametrize(
    "number, more, status, told",
    [
        (3, {}, 2, "task 3 of 3: number the tasks from 0"),
        (2, {"SHARDS": "2"}, 0, "nothing is left for it of 2 shards"),
        (0, {"DUMP": "none"}, 2, "DUMP=none: there is no manifests/dumps/none.yaml"),
        (0, {"SHARDS": "0"}, 2, "SHARDS is '0' (unset: what manifests/dumps/demo.yaml says)"),
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
