"""`kill -9` of a dump: at random moments, and around every file operation it makes.

After each kill everything visible must be whole; the same command, run to its end, must give the same rows and leave no
temporary and no claim. Moments are drawn from the seed; where they fall depends on the machine's load.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chaos import several
from chaos.checks import Outcome, as_it_stands, captured, facts, recovered, wrong_in
from chaos.children import Child, ChildFailed, in_fresh_interpreter
from chaos.figure import Figure
from chaos.operations import PHASES, Operation, Watch, refresh_often
from chaos.power import lose_power
from chaos.recorded import Stage, make_stage, run_recorded
from chaos.trials import done_with, fresh, last_line, output, scratch
from teacher_dump import shard_loop

RANDOM, CHAINS, PAIRS = (300, 40, 60)
SMALL_RANDOM, SMALL_CHAINS, SMALL_PAIRS = (10, 2, 3)
CHAIN_KILLS = 5
HANG_SECONDS = 30.0
FEW_SHARDS = 3
"""Training shards where every operation is killed: more would only repeat them."""


def run(seed: int, small: bool) -> list[Figure]:
    return in_fresh_interpreter("chaos.kills", seed, small)


def experiments(seed: int, small: bool) -> list[Figure]:
    with scratch(memory=small) as folder:
        stage = make_stage(Path(folder), small, shards=FEW_SHARDS if small else 7)
        figures = [
            random_moments(stage, random.Random(seed), SMALL_RANDOM if small else RANDOM),
            chains(stage, random.Random(seed + 1), SMALL_CHAINS if small else CHAINS),
            pairs(stage, random.Random(seed + 2), SMALL_PAIRS if small else PAIRS),
            unharmed_pairs(stage, 1 if small else 20),
            several.killed_workers(stage, random.Random(seed + 4), SMALL_PAIRS if small else PAIRS),
            several.killed_drivers(stage, random.Random(seed + 5), 1 if small else 20),
        ]
    with scratch(memory=True) as folder:
        stage = make_stage(Path(folder), True, shards=FEW_SHARDS)
        figures += every_operation(stage, random.Random(seed + 3), small)
    return figures


def random_moments(stage: Stage, rng: random.Random, trials: int) -> Figure:
    """One kill in one dump, at any time from its first instruction to its end."""
    outcomes, names = [], []
    for number in range(trials):
        cache, log = fresh(stage, f"random-{number}")
        if number % 2:  # on a busy machine most moments by the clock come before the first shard
            tokens, moment = rng.randint(1, stage.tokens), rng.uniform(0, 2 * stage.seconds / stage.shards)
        else:
            tokens, moment = 0, rng.uniform(0, 1.1 * stage.seconds)
        killed_after(stage, cache, log, moment, tokens)
        outcomes.append(done_with(cache, recovered(stage, cache, log)))
        names.append(f"kill {number}, {moment * 1000:.1f} ms after {tokens} tokens")
    found = facts(stage, outcomes, names)
    found["shards committed when killed"] = dict(sorted(Counter(outcome.shards for outcome in outcomes).items()))
    found["a dump's time"] = f"{stage.seconds:.2f} s, a shard's {stage.seconds / stage.shards:.3f} s"
    return figure("SIGKILL at a random moment of a dump", outcomes, found)


def chains(stage: Stage, rng: random.Random, trials: int) -> Figure:
    """Several kills before a dump ends; each run goes on from what the killed ones left."""
    outcomes, names = [], []
    for number in range(trials):
        cache, log = fresh(stage, f"chain-{number}")
        corrupt: list[str] = []
        for _ in range(rng.randint(2, CHAIN_KILLS)):
            killed_after(stage, cache, log, rng.uniform(0, 0.8 * stage.seconds))
            corrupt += Child(lambda cache=cache: wrong_in(stage, cache)).result() or []
        outcome = recovered(stage, cache, log)
        outcome.corrupt += corrupt
        outcomes.append(done_with(cache, outcome))
        names.append(f"chain {number}")
    return figure(f"2 to {CHAIN_KILLS} SIGKILLs in one dump before it ends", outcomes, facts(stage, outcomes, names))


def pairs(stage: Stage, rng: random.Random, trials: int) -> Figure:
    """Two dumps share a cache; one is killed, and not even reaped: the other ends the work alone."""
    moments = [rng.uniform(0, 1.2 * stage.seconds) for _ in range(trials)]
    outcomes = [pair(stage, moment) for moment in moments]
    names = [f"one of two killed after {moment * 1000:.1f} ms" for moment in moments]
    return figure("two dumps at once, SIGKILL to one, the other ends alone", outcomes, facts(stage, outcomes, names))


def unharmed_pairs(stage: Stage, trials: int) -> Figure:
    outcomes = [pair(stage, None) for _ in range(trials)]
    return figure("two dumps at once, neither killed", outcomes, facts(stage, outcomes, ["a pair"] * trials))


def pair(stage: Stage, moment: float | None) -> Outcome:
    """Two dumps started together, the first killed after `moment` seconds; None: no work may be done twice."""
    cache, log = fresh(stage, "pair")
    dumps = [Child(lambda: patient(stage, cache, log), output(cache)) for _ in range(2)]
    if moment is not None:
        time.sleep(moment)
        dumps[0].kill()
    outcome = Outcome()
    try:
        for dump in dumps[0 if moment is None else 1 :]:
            dump.result(HANG_SECONDS)
    except ChildFailed as error:
        outcome.broken.append(f"a dump that was not killed: {last_line(error)}")
    for dump in dumps:
        dump.kill()
    if outcome.ok:
        outcome = Child(lambda: as_it_stands(stage, cache, log)).result()
        if moment is None and outcome.tokens:
            outcome.broken.append(f"{outcome.tokens} tokens were captured twice")
    for dump in dumps:
        dump.wait()
    return done_with(cache, outcome)


def every_operation(stage: Stage, rng: random.Random, small: bool) -> list[Figure]:
    """A kill before, amid and after each operation, and the same with power lost for what was not synced."""
    operations = enumerate_operations(stage)
    points = kill_points(operations)
    if small:
        points = one_of_each(points)
    outcomes = [kill_at(stage, operation, phase) for operation, phase in points]
    names = [f"{phase} {operation.step} {operation.count} of {operation.file}" for operation, phase in points]
    found = facts(stage, outcomes, names)
    steps = Counter(f"{operation.kind}: {operation.step}" for operation, _ in points)
    found["steps"] = ", ".join(f"{name} {count}" for name, count in sorted(steps.items()))
    figures = [figure("SIGKILL before, amid and after each file operation", outcomes, found)]
    # Power: reading changes nothing on a disk, and within one file's writes one moment is as another.
    wet = [(operation, "after") for operation in operations if operation.step != "read"]
    wet = [point for point in wet if point[0].step != "write" or point[0].count < 2]
    if small:
        wet = list({(operation.kind, operation.step): (operation, phase) for operation, phase in wet}.values())
    outcomes = [kill_at(stage, operation, phase, rng) for operation, phase in wet]
    names = [f"{phase} {operation.step} {operation.count} of {operation.file}" for operation, phase in wet]
    what = "the same with power lost: what was not synced is cut or gone (simulated)"
    return [*figures, figure(what, outcomes, facts(stage, outcomes, names))]


def enumerate_operations(stage: Stage) -> list[Operation]:
    """Every operation of an undisturbed dump.

    Raises:
        AssertionError: Python touched a file of the cache past the wrappers.
    """
    cache, _ = fresh(stage, "enumerate")

    def body() -> tuple[list[Operation], list[str]]:
        watch = Watch(cache, lambda operation, phase: None)
        run_recorded(stage, cache)
        return watch.seen, watch.escaped

    seen, escaped = Child(body).result()
    assert not escaped, f"operations that no wrapper saw: {escaped[:5]}"
    assert len(set(seen)) == len(seen) > 100
    return list(seen)


def kill_points(operations: list[Operation]) -> list[tuple[Operation, str]]:
    return [
        (operation, phase)
        for operation in operations
        for phase in PHASES
        if phase != "amid" or operation.step == "write"
    ]


def one_of_each(points: list[tuple[Operation, str]]) -> list[tuple[Operation, str]]:
    """The first of every kind of file and step: before it, or amid it where that is possible."""
    chosen: dict[tuple[str, str], tuple[Operation, str]] = {}
    for operation, phase in points:
        key = operation.kind, operation.step
        wanted = "amid" if operation.step == "write" else "after" if operation.step in ("rename", "link") else "before"
        if phase == wanted and (key not in chosen or operation.kind == "shard" and operation.count == 1):
            chosen[key] = operation, phase
    return list(chosen.values())


def kill_at(stage: Stage, operation: Operation, phase: str, power: random.Random | None = None) -> Outcome:
    """One dump that kills itself there."""
    cache, log = fresh(stage, f"{operation.file.replace('/', '-')}-{operation.step}-{operation.count}-{phase}")
    notes = log.with_suffix(".notes")

    def hook(now: Operation, moment: str) -> Callable[[], None] | None:
        return kill_this_process if (now, moment) == (operation, phase) else None

    def body() -> None:
        Watch(cache, hook, notes if power else None)
        run_recorded(stage, cache, log)

    child = Child(body, output(cache))
    try:
        child.result()
    except ChildFailed as error:
        return Outcome(broken=[last_line(error)])
    if child.status != -signal.SIGKILL:
        return Outcome(broken=["the operation did not come: nothing was killed"])
    if power:
        lose_power(cache, notes, power)
    return done_with(cache, recovered(stage, cache, log))


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_after(stage: Stage, cache: Path, log: Path, seconds: float, tokens: int = 0) -> None:
    """Start a dump and kill it so many seconds after that many tokens went through the teacher."""

    def body() -> None:
        refresh_often()
        run_recorded(stage, cache, log)

    child = Child(body, output(cache))
    deadline = time.monotonic() + HANG_SECONDS
    while captured(log) < tokens and time.monotonic() < deadline:
        time.sleep(0.0005)
    time.sleep(seconds)
    child.kill()
    child.wait()


def patient(stage: Stage, cache: Path, log: Path) -> None:
    """A dump that looks soon again at what another one holds."""
    shard_loop.WAIT_SECONDS = 0.02
    run_recorded(stage, cache, log)


def figure(what: str, outcomes: list[Outcome], found: dict[str, Any]) -> Figure:
    return Figure("kills", what, len(outcomes), sum(not outcome.ok for outcome in outcomes), found)
