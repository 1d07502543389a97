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
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.claim_file import EXPIRY_SECONDS, Claim, holder_lives_here, holder_record, process_lives, read_claim
from pipeline.commit import machine_digest, new_claim_id, temporary_path
from pipeline.errors import named
from pipeline.store import is_remote, names_in
from pipeline.store_claim import clear_dead_store_claims, is_held_in_store, try_store_claim

TEMPORARY = re.compile(r"\.(?P<id>[^.]+-(?P<pid>\d+)-(?P<machine>[0-9a-f]{6})[0-9a-f]{8})\.tmp$")
"""The end of a temporary's name: the id of the writer it belongs to."""


def try_claim(cache: Path, name: str) -> Claim | None:
    """Claim the work called `name` in `cache`, or None if a live writer holds it.

    A dead claim is cleared first, with the temporaries that carry its id.
    """
    if is_remote(cache):
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
        holder = read_claim(path)
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
        return is_held_in_store(cache, name)
    path = cache / "claims" / f"{name}.json"
    try:
        return not _is_dead(path, read_claim(path))
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
        if read_claim(grave) == holder:
            return True
        with contextlib.suppress(FileExistsError):
            os.link(grave, path)
        return False
    finally:
        grave.unlink(missing_ok=True)


def clear_dead_claims(cache: Path) -> None:
    """At the start of a dump: clear what crashed writers left; live writers' claims and temporaries stay."""
    if is_remote(cache):
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
            held.add(read_claim(path).get("id"))
    for path in _temporaries(cache):
        match = TEMPORARY.search(path.name)
        if match is None or match["id"] in held:
            continue
        with contextlib.suppress(FileNotFoundError):
            if match["machine"] == machine_digest():
                dead = not process_lives(int(match["pid"]))
            else:
                dead = time.time() - path.stat().st_mtime > EXPIRY_SECONDS
            if dead:
                path.unlink()


def _temporaries(cache: Path) -> Iterator[Path]:
    """Temporaries in the folders that writers write in."""
    for folder in (cache, cache / "teacher", cache / "claims"):
        if folder.is_dir():
            yield from (folder / name for name in names_in(folder) if name.startswith(".") and name.endswith(".tmp"))
