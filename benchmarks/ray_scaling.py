"""Tokens per second of stage one on Ray with 1, 2 and 4 workers, beside one engine without Ray, and the driver's cost.

    python -m benchmarks.ray_scaling

The embedded teacher on the embedded text, a thread each, Ray started on this machine. More workers than cores say
nothing of speed: they show that the driver copes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.measured import Row, device_name, table, write_results

WORKERS = (0, 1, 2, 4)
"""0: without Ray."""


def measure(workers: int, config: Any) -> Row:
    """One dump into a new cache.

    Returns:
        Rates count from when the first engine is ready to the last commit.
    """
    from pipeline.cache import Cache
    from teacher_dump.dump import for_devices, run_with
    from teacher_dump.progress import DumpProgress
    from teacher_dump.ray_cluster import EngineRoom, connected
    from teacher_dump.ray_workers import RayWorkers
    from teacher_dump.shard_loop import take_shards

    seen: dict[str, float] = {}

    def timed(progress: DumpProgress, run: Any) -> list[str]:
        begun = time.process_time()
        lost: list[str] = run() or []
        seen["seconds"] = time.monotonic() - progress.started
        seen["cpu"] = time.process_time() - begun
        return lost

    with tempfile.TemporaryDirectory(prefix="ray-scaling-") as folder:
        config = replace(config, cache=Path(folder) / "cache")
        if not workers:
            run_with(config, lambda work, units, bar: timed(bar, lambda: take_shards(work, units, bar)))
        else:
            with connected("local", print) as ray:
                room = EngineRoom(ray, workers, 1)
                config = for_devices(config, room.on_gpu)
                run_with(config, lambda *of: timed(of[2], RayWorkers(of[0], of[1], room, of[2]).run))
        tokens = int(Cache(config.cache).shards("train").tokens.sum())
    row: Row = {
        "workers": workers or "1, without Ray",
        "shards": config.shards,
        "tokens": tokens,
        "seconds": seen["seconds"],
        "tokens_per_s": tokens / seen["seconds"],
    }
    if workers:
        row["driver_cpu_ms_per_shard"] = 1000 * seen["cpu"] / config.shards
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=2048, help="of a shard")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the embedded teacher and text")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    from teacher_dump.corpus import CorpusConfig
    from teacher_dump.settings import DumpConfig

    config = DumpConfig(
        corpus=CorpusConfig("embedded:enwik8"),
        cache=Path(),
        shards=options.shards,
        heldout_shards=0,
        tokens_per_shard=options.tokens,
        length=256,
        block=32,
        data=options.data.absolute(),
    )
    rows: list[Row] = []
    for workers in WORKERS:
        rows.append(measure(workers, config))
        print(table(rows, ["workers", "shards", "tokens", "seconds", "tokens_per_s", "driver_cpu_ms_per_shard"]))
    print(write_results("ray_scaling", rows, device=device_name(), load=os.getloadavg()[0]))


if __name__ == "__main__":
    main()
