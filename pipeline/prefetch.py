"""Run an iterator in a thread, a bounded number of items ahead of its consumer."""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from pipeline.stop_signals import LOOK_SECONDS, raise_if_stopped

Item = TypeVar("Item")

EXIT_SECONDS = 10.0
"""So long a program that ends waits for the item that a thread is at."""
_stops: weakref.WeakKeyDictionary[threading.Thread, threading.Event] = weakref.WeakKeyDictionary()
"""Of the threads that run, what stops each."""


@atexit.register
def _stop_all() -> None:
    """Python tears a daemon thread out of what it is at; where that is C++ code (torch), the process is aborted."""
    running = [(thread, stop) for thread, stop in _stops.items() if thread.is_alive()]
    for _, stop in running:
        stop.set()
    for thread, _ in running:
        thread.join(EXIT_SECONDS)


class Ahead(Iterator[Item]):
    """An iterator that a thread runs `depth` items ahead; made by `ahead`."""

    def __init__(self, make: Callable[[], Iterable[Item]], depth: int) -> None:
        self._items: queue.Queue[tuple[str, object]] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        # Not a bound method: the thread must not keep the iterator alive that nobody reads any more. It looks whether
        # there is one, since a Ctrl-C in a `__del__` would be lost.
        arguments = (make, self._items, self._stop, weakref.ref(self))
        self._thread = threading.Thread(target=_fill, args=arguments, name="prefetch", daemon=True)
        _stops[self._thread] = self._stop
        self._thread.start()

    def __next__(self) -> Item:
        if self._stop.is_set():
            raise StopIteration
        kind, value = self._next()
        if kind == "item":
            return value  # type: ignore[return-value]
        self._stop.set()
        if kind == "error":
            assert isinstance(value, BaseException)
            raise value
        raise StopIteration

    def _next(self) -> tuple[str, object]:
        while True:
            try:
                return self._items.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                raise_if_stopped()

    def close(self) -> None:
        """Stop the thread; there are no more items."""
        self._stop.set()
        self._thread.join()


def ahead(make: Callable[[], Iterable[Item]], depth: int = 64) -> Ahead[Item]:
    """Run an iterator in a thread, from now on, at most `depth` items ahead, so that the consumer does not wait for it.

    An exception in the thread is raised by `next`; dropping or closing the iterator stops the thread.
    """
    return Ahead(make, depth)


def _fill(
    make: Callable[[], Iterable[Item]],
    items: queue.Queue[tuple[str, object]],
    stop: threading.Event,
    reader: weakref.ref[Ahead[Item]],
) -> None:
    def put(kind: str, value: object) -> bool:
        while not stop.is_set() and reader() is not None:
            try:
                items.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    try:
        for item in make():
            if not put("item", item):
                return
        put("end", None)
    except BaseException as error:
        put("error", error)
