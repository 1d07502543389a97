"""Everything that `verify` looks at of one shard: its JSON, its place in the plan, its bytes, its numbers."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.commit import file_sha256
from pipeline.errors import UserError, one_line
from pipeline.folder_checks import PlanRanges, Problem
from pipeline.manifest import Manifest
from pipeline.page_checksums import check_pages
from pipeline.row_checks import GroupCheck, Totals
from pipeline.schema import HELDOUT_UNIT, METADATA_KEY
from pipeline.shard import DamagedShard, ShardFile, ShardRecord, footer_sha256, read_record
from pipeline.store import StoreError, is_file, size_of


@dataclass
class UnitCheck:
    """What was found of one unit.

    Attributes:
        name: stem of its files.
        unit: its number; None if its JSON cannot be trusted.
        source: (start, end) of the corpus it says it covers.
        checksum_seconds: time of one core spent on sha256 and page checksums, of `checksum_bytes`.
    """

    name: str
    unit: int | None = None
    split: str = ""
    source: tuple[int, int] | None = None
    problems: list[Problem] = field(default_factory=list)
    notes: list[Problem] = field(default_factory=list)
    rows: int = 0
    tokens: int = 0
    bytes: int = 0
    checksum_bytes: int = 0
    checksum_seconds: float = 0.0


def check_unit(cache: Path, manifest: Manifest, plan: PlanRanges | None, name: str) -> UnitCheck:
    """Check the shard whose JSON is `name`.json.

    Raises:
        OSError: a file could not be read for a reason that is no damage (no permission, too many open files, a store
            that does not answer).
    """
    found = UnitCheck(name)
    path = cache / f"{name}.json"
    try:
        record = read_record(path)
    except (UserError, OSError) as error:
        if not is_damage(error):
            raise
        found.problems.append(Problem(path.name, str(error)))
        return found
    found.unit, found.split, found.bytes = record.unit, record.split, record.bytes
    found.problems += [Problem(path.name, message) for message in check_record(record, manifest, plan)]
    source = (record.source.get("start"), record.source.get("end"))
    if isinstance(source[0], int) and isinstance(source[1], int):
        found.source = source  # type: ignore[assignment]
    ShardCheck(cache, manifest, record, found).run()
    return found


def check_record(record: ShardRecord, manifest: Manifest, plan: PlanRanges | None) -> Iterator[str]:
    """What a shard's JSON says against manifest and plan."""
    for name in ("compat_id", "data_id"):
        own, given = getattr(manifest, name), getattr(record, name)
        if own != given:
            yield f"{name} is {given}, the manifest's is {own}: it is another cache's"
    if record.split != ("heldout" if record.unit >= HELDOUT_UNIT else "train"):
        yield f"split {record.split!r} does not suit unit {record.unit}"
    if plan is not None:
        given_range, planned = (record.source.get("start"), record.source.get("end")), plan.of(record.unit)
        if given_range != planned or not plan.has(record.unit):
            yield f"source range {given_range} is not the plan's {planned} below {plan.limit(record.unit)}"


class ShardCheck:
    """One shard's Parquet file against its JSON, the manifest and the contract; findings go to `found`."""

    def __init__(self, cache: Path, manifest: Manifest, record: ShardRecord, found: UnitCheck) -> None:
        self.cache, self.manifest, self.record, self.found = cache, manifest, record, found
        self.path, self.spec = cache / record.file, manifest.spec

    def wrong(self, message: str, group: int | None = None, column: str | None = None) -> None:
        self.found.problems.append(Problem(self.record.file, message, group, column))

    def run(self) -> None:
        if not is_file(self.path):
            self.wrong(f"is missing, though {self.record.name}.json is there: dump it again")
            return
        try:
            self.look()
        except (OSError, pa.ArrowException) as error:
            if not is_damage(error):
                raise
            self.wrong(f"cannot be read: {one_line(error)}")

    def look(self) -> None:
        before = len(self.found.problems)
        size = size_of(self.path)
        if size != self.record.bytes:
            self.wrong(f"has {size} bytes, its JSON says {self.record.bytes}")
        shard = self.open()
        if shard is None:
            return
        with shard:
            damaged = self.check_bytes(shard.parquet)
            for message in check_footer(shard.parquet, self.manifest, self.record):
                self.wrong(message)
            totals = self.check_rows(shard, damaged)
        if len(self.found.problems) == before:
            for message in check_sums(self.record, totals):
                self.wrong(message)
        self.found.rows, self.found.tokens = totals.rows, totals.tokens
        if totals.sink_rows:
            least = f"{totals.sink_rows} rows sum to less than one (the least to {totals.least_row_sum:.4f})"
            message = f"{least}: right only for a teacher with attention sinks"
            self.found.notes.append(Problem(self.record.file, message, column="attn_map"))

    def open(self) -> ShardFile | None:
        """The shard, if its footer is the one that was committed and claims nothing that cannot be."""
        try:
            if footer_sha256(self.path) == self.record.footer_sha256:
                return ShardFile(self.cache, self.record, self.spec)
            reason = "the footer does not match the digest in its JSON; its rows were not looked at"
        except (UserError, OSError, pa.ArrowException) as error:
            if not is_damage(error):
                raise
            reason = f"cannot be opened, its rows were not looked at: {one_line(error)}"
        if file_sha256(self.path) != self.record.sha256:
            self.wrong("sha256 differs from the one in its JSON")
        self.wrong(reason)
        return None

    def check_bytes(self, file: pq.ParquetFile) -> dict[int, list[str]]:
        """sha256 and page checksums; returns the damaged columns of each row group."""
        started = time.thread_time()
        sums = check_pages(self.path, file.metadata)
        self.found.checksum_seconds = time.thread_time() - started
        self.found.checksum_bytes = size_of(self.path)
        if sums.sha256 != self.record.sha256:
            self.wrong("sha256 differs from the one in its JSON")
        damaged: dict[int, list[str]] = {}
        for group, column, reason in sums.damaged:
            damaged.setdefault(group, []).append(column)
            self.wrong(f"a page does not match its checksum ({reason})", group, column)
        return damaged

    def check_rows(self, shard: ShardFile, damaged: dict[int, list[str]]) -> Totals:
        """The numbers, a row group at a time; those with damaged pages are passed over."""
        totals = Totals()
        for group, rows in enumerate(shard.group_rows):
            if group in damaged:
                totals.rows += rows
                continue
            try:
                columns = shard.read_group(group)
            except DamagedShard as error:
                if isinstance(error.__cause__, Exception) and not is_damage(error.__cause__):
                    raise error.__cause__ from None
                self.wrong(str(error), group)
                totals.rows += rows
                continue
            checked = GroupCheck(columns, self.spec, self.record.unit, totals.rows).run()
            for finding in checked.findings:
                self.wrong(finding.message, group, finding.column)
            totals.add(checked)
        return totals


def is_damage(error: Exception) -> bool:
    """Whether an exception tells of lost or wrong bytes, rather than of a reader that may not or cannot read now."""
    if isinstance(error, MemoryError | StoreError):
        return False
    return not isinstance(error, OSError) or error.errno in (None, errno.EIO)


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
