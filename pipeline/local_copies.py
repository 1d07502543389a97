"""Parts of remote files kept on a local disk, up to a size: what was used longest ago goes first.

A part is named after the content it belongs to (a shard's sha256 and a range of its bytes), so that it can never be
stale. Several processes may share a folder. A copy is only a copy: whoever reads it checks digests and page checksums
as it would the original's, and calls `forget` when they do not match.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import UserError

LOW_WATER = 0.9
"""Share of the limit that is left when parts were removed."""


def default_folder() -> Path:
    """`$DISTIL_XLSTM_CACHE`, or `distil-xlstm` in the user's cache folder."""
    own = os.environ.get("DISTIL_XLSTM_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(own).expanduser() if own else Path(base).expanduser() / "distil-xlstm"


class LocalCopies:
    """Bytes by name, on a disk.

    Args:
        folder: made if it is not there.
        limit_bytes: of all parts together; one part may exceed it alone and is then not kept.

    Raises:
        UserError: the folder cannot be made.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit = Path(folder), limit_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"local copies in {folder}: {error.strerror}: name another folder") from None
        self._lock = threading.Lock()
        self._fetching: dict[str, threading.Lock] = {}
        self._held = sum(size for _, size, _ in self._parts())

    def get(self, name: str, fetch: Callable[[], bytes]) -> bytes:
        """A part: from the disk, else fetched and kept. Two threads that ask for one part fetch it once."""
        with self._lock:
            turn = self._fetching.setdefault(name, threading.Lock())
        with turn:
            data = self._read(name)
            if data is None:
                data = fetch()
                self._keep(name, data)
        with self._lock:
            self._fetching.pop(name, None)
        return data

    def forget(self, name: str) -> None:
        """Remove a part that turned out to be wrong."""
        with contextlib.suppress(OSError):
            (self.folder / name).unlink()

    def _read(self, name: str) -> bytes | None:
        path = self.folder / name
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return data

    def _keep(self, name: str, data: bytes) -> None:
        if len(data) > self.limit:
            return
        with self._lock:
            if self._held + len(data) > self.limit:
                self._make_room(len(data))
            self._held += len(data)
        temporary = self.folder / f".{name}.{secrets.token_hex(4)}.tmp"
        try:
            temporary.write_bytes(data)
            os.replace(temporary, self.folder / name)
        except OSError:  # a full disk: the part is read from afar each time
            with contextlib.suppress(OSError):
                temporary.unlink()

    def _make_room(self, wanted: int) -> None:
        parts = sorted(self._parts(), key=lambda part: part[2])
        held = sum(size for _, size, _ in parts)  # other processes add and remove, too
        goal = min(self.limit * LOW_WATER, self.limit - wanted)
        for path, size, _ in parts:
            if held <= goal:
                break
            with contextlib.suppress(OSError):
                path.unlink()
            held -= size
        self._held = held

    def _parts(self) -> list[tuple[Path, int, float]]:
        """(path, bytes, last use) of everything in the folder."""
        found = []
        for entry in os.scandir(self.folder):
            with contextlib.suppress(OSError):
                status = entry.stat()
                found.append((Path(entry.path), status.st_size, status.st_mtime))
        return found
