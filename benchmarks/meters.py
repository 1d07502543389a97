"""Clock, memory and speed of the device that a benchmark runs on."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait(device: torch.device) -> None:
    """Until everything that was queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object], times: int, device: torch.device, warmup: int = 0) -> float:
    """Wall-clock time of `times` calls after `warmup` others, the device's queue empty before and after."""
    for _ in range(warmup):
        work()
    wait(device)
    started = time.perf_counter()
    for _ in range(times):
        work()
    wait(device)
    return time.perf_counter() - started


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a large product in bfloat16 (on a CPU: a small one)."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = 20 if device.type == "cuda" else 3
    return times * 2 * size**3 / seconds_of(lambda: a @ b, times, device, warmup=3)


def peak_gb(device: torch.device) -> dict[str, float]:
    """Most memory that tensors took at once, and what the allocator held; on a CPU the process's own."""
    if device.type == "cuda":
        return {
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
            "reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
        }
    import resource

    return {"peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
