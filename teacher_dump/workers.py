"""Several engines on one machine: a process each, which share the shards out by the claims of the cache.

The driver starts the processes, adds up what they report over a pipe each, and tells at once when one is gone; the
others take its shards up. Workers end with their driver, however it ends.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

from pipeline.errors import UserError, one_line
from pipeline.schema import unit_name
from pipeline.shard import ShardRecord
from pipeline.stop_signals import interrupt_on_sigterm, no_more, raise_if_stopped, stops_come
from teacher_dump.gpus import EngineSlot
from teacher_dump.plan import Unit
from teacher_dump.progress import DumpProgress
from teacher_dump.shard_loop import take_shards
from teacher_dump.work import Work

POLL_SECONDS = 0.5
"""How often the driver looks whether its workers live."""
SEND_SECONDS = 0.2
"""How often a worker tells how many tokens it has captured."""
STOP_SECONDS = 20.0
"""What a worker that is told to stop may take to leave nothing half done."""


class PipeReport:
    """A worker's `Report`: everything goes to the driver."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._tokens: dict[str, int] = {}
        self._sent = time.monotonic()

    def send(self, *message: Any) -> None:
        with self._lock:
            self._send_tokens()
            self._connection.send(message)

    def _send_tokens(self) -> None:
        for name, tokens in self._tokens.items():
            self._connection.send(("captured", name, tokens))
        self._tokens.clear()
        self._sent = time.monotonic()

    def loading(self) -> None:
        pass

    def ready(self) -> None:
        self.send("ready")

    def claimed(self, name: str) -> None:
        self.send("claimed", name)

    def captured(self, name: str, tokens: int) -> None:
        with self._lock:
            self._tokens[name] = self._tokens.get(name, 0) + tokens
            if time.monotonic() - self._sent > SEND_SECONDS:
                self._send_tokens()

    def committed(self, record: ShardRecord) -> None:
        self.send("committed", record)

    def by_other(self, name: str, tokens: int) -> None:
        self.send("by_other", name, tokens)

    def wait(self, names: list[str], seconds: float) -> None:
        """Until the driver has news, or the time is over."""
        self.send("waiting", names)
        with stops_come():
            news = self._connection.poll(seconds)
        if news:
            self._connection.recv()


def worker_main(work: Work, units: Sequence[Unit], connection: Connection) -> None:
    """Body of a worker process. Exit status 1: it has sent why."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's business
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    interrupt_on_sigterm(repeat=True)
    threading.Thread(target=_end_with_driver, name="driver-watch", daemon=True).start()
    report = PipeReport(connection)
    try:
        take_shards(work, units, report)
    except (KeyboardInterrupt, BrokenPipeError):
        no_more()
        sys.exit(130)
    except BaseException as error:
        with contextlib.suppress(OSError):
            report.send("failed", *told(error))
        _end_now(1)  # the driver waits for the end of this process, and what has failed may not tear down
    _end_now(0)  # all is committed and the engine closed: tearing down vLLM and torch would only cost seconds


def _end_now(status: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _end_with_driver() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STOP_SECONDS)
    os._exit(1)


def told(error: BaseException) -> tuple[str, str]:
    """What a person is told of an exception, and its traceback where the program is to blame."""
    if isinstance(error, UserError):
        return str(error), ""
    if isinstance(error, OSError):
        return f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}", ""
    return f"{type(error).__name__}: {one_line(error)}", traceback.format_exc()[-8000:]


@dataclass
class Worker:
    """What the driver knows of one worker."""

    label: str
    process: BaseProcess
    connection: Connection
    held: dict[str, int] = field(default_factory=dict)  # shards it works on, and their tokens captured so far
    waits_for: list[str] = field(default_factory=list)  # shards that others hold, while it has nothing to do
    news: int = 0  # the last it was told of
    open: bool = True  # the pipe may have more
    gone: bool = False
    error: str = ""
    lost: str = ""  # why it is gone before the work was done


class Workers:
    """The workers of one dump.

    Args:
        work: what `prepare` returned.
        units: what is to be committed.
        slots: where each worker runs.
        progress: is told of all of them together.
    """

    def __init__(self, work: Work, units: Sequence[Unit], slots: list[EngineSlot], progress: DumpProgress) -> None:
        self.work, self.units, self.slots, self.progress = work, units, slots, progress
        self.workers: list[Worker] = []
        self._news = 0
        self._ready = False

    def run(self) -> list[str]:
        """Until every unit is committed.

        Returns:
            A sentence for every worker that was lost on the way.

        Raises:
            UserError: no worker is left and there is work left; says what ended them.
        """
        places = ", ".join(dict.fromkeys(slot.label for slot in self.slots))
        self.progress.say(f"loading teacher {self.work.teacher.name} in vLLM: {len(self.slots)} workers on {places}")
        with _environment({"PYTHONWARNINGS": "ignore:resource_tracker:UserWarning"}):
            resource_tracker.ensure_running()  # it cleans up after killed workers, and need not say so
        try:
            for number, slot in enumerate(self.slots):
                self.workers.append(self._start(number, slot))
                raise_if_stopped()
            while living := [worker for worker in self.workers if not self._ended(worker)]:
                ready = wait([worker.connection for worker in living if worker.open], POLL_SECONDS)
                raise_if_stopped()
                for worker in living:
                    if worker.connection in ready:
                        self._read(worker)
        finally:
            self._stop()
        lost = [f"{worker.label} {worker.lost}" for worker in self.workers if worker.lost]
        left = {unit_name(unit.unit) for unit in self.units} - self.progress.written - self.progress.by_others.keys()
        if left:
            raise UserError(self._all_lost(len(left)))
        return lost

    def _start(self, number: int, slot: EngineSlot) -> Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        # Not a daemon: with tensor parallelism vLLM starts processes of its own.
        process = context.Process(
            target=worker_main, args=(self.work, self.units, theirs), name=f"worker-{number}", daemon=False
        )
        with _environment(slot.environment), _sigint_blocked():
            process.start()
        theirs.close()
        return Worker(f"worker {number} ({slot.label})", process, ours)

    def _read(self, worker: Worker) -> None:
        """Take in what a worker has sent."""
        try:
            while worker.connection.poll():
                self._take(worker, worker.connection.recv())
        except (EOFError, OSError):
            worker.open = False

    def _take(self, worker: Worker, message: tuple[Any, ...]) -> None:
        progress = self.progress
        if message[0] != "waiting":
            worker.waits_for = []
        match message:
            case ("ready",):
                if not self._ready:
                    progress.ready()
                self._ready = True
            case ("claimed", name):
                worker.held[name] = 0
            case ("captured", name, tokens):
                worker.held[name] += tokens
                progress.captured(name, tokens)
            case ("committed", record):
                worker.held.pop(record.name)
                progress.committed(record)
                self._tell_news()
            case ("by_other", name, tokens):
                progress.by_other(name, tokens)
            case ("waiting", names):
                worker.waits_for = names
                self._tell(worker)
            case ("failed", sentence, trace):
                if trace and not any(other.error == sentence for other in self.workers):
                    progress.say(trace)
                worker.error = sentence

    def _tell_news(self) -> None:
        """A shard was committed or is free again: who waits may look."""
        self._news += 1
        for worker in self.workers:
            if worker.waits_for:
                self._tell(worker)

    def _tell(self, worker: Worker) -> None:
        if worker.news != self._news:
            worker.news, worker.waits_for = self._news, []
            with contextlib.suppress(OSError):
                worker.connection.send("look")
        elif not any(other.held for other in self.workers):
            self.progress.waits(len(worker.waits_for))

    def _ended(self, worker: Worker) -> bool:
        """Whether a worker is gone; the first time that it is, tell so."""
        if worker.gone or worker.process.exitcode is None:  # asking reaps it: its claims are dead from now on
            return worker.gone
        if worker.open:
            self._read(worker)
        worker.gone, worker.open, worker.waits_for = True, False, []
        if worker.process.exitcode:
            self._lose(worker)
        self._tell_news()
        return True

    def _lose(self, worker: Worker) -> None:
        holding = f" while it held {', '.join(worker.held)}" if worker.held else ""
        for name, tokens in worker.held.items():
            self.progress.captured(name, -tokens)
        worker.held = {}
        cause = worker.error or _exit_cause(worker.process.exitcode)
        known = any(other.error == cause for other in self.workers if other.lost)
        worker.error, worker.lost = cause, f"stopped{holding}: {cause}"
        if any(other.process.exitcode is None for other in self.workers):
            said = f"stopped{holding} for the same reason" if known else worker.lost
            self.progress.say(f"{worker.label} {said}; the others go on")

    def _all_lost(self, left: int) -> str:
        causes: dict[str, list[str]] = {}
        for worker in self.workers:
            causes.setdefault(worker.error, []).append(worker.label)
        if len(causes) == 1:
            return f"all {len(self.workers)} workers stopped with {left} shards left: {self.workers[0].error}"
        told = "; ".join(f"{', '.join(labels)}: {cause}" for cause, labels in causes.items())
        return f"all {len(self.workers)} workers stopped with {left} shards left: {told}"

    def _stop(self) -> None:
        """End what still runs: kindly, then not."""
        running = [worker.process for worker in self.workers if worker.process.is_alive()]
        try:
            for process in running:
                process.terminate()
            deadline = time.monotonic() + STOP_SECONDS
            for process in running:
                process.join(max(0.0, deadline - time.monotonic()))
        finally:
            for process in running:
                process.kill()
                process.join()


def _exit_cause(code: int | None) -> str:
    if code is None or code >= 0:
        return f"it ended with exit status {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"it was killed ({name}{', as when memory runs out' if -code == signal.SIGKILL else ''})"


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Variables that a process started inside begins with."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Ctrl-C does not end a process started inside before that one ignores it, and comes here afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
