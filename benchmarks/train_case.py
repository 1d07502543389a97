"""One measurement of `train_throughput`, in a process of its own.

    python -m benchmarks.train_case '{"case": "synthetic", "batch": 64, "length": 512}'

Legend: B rows, T tokens a row, V vocabulary, D width.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.meters import pick_device
from benchmarks.processes import given_case, report
from benchmarks.random_cache import write_random_cache
from benchmarks.train_baselines import BaselineStep
from benchmarks.train_clock import StepClock, timed_waits
from benchmarks.train_parts import step_parts
from benchmarks.train_profile import profile_table
from benchmarks.train_step import LOSS_PRESET, PRESETS, Case, OurStep, floor, measure_step
from student.data.loader import TrainLoader


def synthetic(case: Case) -> dict[str, Any]:
    device = pick_device()
    step = OurStep(case, device)
    if case.profile:
        return {"table": profile_table(step, device, case.warmup), "seconds": 1.0, "tokens": 0}
    found = measure_step(step, case, device)
    found["parts_us"] = step_parts(step, found["seconds"] / found["tokens"] * 1e6)
    return {**found, **floor(step.model, case, device)}


def baseline(case: Case) -> dict[str, Any]:
    """`online` and `package`, with fewer rows a forward pass until they fit."""
    device = pick_device()
    rows = case.micro_rows or case.batch
    while True:
        try:
            step = BaselineStep(case, device, rows)
            if case.profile:
                return {"table": profile_table(step, device, case.warmup), "seconds": 1.0, "tokens": 0}
            found = measure_step(step, case, device)
            return {**found, "micro_rows": rows, **floor(step.stack, case, device)}
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            print(f"{rows} rows do not fit", flush=True)
        step = None  # type: ignore[assignment]
        rows = -(-rows // 2)
        torch.cuda.empty_cache()


def write(case: Case) -> dict[str, Any]:
    """The cache of the same name's cases: as many tokens as they read."""
    started = time.perf_counter()
    rows = (case.warmup + case.steps) * case.batch
    tokens = write_random_cache(Path(case.cache), case.spec(), rows * case.length, pick_device())
    return {"seconds": time.perf_counter() - started, "tokens": tokens}


def shards(case: Case) -> dict[str, Any]:
    """Training as a user runs it: the command line's trainer, loader and callbacks, from committed shards."""
    from pipeline.cache import Cache

    if case.case != "shards_s3":
        return train(case, case.cache)
    from benchmarks.remote_loader import copy_to, local_server

    rows = int(Cache(case.cache).shards("train").rows.sum())
    with local_server() as url:
        copy_to(Path(case.cache), url)
        # The first epoch fills the copies on the local disk; its checkpoint, too, is before the clock starts.
        case = replace(case, warmup=rows // case.batch + case.warmup)
        return train(case, url, **{"data.local_copies": f"{case.run}/copies"})


def train(case: Case, cache: str, **more: Any) -> dict[str, Any]:
    """`python -m student` with a clock inside."""
    import student.__main__ as command

    device, config = pick_device(), case.student()
    clock = StepClock(case.warmup, case.steps, case.profile)
    options = {
        "config": PRESETS / f"{LOSS_PRESET}.yaml",
        "cache": cache,
        "run": case.run,
        "checkpoint_every": 1_000_000,
        "trainer.max_steps": case.warmup + case.steps,
        "trainer.devices": case.gpus,
        "trainer.accelerator": device.type,
        "trainer.limit_val_batches": 0,
        "model.loss.chunk_rows": case.loss().chunk_rows,
        "model.graphs": case.graphs,
        "data.batch_rows": case.batch * case.gpus,
        **{f"model.student.{name}": value for name, value in asdict(config).items() if value is not None},
        **more,
    }
    command.TRAINER_DEFAULTS = {**command.TRAINER_DEFAULTS, "callbacks": [clock]}
    with timed_waits(TrainLoader, clock.waits):
        status = command.main([f"--{name}={value}" for name, value in options.items()])
    if status or clock.seconds is None:
        raise RuntimeError(f"training ended with status {status} after {clock.step} steps")
    assert clock.model is not None
    if case.profile:
        return {"table": clock.table, "seconds": clock.seconds, "tokens": 0}
    tokens = case.steps * case.batch * case.gpus * case.length
    found = {"seconds": clock.seconds, "tokens": tokens, "loss": clock.loss, **clock.memory, "gpus": case.gpus}
    waits = {"loader_wait_us": sum(clock.waits) / tokens * 1e6, "longest_wait_s": max(clock.waits)}
    return {**found, **waits, **floor(clock.model, case, device)}


def main() -> None:
    case = Case(**given_case())
    measure = {"online": baseline, "package": baseline, "synthetic": synthetic, "write": write}.get(case.case, shards)
    found = measure(case)
    if os.environ.get("LOCAL_RANK", "0") == "0":  # the other ranks of a run started this file too
        report({**found, "tokens_per_s": found["tokens"] / found["seconds"]})


if __name__ == "__main__":
    main()
