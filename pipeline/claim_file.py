"""One writer's claim: the file that says whose it is, keeping it fresh, and whether its owner lives.

How claims are made, taken over and cleared is in claim.py for a disk, in store_claim.py for an object store.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
from pathlib import Path
from typing import Any

from pipeline.commit import machine
from pipeline.errors import UserError
from pipeline.store import is_remote, open_file, remove

EXPIRY_SECONDS = 600.0
REFRESH_SECONDS = 30.0
OWNER = re.compile(r"[\w-]{0,100}")  # no folders and no wildcards: temporaries are looked for by it
TEXTS = ("id", "machine", "started")
MOST_CLAIM_BYTES = 1 << 16
HOLDER_FACTS: dict[str, str] = {}
"""What else the claims of this process say of it, such as the node of a cluster that it runs on."""


class Claim:
    """One writer's hold on one piece of work; a context manager that refreshes itself until released."""

    def __init__(self, path: Path, claim_id: str) -> None:
        self.path = path
        self.id = claim_id
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name=f"claim-{path.stem}", daemon=True)
        self._thread.start()

    def is_ours(self) -> bool:
        """False once another writer took an expired claim over (this machine slept, or lost the disk for a while)."""
        return read_claim(self.path).get("id") == self.id

    def _refresh(self) -> None:
        while not self._stop.wait(REFRESH_SECONDS):
            with contextlib.suppress(OSError):
                if self.is_ours():
                    self._touch()

    def _touch(self) -> None:
        os.utime(self.path)

    def release(self) -> None:
        self._stop.set()
        with contextlib.suppress(OSError):
            if self.is_ours():
                remove(self.path)

    def check(self) -> None:
        """Before something is made visible: whether the work is still ours, as far as the storage can tell.

        Raises:
            UserError: another writer took it over, because this one could not refresh its claim for too long.
        """
        try:
            ours = self.is_ours()
        except FileNotFoundError:
            ours = False
        except OSError:
            return
        if not ours:
            raise UserError(
                f"{self.path}: another writer took this work over, since this process could not refresh its claim (the "
                "machine slept, or lost its storage): run the same command to go on"
            )

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()


def holder_record(claim_id: str) -> dict[str, Any]:
    """What a claim says of its owner, which is this process."""
    process = {"machine": machine(), "pid": os.getpid(), "started": _process_start(os.getpid())}
    return {"id": claim_id, **process, **HOLDER_FACTS}


def holder_lives_here(holder: dict[str, Any]) -> bool | None:
    """Whether a claim's owner runs on this machine; None if it belongs to another one, of which nothing is known."""
    if holder.get("machine") != machine():
        return None
    return process_lives(int(holder.get("pid", 0)), holder.get("started"))


def read_claim(path: Path) -> dict[str, Any]:
    """A claim's content, {} if it is damaged.

    Raises:
        FileNotFoundError: the claim was released meanwhile.
    """
    if not is_remote(path) and path.exists() and not path.is_file():  # a pipe, which would never end
        return {}
    with open_file(path) as file:
        return read_holder(file.read(MOST_CLAIM_BYTES))


def read_holder(data: bytes) -> dict[str, Any]:
    """What a claim says of its owner, {} if it is damaged or says what no writer says: it may be a stranger's."""
    try:
        holder = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(holder, dict) or not all(isinstance(holder.get(name, ""), str) for name in TEXTS):
        return {}
    pid = holder.get("pid", 0)
    right = type(pid) is int and 0 <= pid < 1 << 31 and OWNER.fullmatch(holder.get("id", "")) is not None
    return holder if right else {}


def process_lives(pid: int, started: str | None = None) -> bool:
    """Whether process `pid` runs here and, where that is known, is the one that started then.

    A process that was killed and not reaped by its parent yet still has its number, and is dead.
    """
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    state, start = _process_state(pid)
    return state not in ("Z", "X") and (not started or started == start)


def _process_start(pid: int) -> str:
    """When a process started, in clock ticks since boot: process numbers are used again. "" if unknown."""
    return _process_state(pid)[1]


def _process_state(pid: int) -> tuple[str, str]:
    """State and start of a process as the kernel tells them, "" where it does not."""
    try:
        told = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return told[0], told[19]
    except (OSError, IndexError):
        return "", ""
