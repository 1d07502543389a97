"""Runs trials in this process: each is trained, evaluated on two texts, and turned into a row of figures."""

from __future__ import annotations

import csv
import gc
import hashlib
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from benchmarks.measured import Row, device_name, versions
from benchmarks.meters import peak_gb, pick_device, reset_peak, wait
from benchmarks.quality.arms import LONG_CACHE
from benchmarks.quality.figures import by_position, figures, long_positions
from benchmarks.quality.judges import DOCUMENTS, FEW_DOCUMENTS, attention_figures, zero_shot_figures
from benchmarks.quality.results import TEACHER
from benchmarks.quality.trial import Trial, begin, fit
from pipeline.cache import Cache
from pipeline.errors import UserError
from student.evaluate import EvaluateOptions, FullTeacher, evaluate, load_teacher
from student.training.module import KL_METRIC, DistillModule

WARM_STEPS = 10
"""Steps before the clock of tokens_per_s starts: kernels are compiled in the first ones of a process."""
CURVE_POINTS = 60


class PhaseClock(Callback):
    """When training began, was warm, and took its last step."""

    def __init__(self) -> None:
        self.began = self.warm = self.ended = 0.0
        self.steps = self.warm_steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DistillModule)
        self.began = self.warm = time.perf_counter()
        self.steps = pl_module.total_steps()
        self.warm_steps = WARM_STEPS if self.steps >= 2 * WARM_STEPS else 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.warm_steps:
            wait(pl_module.device)
            self.warm = time.perf_counter()
        if trainer.global_step == self.steps:
            wait(pl_module.device)
            self.ended = time.perf_counter()

    def tokens_per_s(self, tokens_per_step: int) -> float:
        return (self.steps - self.warm_steps) * tokens_per_step / (self.ended - self.warm)


class RememberedTeacher:
    """A teacher for `evaluate` that reads every batch of held-out rows once, however many students are evaluated."""

    def __init__(self, teacher: FullTeacher) -> None:
        self.teacher, self.vocab_size = teacher, teacher.vocab_size
        self._hidden: dict[bytes, Tensor] = {}

    def hidden(self, input_ids_BT: Tensor) -> Tensor:
        key = hashlib.sha256(input_ids_BT.cpu().numpy().tobytes()).digest()
        if key not in self._hidden:
            self._hidden[key] = self.teacher.hidden(input_ids_BT)
        return self._hidden[key]

    def logits(self, h_ND: Tensor) -> Tensor:
        return self.teacher.logits(h_ND)


class Lab:
    """Runs trials, as many as one likes in a process; keeps the teacher between them."""

    def __init__(self, teacher: FullTeacher | None = None) -> None:
        self.device = pick_device()
        self._teacher = None if teacher is None else RememberedTeacher(teacher)
        self._teacher_zero_shot: Row = {}

    def run(self, trial: Trial) -> dict[str, Any]:
        """Train and evaluate.

        Returns:
            `row` and `curve` of the trial, and `teacher`, the row with the teacher's own figures.

        Raises:
            UserError: what the student's commands raise.
        """
        try:
            return self._run(trial)
        finally:
            if not trial.keep:
                shutil.rmtree(trial.run, ignore_errors=True)
            self._free()

    def _free(self) -> None:
        """Give memory back that nothing holds any more: other processes share the card."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _run(self, trial: Trial) -> dict[str, Any]:
        shutil.rmtree(trial.run, ignore_errors=True)  # of a process that was killed: its times are not known
        reset_peak(self.device)
        started = time.perf_counter()
        seconds: dict[str, float] = {}
        start = begin(trial)
        if start.run is not None:
            seconds["start"] = time.perf_counter() - started
            reset_peak(self.device)  # whether this trial was the one that had to make it is chance
        clock = PhaseClock()
        before = time.perf_counter()
        if trial.arm.share:
            fit(trial, start, [clock])
            run, after = trial.run, time.perf_counter()
            seconds |= {
                "prepare": clock.began - before,
                "train": clock.ended - clock.began,
                "save": after - clock.ended,
            }
        else:
            assert start.run is not None  # `load_arm` sees to it
            run, after = start.run, before
        memory = peak_gb(self.device)["peak_gb"]
        self._free()
        heldout = self.evaluate(trial, run, trial.heldout, "heldout")
        other = self.evaluate(trial, run, trial.other, "other")
        long: Row = {}
        if trial.arm.long:
            found = self.evaluate(trial, run, trial.heldout.with_name(LONG_CACHE), "long")
            long = {"long": {**figures(found, "student"), "by_position": long_positions(found)}}
        judged = self.judge(trial, run)
        seconds["evaluate"] = time.perf_counter() - after
        seconds["total"] = time.perf_counter() - started
        cache = Cache(trial.train)
        tokens_per_step, stored = trial.batch_rows * cache.spec.length, cache.shards("train")
        common = {
            "device": device_name(), "versions": versions(), "date": datetime.now(UTC).date().isoformat(),
        }  # fmt: skip
        row: Row = {
            "arm": trial.arm.name,
            "seed": trial.seed,
            "budget": trial.budget.name,
            "question": list(trial.arm.question),
            "settings": trial.arm.settings(trial.budget),
            "tokens": clock.steps * tokens_per_step,
            "tokens_before": start.tokens,
            "align_tokens": start.align_tokens,
            "steps": clock.steps,
            "share": trial.arm.share,
            "trainable_parameters": heldout["trainable_parameters"],
            "heldout": figures(heldout, "student"),
            "other": figures(other, "student"),
            "by_position": by_position(heldout, "student_cross_entropy"),
            "start": trial.arm.start,
            "seconds": seconds,
            "tokens_per_s": clock.tokens_per_s(tokens_per_step) if clock.steps else 0.0,
            "peak_gb": memory,
            "cache_bytes": float(stored.bytes.sum() / stored.tokens.sum()),
            **long,
            **judged,
            **common,
        }
        teacher: Row = {
            "arm": TEACHER, "seed": 0, "budget": "small" if trial.budget.name == "small" else TEACHER,
            "heldout": figures(heldout, "teacher"), "other": figures(other, "teacher"),
            "by_position": by_position(heldout, "teacher_cross_entropy"), **common,
        }  # fmt: skip
        return {"row": row, "teacher": teacher, **({"curve": read_curve(trial)} if clock.steps else {})}

    def judge(self, trial: Trial, run: Path) -> Row:
        """What the judges find that the trial asks for; `unjudged` says why one found nothing."""
        found: Row = {}
        for name in trial.judges:
            try:
                if name == "zero_shot":
                    found[name] = self._zero_shot(trial, run)
                else:
                    picture = trial.run.parent.parent / "pictures" / f"attention-{trial.arm.name}-{trial.seed}.png"
                    found[name] = attention_figures(run, trial.heldout, picture)
            except (UserError, RuntimeError) as error:  # a student that was trained is worth its row
                found.setdefault("unjudged", {})[name] = str(error)
        return found

    def _zero_shot(self, trial: Trial, run: Path) -> Row:
        documents = FEW_DOCUMENTS if trial.budget.name == "small" else DOCUMENTS
        student = zero_shot_figures(run / "zero_shot.json", documents, run=str(run))
        if not self._teacher_zero_shot:
            folder = str(Cache(trial.heldout).manifest.teacher_path)
            out = run / "zero_shot_teacher.json"
            self._teacher_zero_shot = zero_shot_figures(out, documents, teacher=folder)["tasks"]
        return {**student, "teacher": self._teacher_zero_shot}

    def evaluate(self, trial: Trial, run: Path, cache: Path, name: str) -> dict[str, Any]:
        """What `student.evaluate` finds of a run's student on the held-out rows of a cache."""
        tokens = trial.batch_rows * Cache(trial.train).spec.length
        options = EvaluateOptions(
            run=str(run), cache=str(cache), out=name, maps=0, full_kl=True, precision="bf16-mixed",
            unigram_tokens=1,  # nobody asks for the unigram here
            # The batch of training where rows are as long, so that nothing is compiled for another shape.
            batch_rows=max(1, tokens // Cache(cache).spec.length),
        )  # fmt: skip
        if self._teacher is None:
            self._teacher = RememberedTeacher(load_teacher(options, Cache(cache), self.device))
        return evaluate(options, self._teacher)


def read_curve(trial: Trial) -> dict[str, Any]:
    """Loss, cross-entropy and divergence by step out of metrics.csv, thinned."""
    with open(trial.run / "metrics.csv", newline="", encoding="utf-8") as file:
        lines = [line for line in csv.DictReader(file) if line["train/loss"]]
    every = -(-len(lines) // CURVE_POINTS) or 1
    lines = lines[::-1][::every][::-1]  # the last one stays

    def column(*names: str) -> list[float | None]:
        values = [next((line[name] for name in names if line.get(name)), None) for line in lines]
        return [None if value is None else float(value) for value in values]

    name, seed, budget = trial.key
    return {
        "arm": name, "seed": seed, "budget": budget, "step": [int(line["step"]) for line in lines],
        "loss": column("train/loss"), "ce": column("train/ce"), "kl": column(*KL_METRIC.values()),
    }  # fmt: skip
