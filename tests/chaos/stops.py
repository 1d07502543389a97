"""Ctrl-C and SIGTERM in a dump: at random moments, and at every line that its main thread passes.

A stop is not a kill: the command ends by itself, with status 130 and one sentence, and leaves neither a temporary nor a
thread that still writes. As after a kill everything visible is whole, and the same command brings the same rows.
"""

from __future__ import annotations

import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from chaos.checks import Outcome, facts, recovered
from chaos.children import REPOSITORY, Child, ChildFailed, in_fresh_interpreter
from chaos.endings import as_command
from chaos.figure import Figure
from chaos.recorded import Stage, make_stage
from chaos.trials import done_with, fresh, last_line, output, scratch
from pipeline.stop_signals import interrupt_on_sigterm

RANDOM, LINES = 300, None
SMALL_RANDOM, SMALL_LINES = 10, 50
SHARDS = 5
"""Training shards: with the held-out one more than are written at once."""
STOPS = (signal.SIGINT, signal.SIGTERM)
HANG_SECONDS = 30.0
WATCHED = (*(str(REPOSITORY / name) for name in ("teacher_dump", "pipeline")), threading.__file__)
"""Code whose lines are stopped at. Of `threading` too: there threads are started and waited for."""
OUTSIDE = ("errors.py", "stop_signals.py")
"""Modules of them that catch a stop, or put it off."""

Line = tuple[str, int]


def run(seed: int, small: bool) -> list[Figure]:
    return in_fresh_interpreter("chaos.stops", seed, small)


def experiments(seed: int, small: bool) -> list[Figure]:
    with scratch(memory=True) as folder:
        stage = make_stage(Path(folder), small, shards=SHARDS)
        rng = random.Random(seed)
        return [
            random_moments(stage, rng, SMALL_RANDOM if small else RANDOM),
            every_line(stage, rng, SMALL_LINES if small else LINES),
        ]


def random_moments(stage: Stage, rng: random.Random, trials: int) -> Figure:
    """One stop from outside in one dump."""
    outcomes, names = [], []
    for number in range(trials):
        stop, moment = STOPS[number % 2], rng.uniform(0, 1.1 * stage.seconds)

        def later(child: Child, stop: signal.Signals = stop, moment: float = moment) -> None:
            time.sleep(moment)
            child.send(stop)

        outcomes.append(stopped(stage, f"random-{number}", lambda: None, later)[0])
        names.append(f"{stop.name} after {moment * 1000:.1f} ms")
    return figure("Ctrl-C and SIGTERM at a random moment of a dump", stage, outcomes, names)


def every_line(stage: Stage, rng: random.Random, trials: int | None) -> Figure:
    """One stop in one dump, at one of the times that its main thread passes a line; every line in turn."""
    lines = passed_lines(stage)
    chosen = sorted(lines) if trials is None else sorted(rng.sample(sorted(lines), trials))
    outcomes, names, unmet = [], [], 0
    for number, line in enumerate(chosen):
        stop, count = STOPS[number % 2], rng.randint(1, lines[line])
        at = f"{Path(line[0]).name}:{line[1]}"
        outcome, came = stopped(stage, f"line-{number}", lambda at=(line, count, stop): stop_at(*at))
        unmet += not came
        outcomes.append(outcome)
        names.append(f"{stop.name} at {at}, time {count} of {lines[line]}")
    found = figure("Ctrl-C or SIGTERM at a line that a dump's main thread passes, each in turn", stage, outcomes, names)
    found.facts["lines"] = f"{len(chosen)} of {len(lines)}, {unmet} not passed as often that time"
    return found


def passed_lines(stage: Stage) -> Counter[Line]:
    """How often an undisturbed dump's main thread passes each line."""
    cache, log = fresh(stage, "lines")

    def body() -> Counter[Line]:
        seen: Counter[Line] = Counter()
        trace_lines(lambda line: seen.update([line]))
        assert as_command(stage, cache, log) == 0
        sys.settrace(None)
        return seen

    lines = Child(body, output(cache)).result()
    assert isinstance(lines, Counter) and len(lines) > 200
    return lines


def trace_lines(pass_line: Callable[[Line], None]) -> None:
    """Call `pass_line` before each watched line of this thread."""

    def inside(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            pass_line((frame.f_code.co_filename, frame.f_lineno))
        return inside

    def enter(frame: FrameType, event: str, argument: Any) -> Any:
        file = frame.f_code.co_filename
        return inside if file.startswith(WATCHED) and not file.endswith(OUTSIDE) else None

    sys.settrace(enter)


def stop_at(wanted: Line, count: int, stop: signal.Signals) -> None:
    """Send this process a stop when it passes that line for the `count`-th time."""
    left = count

    def pass_line(line: Line) -> None:
        nonlocal left
        if line == wanted:
            left -= 1
            if not left:
                sys.settrace(None)
                signal.raise_signal(stop)

    trace_lines(pass_line)


def stopped(
    stage: Stage, name: str, before: Callable[[], None], meanwhile: Callable[[Child], None] = lambda child: None
) -> tuple[Outcome, bool]:
    """One dump that is stopped, what is wrong with how it ended, and whether the stop came before its end."""
    cache, log = fresh(stage, name)
    words = output(cache)
    words.unlink(missing_ok=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # until the child can take it

    def body() -> tuple[int, list[str]]:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        interrupt_on_sigterm()

        def first() -> None:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
            before()

        try:
            status = as_command(stage, cache, log, first)
        except KeyboardInterrupt:
            status = 0  # it came after the command's end
        sys.settrace(None)
        for number in STOPS:
            signal.signal(number, signal.SIG_IGN)
        return status, [thread.name for thread in threading.enumerate() if thread.name.startswith("write-")]

    child = Child(body, words)
    meanwhile(child)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    try:
        status, writers = child.result(HANG_SECONDS)
    except ChildFailed as error:
        return Outcome(broken=[f"the run itself: {last_line(error)}"]), True
    broken = wrong_end(status, words.read_text(errors="replace"))
    broken += [f"its thread {thread} went on" for thread in writers]
    broken += [f"{path.name} was left" for path in cache.rglob(".*.tmp")]
    outcome = recovered(stage, cache, log)
    outcome.broken += broken
    return done_with(cache, outcome), status != 0


def wrong_end(status: int, said: str) -> list[str]:
    """What is wrong with the exit status of a dump that was stopped, or had ended before, and with its words."""
    sentences = [line for line in said.splitlines() if line.startswith(("interrupted:", "error:"))]
    wrong = [f"it said: {line}" for line in said.splitlines() if "Traceback" in line or "Exception" in line]
    wanted = [] if status == 0 else ["interrupted: everything committed so far is kept; run the same command to go on"]
    if status not in (0, 130) or sentences != wanted:
        wrong.append(f"status {status}, and it said: {sentences}")
    return wrong


def figure(what: str, stage: Stage, outcomes: list[Outcome], names: list[str]) -> Figure:
    return Figure("stops", what, len(outcomes), sum(not o.ok for o in outcomes), facts(stage, outcomes, names))
