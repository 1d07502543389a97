"""From captured rows to committed shards, off the engine's thread: a thread a shard, at most three at once.

The engine's thread opens a shard, puts its rows and finishes it. The shard's own thread makes row groups, encodes,
reads back, hashes, syncs, commits and gives the claim up, while the next shard is captured. Rows that wait are bounded:
`put` blocks until a row group is encoded. Arrow, zstd, sha256 and NumPy's loops all run without Python's lock.

Rows are read until their row group is encoded: whoever captures them must not use their memory again before that.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType

from pipeline.claim_file import Claim
from pipeline.shard import ShardRecord
from pipeline.stop_signals import LOOK_SECONDS, raise_if_stopped
from teacher_dump.rows import CapturedRow

SHARDS_AT_ONCE = 3
"""The shard that is captured, the one before it, and the one after it, whose text is being read."""


class ShardAborted(Exception):
    """Ends the thread of a shard that shall not be committed."""


class ShardWriter:
    """One shard on its way to the disk; made by `ShardWriters.open`."""

    def __init__(self, writers: ShardWriters, claim: Claim, write: Callable[[ShardWriter], ShardRecord]) -> None:
        self._writers, self._claim, self._write = writers, claim, write
        self._changed = writers.changed
        self._waiting: deque[CapturedRow] = deque()
        self._finished = False
        self.thread = threading.Thread(target=self._run, name=f"write-{claim.path.stem}", daemon=True)

    def put(self, row: CapturedRow) -> None:
        """Hand a row over, in order; waits while too many rows are not encoded yet.

        Raises:
            BaseException: what ended any of the writers.
        """
        with self._changed:
            self._writers.wait_until(lambda: self._writers.held < self._writers.limit)
            self._writers.held += 1
            self._waiting.append(row)
            self._changed.notify_all()

    def finish(self) -> None:
        """There are no more rows: the shard is committed in its thread."""
        with self._changed:
            self._finished = True
            self._changed.notify_all()

    def rows(self) -> Iterator[CapturedRow]:
        """The rows as they come, for the shard's thread.

        Raises:
            ShardAborted: the shard must not be committed.
        """
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._finished or self._writers.aborted)
                if self._writers.aborted:
                    raise ShardAborted
                if not self._waiting:
                    return
                row = self._waiting.popleft()
            yield row

    def encoded(self, rows: int) -> None:
        """That many rows are in the file and no longer needed."""
        with self._changed:
            self._writers.held -= rows
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            self._writers.committed(self._write(self))
        except ShardAborted:
            pass
        except BaseException as error:
            self._writers.fail(error)
        finally:
            self._claim.release()
            self._writers.leave(self)


class ShardWriters:
    """The shards of one process that are being written. Leaving the context waits for them, or aborts them on an error.

    Args:
        limit: rows that may wait or be encoded at a time, of all shards together; at least those of a row group.
        committed: called in a shard's thread once it is committed and before its claim is released.

    Attributes:
        held: rows that were put and are not encoded yet.
    """

    def __init__(self, limit: int, committed: Callable[[ShardRecord], None]) -> None:
        self.limit, self.committed = limit, committed
        self.changed = threading.Condition()
        self.held = 0
        self.aborted = False
        self._active: list[ShardWriter] = []
        self._error: BaseException | None = None

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Wait with the lock held; raise what ended a writer meanwhile or before, or KeyboardInterrupt on a stop."""
        while self._error is None and not ready():
            self.changed.wait(LOOK_SECONDS)
            raise_if_stopped()
        if self._error is not None:
            raise self._error

    def wait_for_place(self) -> None:
        """Until a further shard may be opened.

        Raises:
            BaseException: what ended any of the writers; so do `open` and `wait`.
        """
        with self.changed:
            self.wait_until(lambda: len(self._active) < SHARDS_AT_ONCE)

    def open(self, claim: Claim, write: Callable[[ShardWriter], ShardRecord]) -> ShardWriter:
        """Start the thread of a shard.

        Args:
            claim: released by the thread when the shard is committed or given up.
            write: reads `rows()`, tells `encoded`, returns the committed shard's record; runs in the thread.
        """
        with self.changed:
            self.wait_until(lambda: len(self._active) < SHARDS_AT_ONCE)
            writer = ShardWriter(self, claim, write)
            writer.thread.start()
            self._active.append(writer)
        return writer

    def wait(self) -> None:
        """Until everything finished is committed."""
        with self.changed:
            self.wait_until(lambda: not self._active)

    def abort(self) -> None:
        """Give up every shard whose rows are not all encoded; returns when the threads have ended.

        A shard past its last row group is only read back and renamed: it is committed.
        """
        with self.changed:
            self.aborted = True
            self.changed.notify_all()
            active = list(self._active)
        for writer in active:
            writer.thread.join()

    def fail(self, error: BaseException) -> None:
        with self.changed:
            self._error = self._error or error
            self.changed.notify_all()

    def leave(self, writer: ShardWriter) -> None:
        with self.changed:
            self._active.remove(writer)
            self.changed.notify_all()

    def __enter__(self) -> ShardWriters:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self.abort()
