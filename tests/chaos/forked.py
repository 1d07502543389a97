"""Trials in a child process, so that one that kills its process is counted and not the end of the experiment."""

from __future__ import annotations

import os
import pickle
import signal
import struct
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
CRASH = "the process died"
LIMIT_SECONDS = 60


def in_children(trials: list[T], do: Callable[[T], Any], each: int = 500) -> Iterator[tuple[T, Any]]:
    """Each trial with what `do` returned for it, or `CRASH` where the child died or hung; a new child every `each`."""
    at = 0
    while at < len(trials):
        batch = trials[at : at + each]
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            status = 1
            try:
                for trial in batch:
                    signal.alarm(LIMIT_SECONDS)
                    answer = pickle.dumps(do(trial))
                    os.write(writer, struct.pack("<I", len(answer)) + answer)
                status = 0
            finally:
                os._exit(status)
        os.close(writer)
        with os.fdopen(reader, "rb") as answers:
            done = 0
            while len(size := answers.read(4)) == 4:
                answer = pickle.loads(answers.read(struct.unpack("<I", size)[0]))
                yield batch[done], answer
                done += 1
        os.waitpid(child, 0)
        if done < len(batch):
            yield batch[done], CRASH
            done += 1
        at += done
