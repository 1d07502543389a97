"""Worker processes side by side, each taking one trial after another, until there are no more or the time is up."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.measured import Row
from benchmarks.quality.arms import Arm
from benchmarks.quality.caches import Dumps
from benchmarks.quality.trial import Trial, to_make
from benchmarks.quality.worker import order_of

POLL_SECONDS = 0.5
GRACE_SECONDS = 45.0
"""So long after its minutes a runner waits for what it began in time."""
MOST_LOST = 4
"""Processes that may end unasked before no more are started."""
Answer = dict[str, Any]


@dataclass
class Clock:
    """Whether a trial would end in time, judged by those of its kind that did.

    Attributes:
        minutes: since `started` in which all must be over; None: any.
        known: by kind, seconds of trials on this device, from earlier runs.
        first, later: by kind, seconds of trials in this run; `first`: the first ones of their process, which load
            kernels and the teacher.
        starts: seconds that trials took to make, or wait for, what they begin from; in no other figure here.
    """

    minutes: float | None
    known: dict[str, list[float]] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    first: dict[str, list[float]] = field(default_factory=dict)
    later: dict[str, list[float]] = field(default_factory=dict)
    starts: list[float] = field(default_factory=list)

    def note(self, kind: str, seconds: float, first: bool, start: float = 0.0) -> None:
        """A trial that ended, `start` of its seconds for what it begins from."""
        (self.first if first else self.later).setdefault(kind, []).append(seconds - start)
        self.starts.append(start)

    def fits(self, kind: str, makes_start: bool = False) -> bool:
        """Whether a trial would; `makes_start`: which begins from what is not there yet."""
        if self.minutes is None:
            return True
        start = max(self.starts, default=0.0) if makes_start else 0.0
        return time.monotonic() - self.started + start + self.estimate(kind) <= 60 * self.minutes

    def overdue(self) -> bool:
        """Whether a trial under way took so much longer than was thought that it is given up."""
        return self.minutes is not None and time.monotonic() - self.started > 60 * self.minutes + GRACE_SECONDS

    def estimate(self, kind: str) -> float:
        """Seconds of a trial: the longest of its kind in this run, else before it; of a kind that nothing is known of,
        the longest of all; 0 where there were none."""
        sources = (self.later, self.known, self.first)
        of_kind = next((source[kind] for source in sources if kind in source), None)
        of_all = next((source for source in sources if source), {})
        return max(of_kind or [seconds for some in of_all.values() for seconds in some], default=0.0)


class Worker:
    """One process of `benchmarks.quality.worker`, whose answers come on `answers` as (worker, answer); the last one is
    None, when it has ended."""

    def __init__(self, number: int, logs: Path, answers: queue.Queue[tuple[Worker, Answer | None]], share: int) -> None:
        self.number, self.log = number, logs / f"worker-{number}.log"
        self.trial: Trial | None = None
        self.busy = False
        self.trials = 0
        environment = {**os.environ, **one_gpu(number), "PYTHONUNBUFFERED": "1"}
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // (2 * share)))
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.quality.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=log, text=True, env=environment, start_new_session=True,
            )  # fmt: skip
        threading.Thread(target=self._read, args=(answers,), daemon=True).start()

    def _read(self, answers: queue.Queue[tuple[Worker, Answer | None]]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            answers.put((self, json.loads(line)))
        self.process.wait()
        answers.put((self, None))

    def give(self, order: dict[str, Any], trial: Trial | None = None) -> None:
        assert self.process.stdin is not None
        self.busy, self.trial = True, trial
        self.since = time.monotonic()
        with contextlib.suppress(OSError):  # it has ended: its last answer says so
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()

    def end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def one_gpu(number: int) -> dict[str, str]:
    """Environment that gives a worker one of the machine's GPUs, in turn."""
    count = torch.cuda.device_count()
    if count < 2:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    return {"CUDA_VISIBLE_DEVICES": visible[number % len(visible)]}


class Pool:
    """Runs trials.

    Args:
        trials: in the order in which they should be taken.
        dumps: of the caches that they need.
        clock: says whether another may begin.
        workers: processes at once.
        scratch: folder for what the workers write besides runs.
        report: called with every trial and its answer, in this process.
        warm: compile in one process, while caches are dumped, before the others begin.
    """

    def __init__(
        self,
        trials: list[Trial],
        dumps: Dumps,
        clock: Clock,
        workers: int,
        scratch: Path,
        report: Callable[[Trial, Answer], None],
        warm: bool = False,
    ) -> None:
        self.waiting, self.dumps, self.clock, self.report = list(trials), dumps, clock, report
        self.scratch, self.warm = scratch, warm
        self.wanted = min(workers, len(trials))
        self.answers: queue.Queue[tuple[Worker, Answer | None]] = queue.Queue()
        self.workers: list[Worker] = []
        self.lost = 0

    def run(self) -> list[Trial]:
        """Until all is done or nothing more fits; returns the trials that were not begun, or not ended in time."""
        for _ in range(self.wanted):
            self._start()
        if self.warm and self.workers:
            self.workers[0].give({"warm": str(self.scratch / "warm-up")})
        try:
            while True:
                self.dumps.poll()
                self._give_up_failed()
                self._hand_out()
                if not any(worker.busy for worker in self.workers) and not (self.workers and self._in_time()):
                    return self.waiting
                if self.clock.overdue():
                    return [*self.waiting, *(worker.trial for worker in self.workers if worker.trial is not None)]
                with contextlib.suppress(queue.Empty):
                    self._take(*self.answers.get(timeout=POLL_SECONDS))
        finally:
            for worker in self.workers:
                worker.end()

    def _start(self) -> None:
        self.workers.append(Worker(len(self.workers) + self.lost, self.scratch / "logs", self.answers, self.wanted))

    def _give_up_failed(self) -> None:
        for trial in list(self.waiting):
            failed = next((self.dumps.failed[name] for name in caches_of(trial) if name in self.dumps.failed), None)
            if failed:
                self.waiting.remove(trial)
                self.report(trial, {"error": failed})

    def _hand_out(self) -> None:
        if self.warm:
            return
        for worker in self.workers:
            if worker.busy:
                continue
            trial = self._next()
            if trial is None:
                return
            self.waiting.remove(trial)
            worker.give({"trial": order_of(trial)}, trial)

    def _in_time(self) -> list[Trial]:
        """Those that would end in time if they began now."""
        return [trial for trial in self.waiting if self.clock.fits(kind_of(trial.arm), bool(to_make(trial)))]

    def _next(self) -> Trial | None:
        """The first of them whose caches are there and which would not wait for what another one is making."""
        being_made = {path for worker in self.workers if worker.trial is not None for path in to_make(worker.trial)}
        for trial in self._in_time():
            if self.dumps.ready.issuperset(caches_of(trial)) and being_made.isdisjoint(to_make(trial)):
                return trial
        return None

    def _take(self, worker: Worker, answer: Answer | None) -> None:
        trial, was_busy = worker.trial, worker.busy
        worker.busy, worker.trial = False, None
        if was_busy and trial is None:
            self.warm = False  # also where it failed: the first trials compile for themselves, or say what is wrong
            said = (answer or {}).get("error", "")
            print(f"warm after {time.monotonic() - worker.since:.0f} s{said and f': {said}'}", flush=True)
        if answer is None or answer.pop("last", False):
            self._lose(worker)
        if trial is None:
            return
        if answer is None:
            answer = {"error": f"its process ended with status {worker.process.returncode}, see {worker.log}"}
        worker.trials += 1
        if "error" not in answer:
            start = answer["row"]["seconds"].get("start", 0.0)
            self.clock.note(kind_of(trial.arm), time.monotonic() - worker.since, worker.trials == 1, start)
        self.report(trial, answer)

    def _lose(self, worker: Worker) -> None:
        if worker not in self.workers:
            return
        self.workers.remove(worker)
        self.lost += 1
        if self.lost <= MOST_LOST and self.waiting:
            self._start()


def caches_of(trial: Trial) -> set[str]:
    """Names of the dumps that a trial reads, what it begins from included; each lies in a folder of its name."""
    return {path.name for path in (trial.train, trial.heldout, trial.other)} | set(trial.arm.dumps())


def kind_of(arm: Arm) -> str:
    """Arms of the same kind take about as long: students of one shape, as many steps, the teacher there or not."""
    return json.dumps([arm.shape(), arm.share, arm.teacher_in_loop], sort_keys=True)


def known_seconds(rows: list[Row], arms: Mapping[str, Arm], budget: str, device: str) -> dict[str, list[float]]:
    """By kind, what trials of a budget took on such a device, without what they begin from."""
    known: dict[str, list[float]] = {}
    for row in rows:
        if row.get("budget") == budget and row.get("device") == device and "seconds" in row and row["arm"] in arms:
            seconds = row["seconds"]["total"] - row["seconds"].get("start", 0.0)
            known.setdefault(kind_of(arms[row["arm"]]), []).append(seconds)
    return known
