"""Where a trial takes place, and what is kept of it."""

from __future__ import annotations

import shutil
from pathlib import Path

from chaos.checks import Outcome
from chaos.recorded import Stage


def fresh(stage: Stage, name: str) -> tuple[Path, Path]:
    """An empty place for a cache, and one for its log."""
    cache = stage.cache(name)
    log = cache.with_name(f"{name}.log")
    log.unlink(missing_ok=True)
    return cache, log


def output(cache: Path) -> Path:
    return cache.with_name(f"{cache.name}.txt")


def done_with(cache: Path, outcome: Outcome) -> Outcome:
    """Remove a trial's cache unless there is something to look at."""
    if outcome.ok:
        shutil.rmtree(cache, ignore_errors=True)
    return outcome


def last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]
