"""The report's picture of an evaluation by position in the context."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.report.figures import BLUE, GREEN, ORANGE, STYLE, WIDTH, png


def position_curves(rows: list[dict[str, Any]]) -> bytes | None:
    """Cross-entropies and divergences over bins of positions, at each bin's geometric middle; None without bins."""
    if not rows:
        return None
    middle_N = np.sqrt([(row["first"] + 1) * (row["last"] + 1) for row in rows])  # tokens read
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        lines = [(left, "student_cross_entropy", "student", BLUE), (left, "teacher_cross_entropy", "teacher", ORANGE)]
        lines += [(right, "kl_k1", "KL$_{K+1}$", BLUE)]
        lines += [(right, "kl_full", "KL, whole vocabulary", GREEN)] if "kl_full" in rows[0] else []
        for ax, key, label, colour in lines:
            values = [row.get(key, np.nan) for row in rows]
            ax.plot(middle_N, values, "o-", color=colour, linewidth=1.7, markersize=3.5, label=label)
        for ax, title in ((left, "Cross-entropy by position"), (right, "KL to the teacher by position, τ = 1")):
            _finish(ax, title, int(rows[-1]["last"]) + 1)
        return png(figure)


def _finish(ax: Axes, title: str, length: int) -> None:
    ax.set_xscale("log", base=2)
    ax.set(title=title, xlabel="tokens read", ylabel="nats per token")
    powers = range(0, max(1, (length - 1).bit_length()) + 1)
    ticks = [1 << p for p in powers][:: 1 if len(powers) < 12 else 2]
    ax.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks])
    ax.minorticks_off()
    ax.legend(loc="best")
