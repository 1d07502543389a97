"""Parts of remote files kept on a local disk, up to a size: what was used longest ago goes first.

A part is named after the content it belongs to (a shard's sha256 and a range of its bytes), so that it can never be
stale. Several processes may share a folder and its bound: how much it holds stands in a file there, which is locked
while a part's room is taken. A copy is only a copy: whoever reads it checks digests and page checksums
as it would the original's, and calls `forget` when they do not match.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.errors import UserError

HELD = ".held"
"""File with the number of bytes that all processes' parts take, at least; counted anew when it reaches the limit."""
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
        limit_bytes: of all parts together, whichever process wrote them; a part that exceeds it alone is not kept.

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
        with contextlib.suppress(OSError), self._counter() as counter:
            _set(counter, sum(size for _, size, _ in self._parts()))

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
        temporary = self.folder / f".{name}.{secrets.token_hex(4)}.tmp"
        try:
            with self._counter() as counter:
                held = _get(counter)
                if held is None or held + len(data) > self.limit:
                    held = self._make_room(len(data))
                _set(counter, held + len(data))
                with open(temporary, "wb") as file:  # its size is counted from now on
                    file.truncate(len(data))
            with open(temporary, "r+b") as file:  # unless it was removed meanwhile: it would not be counted
                file.write(data)
            os.replace(temporary, self.folder / name)
        except OSError:  # a full disk: the part is read from afar each time
            with contextlib.suppress(OSError):
                temporary.unlink()

    @contextlib.contextmanager
    def _counter(self) -> Iterator[int]:
        """The file `HELD`, open and locked against other threads and processes."""
        with self._lock:
            counter = os.open(self.folder / HELD, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                with contextlib.suppress(OSError):  # without locks they may miscount until the limit
                    fcntl.flock(counter, fcntl.LOCK_EX)
                yield counter
            finally:
                os.close(counter)

    def _make_room(self, wanted: int) -> int:
        """Remove what was used longest ago; returns the bytes that are left."""
        parts = sorted(self._parts(), key=lambda part: part[2])
        held = sum(size for _, size, _ in parts)
        goal = min(self.limit * LOW_WATER, self.limit - wanted)
        for path, size, _ in parts:
            if held <= goal:
                break
            with contextlib.suppress(OSError):
                path.unlink()
            held -= size
        return held

    def _parts(self) -> list[tuple[Path, int, float]]:
        """(path, bytes, last use) of every part in the folder, also those being written."""
        found = []
        for entry in os.scandir(self.folder):
            if entry.name == HELD:
                continue
            with contextlib.suppress(OSError):
                status = entry.stat()
                found.append((Path(entry.path), status.st_size, status.st_mtime))
        return found


def _get(counter: int) -> int | None:
    """What the counter says, None if that is no number: someone emptied or damaged it."""
    text = os.pread(counter, 20, 0).strip()
    return int(text) if text.isdigit() else None


def _set(counter: int, held: int) -> None:
    os.pwrite(counter, f"{held:<20}".encode(), 0)
