"""One arm with one seed: where it lies, what it begins from, and how it is trained.

What it begins from, a run of `student.from_teacher` or another arm's, is made first where the scratch folder lacks it.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import Callback

from benchmarks.quality.arms import Arm, Budget
from pipeline.cache import Cache
from pipeline.commit import read_json
from pipeline.errors import UserError
from pipeline.packages import exclusive
from student.__main__ import main as train
from student.runs.run_folder import ORIGIN
from student.training.module import DistillModule

BLOCKS = "model.student.blocks"
RECOMMENDED = Path("manifests/students/recommended.yaml")
"""The student that `student.from_teacher` makes unless told otherwise."""


@dataclass(frozen=True)
class Trial:
    """An arm, a seed, how much it is trained, and where everything lies.

    Attributes:
        train, heldout, other: caches: to train on, and whose held-out rows judge. Those of other names that the arm
            needs (`Arm.dumps`) lie beside them.
        run: the run's folder.
        keep: leave it there.
        judges: those of `judges.JUDGES` that are asked too.
        graphs: launch blocks as CUDA graphs, which changes times only.
    """

    arm: Arm
    seed: int
    budget: Budget
    train: Path
    heldout: Path
    other: Path
    run: Path
    keep: bool = False
    judges: tuple[str, ...] = ()
    graphs: bool = False

    @property
    def key(self) -> tuple[str, int, str]:
        return self.arm.name, self.seed, self.budget.name

    def __str__(self) -> str:
        return f"{self.arm.name}, seed {self.seed}, {self.budget.name}"

    @property
    def batch_rows(self) -> int:
        return int(self.arm.options(self.budget).get("data.batch_rows", 32))

    def steps(self) -> int:
        """Optimiser steps: the arm's share of the budget's on its cache, at least one unless the share is 0."""
        rows = int(Cache(self.train).shards("train").rows.sum())
        whole = self.budget.passes * (rows // self.batch_rows)
        return max(1, round(self.arm.share * whole)) if self.arm.share else 0

    def arguments(self) -> list[str]:
        """The words after `python -m student`."""
        given = {
            "cache": self.train,
            "run": self.run,
            "seed_everything": self.seed,
            "data.seed": self.seed,
            "trainer.accelerator": "gpu" if torch.cuda.is_available() else "cpu",
            "trainer.devices": 1,
            "model.graphs": self.graphs,
            **self.arm.options(self.budget),
        }
        files = [word for path in self.arm.config_files() for word in ("--config", str(path))]
        return [*files, *words(given)]


def words(options: dict[str, Any]) -> list[str]:
    """Dotted options as a command line has them."""
    values = {name: value if isinstance(value, str | Path) else json.dumps(value) for name, value in options.items()}
    return [f"--{name}={value}" for name, value in values.items()]


@dataclass(frozen=True)
class Start:
    """What a trial begins from.

    Attributes:
        run: folder of a run; None: random weights.
        tokens: that its student was trained on, over all phases.
        align_tokens: of the transfer of attention before these.
    """

    run: Path | None = None
    tokens: int = 0
    align_tokens: int = 0


def begin(trial: Trial) -> Start:
    """What the arm's `start` asks for, made now where it is missing.

    Raises:
        UserError: what the student's commands raise.
    """
    if (before := earlier(trial)) is not None:
        return phase_before(before)
    if trial.arm.start is not None:
        run = begin_from_teacher(trial)
        return Start(run, align_tokens=int(read_json(run / ORIGIN)["align_tokens"]))
    return Start()


def to_make(trial: Trial) -> list[Path]:
    """Folders that `begin` makes first, as they are missing: a second trial would wait for the one that makes them."""
    folders = []
    while (before := earlier(trial)) is not None:
        trial = before
        if trial.arm.share:
            folders.append(phase_folder(trial))
    if trial.arm.start is not None:
        folders.append(start_folder(trial))
    return [folder for folder in folders if not is_made(folder)]


def is_made(folder: Path) -> bool:
    return (folder / "checkpoints" / "last.ckpt").is_file()


def earlier(trial: Trial) -> Trial | None:
    """The same of the arm that this one begins from, if it does."""
    before = trial.arm.before
    return None if before is None else replace(trial, arm=before, train=trial.train.with_name(before.cache))


def phase_folder(trial: Trial) -> Path:
    what = json.dumps([trial.arm.settings(trial.budget), trial.seed, str(trial.train)])
    return trial.run.parent / f"phase-{trial.arm.name}-{hashlib.sha256(what.encode()).hexdigest()[:12]}"


def start_folder(trial: Trial) -> Path:
    what = json.dumps([trial.arm.start or {}, trial.seed, str(trial.heldout)], sort_keys=True)
    return trial.run.parent / f"start-{hashlib.sha256(what.encode()).hexdigest()[:12]}"


def phase_before(trial: Trial) -> Start:
    """The trained student of an arm that another one begins from: trained once for each seed and budget, in a folder
    that stays; one that was interrupted goes on."""
    start = begin(trial)
    if not trial.arm.share:
        return start
    folder = phase_folder(trial)
    trial = replace(trial, run=folder)
    with exclusive(folder.parent, folder.name):
        fit(trial, start)  # of a run that is finished it says so
    tokens = trial.steps() * trial.batch_rows * Cache(trial.train).spec.length
    return replace(start, run=folder, tokens=start.tokens + tokens)


def fit(trial: Trial, start: Start, callbacks: Sequence[Callback] = ()) -> None:
    """Train.

    Raises:
        UserError: what `student` raises; or it was interrupted.
    """
    module: type[DistillModule] = DistillModule
    if trial.arm.teacher_in_loop:
        from benchmarks.quality.online import OnlineModule

        module = OnlineModule
    given: dict[str, Any] = {} if start.run is None else {"init_from": start.run}
    given |= {"trainer.max_steps": trial.steps()} if trial.arm.share < 1 else {}
    if train([*trial.arguments(), *words(given)], module, callbacks) != 0:
        raise UserError(f"{trial}: training was interrupted")


def begin_from_teacher(trial: Trial) -> Path:
    """The run folder that `student.from_teacher` writes with the arm's `start`, made once for each seed: on rows of
    the cache that all are judged by, which every other cache of the text holds as well.

    Raises:
        UserError: see there.
    """
    start, most = trial.arm.start or {}, trial.budget.most
    folder = start_folder(trial)
    with exclusive(trial.run.parent, folder.name):
        if not is_made(folder):
            given = {
                "run": folder, "cache": trial.heldout, "teacher": Cache(trial.heldout).manifest.teacher_path,
                "seed": trial.seed,
                **{name: min(value, most.get(name, value)) for name, value in start.items()},
            }  # fmt: skip
            if blocks := trial.budget.overrides.get(BLOCKS):
                given["student"] = smaller(RECOMMENDED, blocks, folder.with_suffix(".yaml"))
            command = importlib.import_module("student.from_teacher")
            if command.main(words(given)):
                raise UserError(f"{trial}: student.from_teacher was interrupted")
    return folder


def smaller(student: Path, blocks: int, out: Path) -> Path:
    """A file of manifests/students with fewer blocks, written to `out`."""
    content = yaml.safe_load(student.read_text(encoding="utf-8"))
    content["model"]["student"]["blocks"] = blocks
    out.write_text(yaml.safe_dump(content), encoding="utf-8")
    return out
