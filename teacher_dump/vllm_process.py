"""What a process needs before vLLM is imported into it: environment, quiet start, memory that stays."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
import tempfile
import warnings
from typing import Any


def prepare_process(quiet: bool) -> None:
    """Set what vLLM reads from the environment at import; what the user has set stays, except where we depend on it."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # a failure in the engine is our own exception
    # T tokens fill the model's positions; the token sampled after them is never read.
    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    # Tensor parallelism: this process has counted its GPUs, after which a fork of it can use none.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if "OMP_NUM_THREADS" not in os.environ:  # vLLM's CPU worker computes on one thread without it
        os.environ["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))
    if quiet:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])


def keep_freed_pages() -> None:
    """Let glibc keep what was freed for the next allocation of its size; without glibc nothing happens.

    Activations of some megabytes come and go with every layer, and the kernel would clear fresh pages for each.
    """
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of <malloc.h>
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 32 << 20)
        libc.mallopt(trim_threshold, 1 << 30)


def sockets_of(engine: Any) -> list[Any]:
    """The open sockets of the queues between an engine and its worker processes; none without worker processes.

    vLLM leaves them to the garbage collector, and until 0.32 that may wait for ever for a worker that has ended.
    """
    executor = getattr(engine, "model_executor", None)
    queues = [getattr(executor, "rpc_broadcast_mq", None), *(getattr(executor, "response_mqs", None) or ())]
    for worker in getattr(executor, "workers", None) or ():
        queues += [
            getattr(worker, "worker_response_mq", None),
            *(getattr(worker, "peer_worker_response_mqs", None) or ()),
        ]
    if not any(queues):
        return []
    import zmq

    holders = [holder for queue in queues if queue for holder in (queue, getattr(queue, "_spin_condition", None))]
    found = [value for holder in holders if holder for value in vars(holder).values() if isinstance(value, zmq.Socket)]
    return list(dict.fromkeys(found))


def shut_down(engine: Any, sockets: list[Any]) -> None:
    """End an engine, its worker processes, and what it would leave open.

    Args:
        sockets: its `sockets_of`, taken when it started: an executor that has lost a worker forgets its queues.
    """
    try:
        engine.engine_core.shutdown()
    finally:
        for socket in sockets:
            socket.close(linger=0)


class StartLog:
    """Sends the process's output to a file while entered, from C++ too; `tail` tells what was written.

    Workers started meanwhile keep writing there.
    """

    def __init__(self, quiet: bool) -> None:
        self._file = tempfile.TemporaryFile() if quiet else None  # noqa: SIM115 - lives as long as the engine
        self._kept: list[int] = []
        self._warnings: Any = None

    def __enter__(self) -> StartLog:
        if self._file is not None:
            _flush()
            self._kept = [os.dup(1), os.dup(2)]
            os.dup2(self._file.fileno(), 1)
            os.dup2(self._file.fileno(), 2)
            self._warnings = warnings.catch_warnings()
            self._warnings.__enter__()
            warnings.simplefilter("ignore")
        return self

    def __exit__(self, *_: object) -> None:
        if self._kept:
            _flush()
            for descriptor, kept in zip((1, 2), self._kept, strict=True):
                os.dup2(kept, descriptor)
                os.close(kept)
            self._kept = []
            self._warnings.__exit__(None, None, None)

    def tail(self, lines: int = 20) -> str:
        """The last lines written, "" if there were none."""
        if self._file is None:
            return ""
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(max(0, size - 16384))
        return "\n".join(self._file.read().decode(errors="replace").splitlines()[-lines:])


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
