"""Sections of the report on what was measured of the student beside the evaluation's main figures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeline.report import page
from pipeline.report.results import NAMES, SINKS
from pipeline.report.sources import Run

WHOSE = {
    "student": "student",
    "untrained": "untrained student",
    "mean_teacher_map": "teacher's mean map",
    "recency": "recency",
    "uniform": "uniform",
    "own_block": "own block",
    "previous_block": "previous block",
}
TITLES = {"keep": "with the first key block", "drop": "without the first key block"}


def by_position(figures: dict[str, Any]) -> Iterator[str]:
    """Cross-entropy and divergence by position in the context; nothing where an older version evaluated."""
    from pipeline.report.position_figure import position_curves

    picture = position_curves(figures.get("by_position", []))
    if picture is not None:
        yield page.heading("By position in the context", 3)
        caption = (
            "A student whose state carries the context gets better with position, as the teacher does. The first "
            "positions of a row have few targets: one a row and position."
        )
        yield page.image(picture, "Cross-entropy of student and teacher, and KL, by position in the context", caption)


def other_evaluations(run: Run) -> Iterator[str]:
    """A row for each evaluation on another cache."""
    if not run.measured.others:
        return
    yield page.heading("On other text", 3)
    head = ["", "targets", *(f"{name}, nats" for name in NAMES), "KL over K+1 outcomes", "cache"]
    keys = [("targets", ",.0f"), *((f"{name}_cross_entropy", ".4f") for name in NAMES), ("kl_k1", ".4f")]
    rows = []
    for name, figures in run.measured.others.items():
        cells = [format(figures[key], form) if key in figures else "–" for key, form in keys]
        rows.append([name, *cells, str(figures.get("cache", ""))])
    yield page.number_table(head, rows)


def zero_shot(run: Run) -> Iterator[str]:
    """Accuracies of tasks the student was not trained for; nothing where they were not asked."""
    content = run.measured.zero_shot
    if content is None:
        return
    yield page.heading("Zero-shot tasks")
    limit = content["limit"]
    asked = "All documents" if limit is None else f"The first {limit:,} documents"
    yield page.paragraph(
        f"{asked} of each task, no examples before the question (from {content['package']}); accuracy in %, with its "
        "standard error. acc: the likeliest answer counts; acc_norm: the likeliest per character."
    )
    models = content["models"]
    rows = []
    for name, task in content["tasks"].items():
        measure = task["measure"]
        chance = "–" if task["chance"] is None else f"{100 * task['chance']:.1f}"
        cells = [models[role]["tasks"][name] for role in models]
        values = [f"{100 * cell[measure]:.1f} ± {100 * cell[f'{measure}_stderr']:.1f}" for cell in cells]
        rows.append([name, measure, f"{task['documents']:,}", chance, *values])
    yield page.number_table(["", "measure", "documents", "chance", *models], rows)


def attention_distance(run: Run) -> Iterator[str]:
    """Distances of the student's attention and of baselines to the teacher's; nothing where they were not measured."""
    content = run.measured.distance
    if content is None:
        return
    yield page.heading("How much of the attention was learned", 3)
    yield page.paragraph(
        f"Jensen-Shannon divergence in bits from the teacher's maps, over {content['rows']:,} held-out rows; 0 is the "
        f"same. The teacher's mean map does not look at the text and is about the best such map: what is below it was "
        f"learned from content. Mean map and recency are fitted to {content['fitted_rows']:,} training rows."
    )
    groups = len(content["depth"])
    for sinks in SINKS:
        rows = []
        for group, entry in enumerate(content["depth"]):
            place = f"depth {100 * group // groups}–{100 * (group + 1) // groups}%, {TITLES[sinks]}"
            rows.append([place, *_cells(entry[sinks]["jensen_shannon"])])
        rows.append([f"mean, {TITLES[sinks]}", *_cells(content["mean"][sinks]["jensen_shannon"])])
        yield page.number_table(["", *WHOSE.values()], [rows[-1], *rows[:-1]])
    if run.measured.picture is not None:
        caption = "The first held-out row; below each map its mean distance over all of them, first key block included."
        yield page.image(
            run.measured.picture, "Attention maps of one held-out row: teacher, student, baselines", caption
        )


def _cells(means: dict[str, float]) -> list[str]:
    return [f"{means[whose]:.4f}" if whose in means else "–" for whose in WHOSE]
