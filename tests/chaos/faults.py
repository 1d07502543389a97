"""A disk that is full, refuses, fails or vanishes, at each operation of a dump; and pipes and claims that fail.

What the run must say, and what the next one must find, is in `endings.py`.
"""

from __future__ import annotations

import errno
import os
import random
import resource
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chaos import disks, several
from chaos.checks import Outcome
from chaos.children import in_fresh_interpreter
from chaos.endings import as_command, judged, told
from chaos.figure import Figure
from chaos.kills import enumerate_operations
from chaos.operations import Operation, Watch, refresh_often
from chaos.recorded import ROWS_PER_SHARD, ROWS_PER_STEP, Replay, Stage, make_stage
from chaos.trials import fresh, scratch
from teacher_dump.engine import TeacherEngineError

SHARDS = 3
KINDS = {"ENOSPC": errno.ENOSPC, "EACCES": errno.EACCES, "EIO": errno.EIO}
GROWS = ("create", "write", "mkdir", "rename", "link", "fsync", "fsync folder")
"""Steps that a full disk may refuse."""
CHANGES = ("create", "mkdir", "rename", "link", "unlink")
"""Steps that a folder without permission refuses."""
NAMELESS = ("write", "fsync", "fsync folder", "hash", "read back")
"""Steps at which the operating system's error does not know the file's name."""

Fault = Callable[[Operation], OSError | None]
"""What an operation meets, None: nothing."""


def run(seed: int, small: bool) -> list[Figure]:
    return in_fresh_interpreter("chaos.faults", seed, small)


def experiments(seed: int, small: bool) -> list[Figure]:
    with scratch(memory=True) as folder:
        stage = make_stage(Path(folder), True, shards=SHARDS)
        operations = enumerate_operations(stage)
        return [
            *(once(stage, operations, name, small) for name in KINDS),
            *(from_then_on(stage, operations, name, small) for name in KINDS),
            flipped_bits(stage, operations, random.Random(seed), 12 if small else 200),
            file_size_limit(stage, random.Random(seed + 1), 4 if small else 40),
            *disks.experiments(stage, random.Random(seed + 2), 2 if small else 30),
            claims_fail(stage, ("EIO",) if small else tuple(KINDS)),
            engine_dies(stage, 4 if small else SHARDS * ROWS_PER_SHARD // ROWS_PER_STEP),
            several.failing_pipes(stage, 2 if small else 14),
        ]


def once(stage: Stage, operations: list[Operation], name: str, small: bool) -> Figure:
    """One operation fails once."""
    points = [operation for operation in operations if suits(name, operation)]
    if small:
        points = spread(points, 14)
    outcomes, ends = [], Counter[str]()
    for point in points:
        outcome, end = injected(stage, f"{name}-once", lambda now, at=point: refusal(stage, name, now, now == at))
        outcomes.append(outcome)
        ends[end] += 1
    names = [f"{name} at {point.step} {point.count} of {point.file}" for point in points]
    return told(stage, f"{name} at one operation: each one in turn", outcomes, names, ends)


def from_then_on(stage: Stage, operations: list[Operation], name: str, small: bool) -> Figure:
    """From one operation on everything fails that can: the disk stays full, read-only or gone."""
    points = [operation for operation in operations if suits(name, operation) and operation.step != "write"]
    points += [operation for operation in operations if operation.step == "write" and operation.count < 3]
    if small:
        points = spread(points, 8)
    outcomes, ends = [], Counter[str]()
    for point in points:
        begun = []

        def fault(now: Operation, at: Operation = point, begun: list[bool] = begun) -> OSError | None:
            if now == at:
                begun.append(True)
            return refusal(stage, name, now, bool(begun) and suits(name, now))

        outcome, end = injected(stage, f"{name}-on", fault)
        outcomes.append(outcome)
        ends[end] += 1
    names = [f"{name} from {point.step} {point.count} of {point.file} on" for point in points]
    return told(stage, f"{name} from one operation on, each one in turn", outcomes, names, ends)


def suits(name: str, operation: Operation) -> bool:
    """Whether a disk can answer so there."""
    if name == "ENOSPC":
        return operation.step in GROWS
    return name != "EACCES" or operation.step not in ("write", "fsync", "fsync folder", "hash", "read back")


def refusal(stage: Stage, name: str, operation: Operation, now: bool) -> OSError | None:
    """The operating system's error: writes and syncs do not know their file's name."""
    if not now:
        return None
    code = KINDS[name]
    if operation.step in NAMELESS:
        return OSError(code, os.strerror(code))
    return OSError(code, os.strerror(code), operation.file)


def injected(stage: Stage, name: str, fault: Fault) -> tuple[Outcome, str]:
    """One dump that meets `fault`; what came of it, and how it ended."""
    cache, log = fresh(stage, name)

    def body() -> tuple[int, list[tuple[str, str]]]:
        met: list[tuple[str, str]] = []

        def hook(now: Operation, phase: str) -> Callable[[], None] | None:
            if phase == "after" or now.step == "write" and phase == "before":  # a write fails when half is done
                return None
            error = fault(now)
            if error is None:
                return None
            met.append((now.file, os.strerror(error.errno)))

            def refuse() -> None:
                raise error

            return refuse

        Watch(cache, hook)
        return as_command(stage, cache, log), met

    return judged(stage, cache, log, body)


def flipped_bits(stage: Stage, operations: list[Operation], rng: random.Random, trials: int) -> Figure:
    """A store that turns one bit of one write: told, or without effect, never a visible wrong row."""
    writes = [operation for operation in operations if operation.step == "write" and operation.kind != "claim"]
    points = [rng.choice(writes) for _ in range(trials)]
    outcomes, ends = [], Counter[str]()
    for point in points:
        outcome, end = flip(stage, point, rng.random())
        outcomes.append(outcome)
        ends[end] += 1
    names = [f"a bit of write {point.count} of {point.file}" for point in points]
    return told(stage, "one bit of one write arrives turned", outcomes, names, ends)


def flip(stage: Stage, point: Operation, place: float) -> tuple[Outcome, str]:
    """One dump, of which the write `point` reaches the disk with the bit at `place` (0 to 1) turned."""
    cache, log = fresh(stage, "flip")

    def body() -> tuple[int, list[tuple[str, str]]]:
        watch = Watch(cache, lambda operation, phase: None)
        watch.change = lambda operation, data: flipped(data, place) if operation == point else data
        return as_command(stage, cache, log), [(point.file, "reads back")]

    return judged(stage, cache, log, body)


def flipped(data: bytes, place: float) -> bytes:
    changed = bytearray(data)
    at = int(place * 8 * len(changed))
    if changed:
        changed[at // 8] ^= 1 << at % 8
    return bytes(changed)


def file_size_limit(stage: Stage, rng: random.Random, trials: int) -> Figure:
    """The kernel's own refusal, in Arrow's, safetensors' and Python's writes: EFBIG beyond so many bytes."""
    largest = max(path.stat().st_size for path in stage.config.cache.rglob("*") if path.is_file())
    limits = [rng.randint(2000, largest - 1) for _ in range(trials)]
    outcomes, ends = [], Counter[str]()
    for limit in limits:
        cache, log = fresh(stage, "limit")
        small = [
            str(path.relative_to(stage.config.cache))
            for path in stage.config.cache.rglob("*")
            if path.is_file() and path.stat().st_size > limit
        ]

        def body(
            limit: int = limit, cache: Path = cache, log: Path = log, small: list[str] = small
        ) -> tuple[int, list[tuple[str, str]]]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            return as_command(stage, cache, log), [(file, os.strerror(errno.EFBIG)) for file in small]

        outcome, end = judged(stage, cache, log, body)
        outcomes.append(outcome)
        ends[end] += 1
    names = [f"limit of {limit} bytes" for limit in limits]
    return told(stage, "EFBIG from the kernel beyond a random size (RLIMIT_FSIZE)", outcomes, names, ends)


def claims_fail(stage: Stage, kinds: tuple[str, ...]) -> Figure:
    """Claims whose refresh, look or release always fails: the run goes on, the next one clears them."""
    outcomes, ends, names = [], Counter[str](), []
    for step in ("refresh", "unlink", "read"):
        for name in kinds:
            cache, log = fresh(stage, f"claim-{step}")

            def body(step: str = step, name: str = name, cache: Path = cache, log: Path = log) -> Any:
                refresh_often()

                def hook(now: Operation, phase: str) -> Callable[[], None] | None:
                    if phase != "before" or now.kind != "claim" or now.step != step:
                        return None

                    def refuse() -> None:
                        raise OSError(KINDS[name], os.strerror(KINDS[name]), now.file)

                    return refuse

                watch = Watch(cache, hook)
                status = as_command(stage, cache, log)
                assert any(operation.step == step and operation.kind == "claim" for operation in watch.seen)
                return status, [("", "must end well")]

            outcome, end = judged(stage, cache, log, body)
            if end != "ended well":
                outcome.broken.append(end)
            outcomes.append(outcome)
            ends[end] += 1
            names.append(f"{name} at every {step} of a claim")
    return told(stage, "every refresh, look or release of claims fails", outcomes, names, ends)


def engine_dies(stage: Stage, most: int) -> Figure:
    """The engine fails at each of its steps: what is committed stays, and nothing else is."""
    outcomes, ends, names = [], Counter[str](), []
    for number in range(most):
        outcome, end = engine_death(stage, number)
        outcomes.append(outcome)
        ends[end] += 1
        names.append(f"engine dies at step {number}")
    return told(stage, "the engine dies at each of its steps in turn", outcomes, names, ends)


def engine_death(stage: Stage, number: int) -> tuple[Outcome, str]:
    cache, log = fresh(stage, f"engine-{number}")

    class Dying(Replay):
        steps = 0

        def step(self) -> None:
            if self.steps == number:
                raise TeacherEngineError("the teacher died in vLLM: out of luck")
            self.steps += 1

    return judged(stage, cache, log, lambda: (as_command(stage, cache, log, kind=Dying), [("", "out of luck")]))


def spread(points: list[Operation], count: int) -> list[Operation]:
    """So many points, over all kinds of file and step."""
    first: dict[tuple[str, str], Operation] = {}
    for point in points:
        first.setdefault((point.kind, point.step), point)
    chosen = list(first.values())
    step = max(1, len(chosen) // count)
    return chosen[::step]
