"""Signals that stop a dump: SIGTERM does what Ctrl-C does, and neither comes where it would break something off.

Python raises KeyboardInterrupt between any two instructions of the main thread: while a lock is taken, a thread is
started, a file is about to be closed. A dump therefore puts stops off (`stops_wait`) and looks for them where it waits
anyway (`raise_if_stopped`); only what may take minutes, such as the start of an engine, lets them come as Python does
(`stops_come`). A second Ctrl-C comes at once.

What is being imported when the signal comes may catch the exception: a worker raises it again and again, a dump in its
own process looks once its engine has started.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

AGAIN_SECONDS = 6
LOOK_SECONDS = 0.1
"""How often whoever waits while stops are put off should look for them."""
SAID = b"\nstopping: the step at hand ends first; Ctrl-C again stops at once\n"
"""To a terminal, on the first Ctrl-C that waits."""
_came = False


def interrupt_on_sigterm(repeat: bool = False) -> None:
    """Raise KeyboardInterrupt in the main thread on SIGTERM, and remember that it came, as for Ctrl-C.

    Args:
        repeat: again every `AGAIN_SECONDS`, until `no_more`.
    """
    signal.signal(signal.SIGTERM, _stop_again if repeat else _stop)
    if repeat:
        signal.signal(signal.SIGALRM, _stop_again)
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(*_: Any) -> None:
    global _came
    _came = True
    raise KeyboardInterrupt


def _stop(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _interrupt()


def _stop_again(*_: Any) -> None:
    signal.alarm(AGAIN_SECONDS)
    _stop()


def no_more() -> None:
    """The interrupt has arrived: do not repeat it."""
    signal.alarm(0)


class _PutOff:
    """The main thread's stops that wait: who handled them before, and the first that came."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._came: int | None = None
        self._interrupted = False

    def hold(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            handler = signal.getsignal(number)
            ours = handler == _stop_again  # an alarm may be somebody else's
            if ours if number == signal.SIGALRM else callable(handler) or handler == signal.SIG_DFL:
                self._before[number] = handler
                signal.signal(number, self._note)

    def release(self) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._note:  # else what came has set another
                signal.signal(number, handler)

    def take_effect(self) -> None:
        """Do now what the stop that came would have done then."""
        number, self._came = self._came, None
        if number is None:
            return
        handler = self._before[number]
        if callable(handler):
            handler(number, None)
        else:
            signal.signal(number, handler)
            signal.raise_signal(number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = number == signal.SIGINT and self._interrupted
        self._interrupted |= number == signal.SIGINT
        self._came = self._came or number
        if again:
            self.take_effect()
        elif number == signal.SIGINT and os.isatty(2):
            os.write(2, SAID)  # print may be what was interrupted


_put_off: _PutOff | None = None


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def stops_wait() -> Iterator[None]:
    """Put off Ctrl-C and SIGTERM that come inside to the next `raise_if_stopped`, at the latest to the end.

    Within another `stops_wait` the end is the outer one's. In a thread that is not the main one, where no signal is
    raised, nothing is changed.
    """
    global _put_off
    if not _in_main_thread() or _put_off is not None:
        yield
        return
    put_off = _put_off = _PutOff()
    try:
        put_off.hold()
        yield
    finally:
        _put_off = None
        put_off.release()
    put_off.take_effect()


@contextlib.contextmanager
def stops_come() -> Iterator[None]:
    """Let stops come as they come, within `stops_wait`; those that came before come first."""
    global _put_off
    if not _in_main_thread() or _put_off is None:
        yield
        return
    put_off = _put_off
    try:
        put_off.release()
        _put_off = None
        put_off.take_effect()
        yield
    finally:
        _put_off = put_off
        put_off.hold()


def raise_if_stopped() -> None:
    """Raise KeyboardInterrupt if a stop waits, or if one came at any time before (see `interrupt_on_sigterm`)."""
    if _put_off is not None and _in_main_thread():
        _put_off.take_effect()
    if _came:
        raise KeyboardInterrupt


@contextlib.contextmanager
def errors_of_stops() -> Iterator[None]:
    """An error inside that comes with a stop is the stop.

    C code that calls Python may make another exception of KeyboardInterrupt, and Ctrl-C reaches the teacher's ranks
    too, without whom a step fails.
    """
    try:
        yield
    except Exception:
        raise_if_stopped()
        raise
