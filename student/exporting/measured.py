"""What a model card says was measured: evaluations and zero-shot tasks of the checkpoint that is exported.

Figures of another checkpoint, or of one that has been trained on since, are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.markdown import code, plain, table
from pipeline.report.results import MEASURES, MOST_EVALUATIONS, NAMES, read_evaluation, read_zero_shot
from student.runs.checkpoint import checkpoint_path

COUNTS = (("rows", "rows"), ("targets", "tokens"), ("target_bytes", "bytes"))
NOT_YET = "Not measured yet: run `python -m student.evaluate`, then export again."


@dataclass(frozen=True)
class Measured:
    """Figures of one checkpoint.

    Attributes:
        evaluations: name -> content of evaluation.json ("") and evaluation-NAME.json, of one cache or of several.
        zero_shot: content of zero_shot.json; None where there is none.
        missing: a sentence that says why there is no evaluation; empty where there is one.
    """

    evaluations: dict[str, dict[str, Any]]
    zero_shot: dict[str, Any] | None
    missing: str


def read_figures(run: Path, checkpoint: str) -> Measured:
    """What was measured of a run's checkpoint (last, best, or a path).

    Raises:
        UserError: a file is damaged.
    """
    changed = checkpoint_path(run, checkpoint).stat().st_mtime
    found: dict[str, dict[str, Any]] = {}
    reasons: list[str] = []
    for path in [run / "evaluation.json", *sorted(run.glob("evaluation-*.json"))[:MOST_EVALUATIONS]]:
        if not path.is_file():
            continue
        figures = read_evaluation(path)
        if figures.get("checkpoint") != checkpoint:
            reasons.append(f"The run was evaluated with another checkpoint than `{Path(checkpoint).name}`.")
        elif changed > path.stat().st_mtime:
            reasons.append("The run went on after its evaluation: evaluate this checkpoint, then export again.")
        else:
            found[path.stem.removeprefix("evaluation").removeprefix("-")] = figures
    path, zero_shot = run / "zero_shot.json", None
    if path.is_file() and changed <= path.stat().st_mtime:
        content = read_zero_shot(path)
        student = content["models"].get("student")
        zero_shot = content if student is not None and student.get("checkpoint") == checkpoint else None
    return Measured(found, zero_shot, "" if found else [*reasons, NOT_YET][0])


def section(measured: Measured, corpora: Sequence[str]) -> str:
    """In Markdown.

    Args:
        corpora: sources of the caches that the student learnt from, which evaluation.json is taken to be of.
    """
    parts = [] if measured.evaluations else [f"{measured.missing}\n"]
    for name, figures in measured.evaluations.items():
        source = f" from {', '.join(map(code, corpora))}" if corpora and not name else ""
        parts.append(_evaluation(figures, f", evaluation {code(name)}" if name else source, explained=not parts))
    if measured.zero_shot is not None:
        parts.append(_zero_shot(measured.zero_shot))
    return "\n".join(parts)


def _evaluation(figures: dict[str, Any], of: str, explained: bool) -> str:
    rows = [[name, *(_number(figures, f"{name}_{key}") for key in MEASURES)] for name in NAMES]
    known = [f"{figures[n]:,} {what}" for n, what in COUNTS if isinstance(figures.get(n), int)]
    other = [
        f"{label}: {_number(figures, name)}"
        for name, label in (
            ("kl_k1", "KL over K + 1 outcomes to the teacher, nats (a lower bound of the full KL)"),
            ("kl_full", "KL over the whole vocabulary, nats"),
            ("top1_agreement", "positions whose likeliest token is the teacher's, as a share"),
        )
        if name in figures
    ]
    text = f"On held-out text{of} ({', '.join(known)}; cache {code(str(figures.get('data_id', ''))[:32])})"
    if explained:
        text += (
            ", which no training row contains. Cross-entropy in nats a token; measured with the student itself, before "
            "export"
        )
    return (
        f"{text}.\n\n"
        + table(["", "cross-entropy", "perplexity", "bits per byte"], rows)
        + "".join(f"\n- {line}" for line in other)
        + (f"\n- unigram: {plain(figures['unigram'])}" if isinstance(figures.get("unigram"), str) else "")
        + "\n"
    )


def _number(figures: dict[str, Any], name: str) -> str:
    value = figures.get(name)
    return f"{value:,.4f}" if isinstance(value, int | float) else "not measured"


def _zero_shot(content: dict[str, Any]) -> str:
    roles = [role for role in ("student", "teacher") if role in content["models"]]
    lines = []
    for name, task in content["tasks"].items():
        measure = task["measure"]
        answers = [content["models"][role]["tasks"][name] for role in roles]
        told = [f"{100 * found[measure]:.1f} ± {100 * found[f'{measure}_stderr']:.1f}" for found in answers]
        chance = "-" if task.get("chance") is None else f"{100 * task['chance']:.1f}"
        lines.append([plain(name), measure, f"{task['documents']:,}", *told, chance])
    return (
        "Zero-shot, right answers in per cent with their standard errors, no examples before a question "
        f"(`python -m student.zero_shot`, documents of {code(content['package'])}):\n\n"
        + table(["task", "measure", "documents", *roles, "guessing"], lines)
    )
