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
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.commit import machine, machine_digest, new_claim_id, temporary_path
from pipeline.errors import UserError, named
from pipeline.store import is_remote, names_in

EXPIRY_SECONDS = 600.0
REFRESH_SECONDS = 30.0
TEMPORARY = re.compile(r"\.(?P<id>[^.]+-(?P<pid>\d+)-(?P<machine>[0-9a-f]{6})[0-9a-f]{8})\.tmp$")
"""The end of a temporary's name: the id of the writer it belongs to."""
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
        return _read(self.path).get("id") == self.id

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
                self.path.unlink(missing_ok=True)

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


def try_claim(cache: Path, name: str) -> Claim | None:
    """Claim the work called `name` in `cache`, or None if a live writer holds it.

    A dead claim is cleared first, with the temporaries that carry its id.
    """
    if is_remote(cache):
        from pipeline.store_claim import try_store_claim

        return try_store_claim(cache, name)
    folder = cache / "claims"
    folder.mkdir(exist_ok=True)  # not the cache: where that is gone, there is nothing to work on
    path = folder / f"{name}.json"
    claim_id = new_claim_id()
    draft = folder / f".{name}.{claim_id}.tmp"
    try:
        # Synced, so that a claim that survives a power cut says whose it was.
        _write_synced(draft, json.dumps({**holder_record(claim_id), "since": time.time()}).encode())
        for _ in range(2):
            try:
                os.link(draft, path)
                return Claim(path, claim_id)
            except FileExistsError:
                if not clear_if_dead(path, cache):
                    return None
        return None
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def _write_synced(path: Path, data: bytes) -> None:
    try:
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise named(error, path) from error


def clear_if_dead(path: Path, cache: Path) -> bool:
    """Remove the claim at `path` and its temporaries if its owner is gone; True if the claim is free now."""
    try:
        holder = _read(path)
        if not _is_dead(path, holder):
            return False
    except FileNotFoundError:
        return True
    if holder.get("id"):  # checked: it must not lead to other files
        remove_temporaries(cache, path.stem, holder["id"])
    return take_away(path, holder)


def remove_temporaries(cache: Path, name: str, claim: str) -> None:
    """Remove what a writer that is gone left of the shard it worked on."""
    for ending in ("parquet", "json"):
        with contextlib.suppress(OSError):
            temporary_path(cache / f"{name}.{ending}", claim).unlink(missing_ok=True)


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


def take_away(path: Path, holder: dict[str, Any]) -> bool:
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
    for path in _temporaries(cache):
        match = TEMPORARY.search(path.name)
        if match is None or match["id"] in held:
            continue
        with contextlib.suppress(FileNotFoundError):
            if match["machine"] == machine_digest():
                dead = not _process_lives(int(match["pid"]))
            else:
                dead = time.time() - path.stat().st_mtime > EXPIRY_SECONDS
            if dead:
                path.unlink()


def _temporaries(cache: Path) -> Iterator[Path]:
    """Temporaries in the folders that writers write in."""
    for folder in (cache, cache / "teacher", cache / "claims"):
        if folder.is_dir():
            yield from (folder / name for name in names_in(folder) if name.startswith(".") and name.endswith(".tmp"))


def holder_record(claim_id: str) -> dict[str, Any]:
    """What a claim says of its owner, which is this process."""
    process = {"machine": machine(), "pid": os.getpid(), "started": _process_start(os.getpid())}
    return {"id": claim_id, **process, **HOLDER_FACTS}


def holder_lives_here(holder: dict[str, Any]) -> bool | None:
    """Whether a claim's owner runs on this machine; None if it belongs to another one, of which nothing is known."""
    if holder.get("machine") != machine():
        return None
    return _process_lives(int(holder.get("pid", 0)), holder.get("started"))


def _read(path: Path) -> dict[str, Any]:
    """A claim's content, {} if it is damaged.

    Raises:
        FileNotFoundError: the claim was released meanwhile.
    """
    if path.exists() and not path.is_file():  # a pipe, which would never end
        return {}
    with path.open("rb") as file:
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


def _process_lives(pid: int, started: str | None = None) -> bool:
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
