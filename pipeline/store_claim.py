"""Claims on an object store, which has no rename and no hard links: only creation is exclusive.

A claim is an object `claims/NAME.GENERATION.json`. Work is held by the highest generation there is. Who finds that one
dead creates the next: of several that try, the store lets one succeed, and nobody removes what another may just have
made. The holder removes older generations, keeps its own fresh by writing it again, and removes it at the end.
"""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from pipeline.claim_file import (
    EXPIRY_SECONDS,
    MOST_CLAIM_BYTES,
    Claim,
    holder_lives_here,
    holder_record,
    read_holder,
)
from pipeline.commit import new_claim_id
from pipeline.store import again, names_in, open_file, remove
from pipeline.store_drivers import require_exclusive


class StoreClaim(Claim):
    """One writer's hold on one piece of work; a context manager that refreshes itself until released."""

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self._record = record
        super().__init__(path, record["id"])

    def _touch(self) -> None:
        again(lambda: _write(self.path, self._record, "overwrite"), self.path)


def try_store_claim(cache: Path, name: str) -> StoreClaim | None:
    """Claim the work called `name`, or None if a live writer holds it. See `pipeline.claim.try_claim`."""
    require_exclusive(cache)
    older = generations(cache, name)
    if older and not is_dead(older[-1][1]):
        return None
    record = holder_record(new_claim_id())
    path = cache / "claims" / f"{name}.{older[-1][0] + 1 if older else 0}.json"
    try:
        again(lambda: _write(path, record, "create"), path)
    except FileExistsError:
        if _read(path).get("id") != record["id"]:  # an earlier attempt of ours may have arrived all the same
            return None
    for _, dead in older:
        with contextlib.suppress(OSError):
            remove(dead)
    return StoreClaim(path, record)


def is_held_in_store(cache: Path, name: str) -> bool:
    """See `pipeline.claim.is_held`."""
    there = generations(cache, name)
    return bool(there) and not is_dead(there[-1][1])


def clear_dead_store_claims(cache: Path) -> None:
    """Remove claims whose writers are gone. The next claim does without; this is tidiness."""
    for path in _list(cache):
        if is_dead(path):
            with contextlib.suppress(OSError):
                remove(path)


def generations(cache: Path, name: str) -> list[tuple[int, Path]]:
    """The claims on one piece of work, the highest generation last."""
    found = []
    for path in _list(cache):
        stem, _, generation = path.stem.rpartition(".")
        if stem == name and generation.isdigit():
            found.append((int(generation), path))
    return sorted(found, key=lambda item: item[0])


def is_dead(path: Path) -> bool:
    """Whether a claim's owner is gone: its process (same machine), or not heard of for `EXPIRY_SECONDS` (elsewhere), by
    this machine's clock against the store's."""
    try:
        holder = _read(path)
        store: Any = path
        age = time.time() - again(lambda: store.fs.modified(store.path), path).timestamp()
    except FileNotFoundError:
        return True
    lives = holder_lives_here(holder)
    return age > EXPIRY_SECONDS if lives is None else not lives


def _list(cache: Path) -> list[Path]:
    return [cache / "claims" / name for name in names_in(cache / "claims") if name.endswith(".json")]


def _write(path: Path, record: dict[str, Any], mode: str) -> None:
    store: Any = path
    if mode == "create":
        store.fs.makedirs(store.fs._parent(store.path), exist_ok=True)
    store.fs.pipe_file(store.path, json.dumps({**record, "since": time.time()}).encode(), mode=mode)


def _read(path: Path) -> dict[str, Any]:
    """A claim's content, {} if it is damaged; FileNotFoundError if it was released meanwhile."""
    with open_file(path) as file:
        return read_holder(file.read(MOST_CLAIM_BYTES))
