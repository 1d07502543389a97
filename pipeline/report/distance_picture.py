"""Attention maps of one text side by side: the teacher's, the student's, and what the student is measured against.

Legend: n pooling blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from pipeline.report.figures import FAINT, INK, STYLE, WIDTH, draw_map, png, signed_root


def distance_picture(
    columns: Sequence[str],
    rows: Sequence[str],
    maps: Sequence[Sequence[np.ndarray | None]],
    notes: Sequence[Sequence[float | None]],
) -> bytes:
    """A grid of maps as a PNG.

    Args:
        columns: whose maps stand in a column.
        rows: titles of the rows.
        maps: (n, n) shares a row and column; None: there is none.
        notes: distance to the first column's map, written below the map.
    """
    style = {**STYLE, "axes.grid": False, "axes.titlesize": 9, "axes.titlelocation": "center"}
    with matplotlib.rc_context(style):
        side = WIDTH / (len(columns) + 0.6)
        figure = Figure(figsize=(WIDTH, (side + 0.12) * len(rows) + 0.5), layout="constrained")
        axes = figure.subplots(len(rows), len(columns), squeeze=False)
        image = None
        for number, title in enumerate(rows):
            for place, column in enumerate(columns):
                ax, map_nn, note = axes[number][place], maps[number][place], notes[number][place]
                ax.set(xticks=[], yticks=[])
                ax.spines[:].set_visible(False)
                if map_nn is None:
                    ax.set_facecolor("white")
                    ax.text(
                        0.5, 0.5, "no mLSTM block\nat this depth", ha="center", va="center", color=FAINT, fontsize=8
                    )
                    ax.set_aspect("equal")
                else:
                    image = draw_map(ax, map_nn)
                if number == 0:
                    ax.set_title(column)
                if place == 0:
                    ax.set_ylabel(title, color=INK)
                if note is not None:
                    ax.set_xlabel(f"{note:.3f} bits away", fontsize=8)
        if image is not None:
            bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 3 / len(rows)), aspect=24, pad=0.015)
            ticks = np.array([0.0, 0.05, 0.25, 0.5, 1.0])
            bar.ax.set_ylim(0, 1)
            bar.set_ticks(list(signed_root(ticks)), labels=[f"{tick:g}" for tick in ticks])
            bar.set_label("share of attention")
            bar.outline.set_visible(False)  # type: ignore[operator]
        return png(figure)
