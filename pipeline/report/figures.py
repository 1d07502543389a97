"""The report's pictures, each a function from numbers to a PNG.

Colours are Okabe and Ito's, which people with any kind of colour vision tell apart; order carries meaning by lightness
(cividis). Text is at least 8 points at the size the page shows.

Legend: S temperatures, G depth groups, n pooling blocks, Q sequences, N positions.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from pipeline.report.sources import CacheSample, Curve, Maps

BLUE, ORANGE, GREEN, VERMILLION, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#6b7280"
INK, FAINT, LINES = "#1f2937", "#6b7280", "#e5e7eb"
SHARES = LinearSegmentedColormap.from_list("shares", ["#8c510a", "#dfc27d", "#ffffff", "#56a5d8", "#00335c"])
"""Negative shares brown, none white, positive blue."""
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINES,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": True,
    "legend.framealpha": 0.85,
    "legend.edgecolor": "white",
    "legend.fontsize": 8,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
WIDTH = 10.0  # inches of a figure that fills the page
DPI = 160
PANELS: tuple[tuple[str, tuple[tuple[str, str, str], ...], str], ...] = (
    ("Weighted total loss", (("train/loss", "train", BLUE),), "nats and weights"),
    ("Cross-entropy", (("train/ce", "train", BLUE), ("val/ce", "held-out", VERMILLION)), "nats per token"),
    (
        "KL$_{K+1}$ to the teacher",
        (
            ("train/kl_k1", "train, at the step's τ", BLUE),
            ("train/kl_renormalised", "train, renormalised over K", GREEN),
            ("train/kl_sampled", "train, with draws from the tail", GREEN),
            ("val/kl_k1", "held-out, τ = 1", VERMILLION),
        ),
        "nats per token",
    ),
    ("Frobenius term", (("train/frobenius", "train", BLUE),), "per element"),
    ("Attention alignment", (("train/attention", "train", BLUE),), "squared distance"),
    ("Schedules", (("alpha", "α", GREEN), ("tau", "τ", PURPLE)), ""),
    ("Learning rate", (("lr", "lr", GREY),), ""),
)
"""Panels of the training figure: title, (metric, label, colour) of its curves, unit; only those with data are drawn."""


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def training_curves(curves: dict[str, Curve], teacher_ce: float | None) -> bytes | None:
    """Small multiples of a run's metrics over optimiser steps; None if nothing was logged."""
    panels = [panel for panel in PANELS if any(name in curves for name, _, _ in panel[1])]
    if not panels:
        return None
    columns = 4 if len(panels) > 6 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.5 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for ax, (title, lines, unit) in zip(axes, panels, strict=False):
            shown = [(curves[name], label, colour) for name, label, colour in lines if name in curves]
            for curve, label, colour in shown:
                draw_curve(ax, curve, label, colour, smooth=unit != "")
            if "val/ce" in (name for name, _, _ in lines) and teacher_ce is not None:
                ax.axhline(teacher_ce, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="teacher, held-out")
            ax.set_title(title)
            ax.set_ylabel(unit)
            ax.set_xlabel("optimiser step")
            ax.margins(x=0.02)
            ax.xaxis.get_major_locator().set_params(integer=True, nbins=5)
            if len(ax.get_legend_handles_labels()[1]) > 1:
                ax.legend(loc="best")
        for ax in axes[len(panels) :]:
            ax.set_visible(False)
        return png(figure)


def draw_curve(ax: Axes, curve: Curve, label: str, colour: str, smooth: bool) -> None:
    """A line; a long one that is `smooth`ed is drawn faint, with its running mean over it."""
    count = len(curve.step_N)
    if smooth and count > 60:
        window = max(5, count // 40)
        kernel = np.ones(window) / window
        mean = np.convolve(curve.value_N, kernel, mode="valid")
        start = (window - 1) // 2
        ax.plot(curve.step_N, curve.value_N, color=colour, alpha=0.25, linewidth=0.8)
        ax.plot(curve.step_N[start : start + len(mean)], mean, color=colour, linewidth=1.7, label=label)
    else:
        marker = "o" if count < 25 else None
        ax.plot(curve.step_N, curve.value_N, color=colour, linewidth=1.7, marker=marker, markersize=3.5, label=label)


def uncertainty_histograms(sample: CacheSample, taus: tuple[float, ...], k: int) -> bytes | None:
    """Entropy at tau 1, and the mass outside the top K at every temperature; None without positions."""
    if not len(sample.entropy_N):
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        share = np.full(len(sample.entropy_N), 100.0 / len(sample.entropy_N))
        left.hist(sample.entropy_N, bins=50, weights=share, color=BLUE, alpha=0.85)
        mean = float(sample.entropy_N.mean())
        left.axvline(mean, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=f"mean {mean:.2f} nats")
        left.set(title="How unsure the teacher is", xlabel="entropy at τ = 1, nats", ylabel="% of tokens")
        left.legend(loc="best")
        order = matplotlib.colormaps["cividis"](np.linspace(0.0, 0.85, len(taus)))
        for s, tau in enumerate(taus):
            mass = np.sort(sample.tail_NS[:, s])
            above = np.linspace(0.0, 100.0, len(mass))
            right.plot(mass, above, color=order[s], linewidth=1.8, label=f"τ = {tau:g}, mean {mass.mean():.3f}")
        right.set(
            title=f"What the top {k} leave out",
            xlabel=f"probability mass outside the top {k}",
            ylabel="% of tokens with less",
            xlim=(-0.01, 1.01),
        )
        right.legend(loc="lower right")
        return png(figure)


def column_bars(costs: Iterable[tuple[str, float]]) -> bytes | None:
    """Compressed bytes a token by column, largest first."""
    ordered = sorted(costs, key=lambda cost: cost[1])
    if not ordered:
        return None
    total = sum(value for _, value in ordered)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.7 + 0.24 * len(ordered)), layout="constrained")
        ax = figure.subplots()
        bars = ax.barh([name for name, _ in ordered], [value for _, value in ordered], color=BLUE, height=0.7)
        labels = [f"{value:.2f} B  ({value / total:.1%})" for _, value in ordered]
        ax.bar_label(bars, labels=labels, padding=4, fontsize=8, color=INK)
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="y", length=0, labelcolor=INK)
        ax.set_xlabel("compressed bytes a token")
        ax.set_xlim(0, 1.18 * ordered[-1][1])
        return png(figure)


def attention_maps(maps: Maps, index: int) -> bytes:
    """One held-out sequence: the teacher's depth groups above, the student's mLSTM blocks below, one colour scale.

    Colour is the signed square root of a share, so that small shares show beside the diagonal's.
    """
    teacher_Gnn = maps.teacher_QGnn[index]
    depth = maps.teacher_QGnn.shape[1]
    upper = [(f"depth {_percent(g, depth)}", teacher_Gnn[g]) for g in range(depth)]
    lower = [
        (f"block {i}, depth {_percent(i, maps.student_blocks)}", map_Qnn[index])
        for i, map_Qnn in maps.student_Qnn.items()
    ]
    columns = max(len(upper), len(lower), 3)
    places = (_places(range(depth), depth, columns), _places(maps.student_Qnn, maps.student_blocks, columns))
    with matplotlib.rc_context({**STYLE, "axes.grid": False, "axes.titlesize": 8, "axes.titleweight": "normal"}):
        side = WIDTH / (columns + 0.9)
        figure = Figure(figsize=(WIDTH, 2 * side + 0.75), layout="constrained")
        axes = figure.subplots(2, columns, squeeze=False)
        image = None
        for row, (name, items) in enumerate((("teacher", upper), ("student", lower))):
            for ax in axes[row]:
                ax.set(xticks=[], yticks=[], facecolor="white")
                ax.spines[:].set_visible(False)
            for column, (title, map_nn) in zip(places[row], items, strict=True):
                image = draw_map(axes[row][column], map_nn)
                axes[row][column].set_title(title)
            if items:
                first = axes[row][places[row][0]]
                first.set_xlabel("key block")
                first.set_ylabel(f"{name}\nquery block", color=INK)
        if image is not None:
            bar = figure.colorbar(image, ax=axes, shrink=0.75, aspect=24, pad=0.015)
            ticks = np.array([-1.0, -0.25, 0.0, 0.05, 0.25, 0.5, 1.0])
            bar.set_ticks(list(signed_root(ticks)), labels=[f"{tick:g}" for tick in ticks])
            bar.set_label("share of attention")
            bar.outline.set_visible(False)  # type: ignore[operator]
        return png(figure)


def draw_map(ax: Axes, map_nn: np.ndarray) -> matplotlib.image.AxesImage:
    """A pooled map; blocks above the diagonal, which do not exist, are grey."""
    shown = np.where(np.tri(len(map_nn), dtype=bool), signed_root(map_nn), np.nan)
    ax.set_facecolor("#f0f1f3")
    return ax.imshow(np.ma.masked_invalid(shown), cmap=SHARES, vmin=-1, vmax=1, interpolation="nearest")


def _places(parts: Iterable[int], count: int, columns: int) -> list[int]:
    """Columns in which the parts of a depth cut in `count` stand, so that equal depths are above each other."""
    numbers = list(parts)
    by_depth = [int((part + 0.5) / count * columns) for part in numbers]
    return by_depth if len(set(by_depth)) == len(numbers) else list(range(len(numbers)))


def signed_root(values: np.ndarray) -> np.ndarray:
    """How shares are coloured: the square root shows small ones beside large ones, the sign stays."""
    return np.sign(values) * np.sqrt(np.abs(values))


def _percent(part: int, parts: int) -> str:
    return f"{100 * part // parts}–{100 * (part + 1) // parts}%"
