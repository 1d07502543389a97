"""Further judges of a trained student, where a run asks for them: zero-shot tasks, and attention that was learned."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from student.attention_distance import AttentionDistanceOptions, attention_distance
from student.zero_shot import ZeroShotOptions, zero_shot

JUDGES = ("zero_shot", "attention")
DOCUMENTS, FEW_DOCUMENTS = 1000, 4
"""Of each task: an accuracy's standard error is at most 1.6%. The few are the budget `small`'s."""
ATTENTION_ROWS = 64
DATA = Path("data")


def zero_shot_figures(
    out: Path, documents: int, *, run: str | None = None, teacher: str | None = None
) -> dict[str, Any]:
    """Accuracies by task.

    Args:
        out: file for the command's own figures.
        documents: of each task, the first so many.
        run, teacher: folder of the model; one of the two.

    Raises:
        UserError: see `student.zero_shot.zero_shot`.
    """
    options = ZeroShotOptions(
        run, teacher=teacher, limit=documents, precision="bf16-mixed", data=str(DATA), out=str(out)
    )
    content = zero_shot(options)
    (found,) = content["models"].values()
    measures = {name: task["measure"] for name, task in content["tasks"].items()}
    return {
        "documents": documents,
        "tasks": {name: {"measure": measures[name], **figures} for name, figures in found["tasks"].items()},
        "chance": {name: task["chance"] for name, task in content["tasks"].items()},
    }


def attention_figures(run: Path, cache: Path, picture: Path, rows: int = ATTENTION_ROWS) -> dict[str, Any]:
    """Mean distances from the teacher's pooled maps, of the student and of the baselines.

    Args:
        run: the student's.
        cache: with attention maps and held-out rows.
        picture: file for the maps of a row.
        rows: held-out rows to compare on.

    Raises:
        UserError: see `student.attention_distance.attention_distance`.
    """
    options = AttentionDistanceOptions(str(run), str(cache), max_rows=rows, precision="bf16-mixed")
    content = attention_distance(options)
    picture.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run / "attention_distance.png", picture)
    depth = [
        {"from": entry["from"], "to": entry["to"], "keep": entry["keep"], "drop": entry["drop"]}
        for entry in content["depth"]
    ]
    return {"rows": content["rows"], "mean": content["mean"], "depth": depth}
