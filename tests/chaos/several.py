"""Several engines of one dump, recorded rows: a worker or the driver is killed, or a worker's pipe to the driver fails.

The workers are forked instead of started afresh, so that a trial takes no second; all else is what `--gpus 2` runs.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

from chaos.checks import Outcome, as_it_stands, facts, recovered
from chaos.children import Child, ChildFailed
from chaos.endings import as_command, judged, told
from chaos.figure import Figure
from chaos.recorded import Stage
from chaos.trials import done_with, fresh, last_line, output
from pipeline import stop_signals
from teacher_dump import shard_loop, workers

ENGINES = 2


def run_several(stage: Stage, cache: Path, log: Path) -> int:
    """The dump command with two workers; for a child."""
    fork = multiprocessing.get_context("fork")
    workers.multiprocessing.get_context = lambda kind: fork  # type: ignore[attr-defined]
    workers.resource_tracker.ensure_running = lambda: None  # type: ignore[attr-defined]
    real = workers.worker_main

    def as_if_spawned(*given: Any) -> None:
        stop_signals._put_off = None
        real(*given)

    workers.worker_main = as_if_spawned
    workers.POLL_SECONDS, shard_loop.WAIT_SECONDS = 0.01, 0.02
    return as_command(stage, cache, log, gpus=ENGINES)


def killed_workers(stage: Stage, rng: random.Random, trials: int) -> Figure:
    """One of two workers is killed at a random moment: the run ends well without it, every shard is there."""
    outcomes, names = [], []
    for number in range(trials):
        cache, log = fresh(stage, f"worker-{number}")
        child = Child(lambda cache=cache, log=log: run_several(stage, cache, log), output(cache))
        found = started(child.pid)
        moment = rng.uniform(0, 1.5 * stage.seconds)
        time.sleep(moment)
        if found:
            kill(rng.choice(found))
        outcome = Outcome()
        try:
            if status := child.result(30.0):
                outcome.broken.append(f"status {status}: {output(cache).read_text()[-300:]!r}")
            else:
                outcome = Child(lambda cache=cache, log=log: as_it_stands(stage, cache, log)).result()
        except ChildFailed as error:
            outcome.broken.append(last_line(error))
        outcomes.append(done_with(cache, outcome))
        names.append(f"worker killed after {moment * 1000:.1f} ms")
    what = "one of two engines of a dump: SIGKILL, the other ends the work"
    return figure(what, outcomes, facts(stage, outcomes, names))


def killed_drivers(stage: Stage, rng: random.Random, trials: int) -> Figure:
    """The driver is killed: its workers end, and the same command goes on."""
    outcomes, names = [], []
    for number in range(trials):
        cache, log = fresh(stage, f"driver-{number}")
        child = Child(lambda cache=cache, log=log: run_several(stage, cache, log), output(cache))
        found = started(child.pid)
        moment = rng.uniform(0, 1.2 * stage.seconds)
        time.sleep(moment)
        child.kill()
        child.wait()
        outcome = recovered(stage, cache, log)
        deadline = time.monotonic() + 10
        while any(lives(pid) for pid in found) and time.monotonic() < deadline:
            time.sleep(0.01)
        outcome.broken += [f"worker {pid} outlives its driver" for pid in found if lives(pid)]
        outcomes.append(done_with(cache, outcome))
        names.append(f"driver killed after {moment * 1000:.1f} ms")
    return figure("the driver of two engines: SIGKILL", outcomes, facts(stage, outcomes, names))


def failing_pipes(stage: Stage, most: int) -> Figure:
    """What one worker sends to its driver fails from the n-th message on: the other worker ends the work."""
    outcomes, ends, names = [], Counter[str](), []
    for code in (errno.EPIPE, errno.EIO):
        for number in range(most):
            cache, log = fresh(stage, f"pipe-{number}")

            def body(number: int = number, code: int = code, cache: Path = cache, log: Path = log) -> Any:
                workers.PipeReport = refusing(workers.PipeReport, number, code)  # type: ignore[misc]
                return run_several(stage, cache, log), [("", "")]

            outcome, end = judged(stage, cache, log, body)
            if end != "ended well":
                outcome.broken.append(end)
            outcomes.append(outcome)
            ends[end] += 1
            names.append(f"{errno.errorcode[code]} from message {number} on")
    return told(stage, "a worker's pipe to its driver fails from the n-th message on", outcomes, names, ends)


def refusing(kind: type[workers.PipeReport], number: int, code: int) -> type[workers.PipeReport]:
    """A report whose pipe fails in the first worker."""

    class Refusing(kind):  # type: ignore[misc, valid-type]
        def __init__(self, connection: Any) -> None:
            super().__init__(Pipe(connection, number, code))

    return Refusing


class Pipe:
    """A connection that refuses to send from the n-th message on, in the first worker."""

    def __init__(self, connection: Any, number: int, code: int) -> None:
        self._connection, self._left, self._code = connection, number, code
        self._first = multiprocessing.current_process().name == "worker-0"

    def send(self, message: Any) -> None:
        if self._first and not self._left:
            raise OSError(self._code, os.strerror(self._code))
        self._left -= 1
        self._connection.send(message)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


def started(driver: int) -> list[int]:
    """The workers of a driver, once both are there; none if it ended before."""
    place = Path(f"/proc/{driver}/task/{driver}/children")
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and lives(driver):
        found = [int(pid) for pid in place.read_text().split()]
        if len(found) == ENGINES:
            return found
        time.sleep(0.001)
    return []


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def figure(what: str, outcomes: list[Outcome], found: dict[str, Any]) -> Figure:
    return Figure("kills", what, len(outcomes), sum(not outcome.ok for outcome in outcomes), found)
