"""From rows to tables: means over seeds, their deviations, and differences to a question's reference.

A difference is taken seed by seed, since arms of one seed begin with the same weights and see the same batches in the
same order, and averaged over the seeds that both have. What a difference of one seed is worth, `noise` says: the
standard deviation of such differences, pooled over all arms of the budget that have several seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from benchmarks.measured import Row
from benchmarks.quality.arms import QUESTIONS
from benchmarks.quality.results import TEACHER

Measure = Callable[[Row], float]


def measure(text: str, name: str) -> Measure:
    """A figure of a row, for example ("heldout", "kl_full")."""
    return lambda row: float(row[text][name])


KL = measure("heldout", "kl_full")
"""What arms are ordered by: nats per target between teacher and student over the whole vocabulary, on held-out text."""
CE = measure("heldout", "ce")
LONG_BINS = 3
"""Of the bins of positions in longer rows, so many of the last are told: from 256, 512 and 1,024 on in 2,048 tokens."""


@dataclass(frozen=True)
class Spread:
    """A mean over seeds, and the standard deviation of one seed; None with fewer than two."""

    mean: float
    deviation: float | None
    seeds: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(mean(values), stdev(values) if len(values) > 1 else None, len(values))

    def text(self, digits: int = 3, sign: bool = False) -> str:
        shown = f"{self.mean:{'+' if sign else ''}.{digits}f}"
        return shown if self.deviation is None else f"{shown} ± {self.deviation:.{digits}f}"


def of_budget(rows: Sequence[Row], budget: str) -> dict[str, list[Row]]:
    """Rows of figures of a budget, by arm."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["budget"] == budget and "error" not in row and row["arm"] != TEACHER:
            found.setdefault(row["arm"], []).append(row)
    return found


def of_question(rows: Sequence[Row], budget: str, question: str) -> dict[str, list[Row]]:
    """Of those, the arms of a question and its reference."""
    arms, reference = of_budget(rows, budget), QUESTIONS[question].reference
    return {name: own for name, own in arms.items() if question in own[0]["question"] or name == reference}


def difference(arm: Sequence[Row], reference: Sequence[Row], what: Measure) -> Spread | None:
    """Of the seeds that both have; None where they have none in common."""
    theirs = {row["seed"]: what(row) for row in reference}
    values = [what(row) - theirs[row["seed"]] for row in arm if row["seed"] in theirs]
    return Spread.of(values) if values else None


def noise(rows: Sequence[Row], budget: str, what: Measure) -> float | None:
    """Standard deviation of one seed's difference between two arms, pooled over all arms and their tables' references;
    None where no two arms share two seeds."""
    arms = of_budget(rows, budget)
    squares, freedom = 0.0, 0
    for question, asked in QUESTIONS.items():
        reference = arms.get(asked.reference, [])
        for name, own in arms.items():
            if name == asked.reference or question not in own[0]["question"]:
                continue
            found = difference(own, reference, what)
            if found is not None and found.deviation is not None:
                squares += found.deviation**2 * (found.seeds - 1)
                freedom += found.seeds - 1
    return math.sqrt(squares / freedom) if freedom else None


def question_table(rows: Sequence[Row], budget: str, question: str) -> list[Row]:
    """A row for each arm of a question, the reference first, then by the KL to the teacher; empty without figures."""
    own, reference = of_question(rows, budget, question), QUESTIONS[question].reference
    if not own.keys() - {reference}:
        return []
    order = sorted(own, key=lambda name: (name != reference, mean(map(KL, own[name]))))
    return [_line(name, own[name], own.get(reference, []), name == reference) for name in order]


def _line(name: str, own: Sequence[Row], reference: Sequence[Row], is_reference: bool) -> Row:
    line: Row = {"arm": name, "seeds": len(own)}
    for title, what in (("KL", KL), ("CE", CE)):
        found = None if is_reference else difference(own, reference, what)
        line[title] = Spread.of([what(row) for row in own]).text()
        line[f"{title} - ref"] = "reference" if is_reference else found.text(4, sign=True) if found else "-"
    line["ppl"] = f"{math.exp(mean(map(CE, own))):.1f}"
    line["bits/byte"] = f"{mean(row['heldout']['bits_per_byte'] for row in own):.3f}"
    line["top-1"] = f"{100 * mean(row['heldout']['top1_agreement'] for row in own):.1f}%"
    line["other KL"] = Spread.of([row["other"]["kl_full"] for row in own]).text()
    line["other CE"] = Spread.of([row["other"]["ce"] for row in own]).text()
    return line


def cost_table(rows: Sequence[Row], budget: str) -> list[Row]:
    """Seconds of each phase, speed, memory and what a token takes in the cache by arm, means over seeds."""
    phases = ("start", "prepare", "train", "save", "evaluate", "total")
    lines = []
    for name, own in of_budget(rows, budget).items():
        line: Row = {"arm": name, "seeds": len(own)}
        line |= {phase: round(mean(row["seconds"].get(phase, 0.0) for row in own), 1) for phase in phases}
        line |= {"tokens/s": round(mean(row["tokens_per_s"] for row in own))}
        line |= {"peak GB": round(max(row["peak_gb"] for row in own), 1)}
        stored = [row["cache_bytes"] for row in own if "cache_bytes" in row]  # rows of before did not say
        lines.append({**line, "cache B/token": round(mean(stored), 1) if stored else "-"})
    return lines


def long_table(rows: Sequence[Row], budget: str) -> list[Row]:
    """For each arm that was judged by longer rows too: KL and cross-entropy there, over all positions and in the
    last bins of positions, the teacher's cross-entropy beside them. Means over seeds."""
    lines: list[Row] = []
    found = {name: [row for row in own if "long" in row] for name, own in of_budget(rows, budget).items()}
    judged = {name: [row["long"] for row in own] for name, own in found.items() if own}
    for name, own in judged.items():
        line: Row = {"arm": name, "seeds": len(own)}
        line |= {title: Spread.of([one[key] for one in own]).text() for title, key in (("KL", "kl_full"), ("CE", "ce"))}
        bins = zip(*(one["by_position"][-LONG_BINS:] for one in own), strict=True)
        for bin_S in bins:
            first = int(bin_S[0][0])
            line |= {f"KL from {first:,}": f"{mean(place[3] for place in bin_S):.3f}"}
            line |= {f"CE from {first:,}": f"{mean(place[1] for place in bin_S):.3f}"}
            line |= {f"teacher from {first:,}": f"{mean(place[2] for place in bin_S):.3f}"}
        lines.append(line)
    return lines


def zero_shot_table(rows: Sequence[Row], budget: str) -> list[Row]:
    """Per cent of right answers by task: the teacher, every arm that was asked (means over seeds), and chance."""
    asked = {
        name: [row["zero_shot"] for row in own if "zero_shot" in row] for name, own in of_budget(rows, budget).items()
    }
    asked = {name: own for name, own in asked.items() if own}
    if not asked:
        return []
    one = next(iter(asked.values()))[0]

    def line(name: str, answers: Sequence[dict[str, dict[str, float]]]) -> Row:
        return {"arm": name, "seeds": len(answers)} | {
            task: f"{100 * mean(found[task][str(found[task]['measure'])] for found in answers):.1f}"
            for task in one["tasks"]
        }

    chance = {task: "-" if value is None else f"{100 * value:.1f}" for task, value in one["chance"].items()}
    arms = [line(name, [row["tasks"] for row in own]) for name, own in asked.items()]
    return [line(TEACHER, [one["teacher"]]), *arms, {"arm": "chance", "seeds": "-", **chance}]


ATTENTION_COLUMNS = ("student", "untrained", "mean_teacher_map", "recency", "uniform")


def attention_table(rows: Sequence[Row], budget: str) -> list[Row]:
    """For each arm that was compared: the distance of its attention maps from the teacher's, and of what has learned
    none; with the first key block and without it. Means over seeds."""
    lines: list[Row] = []
    for name, own in of_budget(rows, budget).items():
        found = [row["attention"]["mean"] for row in own if "attention" in row]
        if found:
            line: Row = {"arm": name, "seeds": len(found)}
            for sinks, title in (("keep", ""), ("drop", ", no sink")):
                for whose in ATTENTION_COLUMNS:
                    distances = [one[sinks]["jensen_shannon"][whose] for one in found]
                    line[f"{whose.replace('_', ' ')}{title}"] = f"{mean(distances):.4f}"
            lines.append(line)
    return sorted(lines, key=lambda line: float(line["student"]))


def depth_table(rows: Sequence[Row], budget: str) -> list[Row]:
    """The same by depth, the first key block included: every arm's student (a "-" where no block of it has maps), then
    fresh weights, once for arms that have the same, and what depends on the teacher alone."""
    asked = {
        name: [row["attention"]["depth"] for row in own if "attention" in row]
        for name, own in of_budget(rows, budget).items()
    }

    def line(name: str, whose: str, found: Sequence[Sequence[Row]]) -> Row:
        told: Row = {"attention of": name}
        for groups in zip(*found, strict=True):
            distances = [group["keep"]["jensen_shannon"].get(whose) for group in groups]
            title = f"{groups[0]['from']:.0%} to {groups[0]['to']:.0%}"
            told[title] = "-" if None in distances else f"{mean(distances):.3f}"
        return told

    asked = {name: found for name, found in asked.items() if found}
    lines = [line(name, "student", found) for name, found in asked.items()]
    fresh: list[Row] = []
    for name, found in asked.items():
        of_arm = line(f"{name}, untrained", "untrained", found)
        if list(of_arm.values())[1:] not in [list(known.values())[1:] for known in fresh]:
            fresh.append(of_arm)
    others = [
        line(whose.replace("_", " "), whose, found)
        for found in list(asked.values())[:1]
        for whose in ATTENTION_COLUMNS[2:]
    ]
    return [*lines, *fresh, *others]


def teacher_row(rows: Sequence[Row], budget: str) -> Row | None:
    """The teacher's own figures on the texts that a budget is judged by."""
    wanted = "small" if budget == "small" else TEACHER
    return next((row for row in rows if row["arm"] == TEACHER and row["budget"] == wanted), None)
