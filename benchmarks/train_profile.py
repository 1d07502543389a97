"""What a GPU does during a few training steps: kernels by time, and when it waits for the host or for other ranks."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.meters import seconds_of, wait

ROWS, GAPS = 40, 10


class StepProfile:
    """A profile of a few steps; on a GPU with its gaps."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._on_gpu = device.type == "cuda"
        self._profiler = profile(activities=[ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self._on_gpu else []))

    def start(self) -> None:
        wait(self.device)
        self._profiler.start()

    def table(self, steps: int) -> str:
        """Stop; the kernels (on a CPU: operators) by the time they took themselves over `steps` steps."""
        wait(self.device)
        self._profiler.stop()
        order = "self_cuda_time_total" if self._on_gpu else "self_cpu_time_total"
        table: str = self._profiler.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=80)
        return f"{table}\n{self._gaps(steps)}" if self._on_gpu else table

    def _gaps(self, steps: int) -> str:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profiler.export_chrome_trace(str(path))
            events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        work = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
        return gaps(work, steps)


def gaps(work: list[dict[str, Any]], steps: int) -> str:
    """How long nothing ran, and how long nothing but what waits for other ranks.

    Args:
        work: a GPU's kernels and copies as a Chrome trace has them: `name`, `ts` and `dur` in microseconds.
        steps: steps they belong to.
    """
    own = sorted((e for e in work if "nccl" not in e["name"].lower()), key=lambda e: float(e["ts"]))
    collective = [e for e in work if "nccl" in e["name"].lower() and e["ts"] > own[0]["ts"]]  # none before the steps
    idle, until, found = 0.0, own[0]["ts"], list[tuple[float, float, str]]()
    for event in own:
        if event["ts"] > until:
            idle += event["ts"] - until
            found.append((event["ts"] - until, until - own[0]["ts"], event["name"]))
        until = max(until, event["ts"] + event["dur"])
    whole = until - own[0]["ts"]
    waits, together = idle / steps / 1e3, sum(e["dur"] for e in collective) / steps / 1e3
    lines = [
        f"{steps} steps of {whole / steps / 1e3:.1f} ms: in each {waits:.1f} ms without work of this rank's own, and "
        f"{together:.1f} ms of collectives ({len(collective)} in all)"
    ]
    for length, at, name in sorted(found, reverse=True)[:GAPS]:
        lines.append(f"  {length / 1e3:7.2f} ms at {at / 1e3:8.1f} ms, before {name[:90]}")
    for event in sorted(collective, key=lambda e: -float(e["dur"]))[:GAPS]:
        at = (event["ts"] - own[0]["ts"]) / 1e3
        lines.append(f"  {event['dur'] / 1e3:7.2f} ms at {at:8.1f} ms, {event['name'][:90]}")
    return "\n".join(lines)


def profile_table(step: Callable[[], object], device: torch.device, warmup: int, steps: int = 3) -> str:
    """The profile of a few calls after `warmup` others."""
    seconds_of(step, 1, device, warmup)
    found = StepProfile(device)
    found.start()
    seconds = seconds_of(step, steps, device)
    return f"{steps} steps, {seconds / steps * 1e3:.1f} ms each under the profiler\n{found.table(steps)}"
