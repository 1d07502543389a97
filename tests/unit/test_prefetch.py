"""An iterator that a thread runs ahead: order, bound, failures, and its end."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from helpers_dump import REPOSITORY, environment

from pipeline.prefetch import ahead


def test_prefetch_keeps_order_and_bound() -> None:
    made: list[int] = []

    def make() -> Iterator[int]:
        for n in range(50):
            made.append(n)
            yield n

    items = ahead(make, depth=3)
    assert next(items) == 0
    threads = [t for t in threading.enumerate() if t.name == "prefetch"]
    assert len(threads) == 1
    for _ in range(100):
        threads[0].join(0.005)
    assert len(made) <= 1 + 3 + 1
    assert list(items) == list(range(1, 50))
    threads[0].join(10)
    assert not threads[0].is_alive()


def test_leaving_the_prefetch_early_stops_its_thread() -> None:
    def endless() -> Iterator[int]:
        n = 0
        while True:
            yield n
            n += 1

    items = ahead(endless, depth=2)
    assert [next(items), next(items)] == [0, 1]
    items.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]


def test_failure_in_the_prefetch_comes_after_what_was_made() -> None:
    def fails() -> Iterator[int]:
        yield 1
        raise ZeroDivisionError("in the thread")

    items = ahead(fails)
    assert next(items) == 1
    with pytest.raises(ZeroDivisionError, match="in the thread"):
        next(items)


def test_a_program_that_ends_is_not_aborted_by_threads_in_torch() -> None:
    """Python would tear them out of C++ code, which ends the process with a signal."""
    program = """
import itertools, torch
from pipeline.prefetch import ahead

def work():
    for _ in itertools.count():
        yield torch.ones(300, 300).exp().sum(0)

torch.set_num_threads(1)
kept = [ahead(work, 10**9) for _ in range(4)]
for each in kept:
    next(each)
"""
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=environment(),
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (done.returncode, done.stderr) == (0, "")
