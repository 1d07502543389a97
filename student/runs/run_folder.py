"""What a run folder keeps besides its checkpoints, and what must not change when a run goes on.

config.yaml    the resolved configuration the run was started with
data.json      the caches it was started on: identities field by field, units; how many steps an epoch had
run.json       the student's record, see `student/runs/checkpoint.py`
teacher/       the cache's teacher folder (hard links where the file system has them)
from_teacher.json   only where the student began with its teacher's weights, itself or what it was initialised from
metrics.csv    one line per logged step, see `MetricsCSV`
tensorboard/   the same for TensorBoard
checkpoints/   last.ckpt, best.ckpt
"""

from __future__ import annotations

import csv
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from pipeline.commit import commit_bytes, commit_file, commit_json, read_json
from pipeline.errors import UserError
from student.runs.identity import RunCache, require_same_data
from student.runs.seal import check_seal

FIXED_TRAINER_OPTIONS = (
    "max_epochs",
    "max_steps",
    "precision",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "limit_train_batches",
)
"""Trainer options that a run's result depends on; the others (devices, logging, ...) may change between sittings."""

ADDED_SINCE = {
    "model.loss.kl": "tail",
    "model.graphs": False,
    "model.student.train_embedding": False,
    "model.student.train_head": False,
}
"""Options that earlier versions did not have -> what those did: a run of theirs can go on."""


ORIGIN = "from_teacher.json"
"""What `python -m student.from_teacher` did; runs that begin with such a student's weights keep it."""


def copy_teacher(source: Path, run: Path) -> None:
    """Put the teacher folder into the run, file by file, `teacher.json` last so that it is there only when all is."""
    names = sorted((p.name for p in source.iterdir() if p.is_file()), key=lambda name: (name == "teacher.json", name))
    target = run / "teacher"
    for name in names:
        if (target / name).exists():
            continue

        def place(temporary: Path, name: str = name) -> None:
            try:
                os.link(source / name, temporary)
            except OSError:
                shutil.copyfile(source / name, temporary)

        commit_file(target / name, place)


def save_settings(run: Path, config: dict[str, Any], data: dict[str, Any]) -> None:
    """Commit config.yaml and data.json."""
    commit_bytes(run / "config.yaml", yaml.safe_dump(config, sort_keys=False).encode())
    commit_json(run / "data.json", data)


def check_same_settings(run: Path, config: dict[str, Any]) -> None:
    """Compare with what the run was started with.

    Raises:
        UserError: names every option that differs, with both values; or the run was never trained.
    """
    if not (run / "config.yaml").is_file():
        raise UserError(
            f"{run} holds a student and no settings of a training: name another --run, and this one with --init_from"
        )
    started = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    before, now = ADDED_SINCE | _fixed(started), _fixed(config)
    names = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    differing = [f"--{name} was {before.get(name)}, is {now.get(name)}" for name in names]
    if differing:
        raise UserError(
            f"{run} was started with other settings: {'; '.join(differing)}. Use its own (they are in "
            f"{run}/config.yaml), or name another --run"
        )


def open_data(run: Path, caches: list[RunCache]) -> None:
    """Restrict the caches to the units that the run was started on.

    Raises:
        UserError: see `require_same_data`; or the run was started by a version that did not record them.
    """
    record = read_json(run / "data.json")
    if "caches" not in record:
        raise UserError(
            f"{run}/data.json was written by an earlier version, which did not keep the shards a run was started on: "
            f"start a new --run with --init_from {run}"
        )
    require_same_data(run, record["caches"], caches)


def _fixed(config: dict[str, Any]) -> dict[str, Any]:
    """Dotted options that must stay as they are."""
    flat = {f"{part}.{k}": v for part in ("model", "data") for k, v in flatten(config.get(part) or {}).items()}
    trainer = config.get("trainer") or {}
    flat |= {f"trainer.{name}": trainer.get(name) for name in FIXED_TRAINER_OPTIONS}
    flat |= {"seed_everything": config.get("seed_everything"), "init_from": config.get("init_from") or ""}
    flat.pop("data.cache", None)  # a cache may move: its data_id says whether it is the same
    return flat


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration's options by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def steps_done(checkpoint: Path) -> int:
    """Optimiser steps that a checkpoint has behind it.

    Raises:
        UserError: the file is damaged.
    """
    check_seal(checkpoint)
    try:
        return int(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"])
    except Exception as error:  # torch raises many kinds on a damaged file
        raise UserError(
            f"{checkpoint} cannot be read ({type(error).__name__}): it was damaged; put checkpoints/best.ckpt in "
            "its place, or start another --run"
        ) from None


class MetricsCSV(Logger):
    """Appends to RUN/metrics.csv: columns step, seconds (since this sitting began), metrics; empty where not logged.

    Lightning's own CSV logger empties the file when a run goes on. `step` counts optimiser steps from 1; a run that
    goes on from step S first drops the lines after S, which belong to steps that are now done again.

    Args:
        path: the file.
        columns: names of the metrics; others are left out.
        resume_step: S, 0 for a new run.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], resume_step: int) -> None:
        super().__init__()
        self.path, self.columns = path, columns
        self._since = time.monotonic()
        self._prepare(resume_step)

    @rank_zero_only
    def _prepare(self, resume_step: int) -> None:
        header = ["step", "seconds", *self.columns]
        kept: list[list[str]] = []
        if self.path.is_file() and resume_step:
            with open(self.path, newline="", encoding="utf-8") as file:
                names, *rows = list(csv.reader(file)) or [[]]
            whole = [dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names)]
            kept = [[row.get(name, "") for name in header] for row in whole if int(row["step"]) <= resume_step]
        lines = "".join(",".join(row) + "\n" for row in [header, *kept])
        commit_bytes(self.path, lines.encode())

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The configuration is in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if not any(name in metrics for name in self.columns):
            return
        values = [repr(float(metrics[name])) if name in metrics else "" for name in self.columns]
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(",".join([str((step or 0) + 1), f"{time.monotonic() - self._since:.2f}", *values]) + "\n")
