"""A process for each case of a benchmark, so that every one starts with an empty GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

MARK = "measured: "


def in_own_process(module: str, case: dict[str, Any], timeout: float | None = None) -> dict[str, Any]:
    """Run `python -m MODULE CASE` and return what it printed after MARK.

    Raises:
        RuntimeError: it failed or took longer than `timeout` seconds; the text ends with what it said.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", module, json.dumps(case)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # other ranks are its children, and end with it
    )
    try:
        said, _ = process.communicate(timeout=timeout)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise RuntimeError(f"{module} {case} took more than {timeout} s:\n{_end(said)}") from None
        raise
    for line in said.splitlines():
        if line.startswith(MARK):
            found: dict[str, Any] = json.loads(line.removeprefix(MARK))
            return found
    raise RuntimeError(f"{module} {case} failed:\n{_end(said)}")


def report(found: dict[str, Any]) -> None:
    """The child's side: print what it measured."""
    print("\n" + MARK + json.dumps(found), flush=True)


def _end(text: str) -> str:
    return "\n".join(text.splitlines()[-25:])
