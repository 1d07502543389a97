"""`python -m pipeline verify`: every byte of a cache against its digests, every number against the contract."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from pipeline.commit import commit_json, file_sha256
from pipeline.config import Place
from pipeline.errors import UserError, one_line
from pipeline.folder_checks import Problem, check_plan, check_teacher, find_missing, stray_files
from pipeline.manifest import MANIFEST, Manifest, read_manifest
from pipeline.row_checks import GroupCheck, Totals
from pipeline.schema import HELDOUT_UNIT, METADATA_KEY
from pipeline.shard import ShardFile, ShardRecord, footer_sha256, read_record

DESCRIPTION = (
    "Check a cache: every file against its sha256, every page against its checksum, every number against the data "
    "contract, and the plan for units that are missing or covered twice. Ends with status 0 if nothing is wrong, 1 "
    "otherwise."
)


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
    """training shards the cache must have; by default a gap in their numbers is noted, but is no problem"""


@dataclass
class Verification:
    """The result: problems make it fail, notes do not.

    Attributes:
        missing: units below the highest committed one (or below the number asked for) that are not there.
    """

    problems: list[Problem] = field(default_factory=list)
    notes: list[Problem] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    shards: int = 0
    rows: int = 0
    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_record(self, cache: Path) -> dict[str, Any]:
        return {"cache": str(cache), "ok": self.ok, **asdict(self)}


def verify_cache(
    cache: Path, jobs: int = 1, shards: int | None = None, tell: Callable[[str], None] | None = None
) -> Verification:
    """Check everything under `cache`.

    Args:
        cache: the folder.
        jobs: shards checked at once, in threads (hashing, decompression and NumPy release the interpreter).
        shards: training shards that must be there; None: unknown.
        tell: called with a line for each problem and note as it is found.

    Raises:
        UserError: there is no cache.
    """
    if not (cache / MANIFEST).is_file():
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
        return result
    found(check_teacher(cache, manifest), [])
    records, problems = read_records(cache, manifest)
    found(problems, [])
    found(check_plan(cache, records), [])
    result.missing, problems = find_missing(records, shards)
    found(
        problems, [] if problems else [Problem(name, "is missing: dump it to close the gap") for name in result.missing]
    )
    found([], stray_files(cache))
    result.shards = len(records)
    result.bytes = sum(record.bytes for record in records)
    bar = tqdm(total=result.bytes, unit="B", unit_scale=True, desc="verify", disable=None, leave=False)
    with bar, ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
        tasks = {pool.submit(check_shard, cache, manifest, record): record for record in records}
        try:
            for task in as_completed(tasks):
                problems, notes, totals = task.result()
                found(problems, notes)
                result.rows += totals.rows
                result.tokens += totals.tokens
                bar.update(tasks[task].bytes)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    result.seconds = round(time.monotonic() - started, 3)
    return result


def read_records(cache: Path, manifest: Manifest) -> tuple[list[ShardRecord], list[Problem]]:
    """Every shard's JSON that can be trusted, in order of units, and what is wrong with the others."""
    records, problems = [], []
    for path in sorted([*cache.glob("shard-*.json"), *cache.glob("heldout-*.json")]):
        try:
            record = read_record(path)
        except UserError as error:
            problems.append(Problem(path.name, str(error)))
            continue
        for name in ("compat_id", "data_id"):
            own, given = getattr(manifest, name), getattr(record, name)
            if own != given:
                problems.append(
                    Problem(path.name, f"{name} is {given}, the manifest's is {own}: it is another cache's")
                )
        if record.split != ("heldout" if record.unit >= HELDOUT_UNIT else "train"):
            problems.append(Problem(path.name, f"split {record.split!r} does not suit unit {record.unit}"))
        records.append(record)
    return sorted(records, key=lambda record: record.unit), problems


def check_shard(cache: Path, manifest: Manifest, record: ShardRecord) -> tuple[list[Problem], list[Problem], Totals]:
    """Problems and notes of one shard, and what its rows sum to."""
    path, spec = cache / record.file, manifest.spec
    problems: list[Problem] = []
    totals = Totals()

    def wrong(message: str, group: int | None = None, column: str | None = None) -> None:
        problems.append(Problem(record.file, message, group, column))

    if not path.is_file():
        wrong(f"is missing, though {record.name}.json is there: dump it again")
        return problems, [], totals
    size = path.stat().st_size
    if size != record.bytes:
        wrong(f"has {size} bytes, its JSON says {record.bytes}")
    if file_sha256(path) != record.sha256:
        wrong("sha256 differs from the one in its JSON")
    try:
        if footer_sha256(path) != record.footer_sha256:
            wrong("the footer does not match the digest in its JSON; its rows were not looked at")
            return problems, [], totals
        if size != record.bytes:
            return problems, [], totals
        shard = ShardFile(cache, record, spec)
    except UserError as error:
        wrong(f"cannot be opened, its rows were not looked at: {error}")
        return problems, [], totals
    with shard:
        for message in check_footer(shard.parquet, manifest, record):
            wrong(message)
        for group in range(shard.row_groups):
            damaged = list(damaged_columns(shard, group))
            for column, reason in damaged:
                wrong(f"a page does not match its checksum ({reason})", group, column)
            if damaged:
                totals.rows += shard.group_rows[group]
                continue
            checked = GroupCheck(shard.read_group(group), spec, record.unit, totals.rows).run()
            for finding in checked.findings:
                wrong(finding.message, group, finding.column)
            totals.add(checked)
    if not problems:
        for message in check_sums(record, totals):
            wrong(message)
    notes = []
    if totals.sink_rows:
        least = f"{totals.sink_rows} rows sum to less than one (the least to {totals.least_row_sum:.4f})"
        notes.append(Problem(record.file, f"{least}: right only for a teacher with attention sinks", column="attn_map"))
    return problems, notes, totals


def damaged_columns(shard: ShardFile, group: int) -> Iterator[tuple[str, str]]:
    """Columns of a row group that cannot be read back, with the reason."""
    for column in shard.parquet.schema_arrow.names:
        try:
            shard.check_pages(group, [column])
            shard.parquet.read_row_group(group, columns=[column], use_threads=False)
        except (UserError, OSError, pa.ArrowException) as error:
            yield column, one_line(error)


def check_footer(file: pq.ParquetFile, manifest: Manifest, record: ShardRecord) -> Iterator[str]:
    """What the footer says against manifest and JSON."""
    rows = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    size = manifest.spec.rows_per_group
    if any(count != size for count in rows[:-1]) or rows[-1:] > [size]:
        yield f"has row groups of {rows[:4]} rows; the contract asks for {size} each, the last may be smaller"
    metadata = shard_metadata(file)
    for name, value in (("compat_id", manifest.compat_id), ("data_id", manifest.data_id), ("split", record.split)):
        if metadata.get(name) != value:
            yield f"its metadata says {name} {metadata.get(name)!r}, manifest and JSON say {value!r}"


def shard_metadata(file: pq.ParquetFile) -> dict[str, Any]:
    """The facts stored in a shard's own key-value metadata."""
    raw = (file.schema_arrow.metadata or {}).get(METADATA_KEY, b"{}")
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def check_sums(record: ShardRecord, totals: Totals) -> Iterator[str]:
    """The JSON's sums against the rows'."""
    if totals.tokens != record.tokens:
        yield f"holds {totals.tokens} tokens, its JSON says {record.tokens}"
    for name, total in (("mean_entropy", totals.entropy), ("mean_tail_mass", totals.tail_mass)):
        found, said = total / max(totals.tokens, 1), getattr(record, name)
        if not abs(found - said) <= 1e-3 * (1 + abs(said)):
            yield f"{name} is {found:.5f}, its JSON says {said:.5f}"


def run(options: Options) -> int:
    """Verify, print one line for each finding and a last one; 0 if nothing is wrong, else 1."""
    if options.jobs < 1:
        raise UserError(f"--jobs {options.jobs}: must be at least 1")
    result = verify_cache(options.cache, options.jobs, options.shards, tell=tqdm.write)
    if options.json is not None:
        commit_json(options.json, result.to_record(options.cache))
    checked = (
        f"{options.cache}: {result.shards} shards, {result.rows:,} rows, {result.tokens:,} tokens, "
        f"{result.bytes / 1e6:,.1f} MB checked in {result.seconds:.1f} s"
    )
    if result.ok:
        print(f"{checked}: nothing is wrong")
        return 0
    files = len({problem.file for problem in result.problems})
    print(f"{checked}: {len(result.problems)} problems in {files} files")
    return 1
