"""Trials in processes of their own: an interpreter that has imported everything once forks a child for each.

A fork copies only the thread that calls it, so the interpreter that forks must have no other: `in_fresh_interpreter`
starts one, whatever the caller's has done before. It only forks, kills and waits; what reads or writes a cache runs in
the children, and a child never returns: it ends with `os._exit`.
"""

from __future__ import annotations

import json
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from chaos.figure import Figure

REPOSITORY = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 120.0
"""A trial takes a second; one that takes so long waits for something that will not come."""


class ChildFailed(Exception):
    """A child raised, hung or died without having been killed by us."""


class Child:
    """One forked process that runs `body`.

    Args:
        body: runs in the child; what it returns comes back through a pipe.
        output: file that takes the child's standard output and error; None leaves them with the parent's.
    """

    def __init__(self, body: Callable[[], Any], output: Path | None = None) -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        assert threading.active_count() == 1, "a lock that another thread holds would stay locked in the child"
        self._pipe, write = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(self._pipe)
            _run(body, write, output)
        os.close(write)
        self.status: int | None = None

    def kill(self) -> None:
        """SIGKILL, now."""
        self.send(signal.SIGKILL)

    def send(self, number: signal.Signals) -> None:
        if self.status is None:
            os.kill(self.pid, number)  # where it has ended it is not reaped yet: the number is still its own

    def wait(self) -> int:
        """The exit status, negative for a signal's number; the process is reaped."""
        if self.status is None:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self._pipe)
        return self.status

    def result(self, timeout: float = TIMEOUT_SECONDS) -> Any:
        """What `body` returned, None if it was killed before.

        Raises:
            ChildFailed: it raised (the text is its traceback), or there was no result in time.
        """
        deadline, data = time.monotonic() + timeout, b""
        while True:
            ready, _, _ = select.select([self._pipe], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self.kill()
                self.wait()
                raise ChildFailed(f"hung: no result after {timeout:.0f} s")
            block = os.read(self._pipe, 1 << 16)
            if not block:
                break
            data += block
        status = self.wait()
        if status == -signal.SIGKILL:
            return None
        if not data:
            raise ChildFailed(f"ended with status {status} and no result")
        kind, value = pickle.loads(data)
        if kind == "error":
            raise ChildFailed(value)
        return value


def _run(body: Callable[[], Any], write: int, output: Path | None) -> None:
    """The child's life; does not return."""
    status = 1
    try:
        if output is not None:
            file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(file, 1)
            os.dup2(file, 2)
        try:
            told = ("value", body())
            status = 0
        except BaseException:
            told = ("error", traceback.format_exc())
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        data = pickle.dumps(told)
        while data:
            data = data[os.write(write, data) :]
    finally:
        os._exit(status)


def in_fresh_interpreter(module: str, seed: int, small: bool) -> list[Figure]:
    """Call `experiments(seed, small)` of a module in an interpreter of its own and return its figures.

    Raises:
        ChildFailed: it ended without figures.
    """
    read, write = os.pipe()
    paths = [str(REPOSITORY), str(REPOSITORY / "tests")]
    more = {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, "-m", "chaos.children", module, str(seed), str(int(small)), str(write)]
    process = subprocess.Popen(command, env={**os.environ, **more}, cwd=REPOSITORY, pass_fds=[write])
    os.close(write)
    with open(read, encoding="utf-8") as pipe:
        text = pipe.read()
    if process.wait() or not text:
        raise ChildFailed(f"{module} ended with status {process.returncode} and without figures")
    return [Figure(**record) for record in json.loads(text)]


def main() -> None:
    module, seed, small, write = sys.argv[1:]
    figures = import_module(module).experiments(int(seed), bool(int(small)))
    with open(int(write), "w", encoding="utf-8") as pipe:
        json.dump([vars(figure) for figure in figures], pipe)


if __name__ == "__main__":
    main()
