"""A process that takes one trial after another: orders as JSON lines on its standard input, answers on its output.

    {"trial": {"arm": "ce", "seed": 0, "budget": "screen", "train": ..., "heldout": ..., "other": ..., "run": ...}}
    {"warm": FOLDER}     compile and load what every trial needs, on a cache of random numbers made there

An answer has `row`, `curve` and `teacher`, or `error`; with `last` the process ends. Whatever else a trial prints goes
to standard error.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks.meters import pick_device
from benchmarks.quality.arms import BUDGETS, STUDENTS, load_arms
from benchmarks.quality.lab import Lab
from benchmarks.quality.trial import Trial
from benchmarks.random_cache import benchmark_spec, random_columns, write_random_cache
from pipeline.errors import UserError, one_line
from student.__main__ import main as train
from student.data.group_reader import to_batch
from student.evaluate import measure
from student.evaluation.map_file import MapCollector
from student.evaluation.metrics import Sums
from student.runs.checkpoint import load_student

ROWS = 32


def trial_of(order: dict[str, Any]) -> Trial:
    paths = {name: Path(order[name]) for name in ("train", "heldout", "other", "run")}
    arm, budget = load_arms()[order["arm"]], BUDGETS[order["budget"]]
    return Trial(
        arm, order["seed"], budget, **paths, keep=order["keep"], judges=tuple(order["judges"]), graphs=order["graphs"]
    )


def order_of(trial: Trial) -> dict[str, Any]:
    """What `trial_of` reads."""
    name, seed, budget = trial.key
    paths = {field: str(getattr(trial, field)) for field in ("train", "heldout", "other", "run")}
    more = {"keep": trial.keep, "judges": trial.judges, "graphs": trial.graphs}
    return {"arm": name, "seed": seed, "budget": budget, **more, **paths}


def warm_up(folder: Path) -> None:
    """Two steps of the base student with alignment and a held-out batch, in the shapes of a screening run: compiled
    code is kept on disk, where other processes find it."""
    spec, device = benchmark_spec(512, 49_152, 576, k=128, block=16), pick_device()
    shutil.rmtree(folder, ignore_errors=True)
    write_random_cache(folder / "cache", spec, 2 * ROWS * spec.length, device)
    options = {
        "cache": folder / "cache", "run": folder / "run", "model.loss.gamma": 0.05, "trainer.max_steps": 2,
        "trainer.devices": 1,
    }  # fmt: skip
    train(["--config", str(STUDENTS / "experiment.yaml"), *(f"--{name}={value}" for name, value in options.items())])
    student = load_student(folder / "run")[0].float().to(device)
    batch = to_batch(random_columns(spec, 0, 0, ROWS, torch.Generator(device).manual_seed(0)), spec).to(device)
    nothing_V = torch.zeros(spec.vocab_size, dtype=torch.float64)
    measure(student, batch, Sums(nothing_V, nothing_V.long()), MapCollector(0, 0), None, "bf16-mixed")
    shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    lab = Lab()
    for line in sys.stdin:
        order = json.loads(line)
        try:
            if "warm" in order:
                warm_up(Path(order["warm"]))
                answer: dict[str, Any] = {}
            else:
                answer = lab.run(trial_of(order["trial"]))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            answer = {"error": str(error)}
        except Exception as error:  # whatever it is, the other arms must go on
            traceback.print_exc()
            # What a GPU's error leaves behind is not to be trusted: another process goes on.
            answer = {"error": f"{type(error).__name__}: {one_line(error)[:300]}", "last": True}
        answers.write(json.dumps(answer) + "\n")
        if "last" in answer:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
