"""Claims: how two writers on one cache share the work instead of doing it twice.

A claim is a small file `claims/NAME.json`, created exclusively, whose modification time its owner refreshes. A claim is
dead when its process is gone (same machine) or when it was not refreshed for `EXPIRY_SECONDS` (another machine); a dead
claim and its temporaries are removed by whoever wants the work next.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path

from pipeline.commit import new_claim_id

EXPIRY_SECONDS = 600.0
REFRESH_SECONDS = 30.0


class Claim:
    """One writer's hold on one piece of work; a context manager that refreshes itself until released."""

    def __init__(self, path: Path, claim_id: str) -> None:
        self.path = path
        self.id = claim_id
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name=f"claim-{path.stem}", daemon=True)
        self._thread.start()

    def _refresh(self) -> None:
        while not self._stop.wait(REFRESH_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def release(self) -> None:
        self._stop.set()
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()


def try_claim(cache: Path, name: str) -> Claim | None:
    """Claim the work called `name` in `cache`, or None if a live writer holds it.

    A dead claim is cleared first, with the temporaries that carry its id.
    """
    folder = cache / "claims"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    claim_id = new_claim_id()
    record = json.dumps({"id": claim_id, "host": socket.gethostname(), "pid": os.getpid(), "since": time.time()})
    draft = folder / f".{claim_id}.tmp"
    draft.write_text(record)
    try:
        for _ in range(2):
            try:
                os.link(draft, path)
                return Claim(path, claim_id)
            except FileExistsError:
                if not clear_if_dead(path, cache):
                    return None
        return None
    finally:
        draft.unlink(missing_ok=True)


def clear_if_dead(path: Path, cache: Path) -> bool:
    """Remove the claim at `path` and its temporaries if its owner is gone; True if the claim is free now."""
    try:
        age = time.time() - path.stat().st_mtime
        holder = json.loads(path.read_text())
    except FileNotFoundError:
        return True
    except ValueError:
        holder = {}
    if holder.get("host") == socket.gethostname():
        dead = not _process_lives(int(holder.get("pid", 0)))
    else:
        dead = age > EXPIRY_SECONDS
    if dead:
        claim_id = holder.get("id")
        if claim_id:
            for leftover in cache.glob(f".*.{claim_id}.tmp"):
                leftover.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    return dead


def clear_dead_claims(cache: Path) -> None:
    """At the start of a dump: clear what crashed writers left; live writers' claims and temporaries stay."""
    folder = cache / "claims"
    if folder.is_dir():
        for path in sorted(folder.glob("*.json")):
            clear_if_dead(path, cache)


def _process_lives(pid: int) -> bool:
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
