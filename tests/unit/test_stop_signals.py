"""Signals that stop a dump."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from teacher_dump.stop_signals import interrupt_on_sigterm, stops_wait


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_done_inside_is_done_whole(number: signal.Signals) -> None:
    interrupt_on_sigterm()
    before = signal.getsignal(signal.SIGINT)
    done = []
    with pytest.raises(KeyboardInterrupt):
        with stops_wait():
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            done.append("inside")
        done.append("after")
    assert done == ["inside"]
    assert signal.getsignal(signal.SIGINT) is before


def test_an_error_inside_comes_first() -> None:
    interrupt_on_sigterm()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="the cause"), stops_wait():
        os.kill(os.getpid(), signal.SIGTERM)
        raise ValueError("the cause")
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_was_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with stops_wait():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


def test_other_threads_are_left_alone() -> None:
    """Only the main thread may set handlers."""
    done = []

    def work() -> None:
        with stops_wait():
            done.append("inside")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == ["inside"]
