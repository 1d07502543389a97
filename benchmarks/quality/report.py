"""docs/results.md and its pictures, out of quality.json alone: `results_template.md` with tables put in."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from string import Template

from benchmarks.measured import Row
from benchmarks.quality.arms import BUDGETS, QUESTIONS, is_current, load_arms
from benchmarks.quality.plots import COLOURS, kl_by_arm, positions, training_curves
from benchmarks.quality.results import TEACHER
from benchmarks.quality.tables import (
    CE,
    KL,
    attention_table,
    cost_table,
    depth_table,
    difference,
    long_table,
    noise,
    of_budget,
    of_question,
    question_table,
    teacher_row,
    zero_shot_table,
)
from pipeline.commit import commit_bytes
from pipeline.errors import UserError
from pipeline.markdown import plain, table

DOCS = Path("docs")
TEMPLATE = Path(__file__).with_name("results_template.md")
SHOWN = ("headline", "screen")
"""Budgets that the page tells of, the weightier first."""
NOT_YET = "\nNothing was measured yet.\n"
SURE = 2.0
"""A difference is told as one if it is so many times its own noise."""


def write_report(rows: Sequence[Row], curves: Sequence[Row], docs: Path = DOCS) -> Path:
    """Write DOCS/results.md and DOCS/results/*.png; returns the page.

    Raises:
        UserError: there are no figures yet.
    """
    budgets = [budget for budget in SHOWN if of_budget(rows, budget)]
    if not budgets:
        raise UserError("there are no figures to report yet: run python -m benchmarks.quality on a machine with a GPU")
    pictures = docs / "results"
    measured = [row for row in rows if "error" not in row and row["budget"] in (*SHOWN, TEACHER)]
    students = [row for row in measured if row["arm"] != TEACHER]
    parts = {
        "teacher": _teacher(teacher_row(rows, budgets[0])),
        "parameters": ", ".join(sorted({f"{row['trainable_parameters']:,}" for row in students})),
        "budgets": " ".join(_budget(of_budget(rows, budget)) for budget in budgets),
        "heldout": f"{students[0]['heldout']['targets']:,}",
        "other": f"{students[0]['other']['targets']:,}",
        "outdated": " ".join(_outdated(rows, budget) for budget in budgets),
        "noise": " ".join(_noise(rows, budget) for budget in budgets),
        "questions": "".join(_question(rows, curves, name, budgets, pictures) for name in QUESTIONS),
        "positions": _positions(rows, budgets[0], pictures) + "".join(_long(rows, budget) for budget in budgets),
        "zero_shot": _of_budgets(zero_shot_table, rows, budgets),
        "attention": _of_budgets(attention_table, rows, budgets),
        "depth": _of_budgets(depth_table, rows, budgets),
        "maps": _maps(rows, pictures),
        "costs": "".join(_costs(rows, budget) for budget in budgets),
        "devices": ", ".join(sorted({str(row["device"]) for row in measured})),
    }
    page = docs / "results.md"
    commit_bytes(page, Template(TEMPLATE.read_text(encoding="utf-8")).substitute(parts).encode())
    return page


def _teacher(row: Row | None) -> str:
    about = "SmolLM2-135M-Instruct (its 4-bit weights, bfloat16) on enwik8, Wikipedia cleaned of markup."
    if row is None:
        return about
    told = [
        f"{row[text]['ce']:.3f} nats ({row[text]['perplexity']:.1f} perplexity, {row[text]['bits_per_byte']:.3f} bits "
        f"per byte) on {where}"
        for text, where in (("heldout", "the held-out part"), ("other", "Shakespeare"))
    ]
    return f"{about} Its own cross-entropy is {' and '.join(told)}."


def _budget(arms: dict[str, list[Row]]) -> str:
    rows = [row for own in arms.values() for row in own]
    rows = [row for row in rows if row.get("share", 1) == 1] or rows  # what an arm is trained that is not cut in phases
    tokens, steps = (sorted({row[name] for row in rows}) for name in ("tokens", "steps"))
    seeds = sorted({row["seed"] for row in rows})
    return (
        f"*{rows[0]['budget']}*: {' or '.join(f'{n / 1e6:.1f}' for n in tokens)} million token positions, "
        f"{' or '.join(f'{n:,}' for n in steps)} steps, {len(arms)} arms, seeds {', '.join(map(str, seeds))}."
    )


def _outdated(rows: Sequence[Row], budget: str) -> str:
    """The arms whose figures are of an earlier manifest or earlier code, and therefore to be measured again."""
    arms = load_arms()
    old = [
        name
        for name, own in of_budget(rows, budget).items()
        if not all(is_current(row, arms.get(name), BUDGETS[budget]) for row in own)
    ]
    return f"Of *{budget}*: {', '.join(f'`{name}`' for name in old) or 'none'}."


def _noise(rows: Sequence[Row], budget: str) -> str:
    spread = noise(rows, budget, KL), noise(rows, budget, CE)
    if spread[0] is None or spread[1] is None:
        return f"Of *{budget}* no two arms have two seeds in common: what their differences are worth is not known."
    return (
        f"In *{budget}* the difference between two arms of one seed has a standard deviation of {spread[0]:.4f} nats "
        f"in KL and {spread[1]:.4f} in CE from seed to seed."
    )


def verdicts(rows: Sequence[Row], budget: str, question: str) -> str:
    """Which arms of a question differ from its reference by more than noise, in a sentence or two."""
    spread, asked = noise(rows, budget, KL), QUESTIONS[question]
    arms = of_question(rows, budget, question)
    reference = arms.pop(asked.reference, None)
    if spread is None or reference is None:
        return ""
    told: dict[str, list[str]] = {"better": [], "worse": [], "same": []}
    for name, own in arms.items():
        found = difference(own, reference, KL)
        if found is None:
            continue
        limit = SURE * spread / math.sqrt(found.seeds)
        kind = "same" if abs(found.mean) <= limit else "better" if found.mean < 0 else "worse"
        told[kind].append(f"`{name}` ({found.mean:+.4f})")
    sentences = [
        (told["better"], "Nearer to the teacher than `{}` by more than twice the noise: {}."),
        (told["worse"], "Farther from it than `{}`: {}."),
        (told["same"], "Not told apart from `{}`: {}."),
    ]
    return " ".join(text.format(asked.reference, ", ".join(names)) for names, text in sentences if names)


def _question(rows: Sequence[Row], curves: Sequence[Row], name: str, budgets: list[str], pictures: Path) -> str:
    text = ""
    for budget in budgets:
        lines = question_table(rows, budget, name)
        if not lines:
            continue
        arms = of_question(rows, budget, name)
        order = {line["arm"]: arms[line["arm"]] for line in lines}
        picture = pictures / f"{name}-{budget}.png"
        commit_bytes(picture, kl_by_arm(order, QUESTIONS[name].reference, noise(rows, budget, KL)))
        text += f"\n### {budget.capitalize()}\n\n"
        said = verdicts(rows, budget, name)
        text += f"{said}\n\n" if said else ""
        text += _table(lines)
        text += f"\n![KL to the teacher by arm]({pictures.name}/{picture.name})\n"
        own = [curve for curve in curves if curve["budget"] == budget]
        there = [arm for arm in order if any(curve["arm"] == arm for curve in own)]
        if name == "signal" and there:
            commit_bytes(pictures / f"curves-{budget}.png", training_curves(own, there))
            text += f"\n![Training curves]({pictures.name}/curves-{budget}.png)\n"
    if not text:
        return ""
    abouts = {arm.name: arm.about for arm in load_arms().values() if name in arm.question}
    asked = "".join(f"- `{arm}`: {about}\n" for arm, about in abouts.items())
    return f"## {QUESTIONS[name].title}\n\n{asked}{text}\n"


def _positions(rows: Sequence[Row], budget: str, pictures: Path) -> str:
    # What is learned from nothing beside what begins as the teacher; each arm has a colour of its own.
    arms = of_question(rows, budget, "start") | of_question(rows, budget, "signal") or of_budget(rows, budget)
    arms = dict(list(arms.items())[: len(COLOURS)])
    picture = pictures / f"positions-{budget}.png"
    commit_bytes(picture, positions(arms, teacher_row(rows, budget)))
    return f"*{budget}*, held-out text.\n\n![Cross-entropy by position]({pictures.name}/{picture.name})\n"


def _long(rows: Sequence[Row], budget: str) -> str:
    lines = long_table(rows, budget)
    if not lines:
        return ""
    return f"\n*{budget}*, held-out text in longer rows, by the positions that follow:\n\n{_table(lines)}\n"


def _of_budgets(of: Callable[[Sequence[Row], str], list[Row]], rows: Sequence[Row], budgets: list[str]) -> str:
    found = {budget: of(rows, budget) for budget in budgets}
    return "".join(f"\n*{name}*\n\n{_table(lines)}\n" for name, lines in found.items() if lines) or NOT_YET


def _maps(rows: Sequence[Row], pictures: Path) -> str:
    """Pictures of maps that the runner left, beside the other pictures, of arms that have such a figure."""
    arms = dict.fromkeys(row["arm"] for row in rows if "attention" in row)
    text = ""
    for arm in arms:
        for picture in sorted(pictures.glob(f"attention-{arm}-[0-9]*.png"))[:1]:  # of the first seed that was asked
            text += f"\n`{arm}`:\n\n![Maps of {arm}]({pictures.name}/{picture.name})\n"
    return text


def _costs(rows: Sequence[Row], budget: str) -> str:
    told = _table(cost_table(rows, budget))
    return f"*{budget}*, seconds of each phase, several arms side by side on one GPU:\n\n{told}\n"


def _table(lines: Sequence[Row]) -> str:
    head = list(lines[0])
    return table(head, [[_cell(line[column], column) for column in head] for line in lines])


def _cell(value: object, column: str) -> str:
    if column == "arm":
        return f"`{value}`"
    return f"{value:,}" if isinstance(value, int) else plain(value)
