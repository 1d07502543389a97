"""Claims seen by one who does not want the work: who holds it, and freeing it when its holder is known to be gone."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.claim import clear_if_dead, remove_temporaries, take_away
from pipeline.claim_file import MOST_CLAIM_BYTES, holder_record
from pipeline.store import again, is_remote, open_file, remove
from pipeline.store_claim import generations, is_dead


@dataclass(frozen=True)
class Holding:
    """One writer's claim as it was found.

    Attributes:
        path: its file.
        record: what it says of its owner, {} if it is damaged.
        refreshed: when its owner last refreshed it, by the storage's clock; seconds.
    """

    path: Path
    record: dict[str, Any]
    refreshed: float

    @property
    def id(self) -> str:
        return str(self.record.get("id", ""))

    @property
    def machine(self) -> str:
        return str(self.record.get("machine", ""))


def held_by(cache: Path, name: str) -> Holding | None:
    """Who holds the work called `name`; None if nobody does."""
    if is_remote(cache):
        found = generations(cache, name)
        if not found:
            return None
        path = found[-1][1]
    else:
        path = cache / "claims" / f"{name}.json"
    try:
        with open_file(path) as file:
            text = file.read(MOST_CLAIM_BYTES).decode(errors="replace")
        refreshed = _refreshed(path)
    except FileNotFoundError:
        return None
    try:
        record = json.loads(text)
    except ValueError:
        record = {}
    return Holding(path, record if isinstance(record, dict) else {}, refreshed)


def _refreshed(path: Path) -> float:
    if is_remote(path):
        store: Any = path
        return float(again(lambda: store.fs.modified(store.path), path).timestamp())
    return path.stat().st_mtime


def free_if_dead(cache: Path, name: str) -> bool:
    """Free the work called `name` if its holder is a process of this machine that is gone, or has been silent for
    `EXPIRY_SECONDS`; True if nobody holds it now."""
    if not is_remote(cache):
        return clear_if_dead(cache / "claims" / f"{name}.json", cache)
    found = generations(cache, name)
    for _, path in found:
        if not is_dead(path):
            return False
        with contextlib.suppress(OSError):
            remove(path)
    return True


def free(cache: Path, name: str, holding: Holding) -> bool:
    """Free work whose holder the caller knows to be gone, and remove its temporaries.

    Returns:
        False if another writer holds the work by now.
    """
    if is_remote(cache):
        with contextlib.suppress(OSError):
            remove(holding.path)
        return True
    if holding.id:
        remove_temporaries(cache, name, holding.id)
    return take_away(holding.path, holding.record)


def this_machine() -> str:
    """What the claims of this machine's processes call it."""
    return str(holder_record("")["machine"])


class Silence:
    """Notices holders that have stopped refreshing their claims, by this process's clock alone.

    Args:
        seconds: for which a claim must stand unchanged.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._since: dict[Path, tuple[tuple[str, float], float]] = {}

    def lasts(self, holding: Holding) -> bool:
        """Whether the claim has looked the same for so long; asked again and again."""
        state, now = (holding.id, holding.refreshed), time.monotonic()
        before, since = self._since.get(holding.path, (None, now))
        if before != state:
            self._since[holding.path] = (state, now)
            return False
        return now - since >= self.seconds
