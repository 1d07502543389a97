"""The protocol broken on purpose, one way at a time: do the experiments of `kills` and `faults` notice?

Each mutant is a change made in the process of every dump (`Stage.change`), and the trials that should tell it from the
real thing, the likeliest first. A mutant that no trial notices is a survivor: the experiments are blind there.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from chaos import faults, kills
from chaos.checks import Outcome, recovered
from chaos.children import Child, in_fresh_interpreter
from chaos.figure import Figure
from chaos.operations import Operation
from chaos.recorded import Stage, make_stage, run_recorded
from chaos.trials import done_with, fresh, scratch
from pipeline import claim, claim_file, commit, shard
from pipeline.commit import FileDigest
from teacher_dump import shard_loop, work, writer

SHARDS = 3
RANDOM_TRIES = 12
Trials = Iterator[tuple[str, Outcome]]


@dataclass(frozen=True)
class Mutant:
    """One way to break the protocol.

    Attributes:
        what: in words.
        change: makes it, in the process of a dump.
        trials: names and outcomes of trials, made as they are asked for.
    """

    what: str
    change: Callable[[], None]
    trials: Callable[[Stage, list[Operation]], Trials]


def run(seed: int, small: bool) -> list[Figure]:
    return in_fresh_interpreter("chaos.mutations", seed, small)


def experiments(seed: int, small: bool) -> list[Figure]:
    with scratch(memory=True) as folder:
        stage = make_stage(Path(folder), True, shards=SHARDS)
        operations = kills.enumerate_operations(stage)
        noticed = {mutant.what: notice(mutant, replace(stage, change=mutant.change), operations) for mutant in MUTANTS}
        blind = {what: seen for what, (seen, _) in noticed.items() if seen is None}
        false_alarms = [name for name, outcome in controls(stage, operations) if not outcome.ok]
    found: dict[str, Any] = {
        what: f"noticed by {seen} ({told})" if seen else "SURVIVED" for what, (seen, told) in noticed.items()
    }
    found["the same trials without a mutant"] = f"{len(false_alarms)} alarms" + "".join(f", {a}" for a in false_alarms)
    what = "the protocol broken on purpose; failures: mutants that nothing noticed"
    return [Figure("mutations", what, len(MUTANTS), len(blind) + len(false_alarms), found)]


def notice(mutant: Mutant, stage: Stage, operations: list[Operation]) -> tuple[str | None, str]:
    """The first trial that tells the mutant from the real thing, and what it said."""
    for name, outcome in mutant.trials(stage, operations):
        if not outcome.ok:
            return name, outcome.said()[0].replace(f"{stage.folder}/trials/", "")[:160]
    return None, ""


def controls(stage: Stage, operations: list[Operation]) -> Trials:
    """The first trials of each kind on the real code, which must say nothing."""
    for trials in {mutant.trials: None for mutant in MUTANTS}:
        yield from itertools.islice(trials(stage, operations), 2)


# trials


def at_steps(file: str, step: str, phase: str, power: bool = False) -> Callable[[Stage, list[Operation]], Trials]:
    """Kills at one step of files of one kind, with power lost or without."""

    def trials(stage: Stage, operations: list[Operation]) -> Trials:
        name = f"kills: {phase} {step} of a {file}" + (", power lost" if power else "")
        for operation in operations:
            if (operation.kind, operation.step) == (file, step):
                for seed in range(4 if power else 1):
                    yield name, kills.kill_at(stage, operation, phase, random.Random(seed) if power else None)

    return trials


def random_kills(stage: Stage, operations: list[Operation]) -> Trials:
    rng = random.Random(1)
    for number in range(RANDOM_TRIES):
        cache, log = fresh(stage, f"mutant-{number}")
        kills.killed_after(stage, cache, log, rng.uniform(0.2, 1.0) * stage.seconds)
        yield (
            "kills: a random moment",
            done_with(cache, recovered(stage, cache, log, timeout=60.0 if stage.change is None else 6.0)),
        )


def pairs(stage: Stage, operations: list[Operation]) -> Trials:
    for _ in range(RANDOM_TRIES):
        yield "kills: two dumps at once", kills.pair(stage, None)


def flips(stage: Stage, operations: list[Operation]) -> Trials:
    rng = random.Random(1)
    writes = [operation for operation in operations if operation.step == "write" and operation.kind == "shard"]
    for _ in range(RANDOM_TRIES):
        yield "faults: a bit of a write turned", faults.flip(stage, rng.choice(writes), rng.random())[0]


def refusals(stage: Stage, operations: list[Operation]) -> Trials:
    for operation in operations:
        if operation.kind == "shard" and operation.step in ("create", "rename"):
            outcome, _ = faults.injected(
                stage, "mutant", lambda now, at=operation: faults.refusal(stage, "ENOSPC", now, now == at)
            )
            yield "faults: ENOSPC at one operation", outcome


def engine_deaths(stage: Stage, operations: list[Operation]) -> Trials:
    for number in range(2, 6):
        yield "faults: the engine dies", faults.engine_death(stage, number)[0]


def damaged_before(stage: Stage, operations: list[Operation]) -> Trials:
    """A committed shard's footer loses a bit; the same command must write the shard anew."""
    rng = random.Random(1)
    for _ in range(RANDOM_TRIES):
        cache, log = fresh(stage, "mutant-damage")
        Child(lambda cache=cache, log=log: bool(run_recorded(replace(stage, change=None), cache, log))).result()
        path = cache / "shard-00001.parquet"
        data = bytearray(path.read_bytes())
        length = int.from_bytes(data[-8:-4], "little")
        data[rng.randrange(len(data) - 8 - length, len(data) - 8)] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        outcome = recovered(stage, cache, None)
        outcome.corrupt.clear()  # it was, by our hand
        yield "damage: a footer's bit, then the same command", done_with(cache, outcome)


# mutants


def straight_to_the_final_name() -> None:
    """No temporary, no rename: a file grows under the name readers look for."""

    def commit_file(final: Path, write: Any, *, check: Any = None, exclusive: bool = False, **_: Any) -> FileDigest:
        if exclusive and final.exists():
            raise FileExistsError
        final.parent.mkdir(parents=True, exist_ok=True)
        return commit._written(final, write, check)

    commit.commit_file = shard.commit_file = commit_file  # type: ignore[assignment]
    import teacher_dump.teacher

    teacher_dump.teacher.commit_file = commit_file  # type: ignore[assignment]


def record_before_rows() -> None:
    """A shard's Parquet file gets its final name after its JSON."""
    real_publish, real_footer = commit.publish, shard.footer_sha256
    waiting: dict[Path, Path] = {}

    def publish(temporary: Path, final: Path, *, exclusive: bool = False) -> None:
        if final.suffix == ".parquet" and final.parent.name != "teacher":
            waiting[final] = temporary
            return
        real_publish(temporary, final, exclusive=exclusive)
        if (rows := final.with_suffix(".parquet")) in waiting:
            real_publish(waiting.pop(rows), rows)

    commit.publish = publish
    shard.footer_sha256 = lambda path: real_footer(waiting.get(path, path))


def no_read_back() -> None:
    """Digest and size are those of whatever is on the disk; nothing is compared."""

    def written(path: Path, write: Any, check: Any) -> FileDigest:
        write(path)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        return FileDigest(path.stat().st_size, commit.file_sha256(path))

    commit._written = written


def no_footer_digest() -> None:
    """A shard whose footer is not its JSON's is taken for done."""

    def is_done(found: work.Work, unit: Any) -> bool:
        path = found.cache / f"{work.unit_name(unit.unit)}.json"
        return path.is_file() and path.with_suffix(".parquet").stat().st_size == work.read_record(path).bytes

    work.is_done = shard_loop.is_done = is_done
    import teacher_dump.dump

    teacher_dump.dump.is_done = is_done


def claims_always_granted() -> None:
    """Another's live claim is taken for dead."""
    claim._is_dead = lambda path, holder: True


def one_name_for_all() -> None:
    """Claims are ignored, and all writers use one temporary."""

    class Free(claim_file.Claim):
        def is_ours(self) -> bool:
            return True

        def release(self) -> None:
            self._stop.set()

    shard_loop.try_claim = lambda cache, name: Free(cache / "claims" / f"{name}.json", "host-1-00000000000000")


def dead_claims_stay() -> None:
    """A dead writer's claim is respected for ever."""
    claim._is_dead = lambda path, holder: False


def temporaries_stay() -> None:
    """What dead writers left is not cleared."""
    claim._clear_unclaimed = lambda cache: None


def no_sync_of_files() -> None:
    """Files are renamed before they are on the disk."""
    real = os.fsync
    os.fsync = lambda handle: real(handle) if os.path.isdir(f"/proc/self/fd/{handle}") else None


def no_sync_of_folders() -> None:
    """Renames are not brought to the disk."""
    commit.fsync_folder = lambda folder: None


def other_rows_when_resumed() -> None:
    """A unit that is dumped in a cache that was begun before leaves its first document out."""
    real = shard_loop.packed_rows
    begun: dict[Path, bool] = {}

    def packed_rows(found: work.Work, unit: Any, count: Any) -> Any:
        cache = found.cache
        if begun.setdefault(cache, len(list(cache.glob("*-*.json"))) > 0):
            documents = found.plan.documents(found.config.corpus, unit)
            next(documents)
            plan = replace(found.plan)
            object.__setattr__(plan, "documents", lambda config, unit: documents)
            found = replace(found, plan=plan)
        return real(found, unit, count)

    shard_loop.packed_rows = packed_rows


def errors_are_swallowed() -> None:
    """An error in a writer's thread does not reach the dump."""
    writer.ShardWriters.fail = lambda self, error: None  # type: ignore[method-assign]


def aborted_shards_are_committed() -> None:
    """Rows captured before the engine died make a shard of their own."""
    real = writer.ShardWriter.rows

    def rows(self: writer.ShardWriter) -> Iterator[Any]:
        with contextlib.suppress(writer.ShardAborted):
            yield from real(self)

    writer.ShardWriter.rows = rows  # type: ignore[method-assign]


MUTANTS = [
    Mutant("no temporary name", straight_to_the_final_name, at_steps("shard's JSON", "write", "amid")),
    Mutant("a shard's JSON before its rows", record_before_rows, at_steps("shard's JSON", "rename", "after")),
    Mutant("no read-back, on a store that turns a bit", no_read_back, flips),
    Mutant("footer digest not compared at start", no_footer_digest, damaged_before),
    Mutant("live claims taken for dead", claims_always_granted, pairs),
    Mutant("claims ignored, one temporary for two writers", one_name_for_all, pairs),
    Mutant("dead claims respected", dead_claims_stay, random_kills),
    Mutant("dead writers' temporaries stay", temporaries_stay, at_steps("teacher file", "write", "amid")),
    Mutant("no fsync of files", no_sync_of_files, at_steps("shard's JSON", "rename", "after", power=True)),
    Mutant("no fsync of folders", no_sync_of_folders, at_steps("shard's JSON", "rename", "after", power=True)),
    Mutant("a resumed dump takes other rows", other_rows_when_resumed, at_steps("shard's JSON", "rename", "after")),
    Mutant("errors of writers swallowed", errors_are_swallowed, refusals),
    Mutant("half a shard committed when the engine dies", aborted_shards_are_committed, engine_deaths),
]
