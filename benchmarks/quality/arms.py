"""Arms of experiments: a file of manifests/experiments each, on top of manifests/students/experiment.yaml.

    # The question that it answers, in words.
    question: [divergence, k]      # tables of `QUESTIONS` that it stands in
    cache: experiment              # the dump it trains on, a file of manifests/dumps
    config: [other.yaml]           # files of manifests/students over the base
    overrides: {data.k: 32}        # dotted options as `python -m student` takes them
    start: {align_tokens: 1000000} # options of `python -m student.from_teacher`, whose run it begins from
    teacher_in_loop: false         # the KL over the whole vocabulary from the teacher itself
    budget: headline               # worth the long training too

Only `question` is needed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError

EXPERIMENTS = Path("manifests/experiments")  # benchmarks run from the repository's root
STUDENTS = Path("manifests/students")
DUMPS = Path("manifests/dumps")
BASE = "experiment.yaml"
HELDOUT_CACHE, OTHER_CACHE = "experiment", "experiment-other"
"""Dumps whose held-out rows every arm is judged by: text of the kind that was trained on, and of another."""


@dataclass(frozen=True)
class Question:
    """A table: what it asks, and the arm whose figures the others' are taken from."""

    title: str
    reference: str


QUESTIONS = {
    "signal": Question("What of the teacher helps?", "ce"),
    "mix": Question("How much of the loss should be KL?", "delta"),
    "divergence": Question("Which KL, and what does a cache lose?", "mix-0.9"),
    "k": Question("How many ids does a cache need?", "mix-0.9"),
    "attention": Question("Does aligning pooled attention help?", "delta"),
    "frobenius": Question("Does the Frobenius term help, and how finely must hidden states be stored?", "delta"),
    "start": Question("Does a start from the teacher's own weights help?", "mix-0.9"),
    "unfreeze": Question("Does training the teacher's head and embedding too help?", "start-aligned"),
}


@dataclass(frozen=True)
class Budget:
    """How much an arm is trained.

    Attributes:
        shards: training shards of the caches.
        passes: epochs.
        seeds: that are run unless others are asked for.
        overrides: student options over the arm's own.
        dump: further options of the dumps.
    """

    name: str
    shards: int
    passes: int
    seeds: tuple[int, ...] = (0,)
    overrides: dict[str, Any] = field(default_factory=dict)
    dump: dict[str, Any] = field(default_factory=dict)


BUDGETS = {
    "screen": Budget("screen", shards=16, passes=1),
    "headline": Budget("headline", shards=57, passes=4, seeds=(0, 1, 2)),
    "small": Budget(
        "small",
        shards=2,
        passes=1,
        overrides={"model.student.blocks": 2, "data.batch_rows": 2, "trainer.log_every_n_steps": 1},
        dump={"length": 64, "tokens_per_shard": 512, "corpus.range_bytes": 65_536},
    ),
}
"""screen: 4.2 M tokens once. headline: 14.9 M tokens, all that enwik8 has, four times. small: checks the runner."""


@dataclass(frozen=True)
class Arm:
    """One file of manifests/experiments; the module's docstring says what the fields are."""

    name: str
    about: str
    question: tuple[str, ...]
    cache: str = HELDOUT_CACHE
    config: tuple[str, ...] = ()
    overrides: dict[str, Any] = field(default_factory=dict)
    start: dict[str, Any] | None = None
    teacher_in_loop: bool = False
    budget: str = "screen"

    def options(self, budget: Budget) -> dict[str, Any]:
        """Dotted options over the base and `config`."""
        return {**self.overrides, **budget.overrides, "trainer.max_epochs": budget.passes}

    def settings(self, budget: Budget) -> str:
        """Identity of all that its figures depend on but the seed: a row made under another one is out of date."""
        dump = _read(DUMPS / f"{self.cache}.yaml")
        for unimportant in ("cache", "shards"):
            dump.pop(unimportant, None)
        files = [_flat(_read(STUDENTS / name)) for name in (BASE, *self.config)]
        student = {key: value for options in (*files, self.options(budget)) for key, value in options.items()}
        judged = [_read(DUMPS / f"{name}.yaml") for name in (HELDOUT_CACHE, OTHER_CACHE)]
        what = [student, dump, judged, budget.shards, budget.dump, self.start, self.teacher_in_loop]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]

    def config_files(self) -> list[Path]:
        return [STUDENTS / name for name in (BASE, *self.config)]


def load_arms(folder: Path = EXPERIMENTS) -> dict[str, Arm]:
    """Every arm, in the order of `QUESTIONS`, a question's reference first.

    Raises:
        UserError: see `load_arm`; or a question's reference has no file.
    """
    arms = {path.stem: load_arm(path) for path in sorted(folder.glob("*.yaml"))}
    if not arms:
        raise UserError(f"{folder} holds no arm (*.yaml): run this from the repository's root")
    for name, question in QUESTIONS.items():
        if any(name in arm.question for arm in arms.values()) and question.reference not in arms:
            raise UserError(f"{folder}/{question.reference}.yaml is missing: it is the reference of question {name}")
    order = list(QUESTIONS)
    references = [question.reference for question in QUESTIONS.values()]

    def place(arm: Arm) -> tuple[bool, int, str]:
        return arm.name not in references, min(order.index(name) for name in arm.question), arm.name

    return {arm.name: arm for arm in sorted(arms.values(), key=place)}


def load_arm(path: Path) -> Arm:
    """Read one manifest.

    Raises:
        UserError: a field is unknown, missing or of another type, or names what does not exist.
    """
    values = _read(path)
    known = {f.name for f in fields(Arm)} - {"name", "about"}
    for unknown in sorted(values.keys() - known):
        raise UserError(f"{path}: {unknown} is no field of an arm; known are {', '.join(sorted(known))}")
    text = path.read_text(encoding="utf-8").splitlines()
    about = " ".join(line.lstrip("# ") for line in text if line.startswith("#"))
    if not about:
        raise UserError(f"{path} does not say in a comment which question it answers")
    question = _names(values.get("question"), path, "question", QUESTIONS)
    if not question:
        raise UserError(f"{path}: question is missing; choose from {', '.join(QUESTIONS)}")
    for name, kind in (("overrides", dict), ("start", dict), ("teacher_in_loop", bool)):
        if not isinstance(values.get(name, kind()), kind):
            raise UserError(f"{path}: {name} is {values[name]!r}, not of the type {kind.__name__}")
    cache, budget = values.get("cache", HELDOUT_CACHE), values.get("budget", "screen")
    if not (DUMPS / f"{cache}.yaml").is_file():
        raise UserError(f"{path}: cache {cache!r} is no file of {DUMPS}")
    if budget not in ("screen", "headline"):
        raise UserError(f"{path}: budget {budget!r} must be screen or headline")
    config = _names(values.get("config"), path, "config", [file.name for file in STUDENTS.glob("*.yaml")])
    start = values.get("start")
    return Arm(path.stem, about, question, cache, config, values.get("overrides", {}), start,
               values.get("teacher_in_loop", False), budget)  # fmt: skip


def chosen(arms: dict[str, Arm], names: Iterable[str] | None, question: str | None, budget: Budget) -> list[Arm]:
    """The arms that are asked for: by name, by question (its reference too), or all that the budget is for.

    Raises:
        UserError: there is no such arm or question.
    """
    if names:
        unknown = sorted(set(names) - arms.keys())
        if unknown:
            raise UserError(f"--arms {' '.join(unknown)}: no such file in {EXPERIMENTS}; known are {', '.join(arms)}")
        return [arms[name] for name in dict.fromkeys(names)]  # in the order that was asked for
    found = [arm for arm in arms.values() if budget.name != "headline" or arm.budget == "headline"]
    if question is None:
        return found
    if question not in QUESTIONS:
        raise UserError(f"--question {question}: known are {', '.join(QUESTIONS)}")
    return [arm for arm in found if question in arm.question or arm.name == QUESTIONS[question].reference]


def _names(value: Any, path: Path, what: str, known: Iterable[str]) -> tuple[str, ...]:
    names = tuple(value if isinstance(value, list) else [] if value is None else [value])
    known = list(known)
    for name in names:
        if name not in known:
            raise UserError(f"{path}: {what} {name!r} is unknown; choose from {', '.join(sorted(known))}")
    return names


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run this from the repository's root") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold fields and their values, found {type(content).__name__}")
    return content


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
