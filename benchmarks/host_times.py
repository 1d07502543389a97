"""Where the host's time goes in a dump: timers around the calls that it is made of, thread by thread.

The engine's thread does one thing after the other: its lines and `the rest` add up to the whole. A thread reads and
tokenises the rows of a shard beside it, at most 64 ahead, and one a shard encodes and commits: theirs are sums over
threads, in wall-clock time, which holds waiting for Python's lock and for a core.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from benchmarks.measured import table
from teacher_dump import shard_loop
from teacher_dump.engine import TeacherEngine
from teacher_dump.writer import ShardWriter, ShardWriters

ROWS, STEP, TAKE, PUT = "waiting for rows", "the engine's steps", "taking captured rows", "handing rows to writers"
PLACE, LAST, CLOSE = "waiting for a writer to end", "waiting for the last shards", "closing the engine"
ENGINE = (ROWS, STEP, TAKE, PUT, PLACE, LAST, CLOSE)
TEXT = "reading, tokenising, packing"
IDLE, COMMIT = "writers waiting for rows", "all that writers do"


class HostTimes:
    """Seconds by what they were spent on, from `begin` on."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._lock = threading.Lock()
        self._begun = time.perf_counter()

    def begin(self) -> None:
        """What came before does not count, the first part of what is under way neither."""
        with self._lock:
            self._begun = time.perf_counter()
            self.spent.clear()

    def add(self, what: str, started: float) -> None:
        with self._lock:
            now = time.perf_counter()
            self.spent[what] = self.spent.get(what, 0.0) + now - max(started, self._begun)

    def calls(self, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.add(what, started)

        return timed

    def items(self, what: str, function: Callable[..., Iterable[Any]]) -> Callable[..., Iterator[Any]]:
        """The same function, each `next` of the iterator that it returns timed."""

        def timed(*args: Any, **kwargs: Any) -> Iterator[Any]:
            advance = self.calls(what, iter(function(*args, **kwargs)).__next__)

            def advanced() -> Iterator[Any]:
                while True:
                    try:
                        item = advance()
                    except StopIteration:
                        return
                    yield item

            return advanced()

        return timed

    def table(self, seconds: float, tokens: int) -> str:
        """Seconds by thread, and their share of the whole."""
        spent = dict(self.spent)
        lines = [("engine", name, spent.get(name, 0.0)) for name in ENGINE]
        lines.append(("engine", "the rest", seconds - sum(found for _, _, found in lines)))
        waited = spent.get(IDLE, 0.0)
        lines += [("text", TEXT, spent.get(TEXT, 0.0)), ("writers", IDLE, waited)]
        lines.append(("writers", "encoding, reading back, committing", spent.get(COMMIT, 0.0) - waited))
        rows = [{"thread": who, "what": what, "seconds": s, "of the whole": s / seconds} for who, what, s in lines]
        return f"{tokens:,} tokens from text to committed shards in {seconds:.4g} s\n\n{table(rows)}\n"


@contextmanager
def host_times() -> Iterator[HostTimes]:
    """Time the dumps of this process while the `with` lasts."""
    times = HostTimes()
    with ExitStack() as patches:

        def replace(owner: Any, name: str, what: str, wrap: Callable[..., Any]) -> None:
            patches.enter_context(patch.object(owner, name, wrap(what, getattr(owner, name))))

        replace(shard_loop, "ahead", ROWS, times.items)
        replace(TeacherEngine, "_launch", STEP, times.calls)
        replace(TeacherEngine, "_drain", STEP, times.calls)
        replace(TeacherEngine, "_collect", TAKE, times.items)
        replace(TeacherEngine, "close", CLOSE, times.calls)
        replace(ShardWriter, "put", PUT, times.calls)
        replace(ShardWriters, "wait_for_place", PLACE, times.calls)
        replace(ShardWriters, "wait", LAST, times.calls)
        replace(shard_loop, "packed_rows", TEXT, times.items)
        replace(ShardWriter, "rows", IDLE, times.items)
        replace(shard_loop, "commit_shard", COMMIT, times.calls)
        yield times
