"""What a further token costs: the student's recurrent state against a Transformer's growing cache.

    python -m benchmarks.decode
    python -m benchmarks.decode --models student --contexts 65536 --batches 1

The student generates as `student.generate` does (float32, one step of the recurrence a token); the Transformer has
the teacher's shape, random bfloat16 weights, scaled_dot_product_attention and the static cache of `transformers`. A
step of either is a CUDA graph; `student_eager` and `transformer_eager` are without, that Transformer with the growing
cache which `generate` uses by default. All take the likeliest token. A prompt of the context's length is read first,
for one row, and its state given to all rows; the steps after it are timed, the prompt by itself
(`prefill_tokens_per_s`, one row). `state` is what is kept between tokens, `peak` the most memory while stepping. What
does not fit is a row with the reason. Each model is a process; a row replaces the one that results/decode.json had, and
all that it then has are shown.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.decode_case import Case
from benchmarks.measured import RESULTS, Row, device_name, merged_with, read_rows, table, write_results
from benchmarks.processes import reports_of

MODELS = ("student", "transformer", "student_eager", "transformer_eager")
KEYS = ("model", "preset", "context", "batch")
COLUMNS = (*KEYS, "tokens_per_s", "ms_per_step", "graph", "state_gb", "peak_gb", "prefill_tokens_per_s", "skipped")
SMALL: dict[str, Any] = {"width": 64, "vocab": 160, "teacher_layers": 1, "heads": 4, "blocks": 2}
"""Models that a CPU runs in a second: to check the benchmark itself."""


def to_row(case: Case, found: dict[str, Any]) -> Row:
    """What is written of one measurement; the Transformer has no preset."""
    preset = case.preset if case.model.startswith("student") else "-"
    return {"model": case.model, "preset": preset, "context": case.context, "batch": case.batch, **found}


def save(arguments: argparse.Namespace, rows: list[Row]) -> Path:
    device = device_name()
    kept = merged_with(arguments.name, rows, KEYS, device=device, folder=arguments.results)
    settings = {"steps": arguments.steps, "warmup": arguments.warmup, **(SMALL if arguments.small else {})}
    return write_results(arguments.name, kept, device=device, folder=arguments.results, settings=settings)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    options.add_argument("--contexts", nargs="+", type=int, default=[1024, 8192, 65536], help="tokens of the prompt")
    options.add_argument("--batches", nargs="+", type=int, default=[1, 64], help="rows that are continued at once")
    options.add_argument("--preset", default="fast", help="shape of the student: a file in manifests/students")
    options.add_argument("--steps", type=int, default=64, help="tokens a row that are timed")
    options.add_argument("--warmup", type=int, default=8, help="tokens a row before them")
    options.add_argument("--timeout", type=float, default=1200.0, help="seconds after which a model is given up")
    options.add_argument("--small", action="store_true", help="models of width 64, to check the benchmark on a CPU")
    options.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON")
    options.add_argument("--name", default="decode", help="of the JSON")
    return options


def main(words: list[str] | None = None) -> int:
    import torch

    options = parser()
    arguments = options.parse_args(words)
    if not torch.cuda.is_available() and not arguments.small:
        options.error("no CUDA device: --small checks the benchmark itself")
    if arguments.small and arguments.results == RESULTS:
        options.error("--small measures nothing that belongs in benchmarks/results: name another --results")
    rows: list[Row] = []
    small = SMALL if arguments.small else {}
    for model in arguments.models:
        cases = [
            Case(model, context, batch, arguments.steps, arguments.warmup, arguments.preset, **small)
            for context in arguments.contexts
            for batch in arguments.batches
        ]
        given = {"cases": [asdict(case) for case in cases]}
        try:
            for found, case in zip(reports_of("benchmarks.decode_case", given, arguments.timeout), cases, strict=True):
                rows.append(to_row(case, found))
                print(json.dumps(rows[-1]), flush=True)
                save(arguments, rows)
        except (RuntimeError, OSError) as error:
            print(error, file=sys.stderr, flush=True)
    if not rows:
        return 1
    path = save(arguments, rows)
    print(table(read_rows(path), COLUMNS))
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
