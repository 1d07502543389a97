"""Reading a cache: manifest, teacher folder and the shards that are committed at this moment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import UserError
from pipeline.fields import check_stays
from pipeline.index import INDEX, ShardEntries, ShardEntry, listed_units, read_index, units_of_files, write_index
from pipeline.local_copies import LocalCopies
from pipeline.manifest import read_manifest
from pipeline.row_checks import check_indices
from pipeline.schema import HELDOUT_UNIT, MOST_GROUPS, unit_name
from pipeline.shard import Columns, DamagedShard, ShardFile, ShardRecord, read_record
from pipeline.store import is_file, open_path
from pipeline.teacher_folder import TeacherFolder, local_teacher

SPLITS = ("train", "heldout")


class Cache:
    """An open cache folder.

    Shards are found by their JSON files, never by Parquet files; the list is taken when `shards` is called, so a dump
    may still be running beside the reader.

    Raises:
        UserError: the folder is no cache, or its manifest is damaged or of another major version.
    """

    def __init__(self, path: Path | str, copies: LocalCopies | None = None) -> None:
        self.path, self.copies = open_path(path), copies
        self.manifest = read_manifest(self.path)
        self.spec = self.manifest.spec

    @property
    def teacher(self) -> TeacherFolder:
        """The teacher folder.

        Raises:
            UserError: it is incomplete or damaged, a link out of the cache, or another vocabulary's or width's.
        """
        check_stays(self.path, self.path / "teacher")
        teacher = TeacherFolder(local_teacher(self.path / "teacher"))
        for name in ("vocab_size", "width"):
            own, given = getattr(self.spec, name), getattr(teacher.facts, name)
            if own != given:
                raise UserError(
                    f"{teacher.path}/teacher.json: {name} is {given}, the manifest's is {own}: the folder is another "
                    "cache's; restore it"
                )
        return teacher

    def shards(self, split: str = "train") -> ShardEntries:
        """The committed shards of `split`, ordered by unit: those of the index, the others from their JSON.

        Raises:
            UserError: a record or the index is damaged or belongs to another cache.
        """
        return self._entries_of(listed_units(self.path, split), self._indexed())

    def _indexed(self) -> ShardEntries:
        """What the index holds, nothing without one.

        Raises:
            UserError: it is damaged or belongs to another cache.
        """
        found = read_index(self.path)
        if found is None:
            return ShardEntries.of([])
        record, entries = found
        self._check_identity(self.path / INDEX, record)
        return entries

    def _whole_index(self) -> ShardEntries:
        """The same, nothing if it is of no use."""
        try:
            return self._indexed()
        except UserError:
            return ShardEntries.of([])

    def _entries_of(self, units: np.ndarray, indexed: ShardEntries) -> ShardEntries:
        """Of the committed shards among `units`, ordered by unit: from the index, the others from their JSON."""
        entries = indexed.select(np.isin(indexed.unit, units))
        new = units[~np.isin(units, entries.unit)]
        records = (self._record_if_there(int(unit)) for unit in new)
        entries = entries.and_also(ShardEntries.of(record for record in records if record is not None))
        most = MOST_GROUPS * self.spec.rows_per_group
        for index in np.flatnonzero(entries.rows > most)[:1]:  # the order of an epoch is made from these numbers
            raise UserError(
                f"{self.path / entries[index].name}.json says {entries.rows[index]} rows, none has more than {most}: "
                "it was damaged or another program wrote it; restore it from a copy"
            )
        return entries

    def records(self, split: str = "train") -> Iterator[ShardRecord]:
        """The whole records of the committed shards of `split`, ordered by unit, each read from its JSON."""
        records = (self._record_if_there(int(unit)) for unit in listed_units(self.path, split))
        return (record for record in records if record is not None)

    def record(self, unit: int) -> ShardRecord:
        """The record of a committed unit.

        Raises:
            UserError: it is missing, damaged or belongs to another cache.
        """
        path = self.path / f"{unit_name(unit)}.json"
        record = read_record(path)
        self._check_identity(path, vars(record))
        return record

    def _record_if_there(self, unit: int) -> ShardRecord | None:
        """None where a shard that was just listed is gone: it is being dumped again."""
        try:
            return self.record(unit)
        except UserError:
            if is_file(self.path / f"{unit_name(unit)}.json"):
                raise
            return None

    def _check_identity(self, path: Path, record: dict[str, Any]) -> None:
        for field in ("compat_id", "data_id"):
            if record.get(field) != getattr(self.manifest, field):
                raise UserError(
                    f"{path}: {field} is {record.get(field)}, the cache's is {getattr(self.manifest, field)}: the "
                    "shard was copied from another cache; remove it"
                )

    def find(self, shard: int, split: str = "train") -> ShardRecord:
        """The record of shard number `shard` of `split`."""
        unit = shard + HELDOUT_UNIT if split == "heldout" else shard
        path = self.path / f"{unit_name(unit)}.json"
        if not is_file(path):
            here = len(listed_units(self.path, "train"))
            raise UserError(f"{path} is missing: the cache has {here} training shards; name another one (SHARD=...)")
        return self.record(unit)

    def open(self, shard: ShardEntry | ShardRecord) -> ShardFile:
        """Open a shard; its size and footer digest are checked."""
        try:
            return ShardFile(self.path, shard, self.spec, self.copies)
        except DamagedShard:
            now = self.record(shard.unit)  # dumped again since the index was built?
            if now.footer_sha256 == shard.footer_sha256:
                raise
            return ShardFile(self.path, now, self.spec, self.copies)

    def unindexed(self) -> int:
        """How many committed shards the index does not have: all, if it is of no use."""
        units, _ = units_of_files(self.path)
        return int((~np.isin(units, self._whole_index().unit)).sum())

    def build_index(self) -> int:
        """Write the index of all committed shards, from the one there is and their JSON; returns their number."""
        entries = self._entries_of(units_of_files(self.path)[0], self._whole_index())
        write_index(self.path, entries, {name: getattr(self.manifest, name) for name in ("compat_id", "data_id")})
        return len(entries)

    def groups(self, split: str, columns: list[str] | None = None) -> Iterator[Columns]:
        """Every row group of `split` in order, as NumPy columns, ids and lengths in their ranges."""
        for record in self.shards(split):
            with self.open(record) as shard:
                for group in range(shard.row_groups):
                    values = shard.read_group(group, columns)
                    check_indices(values, self.spec, f"{shard.path}: row group {group}")
                    yield values
