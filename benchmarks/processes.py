"""A process for each case of a benchmark, so that every one starts with an empty GPU."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

MARK = "measured: "
LINES = 25
"""Of what a process said that are shown when it fails."""
_spares: dict[str, subprocess.Popen[str]] | None = None
"""Processes that have no case yet, by their module; None: no such process is started."""


@contextlib.contextmanager
def spare_processes() -> Iterator[None]:
    """Inside, a case's process is followed at once by that of the next case of its module, which imports what it
    needs while the first is still starting; such a module calls `given_case` for its case."""
    global _spares
    _spares = {}
    try:
        yield
    finally:
        spares, _spares = _spares, None
        for process in spares.values():
            process.communicate()  # the end of its input is the end of it


def in_own_process(module: str, case: dict[str, Any], timeout: float | None = None) -> dict[str, Any]:
    """Run `python -m MODULE CASE` and return what it reported first; how it ended after that does not matter.

    Raises:
        RuntimeError: it failed or took longer than `timeout` seconds; the text ends with what it said.
    """
    found: list[dict[str, Any]] = []
    try:
        found.extend(reports_of(module, case, timeout))
    except RuntimeError:
        if not found:
            raise
    return found[0]


def reports_of(module: str, case: dict[str, Any], timeout: float | None = None) -> Iterator[dict[str, Any]]:
    """Run `python -m MODULE CASE` and yield what it reports, as it comes; it ends when the caller stops listening.

    Raises:
        RuntimeError: it failed, reported nothing or took longer than `timeout` seconds; ends with what it said.
    """
    process = _spares.pop(module, None) if _spares is not None else None
    if process is None:
        process = _start(module, json.dumps(case))
    else:
        with contextlib.suppress(BrokenPipeError):  # it has failed already, and said why
            print(json.dumps(case), file=process.stdin, flush=True)
    if _spares is not None:
        _spares[module] = _start(module, "-")
    assert process.stdin is not None and process.stdout is not None
    late = threading.Event()

    def stop() -> None:
        late.set()
        with contextlib.suppress(ProcessLookupError):  # it may just have ended
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(timeout or 0.0, stop)
    said: collections.deque[str] = collections.deque(maxlen=LINES)
    reported = False
    if timeout is not None:
        timer.start()
    try:
        for line in process.stdout:
            if line.startswith(MARK):
                reported = True
                yield json.loads(line.removeprefix(MARK))
            else:
                said.append(line)
        status = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
    if late.is_set():
        raise RuntimeError(f"{module} {case} took more than {timeout} s:\n{''.join(said)}")
    if status or not reported:
        raise RuntimeError(f"{module} {case} failed:\n{''.join(said)}")


def _start(module: str, word: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", module, word],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # other ranks are its children, and end with it
    )


def given_case() -> dict[str, Any]:
    """The child's side: its case, from the command line or, where that has `-`, from its input, after the imports."""
    if sys.argv[1] == "-":
        line = sys.stdin.readline()
        if not line:
            sys.exit(0)  # there was no further case
        sys.argv[1] = line.strip()  # Lightning starts other ranks with these arguments
    case: dict[str, Any] = json.loads(sys.argv[1])
    return case


def report(found: dict[str, Any]) -> None:
    """The child's side: print what it measured."""
    print("\n" + MARK + json.dumps(found), flush=True)
