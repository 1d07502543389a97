"""What of an evaluation stands in a row of quality.json."""

from __future__ import annotations

from typing import Any

FIGURES = {"cross_entropy": "ce", "perplexity": "perplexity", "bits_per_byte": "bits_per_byte"}


def figures(found: dict[str, Any], who: str) -> dict[str, float]:
    """An evaluation's figures of the student or the teacher, in nats per target unless the name says otherwise."""
    result = {short: found[f"{who}_{name}"] for name, short in FIGURES.items()}
    if who == "student":
        result |= {name: found[name] for name in ("kl_full", "kl_k1", "top1_agreement")}
    return {**result, "targets": found["targets"]}


def by_position(found: dict[str, Any], measure: str) -> list[list[float]]:
    """First position of each bin and the cross-entropy there."""
    return [[row["first"], row[measure]] for row in found["by_position"]]


def long_positions(found: dict[str, Any]) -> list[list[float]]:
    """First position of each bin, cross-entropy of student and teacher, and the KL between them there."""
    names = ("first", "student_cross_entropy", "teacher_cross_entropy", "kl_full")
    return [[row[name] for name in names] for row in found["by_position"]]
