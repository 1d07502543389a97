"""From rows to tables: means over seeds, their deviations, and differences to a question's reference.

A difference is taken seed by seed, since arms of one seed begin with the same weights and see the same batches in the
same order, and averaged over the seeds that both have. What a difference of one seed is worth, `noise` says: the
standard deviation of such differences, pooled over the arms of a question that have several seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

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
MOST_T = 13
STUDENT_T = dict(enumerate((12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16), start=1))
"""Two-sided 95% quantiles of Student's distribution by degrees of freedom; the last one for more of them."""
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


@dataclass(frozen=True)
class Noise:
    """Standard deviation of one seed's difference between two arms, and on how many degrees of freedom it is known."""

    deviation: float
    freedom: int

    def limit(self, seeds: int) -> float:
        """What the mean difference of so many seeds must exceed to be one: half of a 95% interval around nothing."""
        return STUDENT_T.get(self.freedom, STUDENT_T[MOST_T]) * self.deviation / math.sqrt(seeds)


def noise(rows: Sequence[Row], budget: str, question: str, what: Measure) -> Noise | None:
    """Pooled over the arms of a question, each against the reference; None where no arm shares two seeds with it."""
    arms, name = of_question(rows, budget, question), QUESTIONS[question].reference
    reference = arms.pop(name, [])
    found = [spread for own in arms.values() if (spread := difference(own, reference, what)) is not None]
    known = [(spread.deviation, spread.seeds - 1) for spread in found if spread.deviation is not None]
    freedom = sum(n for _, n in known)
    return Noise(math.sqrt(sum(s**2 * n for s, n in known) / freedom), freedom) if freedom else None


def question_table(rows: Sequence[Row], budget: str, question: str) -> list[Row]:
    """A row for each arm of a question, the reference first, then by the KL to the teacher; empty without
    the reference, or with nothing else."""
    own, reference = of_question(rows, budget, question), QUESTIONS[question].reference
    if reference not in own or len(own) < 2:
        return []
    order = sorted(own, key=lambda name: (name != reference, mean(map(KL, own[name]))))
    return [_line(name, own[name], own.get(reference, []), name == reference) for name in order]


def _line(name: str, own: Sequence[Row], reference: Sequence[Row], is_reference: bool) -> Row:
    line: Row = {"arm": name, "seeds": len(own), "trained": f"{own[0]['trainable_parameters'] / 1e6:.1f} M"}
    line["tokens"] = tokens_text(own[0])
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


def verdicts(rows: Sequence[Row], budget: str, question: str) -> str:
    """Which arms of a question differ from its reference by more than noise, in KL and in CE, a sentence each; empty
    where no arm has two seeds."""
    asked, arms = QUESTIONS[question], of_question(rows, budget, question)
    reference = arms.pop(asked.reference, None)
    sentences = []
    for title, what in (("KL to the teacher", KL), ("Cross-entropy", CE)):
        spread = noise(rows, budget, question, what)
        if spread is None or reference is None:
            continue
        told: dict[str, list[str]] = {"lower": [], "higher": [], "not told apart": []}
        for name, own in arms.items():
            found = difference(own, reference, what)
            if found is not None:
                same = abs(found.mean) <= spread.limit(found.seeds)
                kind = "not told apart" if same else "lower" if found.mean < 0 else "higher"
                told[kind].append(f"`{name}` ({found.mean:+.4f})")
        parts = [f"{kind} with {', '.join(names)}" for kind, names in told.items() if names]
        sentences.append(f"{title}, against `{asked.reference}`: {'; '.join(parts)}.")
    return " ".join(sentences)


def tokens_text(row: Row) -> str:
    """Millions of tokens that a student was trained on, over all phases, and of the transfer of attention before."""
    trained, aligned = row["tokens"] + row.get("tokens_before", 0), row.get("align_tokens", 0)
    return f"{trained / 1e6:.1f} M" + (f" + {aligned / 1e6:.1f} M" if aligned else "")


def cost_table(rows: Sequence[Row], budget: str) -> list[Row]:
    """Seconds of each phase, speed, memory and what a token takes in the cache, means over an arm's seeds that were run
    alike: on such a GPU, with as many others beside it, with CUDA graphs or without."""
    phases = ("start", "prepare", "train", "save", "evaluate", "total")
    alike: dict[tuple[Any, ...], list[Row]] = {}
    for name, own in of_budget(rows, budget).items():
        for row in own:
            workers = row["workers"] / row.get("gpus", 1) if "workers" in row else None
            alike.setdefault((name, row.get("device"), workers, row.get("graphs")), []).append(row)
    lines = []
    for (name, device, workers, graphs), own in alike.items():
        line: Row = {"arm": name, "seeds": len(own), "on": str(device).removeprefix("NVIDIA ").split(" ")[0]}
        line |= {"at once": "-" if workers is None else f"{workers:g}"}
        line |= {"graphs": {None: "-", True: "yes", False: "no"}[graphs]}
        line |= {phase: round(mean(row["seconds"].get(phase, 0.0) for row in own), 1) for phase in phases}
        line |= {"tokens/s": round(mean(row["tokens_per_s"] for row in own))}
        line |= {"peak GB": round(max(row["peak_gb"] for row in own), 1)}
        stored = [row["cache_bytes"] for row in own if "cache_bytes" in row]  # rows of before did not say
        lines.append({**line, "cache B/token": round(mean(stored), 1) if stored else "-"})
    return lines


def position_table(arms: dict[str, list[Row]], teacher: Row | None) -> list[Row]:
    """Cross-entropy by how many tokens were read, from so many on, means over seeds, and the teacher's."""

    def line(name: str, own: Sequence[Row]) -> Row:
        bins = zip(*(row["by_position"] for row in own), strict=True)
        return {"arm": name} | {f"{bin_S[0][0] + 1:,}": f"{mean(place[1] for place in bin_S):.3f}" for bin_S in bins}

    lines = [line(name, own) for name, own in arms.items()]
    return [*lines, *([line(TEACHER, [teacher])] if teacher is not None else [])]


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


def depth_table(rows: Sequence[Row], budget: str, sinks: str = "keep") -> list[Row]:
    """The same by depth, the first key block kept or dropped: every arm's student (a "-" where no block of it has
    maps), then fresh weights, once for arms that have the same, and what depends on the teacher alone."""
    asked = {
        name: [row["attention"]["depth"] for row in own if "attention" in row]
        for name, own in of_budget(rows, budget).items()
    }

    def line(name: str, whose: str, found: Sequence[Sequence[Row]]) -> Row:
        told: Row = {"attention of": name}
        for groups in zip(*found, strict=True):
            distances = [group[sinks]["jensen_shannon"].get(whose) for group in groups]
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
