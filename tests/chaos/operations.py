"""Every file operation of a dump on its cache, by name, with a hook before, amid and after each; for child processes.

Operations are wrapped where Python calls them, so that the code under trial stays as users run it. Arrow writes from
C++ when given a path: it is given a Python file at that path instead, and writes the same bytes. An audit hook counts
what Python opens, renames, links and removes, so that nothing escapes unseen.
"""

from __future__ import annotations

import builtins
import io
import os
import re
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet

from pipeline import claim_file, commit, shard

PHASES = ("before", "amid", "after")
WRITER_ID = re.compile(r"\.[^.]+-\d+-[0-9a-f]+\.tmp$")


@dataclass(frozen=True, order=True)
class Operation:
    """One operation, the same in every run of the same dump: a file is written by one thread, in one order.

    Attributes:
        file: final name of the file concerned, relative to the cache: a temporary's is that of what it becomes.
        step: create, write, read back, hash, fsync, rename, link, unlink, refresh, mkdir, read, open folder,
            fsync folder (of a file: the sync after its rename).
        count: how many times the step was done with this file before.
    """

    file: str
    step: str
    count: int

    @property
    def kind(self) -> str:
        """What sort of file it is."""
        for pattern, kind in KINDS:
            if re.match(pattern, self.file):
                return kind
        return "folder"


KINDS = (
    (r"claims/.", "claim"),
    (r"teacher/.", "teacher file"),
    (r"manifest\.json", "manifest"),
    (r"plan\.json", "plan"),
    (r"(shard|heldout)-\d+\.parquet", "shard"),
    (r"(shard|heldout)-\d+\.json", "shard's JSON"),
)

Hook = Callable[[Operation, str], Callable[[], None] | None]
"""Asked at each phase of each operation; what it returns is called there: to kill, to raise, to wait."""


class Watch:
    """Wraps the operations of this process on `cache` for good and asks `hook` at each.

    Amid a write is after its first half: what `hook` returns there must not come back.

    Args:
        cache: the folder, which need not exist yet.
        hook: see `Hook`.
        log: file that takes a line for each write, sync, rename and link, for `lose_power`.

    Attributes:
        seen: operations in the order they came.
        escaped: what the audit hook saw and no wrapper did.
        change: what of a write's bytes reaches the disk.
    """

    def __init__(self, cache: Path, hook: Hook, log: Path | None = None) -> None:
        self.root = os.path.realpath(cache)
        self.hook = hook
        self.seen: list[Operation] = []
        self.escaped: list[str] = []
        self.change: Callable[[Operation, bytes], bytes] = lambda operation, data: data
        self._counts: Counter[tuple[str, str]] = Counter()
        self._inside = threading.local()
        self._lock = threading.Lock()
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) if log else None
        self._wrap()

    # names

    def relative(self, path: Any) -> str | None:
        """The final name, relative to the cache; None outside of it."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        full = os.path.abspath(os.fspath(path))
        if isinstance(full, bytes) or not (full == self.root or full.startswith(self.root + os.sep)):
            return None
        name = os.path.relpath(full, self.root)
        folder, base = os.path.split(name)
        if base.endswith(".tmp"):
            base = WRITER_ID.sub("", base).lstrip(".")
            base += ".json" if folder == "claims" and not base.endswith(".json") else ""
        return os.path.join(folder, base)

    # hooks

    def around(self, path: Any, step: str, act: Callable[[], Any], amid: Callable[[], Any] | None = None) -> Any:
        """Do `act`, or half of it (`amid`) where the hook ends it there."""
        name = self.relative(path)
        if name is None or getattr(self._inside, "on", False):
            return act()
        with self._lock:
            operation = Operation(name, step, self._counts[name, step])
            self._counts[name, step] += 1
            self.seen.append(operation)
        self._inside.on, self._inside.operation = True, operation
        try:
            self._ask(operation, "before")
            if amid is not None and (end := self.hook(operation, "amid")) is not None:
                amid()
                end()
            try:
                return act()
            finally:  # what failed, such as removing what is not there, was an operation too
                self._ask(operation, "after")
        finally:
            self._inside.on = False

    def _ask(self, operation: Operation, phase: str) -> None:
        action = self.hook(operation, phase)
        if action is not None:
            action()

    def changed(self, data: bytes) -> bytes:
        return self.change(self._inside.operation, data)

    def note(self, *words: object) -> None:
        """A line of the log that outlives the process."""
        if self._log is not None:
            os.write(self._log, (" ".join(map(str, words)) + "\n").encode())

    # wrappers

    def _wrap(self) -> None:
        real_open = io.open

        def watched_open(file: Any, mode: str = "r", *arguments: Any, **more: Any) -> Any:
            if isinstance(file, int) or self.relative(file) is None or getattr(self._inside, "on", False):
                return real_open(file, mode, *arguments, **more)
            writes = bool(set(mode) & set("wax+"))
            opened = self.around(
                file, "create" if writes else "read", lambda: real_open(file, mode, *arguments, **more)
            )
            return WatchedFile(opened, file, self) if writes else opened

        builtins.open = io.open = watched_open  # type: ignore[assignment]
        for name, step in (
            ("replace", "rename"),
            ("rename", "rename"),
            ("link", "link"),
            ("unlink", "unlink"),
            ("remove", "unlink"),
            ("mkdir", "mkdir"),
            ("utime", "refresh"),
        ):
            self._wrap_call(name, step)
        real_fsync, real_os_open = os.fsync, os.open

        def fsync(handle: int) -> None:
            place = f"/proc/self/fd/{handle}"
            folder = os.path.isdir(place)

            def act() -> None:
                real_fsync(handle)
                self.note("fsync", os.fstat(handle).st_ino, os.readlink(place))

            name = getattr(self._inside, "published", None) if folder else None
            self.around(name or os.readlink(place), "fsync folder" if folder else "fsync", act)

        def os_open(path: Any, *arguments: Any, **more: Any) -> int:
            if not os.path.isdir(path):
                return real_os_open(path, *arguments, **more)
            name = getattr(self._inside, "published", None)
            return int(self.around(name or path, "open folder", lambda: real_os_open(path, *arguments, **more)))

        os.fsync, os.open = fsync, os_open  # type: ignore[assignment]
        self._wrap_libraries(real_open)
        sys.addaudithook(self._audit)

    def _wrap_call(self, name: str, step: str) -> None:
        real = getattr(os, name)

        def call(path: Any, *arguments: Any, **more: Any) -> Any:
            def act() -> Any:
                inode = os.stat(path).st_ino if self._log is not None and step in ("rename", "link") else 0
                done = real(path, *arguments, **more)
                if inode:
                    self.note(step, inode, path, arguments[0])
                if step in ("rename", "link"):
                    self._inside.published = arguments[0]
                return done

            return self.around(path, step, act)

        setattr(os, name, call)

    def _wrap_libraries(self, real_open: Any) -> None:
        class WatchedParquet(pyarrow.parquet.ParquetWriter):
            """Writes through a Python file, so that each of its writes is an operation."""

            def __init__(self, where: Any, *arguments: Any, **more: Any) -> None:
                named = isinstance(where, str | Path)
                self.watched = open(where, "wb") if named else None  # noqa: SIM115 - closed by `close`
                super().__init__(self.watched if named else where, *arguments, **more)

            def close(self) -> None:
                try:
                    super().close()
                finally:
                    if self.watched is not None:
                        self.watched.close()

        pyarrow.parquet.ParquetWriter = pyarrow.parquet.core.ParquetWriter = WatchedParquet

        shutil._USE_CP_SENDFILE = False  # type: ignore[attr-defined] - copies go through `write`
        real_read_back, real_hash = shard.read_back, commit.file_sha256

        def read_back(path: Path, *arguments: Any) -> Any:
            return self.around(path, "read back", lambda: real_read_back(path, *arguments))

        def file_sha256(path: Path, *arguments: Any, **more: Any) -> Any:
            return self.around(path, "hash", lambda: real_hash(path, *arguments, **more))

        shard.read_back = read_back
        for module in (commit, shard):
            module.file_sha256 = file_sha256  # type: ignore[attr-defined]

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.utime"):
            return
        path = arguments[0]
        if isinstance(path, int) or path is None or getattr(self._inside, "on", False):
            return
        name = self.relative(path)
        if name is None or event == "open" and os.path.isdir(path):
            return
        self.escaped.append(f"{event} {name}")


class WatchedFile:
    """A file open for writing whose writes are operations; unbuffered, so that half a write is half on the disk."""

    def __init__(self, file: Any, path: Any, watch: Watch) -> None:
        self._file, self._path, self._watch = file, path, watch

    def write(self, data: Any) -> int:
        def put(part: bytes) -> int:
            self._file.write(self._watch.changed(part))
            self._file.flush()
            self._watch.note("write", os.fstat(self._file.fileno()).st_ino)
            return len(part)

        whole = bytes(memoryview(data))
        return int(self._watch.around(self._path, "write", lambda: put(whole), lambda: put(whole[: len(whole) // 2])))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> WatchedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def refresh_often() -> None:
    """Claims refresh themselves every few milliseconds, so that a short dump has refreshes too."""
    claim_file.REFRESH_SECONDS = 0.005
