"""How a run that met a fault must end, and what the next run must find: judged for every kind of fault.

Status 2 and one sentence that names the file and the cause, without a traceback. Where what failed does not matter (a
claim's refresh or release) a run that ends well is as good. Shards committed before stay whole; the same command, once
the cause is mended, gives the same rows and leaves no temporary.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chaos.checks import Outcome, facts, recovered
from chaos.children import Child, ChildFailed
from chaos.figure import Figure
from chaos.recorded import Stage, run_recorded
from chaos.trials import done_with, last_line
from pipeline.errors import run_command


def judged(
    stage: Stage,
    cache: Path,
    log: Path,
    body: Callable[[], tuple[int, list[tuple[str, str]]]],
    mend: Callable[[], None] = lambda: None,
    during: Callable[[], None] = lambda: None,
) -> tuple[Outcome, str]:
    """Run `body` in a child, mend what it met, and see that the promise holds.

    Args:
        body: returns the command's exit status, and the files and causes it met.
        mend: takes the fault away.
        during: does harm from outside while the child runs.
    """
    words = stage.folder / "trials" / "words.txt"
    words.unlink(missing_ok=True)
    child = Child(body, words)
    during()
    try:
        status, met = child.result(30.0)
    except ChildFailed as error:
        mend()
        return Outcome(broken=[f"the run itself: {last_line(error)}"]), "broken"
    finally:
        said = words.read_text(errors="replace")
    mend()
    outcome = recovered(stage, cache, log)
    outcome.broken += wrong_words(status, met, said)
    if status == 0 and outcome.shards < stage.shards:
        outcome.broken.append(f"it ended well with {outcome.shards} of {stage.shards} shards")
    end = "refused with status 2" if status == 2 else "ended well" if status == 0 else f"status {status}"
    return done_with(cache, outcome), end


def wrong_words(status: int, met: list[tuple[str, str]], said: str) -> list[str]:
    """What is wrong with how a run ended: its status, and the words a person reads."""
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    others = [line for line in said.splitlines() if "Traceback" in line or "Exception" in line]
    wrong = [f"it said: {line}" for line in others]
    if status == 0:
        return wrong + [f"it ended well and said: {line}" for line in errors]
    if status != 2 or len(errors) != 1:
        return [*wrong, f"status {status} and {len(errors)} sentences: {said[-300:]!r}"]
    if not met:
        return [*wrong, f"nothing was met, but it said: {errors[0]}"]
    if not any(Path(file).stem in errors[0] and cause in errors[0] for file, cause in met):
        wrong.append(f"met {met[0]}, but said: {errors[0]}")
    return wrong


def as_command(stage: Stage, cache: Path, log: Path, first: Callable[[], object] = lambda: None, **change: Any) -> int:
    """The dump with its messages, as `python -m teacher_dump` ends it.

    Args:
        first: called where a stop is caught already.
        change: other settings.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)

    def command() -> int:
        first()
        result = run_recorded(stage, cache, log, **change)
        print(f"{cache}: {result.shards} shards")
        return 0

    return run_command(command)


def told(stage: Stage, what: str, outcomes: list[Outcome], names: list[str], ends: Counter[str]) -> Figure:
    found = facts(stage, outcomes, names)
    del found["work redone, shards"]
    found["ends"] = ", ".join(f"{end} {count}" for end, count in sorted(ends.items()))
    return Figure("faults", what, len(outcomes), sum(not outcome.ok for outcome in outcomes), found)
