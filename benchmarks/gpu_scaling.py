"""Stage one on one GPU and on several of the same machine: tokens per second of each, and what is lost by sharing.

    python -m benchmarks.gpu_scaling
    python -m benchmarks.gpu_scaling --gpus 1 2 4 --shape llama-3.1-8b
    python -m benchmarks.gpu_scaling --ray

A dump of text to committed shards, as a user runs it (`--gpus N`; with `--ray` each also on Ray, started here), by a
teacher of a published shape with random weights. Rates are taken between a fifth and nine tenths of the tokens: neither
the engines' start nor the end, where one has no shard left, says how they scale. `whole` counts all of it from when the
first engine is ready; `efficiency` is a GPU's rate beside that of the first row, which is without Ray.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.dump_throughput import SHAPES, random_teacher, shape_folder
from benchmarks.measured import Row, device_name, table, write_results
from benchmarks.processes import in_own_process, report
from benchmarks.throughput_case import TAUS, often_enough

FIRST, LAST = 0.2, 0.9
"""Shares of all tokens between which the rate is taken."""


@dataclass(frozen=True)
class Case:
    """One dump: `shards_each` shards for each of the GPUs."""

    gpus: int
    teacher: str
    cache: str
    text: str
    shards_each: int
    tokens_per_shard: int
    length: int
    ray: bool = False

    @property
    def shards(self) -> int:
        return self.gpus * self.shards_each


def steady_rate(events: list[tuple[float, int]]) -> float:
    """Tokens per second between the times at which `FIRST` and `LAST` of all tokens had been captured.

    Args:
        events: (seconds, tokens) of every message, in order of time.
    """
    total, sum_so_far = sum(tokens for _, tokens in events), 0
    marks: list[tuple[float, int]] = []
    for seconds, tokens in events:
        sum_so_far += tokens
        if sum_so_far >= (FIRST, LAST)[len(marks)] * total:
            marks.append((seconds, sum_so_far))
            if len(marks) == 2:
                break
    (start, before), (end, after) = marks
    return (after - before) / (end - start)


def measure(case: Case) -> dict[str, Any]:
    """One dump into a new cache."""
    from pipeline.cache import Cache
    from teacher_dump.corpus import CorpusConfig
    from teacher_dump.dump import Engines, for_devices, on_this_machine, run_with
    from teacher_dump.gpus import engine_slots
    from teacher_dump.pending import Units
    from teacher_dump.progress import DumpProgress
    from teacher_dump.ray_cluster import LOCAL, EngineRoom, connected
    from teacher_dump.ray_workers import RayWorkers
    from teacher_dump.settings import DumpConfig
    from teacher_dump.work import Work

    text = often_enough(Path(case.text), Path(f"{case.cache}-text"), case.shards, case.tokens_per_shard)
    config = DumpConfig(
        corpus=CorpusConfig(source=text), cache=Path(case.cache), teacher=case.teacher, shards=case.shards,
        heldout_shards=0, tokens_per_shard=case.tokens_per_shard, length=case.length, k=64, taus=TAUS, block=64,
        groups=6, gpus=case.gpus,
    )  # fmt: skip
    events: list[tuple[float, int]] = []
    seen: dict[str, float] = {}

    def timed(engines: Engines, work: Work, units: Units, progress: DumpProgress) -> list[str]:
        captured = progress.captured

        def noted(name: str, tokens: int) -> None:
            events.append((time.monotonic(), tokens))
            captured(name, tokens)

        progress.captured = noted  # type: ignore[method-assign]
        lost = engines(work, units, progress)
        seen["seconds"] = time.monotonic() - progress.started
        return lost

    if case.ray:  # as `run_dump` does with --ray local
        with connected(LOCAL, print) as ray:
            room = EngineRoom(ray, case.gpus, 1)
            config = for_devices(config, room.on_gpu)

            def on_ray(work: Work, units: Units, progress: DumpProgress) -> list[str]:
                return RayWorkers(work, units, room, progress).run()

            result = run_with(config, partial(timed, on_ray))
    else:
        result = run_with(config, partial(timed, partial(on_this_machine, engine_slots(case.gpus, 1))))
    if result.lost:
        raise RuntimeError("; ".join(result.lost))
    tokens = int(Cache(config.cache).shards("train").tokens.sum())
    return {"tokens": tokens, "tokens_per_s": steady_rate(events), "whole": tokens / seen["seconds"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--ray", action="store_true", help="measure each number of GPUs on Ray too")
    parser.add_argument("--shape", default="qwen2.5-1.5b", choices=SHAPES)
    parser.add_argument("--shards", type=int, default=12, help="of each GPU")
    parser.add_argument("--tokens", type=int, default=1_048_576, help="of a shard")
    parser.add_argument("--length", type=int, default=2048, help="T")
    parser.add_argument("--text", default="data/enwik8.jsonl.zst", help="corpus")
    parser.add_argument("--tokenizer", default="data/smollm2-135m", help="folder with a tokenizer")
    parser.add_argument("--scratch", help="folder on the disk that shards are written to")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds after which a dump is given up")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        teacher = shape_folder(SHAPES[options.shape], Path(scratch) / "teacher")
        random_teacher(teacher, Path(options.tokenizer))
        for gpus, ray in product(options.gpus, (False, True) if options.ray else (False,)):
            case = Case(
                gpus, str(teacher), f"{scratch}/cache-{gpus}{'-ray' * ray}", options.text, options.shards,
                options.tokens, options.length, ray,
            )  # fmt: skip
            found = in_own_process("benchmarks.gpu_scaling", asdict(case), options.timeout)
            rows.append({"shape": options.shape, "gpus": gpus, "ray": ray, **found})
            base = rows[0]["tokens_per_s"] / rows[0]["gpus"]
            rows[-1]["efficiency"] = found["tokens_per_s"] / gpus / base
            print(json.dumps(rows[-1]), flush=True)
    print(table(rows))
    print(f"written to {write_results('gpu_scaling', rows, device=device_name(), cores=os.cpu_count())}")
    return 0


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        report(measure(Case(**json.loads(sys.argv[1]))))
    else:
        sys.exit(main())
