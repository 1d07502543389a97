"""`python -m pipeline verify`: every byte of a cache against its digests, every number against the contract."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.commit import commit_json
from pipeline.config import Place
from pipeline.errors import UserError
from pipeline.folder_checks import (
    PlanRanges,
    Problem,
    check_teacher,
    covered_twice,
    find_missing,
    read_plan,
    shard_stems,
    stray_files,
    unit_of,
)
from pipeline.manifest import MANIFEST, Manifest, read_manifest
from pipeline.repair import Mode, Repair, repair_cache
from pipeline.shard_checks import UnitCheck, check_unit
from pipeline.store import is_file, sizes_in

DESCRIPTION = (
    "Check a cache: every file against its sha256, every page against its checksum, every number against the data "
    "contract, and the plan for units that are missing or covered twice. Ends with status 0 if nothing is wrong, 1 "
    "otherwise."
)
AHEAD = 2
"""Shards waiting for each thread: enough that none is idle, and a cache of many shards is never in memory at once."""


@dataclass(frozen=True)
class Options:
    """What to check."""

    cache: Place
    """folder of the cache"""
    jobs: int = min(4, os.cpu_count() or 1)
    """shards checked at once"""
    json: Path | None = None
    """file the result is written to, for programs"""
    shards: int | None = None
    """training shards the cache must have at least; by default only gaps in their numbers are found"""
    repair: Mode | None = None
    """list: print which units must be dumped again; remove: also remove their damaged shards, so that the next dump
    writes them; the manifest, the plan, the teacher folder, whole shards and those being written stay as they are"""


@dataclass
class Verification:
    """The result: problems make it fail, notes do not.

    Attributes:
        missing: units below the highest committed one (or below the number asked for) that are not there.
        checksum_mb_per_second: bytes through sha256 and page checksums per second of one core's time, in 10^6.
        repair: what is to be done, where that was asked for.
    """

    problems: list[Problem] = field(default_factory=list)
    notes: list[Problem] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    shards: int = 0
    rows: int = 0
    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0
    checksum_mb_per_second: float | None = None
    repair: Repair | None = None

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_record(self, cache: Path) -> dict[str, Any]:
        return {"cache": str(cache), "ok": self.ok, **asdict(self)}


def verify_cache(
    cache: Path,
    jobs: int = 1,
    shards: int | None = None,
    tell: Callable[[str], None] | None = None,
    repair: Mode | None = None,
) -> Verification:
    """Check everything under `cache`.

    Args:
        cache: the folder.
        jobs: shards checked at once, in threads (hashing, decompression and NumPy release the interpreter).
        shards: training shards that must be there; None: unknown.
        tell: called with a line for each problem and note as it is found.
        repair: list or remove what must be dumped again.

    Raises:
        UserError: there is no cache.
        OSError: a file could not be read for a reason that is no damage; nothing is removed then.
    """
    if not is_file(cache / MANIFEST):
        raise UserError(
            f"{cache} is no cache ({MANIFEST} is missing): name a cache folder, or make one with dump-teacher"
        )
    started = time.monotonic()
    result = Verification()
    say = tell or (lambda line: None)

    def found(problems: list[Problem], notes: list[Problem]) -> None:
        result.problems += problems
        result.notes += notes
        for kind, items in (("problem", problems), ("note", notes)):
            for item in items:
                say(f"{kind}: {item}")

    try:
        manifest = read_manifest(cache)
    except UserError as error:
        found([Problem(MANIFEST, f"{error}; nothing else can be checked without it")], [])
        if repair:
            result.repair = repair_cache(cache, repair, result.problems, [], None, lambda name: False)
        return result
    found(check_teacher(cache, manifest), [])
    plan, problems = read_plan(cache)
    found(problems, [])
    stems = shard_stems(cache)
    sources: list[tuple[str, int, int, int]] = []
    checksum_bytes, checksum_seconds = 0, 0.0
    for unit in check_units(cache, manifest, plan, stems, jobs):
        found(unit.problems, unit.notes)
        result.rows += unit.rows
        result.tokens += unit.tokens
        result.bytes += unit.bytes
        result.shards += unit.unit is not None
        checksum_bytes += unit.checksum_bytes
        checksum_seconds += unit.checksum_seconds
        if unit.unit is not None and unit.source is not None:
            sources.append((unit.split, *unit.source, unit.unit))
    found(covered_twice(sources), [])
    result.missing, problems, notes = find_missing(cache, {u for s in stems if (u := unit_of(s)) is not None}, shards)
    found(problems, notes)
    found([], stray_files(cache))
    if checksum_seconds > 0:
        result.checksum_mb_per_second = round(checksum_bytes / 1e6 / checksum_seconds, 1)
    if repair:
        overlapping = {problem.file for problem in covered_twice(sources)}

        def still_damaged(name: str) -> bool:
            return bool(f"{name}.json" in overlapping or check_unit(cache, manifest, plan, name).problems)

        result.repair = repair_cache(cache, repair, result.problems, result.missing, plan, still_damaged)
    result.seconds = round(time.monotonic() - started, 3)
    return result


def check_units(
    cache: Path, manifest: Manifest, plan: PlanRanges | None, stems: list[str], jobs: int
) -> Iterator[UnitCheck]:
    """Check shards in threads, a few ahead of the one that is handed over, with a progress bar of their bytes."""
    bar = tqdm(total=parquet_bytes(cache, stems), unit="B", unit_scale=True, desc="verify", disable=None, leave=False)
    with bar, ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
        names = iter(stems)
        tasks: set[Future[UnitCheck]] = set()
        try:
            while True:
                for name in islice(names, max(1, jobs) * AHEAD - len(tasks)):
                    tasks.add(pool.submit(check_unit, cache, manifest, plan, name))
                if not tasks:
                    return
                done, tasks = wait(tasks, return_when=FIRST_COMPLETED)
                for task in done:
                    unit = task.result()
                    bar.update(unit.bytes)
                    yield unit
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def parquet_bytes(cache: Path, stems: list[str]) -> int:
    """Bytes there are to check, for the progress bar."""
    sizes = sizes_in(cache)
    return sum(sizes.get(f"{stem}.parquet", 0) for stem in stems)


def run(options: Options) -> int:
    """Verify, print one line for each finding and a last one; 0 if nothing is wrong, else 1."""
    if options.jobs < 1:
        raise UserError(f"--jobs {options.jobs}: must be at least 1")
    result = verify_cache(options.cache, options.jobs, options.shards, tqdm.write, options.repair)
    if options.json is not None:
        commit_json(options.json, result.to_record(options.cache))
    if result.repair is not None:
        for line in result.repair.lines():
            print(line)
    speed = "" if result.checksum_mb_per_second is None else f" (checksums {result.checksum_mb_per_second:,.0f} MB/s)"
    checked = (
        f"{options.cache}: {result.shards} shards, {result.rows:,} rows, {result.tokens:,} tokens, "
        f"{result.bytes / 1e6:,.1f} MB checked in {result.seconds:.1f} s{speed}"
    )
    if result.ok:
        print(f"{checked}: nothing is wrong")
        return 0
    files = len({problem.file for problem in result.problems})
    print(f"{checked}: {len(result.problems)} problems in {files} files")
    return 1
