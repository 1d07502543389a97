"""A remote file of which the parts that are needed come here, one request each, and may be kept on a local disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.local_copies import LocalCopies
from pipeline.store import RangedFile, again

TAIL_BYTES = 256 << 10
"""Fetched when a file is opened: its footer, in all but the longest files."""


class PartsFile(RangedFile):
    """Reads like a file; what lies outside the parts that are held is fetched read by read.

    Args:
        path: on an object store.
        size: bytes it must have.
        name: of its content, for copies: its sha256.
        copies: where parts are kept; None keeps none.

    Raises:
        EOFError: the file is shorter than it must be.
        OSError: from the store.
    """

    def __init__(self, path: Path, size: int, name: str, copies: LocalCopies | None) -> None:
        super().__init__(size)
        self.path, self.name, self.copies = path, name, copies
        self._held: dict[tuple[int, int], bytes] = {}
        self.hold(max(0, size - TAIL_BYTES), size)

    def hold(self, start: int, end: int) -> None:
        """Have the bytes [start, end) at hand."""
        if (start, end) not in self._held:
            self._held[start, end] = self._part(start, end)

    def drop(self, start: int, end: int) -> None:
        """Give up the memory of a part."""
        self._held.pop((start, end), None)

    def forget(self) -> None:
        """What is held was found damaged: hold nothing but what the store returns now."""
        parts = list(self._held)
        self._held.clear()
        for start, end in parts:
            if self.copies is not None:
                self.copies.forget(self._name(start, end))
            self.hold(start, end)

    def fetch_ahead(self, start: int, end: int) -> None:
        """Put a part on the local disk, if copies are kept."""
        if self.copies is not None:
            self._part(start, end)

    def _name(self, start: int, end: int) -> str:
        return f"{self.name}-{start}-{end}"

    def _part(self, start: int, end: int) -> bytes:
        if self.copies is None:
            return self._fetch(start, end)
        return self.copies.get(self._name(start, end), lambda: self._fetch(start, end))

    def _fetch(self, start: int, end: int) -> bytes:
        store: Any = self.path
        data: bytes = again(lambda: store.fs.cat_file(store.path, start=start, end=end), self.path)
        if len(data) != end - start:
            raise EOFError(f"{self.path} ends before byte {end}")
        return data

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = min(len(view), self.size - self._at)
        if count <= 0:
            return 0
        start, end = self._at, self._at + count
        for (first, last), data in self._held.items():
            if first <= start and end <= last:
                view[:count] = memoryview(data)[start - first : end - first]
                break
        else:
            view[:count] = self._fetch(start, end)
        self._at = end
        return count
