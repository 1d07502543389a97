"""What was measured of a student, read from the JSON files of its run folder; they may come from a stranger.

evaluation.json          student/evaluate.py; evaluation-NAME.json: the same on another cache
zero_shot.json           student/zero_shot.py
attention_distance.json  student/attention_distance.py, and its picture
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.commit import read_json
from pipeline.errors import UserError
from pipeline.fields import Fields

NAMES = ("student", "teacher", "unigram")
MEASURES = ("cross_entropy", "perplexity", "bits_per_byte")
FIGURES = {"rows", "targets", "target_bytes", "kl_k1", "kl_full", "top1_agreement", "trainable_parameters"}
TEXTS = {"checkpoint", "unigram", "cache", "precision"}
OF_POSITION = ("student_cross_entropy", "teacher_cross_entropy", "kl_k1")
DISTANCES = ("jensen_shannon", "total_variation")
SINKS = ("keep", "drop")
MOST_BINS, MOST_GROUPS, MOST_TASKS, MOST_MODELS, MOST_EVALUATIONS = 64, 4096, 100, 16, 32
MOST_PICTURE = 16 << 20
PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Measured:
    """What the files hold, the parts that pages show checked; empty or None where there is none.

    Attributes:
        others: NAME of evaluation-NAME.json -> its figures.
        zero_shot: of zero_shot.json.
        distance: of attention_distance.json.
        picture: attention_distance.png.
    """

    others: dict[str, dict[str, Any]] = field(default_factory=dict)
    zero_shot: dict[str, Any] | None = None
    distance: dict[str, Any] | None = None
    picture: bytes | None = None


def read_measured(run: Path, problems: list[str]) -> Measured:
    """Read what is there; what is damaged is told in `problems`."""

    def of(path: Path, read: Any) -> Any:
        try:
            return read(path) if path.is_file() else None
        except UserError as error:
            problems.append(str(error))
            return None

    files = sorted(run.glob("evaluation-*.json"))[:MOST_EVALUATIONS]
    found = {path.stem.removeprefix("evaluation-"): of(path, read_evaluation) for path in files}
    return Measured(
        {name: figures for name, figures in found.items() if figures is not None},
        of(run / "zero_shot.json", read_zero_shot),
        of(run / "attention_distance.json", read_distance),
        of(run / "attention_distance.png", read_picture),
    )


def read_evaluation(path: Path) -> dict[str, Any]:
    """The figures of an evaluation, those that pages show checked.

    Raises:
        UserError: the file is damaged, or a figure is no number.
    """
    record = Fields(read_json(path), path)
    measured = {f"{name}_{measure}" for name in NAMES for measure in MEASURES}
    for name in sorted((FIGURES | measured) & record.record.keys()):
        record.number(name)
    for name in sorted(TEXTS & record.record.keys()):
        record.text(name)
    if "by_position" in record.record:
        for row in record.list("by_position", MOST_BINS):
            entry = Fields(row, f"{path}: by_position")
            for name in ("first", "last", "targets"):
                entry.integer(name)
            for name in (*OF_POSITION, *({"kl_full"} & entry.record.keys())):
                entry.number(name)
    return record.record


def read_zero_shot(path: Path) -> dict[str, Any]:
    """The accuracies of zero-shot tasks.

    Raises:
        UserError: the file is damaged, or a figure is no number.
    """
    record = Fields(read_json(path), path)
    if not record.absent("limit"):
        record.integer("limit", 1)
    record.text("package")
    tasks, models = record.fields("tasks"), record.fields("models")
    for part, most in ((tasks, MOST_TASKS), (models, MOST_MODELS)):
        if len(part.record) > most or any(len(name) > 64 for name in part.record):
            raise UserError(f"{part.where} has more than {most} entries, or long names: another program wrote it")
    for name in tasks.record:
        task = tasks.fields(name)
        task.integer("documents", 1)
        measure = task.choice("measure", ("acc", "acc_norm"))
        if not task.absent("chance"):
            task.number("chance", 0, 1)
        for role in models.record:
            figures = models.fields(role).fields("tasks").fields(name)
            for figure in (measure, f"{measure}_stderr"):
                figures.number(figure, 0, 1)
    return record.record


def read_distance(path: Path) -> dict[str, Any]:
    """The distances of attention maps, by depth group.

    Raises:
        UserError: the file is damaged, or a figure is no number.
    """
    record = Fields(read_json(path), path)
    for name in ("rows", "fitted_rows", "tokens_per_block"):
        record.integer(name)
    depth = [Fields(entry, f"{path}: depth") for entry in record.list("depth", MOST_GROUPS)]
    for entry in [*depth, record.fields("mean")]:
        for sinks in SINKS:
            for name in DISTANCES:
                means = entry.fields(sinks).fields(name)
                for whose in means.record:
                    means.number(whose, 0, 1)
    return record.record


def read_picture(path: Path) -> bytes:
    """A PNG as it stands.

    Raises:
        UserError: it is none, or a very large one.
    """
    with open(path, "rb") as file:
        content = file.read(MOST_PICTURE + 1)
    if not content.startswith(PNG) or len(content) > MOST_PICTURE:
        raise UserError(f"{path} is no PNG of at most {MOST_PICTURE >> 20} MiB: measure again")
    return content
