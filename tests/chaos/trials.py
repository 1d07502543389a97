"""Where a trial takes place, and what is kept of it."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from chaos.checks import Outcome
from chaos.recorded import Stage


def scratch(memory: bool) -> tempfile.TemporaryDirectory[str]:
    """A folder for trials that all may enter; in `memory` where it is the order of operations that counts."""
    shared = "/dev/shm" if memory and os.access("/dev/shm", os.W_OK) else None
    folder = tempfile.TemporaryDirectory(prefix="chaos-", dir=shared)
    os.chmod(folder.name, 0o755)
    return folder


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
