"""docs/results.md and its pictures, out of quality.json alone: `results_template.md` with tables put in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
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
    long_table,
    noise,
    of_budget,
    of_question,
    position_table,
    question_table,
    teacher_row,
    verdicts,
    zero_shot_table,
)
from pipeline.commit import commit_bytes
from pipeline.errors import UserError
from pipeline.markdown import plain, table

DOCS = Path("docs")
TEMPLATE = Path(__file__).with_name("results_template.md")
SHOWN = ("headline", "screen")
"""Budgets that the page tells of, the weightier first."""
MAPS = "attention-"
"""How the names of maps' pictures begin, which the runner makes and a user puts beside the page."""
NOT_YET = "\nNothing was measured yet.\n"


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
        "short": _in_short(rows, budgets),
        "questions": "".join(_question(rows, curves, name, budgets, pictures) for name in QUESTIONS),
        "positions": _positions(rows, budgets[0], pictures) + "".join(_long(rows, budget) for budget in budgets),
        "zero_shot": _of_budgets(zero_shot_table, rows, budgets),
        "attention": _of_budgets(attention_table, rows, budgets),
        "depth": _of_budgets(partial(depth_table, sinks="keep"), rows, budgets),
        "depth_no_sink": _of_budgets(partial(depth_table, sinks="drop"), rows, budgets),
        "maps": _maps(rows, pictures),
        "costs": "".join(_costs(rows, budget) for budget in budgets),
        "devices": ", ".join(sorted({str(row["device"]) for row in measured})),
    }
    page = docs / "results.md"
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(parts)
    commit_bytes(page, text.encode())
    for picture in pictures.glob("*.png"):  # of an earlier page
        if f"{pictures.name}/{picture.name}" not in text and not picture.name.startswith(MAPS):
            picture.unlink()
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
    told = []
    for name in QUESTIONS:
        spread = noise(rows, budget, name, KL), noise(rows, budget, name, CE)
        if spread[0] is not None and spread[1] is not None:
            kl, ce, freedom = spread[0].deviation, spread[1].deviation, spread[0].freedom
            told.append(f"{name} {kl:.4f} and {ce:.4f} ({freedom})")
    if not told:
        return (
            f"Of *{budget}* no two arms of a question have two seeds in common: nothing is known of their differences."
        )
    return f"*{budget}*, by question, nats of KL and of CE (degrees of freedom): {'; '.join(told)}."


def _in_short(rows: Sequence[Row], budgets: list[str]) -> str:
    """The verdict of every question that has one, of the weightiest budget that gives it."""
    lines = []
    for name, asked in QUESTIONS.items():
        said = next(((budget, text) for budget in budgets if (text := verdicts(rows, budget, name))), None)
        if said is not None:
            lines.append(f"- **{asked.title}** {said[1]} (*{said[0]}*)\n")
    return "".join(lines) or NOT_YET.strip() + "\n"


def _question(rows: Sequence[Row], curves: Sequence[Row], name: str, budgets: list[str], pictures: Path) -> str:
    text = ""
    for budget in budgets:
        lines = question_table(rows, budget, name)
        if not lines:
            continue
        arms = of_question(rows, budget, name)
        order = {line["arm"]: arms[line["arm"]] for line in lines}
        picture = pictures / f"{name}-{budget}.png"
        reference, spread = QUESTIONS[name].reference, noise(rows, budget, name, KL)
        band = spread.limit(len(arms[reference])) if spread is not None and reference in arms else None
        commit_bytes(picture, kl_by_arm(order, reference, band))
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
    arms = of_question(rows, budget, "recommended") | of_question(rows, budget, "signal") or of_budget(rows, budget)
    arms = dict(list(arms.items())[: len(COLOURS)])
    teacher = teacher_row(rows, budget)
    picture = pictures / f"positions-{budget}.png"
    commit_bytes(picture, positions(arms, teacher))
    told = f"![Cross-entropy by position]({pictures.name}/{picture.name})\n\n{_table(position_table(arms, teacher))}"
    return f"*{budget}*, held-out text; the table by how many tokens were read, from so many on.\n\n{told}\n"


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
        for picture in sorted(pictures.glob(f"{MAPS}{arm}-[0-9]*.png"))[:1]:  # of the first seed that was asked
            text += f"\n`{arm}`:\n\n![Maps of {arm}]({pictures.name}/{picture.name})\n"
    return text


def _costs(rows: Sequence[Row], budget: str) -> str:
    told = _table(cost_table(rows, budget))
    return f"*{budget}*, seconds of each phase; a line for each way it was run:\n\n{told}\n"


def _table(lines: Sequence[Row]) -> str:
    head = list(lines[0])
    return table(head, [[_cell(line[column], column) for column in head] for line in lines])


def _cell(value: object, column: str) -> str:
    if column == "arm":
        return f"`{value}`"
    return f"{value:,}" if isinstance(value, int) else plain(value)
