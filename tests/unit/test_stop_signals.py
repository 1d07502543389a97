"""Signals that stop a dump."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pipeline import stop_signals
from pipeline.stop_signals import errors_of_stops, interrupt_on_sigterm, raise_if_stopped, stops_come, stops_wait
from teacher_dump import teacher


@pytest.fixture(autouse=True)
def handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(stop_signals, "_came", False)
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_comes_where_it_is_looked_for(number: signal.Signals) -> None:
    interrupt_on_sigterm()
    before = {stop: signal.getsignal(stop) for stop in (signal.SIGINT, signal.SIGTERM)}
    done = []
    with pytest.raises(KeyboardInterrupt), stops_wait():
        with stops_wait():  # of something that may be called alone too
            os.kill(os.getpid(), number)
            done.append("inner")
        done.append("outer")
        raise_if_stopped()
        done.append("after")
    assert done == ["inner", "outer"]
    assert signal.getsignal(signal.SIGINT) is before[signal.SIGINT]
    assert signal.getsignal(signal.SIGTERM) in (before[signal.SIGTERM], signal.SIG_IGN)


def test_a_second_ctrl_c_comes_at_once() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), stops_wait():
        os.kill(os.getpid(), signal.SIGINT)
        done.append("first")
        os.kill(os.getpid(), signal.SIGINT)
        done.append("second")
    assert done == ["first"]


def test_a_second_sigterm_changes_nothing() -> None:
    """A scheduler and a driver may send one each."""
    interrupt_on_sigterm()
    done = []
    with pytest.raises(KeyboardInterrupt), stops_wait():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("inside")
    assert done == ["inside"]


def test_stops_come_as_they_come_in_between() -> None:
    """And what is cleaned up after them is not disturbed by the next one."""
    done = []
    with pytest.raises(KeyboardInterrupt), stops_wait():
        try:
            with stops_come():
                os.kill(os.getpid(), signal.SIGINT)
                done.append("not stopped")
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            done.append("cleaned up")
    assert done == ["cleaned up"]


def test_what_came_before_comes_first() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), stops_wait():
        os.kill(os.getpid(), signal.SIGINT)
        with stops_come():
            done.append("begun")
    assert not done


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_was_made_of_a_stop_is_a_stop(number: signal.Signals) -> None:
    """C code that calls Python may make another exception of it, or none."""
    interrupt_on_sigterm()
    with pytest.raises(KeyboardInterrupt), errors_of_stops():
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            raise ValueError("I/O operation on closed file") from None
    with pytest.raises(KeyboardInterrupt):
        raise_if_stopped()


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(ValueError, match="a cause"), errors_of_stops():
        raise ValueError("a cause")


def test_ctrl_c_after_a_sigterm_waits_and_a_second_comes_at_once() -> None:
    interrupt_on_sigterm()
    done = []
    with pytest.raises(KeyboardInterrupt), stops_wait():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            os.kill(os.getpid(), number)
            done.append(number)
    assert done == [signal.SIGTERM, signal.SIGINT]


def test_an_alarm_of_somebody_else_is_left_alone() -> None:
    rang = []
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append("inside"))
    try:
        with stops_wait():
            signal.raise_signal(signal.SIGALRM)
            assert rang == ["inside"]
    finally:
        signal.signal(signal.SIGALRM, before)


def test_ctrl_c_that_waits_says_so_on_a_terminal() -> None:
    terminal, theirs = os.openpty()
    ours = os.dup(2)
    os.dup2(theirs, 2)
    try:
        with pytest.raises(KeyboardInterrupt), stops_wait():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        os.dup2(ours, 2)
    assert b"Ctrl-C again stops at once" in os.read(terminal, 200)
    for handle in (terminal, theirs, ours):
        os.close(handle)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_while_a_tensor_is_read_comes_afterwards(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch, reading, makes a ValueError of KeyboardInterrupt."""
    save_file({"a": torch.ones(3)}, str(tmp_path / "model.safetensors"))
    done = []

    class File:
        def __init__(self, *given: Any, **more: Any) -> None:
            self.file = safe_open(*given, **more)

        def __enter__(self) -> File:
            self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.__exit__(*error)

        def keys(self) -> Any:
            return self.file.keys()

        def get_tensor(self, name: str) -> torch.Tensor:
            os.kill(os.getpid(), number)
            tensor = self.file.get_tensor(name)
            done.append("read")
            return tensor

    monkeypatch.setattr(teacher, "safe_open", File)
    interrupt_on_sigterm()
    with pytest.raises(KeyboardInterrupt):
        teacher.find_tensor([tmp_path / "model.safetensors"], ("a",), tmp_path)
    assert done == ["read"]
