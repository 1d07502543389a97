"""SIGTERM does what Ctrl-C does: a scheduler wants the machine back, or a driver ends its workers.

What is being imported when the signal comes may catch the exception: a worker raises it again and again, a dump in its
own process looks once its engine has started.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

AGAIN_SECONDS = 6
_came = False


def interrupt_on_sigterm(repeat: bool = False) -> None:
    """Raise KeyboardInterrupt in the main thread on SIGTERM.

    Args:
        repeat: again every `AGAIN_SECONDS`, until `no_more`.
    """

    def stop(*_: Any) -> None:
        global _came
        _came = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if repeat:
            signal.alarm(AGAIN_SECONDS)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    if repeat:
        signal.signal(signal.SIGALRM, stop)


def no_more() -> None:
    """The interrupt has arrived: do not repeat it."""
    signal.alarm(0)


def raise_if_stopped() -> None:
    """Raise KeyboardInterrupt if SIGTERM came at any time before."""
    if _came:
        raise KeyboardInterrupt


@contextlib.contextmanager
def stops_wait() -> Iterator[None]:
    """Ctrl-C and SIGTERM that come inside take effect at the end, so that what is done inside is done whole.

    For short pieces of work of the main thread; in another one, where no signal is raised, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, Any]] = []
    before: dict[int, Any] = {}
    try:
        for stop in (signal.SIGINT, signal.SIGTERM):
            before[stop] = signal.signal(stop, lambda *given: came.append(given))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number, frame in came[:1]:
        if callable(handler := before[number]):
            handler(number, frame)
        elif handler == signal.SIG_DFL:
            signal.raise_signal(number)
