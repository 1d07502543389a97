"""Claims: how two writers on one cache share the work instead of doing it twice.

A claim is a small file `claims/NAME.json`, created exclusively, whose modification time its owner refreshes. A claim is
dead when its process is gone (same machine, same boot) or when it was not refreshed for `EXPIRY_SECONDS` (elsewhere); a
dead claim and its temporaries are removed by whoever wants the work next.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
from pathlib import Path
from typing import Any

from pipeline.commit import host_name, new_claim_id
from pipeline.store import is_remote

EXPIRY_SECONDS = 600.0
REFRESH_SECONDS = 30.0
TEMPORARY = re.compile(r"\.(?P<id>(?P<host>[^.]+)-(?P<pid>\d+)-[0-9a-f]{8})\.tmp$")
"""The end of a temporary's name: the id of the writer it belongs to."""


class Claim:
    """One writer's hold on one piece of work; a context manager that refreshes itself until released."""

    def __init__(self, path: Path, claim_id: str) -> None:
        self.path = path
        self.id = claim_id
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name=f"claim-{path.stem}", daemon=True)
        self._thread.start()

    def _is_ours(self) -> bool:
        """False once another writer took an expired claim over (this machine slept, or lost the disk for a while)."""
        return _read(self.path).get("id") == self.id

    def _refresh(self) -> None:
        while not self._stop.wait(REFRESH_SECONDS):
            with contextlib.suppress(OSError):
                if self._is_ours():
                    self._touch()

    def _touch(self) -> None:
        os.utime(self.path)

    def release(self) -> None:
        self._stop.set()
        with contextlib.suppress(OSError):
            if self._is_ours():
                self.path.unlink(missing_ok=True)

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()


def try_claim(cache: Path, name: str) -> Claim | None:
    """Claim the work called `name` in `cache`, or None if a live writer holds it.

    A dead claim is cleared first, with the temporaries that carry its id.
    """
    if is_remote(cache):
        from pipeline.store_claim import try_store_claim

        return try_store_claim(cache, name)
    folder = cache / "claims"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    claim_id = new_claim_id()
    draft = folder / f".{name}.{claim_id}.tmp"
    draft.write_text(json.dumps({**holder_record(claim_id), "since": time.time()}))
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
        holder = _read(path)
        if not _is_dead(path, holder):
            return False
    except FileNotFoundError:
        return True
    if holder.get("id"):
        for leftover in cache.glob(f"**/.*.{holder['id']}.tmp"):
            leftover.unlink(missing_ok=True)
    return _take_away(path, holder)


def is_held(cache: Path, name: str) -> bool:
    """Whether a live writer works on what is called `name` at this moment; nothing is changed."""
    if is_remote(cache):
        from pipeline.store_claim import is_held_in_store

        return is_held_in_store(cache, name)
    path = cache / "claims" / f"{name}.json"
    try:
        return not _is_dead(path, _read(path))
    except FileNotFoundError:
        return False


def _is_dead(path: Path, holder: dict[str, Any]) -> bool:
    """Whether the holder of the claim at `path` is gone; raises FileNotFoundError if the claim is."""
    age = time.time() - path.stat().st_mtime
    lives = holder_lives_here(holder)
    return age > EXPIRY_SECONDS if lives is None else not lives


def _take_away(path: Path, holder: dict[str, Any]) -> bool:
    """Remove the claim of `holder` unless another writer was faster and its live claim stands there by now."""
    grave = path.with_name(f".{path.name}.{new_claim_id()}.tmp")
    try:
        os.rename(path, grave)
    except FileNotFoundError:
        return True
    try:
        if _read(grave) == holder:
            return True
        with contextlib.suppress(FileExistsError):
            os.link(grave, path)
        return False
    finally:
        grave.unlink(missing_ok=True)


def clear_dead_claims(cache: Path) -> None:
    """At the start of a dump: clear what crashed writers left; live writers' claims and temporaries stay."""
    if is_remote(cache):
        from pipeline.store_claim import clear_dead_store_claims

        clear_dead_store_claims(cache)
        return
    folder = cache / "claims"
    if folder.is_dir():
        for path in sorted(folder.glob("*.json")):
            clear_if_dead(path, cache)
    _clear_unclaimed(cache)


def _clear_unclaimed(cache: Path) -> None:
    """Remove temporaries of writers that held no claim (teacher folder, plan, manifest) and are gone."""
    held = set()
    for path in (cache / "claims").glob("*.json"):
        with contextlib.suppress(FileNotFoundError):
            held.add(_read(path).get("id"))
    for path in cache.glob("**/.*.tmp"):
        match = TEMPORARY.search(path.name)
        if match is None or match["id"] in held or match["host"] == host_name() and _process_lives(int(match["pid"])):
            continue
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > EXPIRY_SECONDS:
                path.unlink()


def holder_record(claim_id: str) -> dict[str, Any]:
    """What a claim says of its owner, which is this process."""
    return {"id": claim_id, "machine": _machine(), "pid": os.getpid(), "started": _process_start(os.getpid())}


def holder_lives_here(holder: dict[str, Any]) -> bool | None:
    """Whether a claim's owner runs on this machine; None if it belongs to another one, of which nothing is known."""
    if holder.get("machine") != _machine():
        return None
    return _process_lives(int(holder.get("pid", 0)), holder.get("started"))


def _read(path: Path) -> dict[str, Any]:
    """A claim's content, {} if it is damaged.

    Raises:
        FileNotFoundError: the claim was released meanwhile.
    """
    try:
        holder = json.loads(path.read_text())
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _machine() -> str:
    """What process numbers are unique in: this host since it booted, and the container this process sees."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # only Linux has these
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _process_lives(pid: int, started: str | None = None) -> bool:
    """Whether process `pid` runs here and, where that is known, is the one that started then."""
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return not started or started == _process_start(pid)


def _process_start(pid: int) -> str:
    """When a process started, in clock ticks since boot: process numbers are used again. "" if unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
