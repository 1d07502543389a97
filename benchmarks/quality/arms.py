"""Arms of experiments: a file of manifests/experiments each, on top of manifests/students/experiment.yaml.

    # The question that it answers, in words.
    question: [divergence, k]      # tables of `QUESTIONS` that it stands in
    cache: experiment              # the dump it trains on, a file of manifests/dumps
    config: [other.yaml]           # files of manifests/students over the base
    overrides: {data.k: 32}        # dotted options as `python -m student` takes them
    start: {align_tokens: 1000000} # options of `python -m student.from_teacher`, whose run it begins from
    start: {arm: base}             # or another arm, whose trained student it begins from
    share: 0.25                    # of the budget's steps; 0: what it begins from is evaluated as it is
    phase: true                    # only what others begin from: in no table, trained when one of them needs it
    long: true                     # evaluated on the longer held-out rows of `LONG_CACHE` too
    teacher_in_loop: false         # the KL over the whole vocabulary from the teacher itself
    budget: both                   # worth the long training too; headline: that one alone

Only `question` is needed; a phase has none.
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
from student.runs.run_folder import flatten

EXPERIMENTS = Path("manifests/experiments")  # benchmarks run from the repository's root
STUDENTS = Path("manifests/students")
DUMPS = Path("manifests/dumps")
BASE = "experiment.yaml"
HELDOUT_CACHE, OTHER_CACHE = "experiment", "experiment-other"
"""Dumps whose held-out rows every arm is judged by: text of the kind that was trained on, and of another."""
UNFROZEN = ("model.student.train_embedding", "model.student.train_head")
LONG_CACHE = "experiment-long"
"""The text of `HELDOUT_CACHE` in longer rows, which arms with `long` are judged by as well."""


REVISION = 2
"""Raised when the code changes what arms come to: figures of before count as missing. 2: weights begin as a CPU's."""


@dataclass(frozen=True)
class Question:
    """A table: what it asks, and the arm whose figures the others' are taken from."""

    title: str
    reference: str


QUESTIONS = {
    "recommended": Question("What is the recommended student worth?", "recommended-ce"),
    "signal": Question("What of the teacher helps?", "ce"),
    "mix": Question("How much of the loss should be KL?", "delta"),
    "divergence": Question("Which KL, and what does a cache lose against a teacher in memory?", "online"),
    "k": Question("How many ids does a cache need?", "mix-0.9"),
    "attention": Question("Does aligning pooled attention help?", "delta"),
    "maps": Question("Does it help a student that begins as its teacher?", "start-aligned-fast"),
    "frobenius": Question("Does the Frobenius term help, and how finely must hidden states be stored?", "delta"),
    "start": Question("Does a start from the teacher's own weights help?", "start-aligned"),
    "aligned": Question("Which training from the aligned start?", "start-aligned-fast"),
    "near": Question("What does a cache lose where the student is near its teacher?", "start-aligned-online"),
    "late": Question("What helps late?", "start-aligned-short"),
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
        most: what a transfer's options may be at most.
    """

    name: str
    shards: int
    passes: int
    seeds: tuple[int, ...] = (0,)
    overrides: dict[str, Any] = field(default_factory=dict)
    dump: dict[str, Any] = field(default_factory=dict)
    most: dict[str, int] = field(default_factory=dict)


BUDGETS = {
    "screen": Budget("screen", shards=16, passes=1),
    "headline": Budget("headline", shards=57, passes=4, seeds=(0, 1, 2)),
    "small": Budget(
        "small",
        shards=2,
        passes=1,
        overrides={"model.student.blocks": 2, "data.batch_rows": 2, "trainer.log_every_n_steps": 1},
        dump={"length": 64, "tokens_per_shard": 512, "corpus.range_bytes": 65_536},
        most={"align_tokens": 4096, "batch_rows": 2},
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
    share: float = 1.0
    phase: bool = False
    long: bool = False
    before: Arm | None = None
    """The arm that `start` names."""

    def dumps(self) -> tuple[str, ...]:
        """Names of the dumps that it and what it begins from are trained on, and of `LONG_CACHE` if it is judged by it;
        what all are judged by is not among them."""
        before = () if self.before is None else self.before.dumps()
        return tuple(dict.fromkeys([self.cache, *before, *([LONG_CACHE] if self.long else [])]))

    def options(self, budget: Budget) -> dict[str, Any]:
        """Dotted options over the base and `config`."""
        return {**self.overrides, **budget.overrides, "trainer.max_epochs": budget.passes}

    def settings(self, budget: Budget) -> str:
        """Identity of all that its figures depend on but the seed: a row made under another one is out of date."""
        dump = _read(DUMPS / f"{self.cache}.yaml")
        for unimportant in ("cache", "shards"):
            dump.pop(unimportant, None)
        student = {**self._student_files(), **self.options(budget)}
        student.pop("model.graphs", None)  # changes times only
        judged = [_read(DUMPS / f"{name}.yaml") for name in (HELDOUT_CACHE, OTHER_CACHE)]
        what = [REVISION, student, dump, judged, budget.shards, budget.dump, self.start, self.teacher_in_loop]
        # Only where they are used: figures of arms without them stay what they were.
        phases: dict[str, Any] = {"share": self.share} if self.share != 1 else {}
        phases |= {"before": self.before.settings(budget)} if self.before is not None else {}
        phases |= {"long": _read(DUMPS / f"{LONG_CACHE}.yaml")} if self.long else {}
        what += [phases] if phases else []
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]

    def config_files(self) -> list[Path]:
        return [STUDENTS / name for name in (BASE, *self.config)]

    def shape(self) -> dict[str, Any]:
        """Dotted options of the student's shape."""
        options = {**self._student_files(), **self.overrides}
        return {name: value for name, value in options.items() if name.startswith("model.student.")}

    def frozen_shape(self) -> dict[str, Any]:
        """The same without which of the teacher's embedding and head are trained: a later phase may begin to."""
        return {name: value for name, value in self.shape().items() if name not in UNFROZEN}

    def _student_files(self) -> dict[str, Any]:
        files = [flatten(_read(path)) for path in self.config_files()]
        return {key: value for options in files for key, value in options.items()}


def load_arms(folder: Path = EXPERIMENTS) -> dict[str, Arm]:
    """Every arm, in the order of `QUESTIONS`, a question's reference first.

    Raises:
        UserError: see `load_arm`; or a question's reference has no file, or is a phase.
    """
    arms = {path.stem: load_arm(path) for path in sorted(folder.glob("*.yaml"))}
    if not arms:
        raise UserError(f"{folder} holds no arm (*.yaml): run this from the repository's root")
    for name, question in QUESTIONS.items():
        if any(name in arm.question for arm in arms.values()) and question.reference not in arms:
            raise UserError(f"{folder}/{question.reference}.yaml is missing: it is the reference of question {name}")
        if question.reference in arms and arms[question.reference].phase:
            raise UserError(
                f"{folder}/{question.reference}.yaml: phase is true, but it is the reference of question {name}"
            )
    order = list(QUESTIONS)
    references = [question.reference for question in QUESTIONS.values()]

    def place(arm: Arm) -> tuple[bool, int, str]:
        first = min((order.index(name) for name in arm.question), default=len(order))
        return arm.name not in references, first, arm.name

    return {arm.name: arm for arm in sorted(arms.values(), key=place)}


def load_arm(path: Path, later: tuple[str, ...] = ()) -> Arm:
    """Read one manifest, and those of the arms it begins from.

    Args:
        later: names of the arms that begin from this one, the nearest first.

    Raises:
        UserError: a field is unknown, missing or of another type, or names what does not exist; or an arm begins from
            itself, or from a student of another shape.
    """
    values = _read(path)
    known = {f.name for f in fields(Arm)} - {"name", "about", "before"}
    for unknown in sorted(values.keys() - known):
        raise UserError(f"{path}: {unknown} is no field of an arm; known are {', '.join(sorted(known))}")
    text = path.read_text(encoding="utf-8").splitlines()
    about = " ".join(line.lstrip("# ") for line in text if line.startswith("#"))
    if not about:
        raise UserError(f"{path} does not say in a comment which question it answers")
    question = _names(values.get("question"), path, "question", QUESTIONS)
    kinds = {"overrides": dict, "start": dict, "teacher_in_loop": bool, "phase": bool, "long": bool}
    for name, kind in kinds.items():
        if not isinstance(values.get(name, kind()), kind):
            raise UserError(f"{path}: {name} is {values[name]!r}, not of the type {kind.__name__}")
    phase = values.get("phase", False)
    if not question and not phase:
        raise UserError(f"{path}: question is missing; choose from {', '.join(QUESTIONS)}")
    for name in ("question", "long", "budget"):
        if phase and name in values:
            raise UserError(
                f"{path}: {name} is {values[name]!r}, but a phase is neither run nor judged by itself: remove it"
            )
    cache, budget = values.get("cache", HELDOUT_CACHE), values.get("budget", "screen")
    if not (DUMPS / f"{cache}.yaml").is_file():
        raise UserError(f"{path}: cache {cache!r} is no file of {DUMPS}")
    if budget not in ("screen", "headline", "both"):
        raise UserError(f"{path}: budget {budget!r} must be screen, headline or both")
    config = _names(values.get("config"), path, "config", [file.name for file in STUDENTS.glob("*.yaml")])
    start = values.get("start")
    before = _arm_before(path, start, (path.stem, *later))
    arm = Arm(path.stem, about, question, cache, config, values.get("overrides", {}), start,
              values.get("teacher_in_loop", False), budget, _share(path, values), phase, values.get("long", False),
              before)  # fmt: skip
    if before is not None and before.frozen_shape() != arm.frozen_shape():
        a, b = arm.frozen_shape(), before.frozen_shape()
        told = [f"{name} is {a.get(name)}, there {b.get(name)}" for name in {**a, **b} if a.get(name) != b.get(name)]
        raise UserError(f"{path}: start.arm {before.name} trains another student: {'; '.join(told)}")
    return arm


def _arm_before(path: Path, start: dict[str, Any] | None, later: tuple[str, ...]) -> Arm | None:
    """The arm that `start` names, if it names one."""
    if start is None or "arm" not in start:
        return None
    name, others = start["arm"], sorted(start.keys() - {"arm"})
    if others:
        raise UserError(f"{path}: start.arm stands alone, found {', '.join(others)} too: give that arm such a start")
    if not isinstance(name, str) or not path.with_name(f"{name}.yaml").is_file():
        raise UserError(f"{path}: start.arm {name!r} is no file of {path.parent}")
    if name in later:
        chain = [*later[::-1], name]
        raise UserError(f"{path}: start.arm {name} begins from this arm itself: {', then '.join(chain)}")
    return load_arm(path.with_name(f"{name}.yaml"), later)


def _share(path: Path, values: dict[str, Any]) -> float:
    share = values.get("share", 1.0)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise UserError(f"{path}: share is {share!r}, must be a number from 0 to 1, of the budget's steps")
    if share == 0 and values.get("start") is None:
        raise UserError(
            f"{path}: share is 0, which trains nothing: give the arm a start to evaluate, or a share above 0"
        )
    return float(share)


def is_current(row: dict[str, Any], arm: Arm | None, budget: Budget) -> bool:
    """Whether a row's figures are of the settings that its arm's manifest, and this code, has now."""
    return arm is None or row.get("settings") == arm.settings(budget)


def chosen(arms: dict[str, Arm], names: Iterable[str] | None, question: str | None, budget: Budget) -> list[Arm]:
    """The arms that are asked for: by name, by question (its reference too), or all that the budget is for.

    Raises:
        UserError: there is no such arm or question, or an arm that is named is a phase.
    """
    if names:
        unknown = sorted(set(names) - arms.keys())
        if unknown:
            raise UserError(f"--arms {' '.join(unknown)}: no such file in {EXPERIMENTS}; known are {', '.join(arms)}")
        if phases := sorted(name for name in set(names) if arms[name].phase):
            raise UserError(
                f"--arms {' '.join(phases)}: a phase is trained when an arm that begins from it is; name such an arm"
            )
        return [arms[name] for name in dict.fromkeys(names)]  # in the order that was asked for
    own = [arm for arm in arms.values() if not arm.phase]
    found = [arm for arm in own if budget.name not in ("screen", "headline") or arm.budget in (budget.name, "both")]
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
