"""`python -m pipeline summary`: the closing lines of a demo: what was dumped, trained and measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.cache import Cache
from pipeline.config import Place
from pipeline.report.results import NAMES
from pipeline.report.sources import CacheFacts, Run, cache_facts, read_run

DESCRIPTION = "Print in a few lines what a cache holds, how far a run was trained and what it measured."


@dataclass(frozen=True)
class Options:
    """What to sum up."""

    cache: Place
    """folder of the cache"""
    run: Path
    """folder of the run; it may not exist yet"""


def summary_lines(cache: Cache, facts: CacheFacts, run: Run) -> Iterator[str]:
    """The table, line by line."""
    folder, trained = cache.path, run.tokens(cache.spec.length)
    held = f"{facts.train_shards} training and {facts.heldout_shards} held-out shards"
    yield _line("teacher", cache.teacher.facts.name)
    yield _line("dumped", f"{facts.tokens:,} tokens in {held}, {facts.bytes_per_token:.1f} B/token")
    if run.steps:
        yield _line("trained", f"{run.steps:,} steps" + (f", {trained:,} tokens" if trained else ""))
    else:
        yield _line("trained", f"not yet: make train-student CACHE={folder} RUN={run.path}")
    figures = run.evaluation
    if figures is None:
        yield _line("evaluated", f"not yet: make eval CACHE={folder} RUN={run.path}")
    else:
        yield ""
        yield f"  {'held-out text':<13} {'cross-entropy':>15} {'perplexity':>12} {'bits/byte':>11}"
        for name in NAMES:
            values = [figures.get(f"{name}_{key}") for key in ("cross_entropy", "perplexity", "bits_per_byte")]
            ce, ppl, bits = (value if isinstance(value, int | float) else float("nan") for value in values)
            yield f"  {name:<13} {ce:>15.4f} {ppl:>12,.2f} {bits:>11.4f}"
        if "kl_k1" in figures and "top1_agreement" in figures:
            agreement = f"same likeliest token in {figures['top1_agreement']:.1%}"
            yield _line("to teacher", f"KL over K+1 outcomes {figures['kl_k1']:.4f} nats, {agreement}")
    for problem in run.problems:
        yield _line("problem", problem)
    yield ""
    page = run.path / "report.html"
    command = f"make report CACHE={folder} RUN={run.path}"
    yield _line("pictures", str(page) if page.is_file() else f"not yet: {command}")
    yield _line("shards", str(folder))
    yield _line("look inside", f"make inspect CACHE={folder} SHARD=0")


def _line(name: str, text: str) -> str:
    return f"  {name:<13} {text}"


def run(options: Options) -> int:
    """Print the summary.

    Raises:
        UserError: no such cache.
    """
    cache = Cache(options.cache)
    print()
    for line in summary_lines(cache, cache_facts(cache), read_run(options.run)):
        print(line)
    return 0
