"""How fast stage two trains, against the ways one would train without it, in one run on one machine.

    python -m benchmarks.train_throughput
    python -m benchmarks.train_throughput --cases synthetic shards --shapes 64x512
    python -m benchmarks.train_throughput --profile

Cases: `online` (teacher in the loop, divergence over the whole vocabulary, blocks of the `xlstm` package: how the
paper's authors train), `package` (the package's blocks and a chunked loss in plain PyTorch on the same sparse
targets), `synthetic` (ours, one batch that stays on the GPU, no trainer), `shards` (ours: `python -m student` with
its trainer, loader and callbacks, from shards that the benchmark commits first), `shards_s3` (the same shards from an
S3-compatible server on this machine, in the epoch after the first) and `shards_ddp2` (on two GPUs; the batch is that
of each; `scaling` is over the `shards` of the same run). The student is that of manifests/students/PRESET.yaml on a
teacher of Qwen2.5-1.5B's width and vocabulary; the loss CE + KL + attention maps, for online and package CE + KL.
AdamW, bf16-mixed, gradients clipped. Without --cases the first preset and shape run all cases that the machine's GPUs
allow, the others `synthetic` and `shards`. A row of `synthetic` always has the times of the step's parts, the
optimizer's among them.

The floor is (6 P + 4 V D) / R microseconds a token: P weights of the trained matrices (0.50 GFLOP a token at D=1536),
V D the frozen head (0.93), R the FLOP/s that a large bfloat16 product reaches in the same process. `share` is the floor
over what was measured. Each case is a process; its row replaces the one that results/train_throughput.json had, and all
that it then has are shown.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.measured import RESULTS, Row, device_name, merged_with, read_rows, table, write_results
from benchmarks.processes import in_own_process, spare_processes
from benchmarks.train_step import LOSS_PRESET, PRESETS, Case

CASES = ("online", "package", "synthetic", "shards", "shards_s3", "shards_ddp2")
OURS = ("synthetic", "shards")
KEYS = ("preset", "case", "batch", "length")
COLUMNS = [
    *KEYS, "tokens_per_s", "us_per_token", "share", "scaling", "peak_gb", "micro_rows", "loader_wait_us",
    "longest_wait_s",
]  # fmt: skip
SMALL: dict[str, Any] = {
    "width": 64, "vocab": 160, "k": 8, "block": 16, "groups": 2, "teacher_layers": 1, "heads": 4, "blocks": 2,
}  # fmt: skip
"""A student that a CPU trains in a second: to check the benchmark itself."""


def shape(text: str) -> tuple[int, int]:
    """B and T of `64x512`.

    Raises:
        argparse.ArgumentTypeError: it is not of that form.
    """
    batch, x, length = text.partition("x")
    if not (x and batch.isdecimal() and length.isdecimal() and int(batch) and int(length)):
        raise argparse.ArgumentTypeError(f"{text!r}: give rows and tokens a row as in 64x512")
    return int(batch), int(length)


def to_row(case: Case, found: dict[str, Any], before: Sequence[Row] = ()) -> Row:
    """What is written of one measurement; of `shards_ddp2` its `scaling` over `shards` too, if it is among `before`."""
    us = 1e6 / found["tokens_per_s"]
    row: Row = {"preset": case.preset, "case": case.case, "batch": case.batch, "length": case.length}
    share = found["floor_us"] / (us * case.gpus)  # of each GPU's own floor
    row |= {"tokens_per_s": found["tokens_per_s"], "us_per_token": us, "share": share}
    row |= {key: value for key, value in found.items() if key not in {*row, "tokens"}}
    same = [other for other in before if all(other[key] == row[key] for key in ("preset", "batch", "length"))]
    if case.case == "shards_ddp2" and (one := [other for other in same if other["case"] == "shards"]):
        row["scaling"] = row["tokens_per_s"] / one[-1]["tokens_per_s"]
    return {**row, "steps": case.steps, "warmup": case.warmup}


def run_cases(arguments: argparse.Namespace, scratch: Path) -> list[Row]:
    """Measure what was asked for; a case that fails is reported and left out."""
    rows: list[Row] = []
    for batch, length in arguments.shapes:
        cache = scratch / f"cache-{batch}x{length}"
        for preset in arguments.presets:
            for kind in arguments.cases or cases_of(arguments, preset, (batch, length)):
                case = case_of(arguments, kind, preset, batch, length, scratch / f"{preset}-{batch}x{length}-{kind}")
                case = replace(case, cache=str(cache))
                started = time.perf_counter()
                try:
                    if kind.startswith("shards") and not cache.exists():
                        in_own_process("benchmarks.train_case", asdict(to_write(case)), arguments.timeout)
                    found = in_own_process("benchmarks.train_case", asdict(case), arguments.timeout)
                except (RuntimeError, OSError) as error:
                    print(error, file=sys.stderr, flush=True)
                    continue
                finally:
                    shutil.rmtree(case.run, ignore_errors=True)
                if arguments.profile:
                    told = found.get("table", f"{kind} has no profile")
                    print(f"{preset} {batch}x{length}: {told}", flush=True)
                    continue
                rows.append(to_row(case, found, rows))
                print(json.dumps(rows[-1]), f"({time.perf_counter() - started:.0f} s)", flush=True)
                save(arguments, rows)
        shutil.rmtree(cache, ignore_errors=True)
    return rows


def cases_of(arguments: argparse.Namespace, preset: str, shape: tuple[int, int]) -> tuple[str, ...]:
    """What is measured unless --cases says it: all that the GPUs allow of the first preset and shape, ours of each."""
    import torch

    if (preset, shape) != (arguments.presets[0], arguments.shapes[0]):
        return OURS
    return CASES if torch.cuda.device_count() > 1 else tuple(case for case in CASES if case != "shards_ddp2")


def to_write(case: Case) -> Case:
    """What writes a cache that is large enough for every case of this shape: two GPUs warm up on twice the rows."""
    return replace(case, case="write", steps=case.gpus * case.steps + case.warmup)


def case_of(arguments: argparse.Namespace, kind: str, preset: str, batch: int, length: int, folder: Path) -> Case:
    steps = arguments.steps
    if kind.startswith("shards"):
        gpus = 2 if kind == "shards_ddp2" else 1
        steps = max(steps, arguments.shard_tokens // (batch * length * gpus))
    return Case(
        kind, batch, length, preset, steps, arguments.warmup, micro_rows=arguments.micro_rows,
        chunk_rows=arguments.chunk_rows, run=str(folder),
        profile=arguments.profile, graphs=arguments.graphs,
        **(SMALL if arguments.small else {}),
    )  # fmt: skip


def save(arguments: argparse.Namespace, rows: list[Row]) -> Path:
    """After each case, so that a time limit costs only the one at hand."""
    device = device_name()
    kept = merged_with(arguments.name, rows, KEYS, device=device, folder=arguments.results)
    settings = {"k": 64, "block": 64, "groups": 6, **SMALL} if arguments.small else {"k": 64, "block": 64, "groups": 6}
    return write_results(arguments.name, kept, device=device, folder=arguments.results, settings=settings)


def parser() -> argparse.ArgumentParser:
    presets = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--cases", nargs="+", choices=CASES, help="of every preset and shape; else see above")
    options.add_argument("--presets", nargs="+", default=[LOSS_PRESET], choices=presets, help="shapes of the student")
    options.add_argument("--shapes", nargs="+", type=shape, default=[(64, 512), (16, 2048)], help="rows x tokens a row")
    options.add_argument("--steps", type=int, default=30, help="optimiser steps that are timed")
    options.add_argument(
        "--shard_tokens", type=int, default=4_194_304,
        help="shards are read for at least so many timed tokens: two of the loader's windows of 16 row groups",
    )  # fmt: skip
    options.add_argument("--warmup", type=int, default=10, help="optimiser steps before them")
    options.add_argument(
        "--micro_rows", type=int, default=0, help="rows of a forward pass of online and package; 0: most"
    )
    options.add_argument("--chunk_rows", type=int, default=0, help="tokens whose logits exist at once; 0: the preset's")
    options.add_argument("--graphs", action="store_true", help="launch the student's blocks as CUDA graphs; see --name")
    options.add_argument(
        "--profile", action="store_true",
        help="print the kernels of a few steps by time, and the GPU's gaps; nothing is written",
    )  # fmt: skip
    options.add_argument("--timeout", type=float, default=600.0, help="seconds after which a case is given up")
    options.add_argument("--scratch", help="folder on the disk that shards are written to")
    options.add_argument("--small", action="store_true", help="a student of width 64, to check the benchmark on a CPU")
    options.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON")
    options.add_argument("--name", default="train_throughput", help="of the JSON")
    return options


def main(words: list[str] | None = None) -> int:
    import torch

    options = parser()
    arguments = options.parse_args(words)
    if not torch.cuda.is_available() and not arguments.small:
        options.error("no CUDA device: --small checks the benchmark itself")
    if arguments.small and arguments.results == RESULTS:
        options.error("--small measures nothing that belongs in benchmarks/results: name another --results")
    if arguments.profile:
        arguments.cases = arguments.cases or ["synthetic"]
        arguments.steps, arguments.shard_tokens = min(arguments.steps, 6), 0
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch, spare_processes():
        rows = run_cases(arguments, Path(scratch))
    if not rows:
        return 0 if arguments.profile else 1
    path = save(arguments, rows)
    rows = read_rows(path)
    print(table(rows, COLUMNS))
    shown = (*KEYS, "device")
    parts = [{**{key: row[key] for key in shown if key in row}, **row["parts_us"]} for row in rows if "parts_us" in row]
    if parts:
        print(f"\nmicroseconds a token, forward and backward\n{table(parts)}")
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
