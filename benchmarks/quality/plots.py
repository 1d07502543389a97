"""Pictures of docs/results.md, each a function from rows to the bytes of a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

import matplotlib
from matplotlib.figure import Figure

from benchmarks.measured import Row
from benchmarks.quality.tables import KL
from pipeline.report.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, STYLE, VERMILLION, png

COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, GREY)
WIDTH = 8.0


def kl_by_arm(arms: dict[str, list[Row]], reference: str, band: float | None) -> bytes:
    """The KL to the teacher of every arm: a dot a seed, a line at their mean; around the reference's mean a band,
    within which others are not told apart from it.

    Args:
        arms: rows by arm, in the order in which they are shown from top to bottom.
        band: half of its width; None: none.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.9 + 0.3 * len(arms)), layout="constrained")
        ax = figure.subplots()
        if reference in arms:
            middle = mean(map(KL, arms[reference]))
            ax.axvline(middle, color=GREY, linewidth=1)
            if band is not None:
                ax.axvspan(middle - band, middle + band, color=GREY, alpha=0.15, linewidth=0)
        for place, (name, own) in enumerate(arms.items()):
            colour = GREY if name == reference else BLUE
            values = [KL(row) for row in own]
            ax.plot(values, [place] * len(values), "o", color=colour, markersize=5, alpha=0.6)
            ax.plot([mean(values)] * 2, [place - 0.3, place + 0.3], color=colour, linewidth=2)
        ax.set_yticks(range(len(arms)), labels=list(arms))
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        ax.set_xlabel("KL to the teacher on held-out text, nats per target")
        return png(figure)


def training_curves(curves: Sequence[Row], arms: Sequence[str]) -> bytes:
    """Cross-entropy of the training batches by step, a line an arm (its first seed)."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
        ax = figure.subplots()
        for name, colour in zip(arms, COLOURS, strict=False):
            own = min((curve for curve in curves if curve["arm"] == name), key=lambda curve: curve["seed"])
            ax.plot(own["step"], own["ce"], color=colour, linewidth=1.5, label=name)
        ax.set(xlabel="optimiser step", ylabel="cross-entropy in training, nats per target")
        ax.legend(loc="upper right")
        return png(figure)


def positions(arms: dict[str, list[Row]], teacher: Row | None) -> bytes:
    """Held-out cross-entropy by position in the context: the arms, mean over seeds, and the teacher."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
        ax = figure.subplots()
        lines = {name: [row["by_position"] for row in own] for name, own in arms.items()}
        if teacher is not None:
            lines["teacher"] = [teacher["by_position"]]
        colours = [*COLOURS[: len(lines) - (teacher is not None)], "#000000"]
        for (name, found), colour in zip(lines.items(), colours, strict=False):
            first = [place + 1 for place, _ in found[0]]
            values = [mean(one[i][1] for one in found) for i in range(len(first))]
            ax.plot(first, values, "o-", color=colour, linewidth=1.5, markersize=3, label=name)
        ax.set_xscale("log", base=2)
        ax.set_xticks(first, labels=[f"{tick:,}" for tick in first])
        ax.minorticks_off()
        ax.set(xlabel="tokens read, from", ylabel="cross-entropy, nats per target")
        ax.legend(loc="upper right")
        return png(figure)
