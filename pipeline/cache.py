"""Reading a cache: manifest, teacher folder and the shards that are committed at this moment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import UserError
from pipeline.manifest import read_manifest
from pipeline.schema import HELDOUT_UNIT, unit_name
from pipeline.shard import Columns, ShardFile, ShardRecord, read_record
from pipeline.teacher_folder import TeacherFolder

SPLITS = ("train", "heldout")


class Cache:
    """An open cache folder.

    Shards are found by their JSON files, never by Parquet files; the list is taken when `shards` is called, so a dump
    may still be running beside the reader.

    Raises:
        UserError: the folder is no cache, or its manifest is damaged or of another major version.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self.spec = self.manifest.spec

    @property
    def teacher(self) -> TeacherFolder:
        return TeacherFolder(self.path / "teacher")

    def shards(self, split: str = "train") -> list[ShardRecord]:
        """Records of the committed shards of `split`, ordered by unit.

        Raises:
            UserError: a record is damaged or belongs to another cache.
        """
        pattern = "heldout-*.json" if split == "heldout" else "shard-*.json"
        records = [self._own(read_record(path)) for path in sorted(self.path.glob(pattern))]
        return sorted(records, key=lambda record: record.unit)

    def _own(self, record: ShardRecord) -> ShardRecord:
        for field in ("compat_id", "data_id"):
            if getattr(record, field) != getattr(self.manifest, field):
                raise UserError(
                    f"{self.path / (record.name + '.json')}: {field} is {getattr(record, field)}, the cache's is "
                    f"{getattr(self.manifest, field)}: the shard was copied from another cache; remove it"
                )
        return record

    def record(self, unit: int) -> ShardRecord:
        """The record of a unit.

        Raises:
            UserError: it is missing, damaged or belongs to another cache.
        """
        return self._own(read_record(self.path / f"{unit_name(unit)}.json"))

    def find(self, shard: int, split: str = "train") -> ShardRecord:
        """The record of shard number `shard` of `split`."""
        unit = shard + HELDOUT_UNIT if split == "heldout" else shard
        path = self.path / f"{unit_name(unit)}.json"
        if not path.is_file():
            here = len(list(self.path.glob("shard-*.json")))
            raise UserError(f"{path} is missing: the cache has {here} training shards; name another one (SHARD=...)")
        return self.record(unit)

    def open(self, record: ShardRecord) -> ShardFile:
        """Open a shard; its size and footer digest are checked."""
        return ShardFile(self.path, record, self.spec)

    def groups(self, split: str, columns: list[str] | None = None) -> Iterator[Columns]:
        """Every row group of `split` in order, as NumPy columns."""
        for record in self.shards(split):
            with self.open(record) as shard:
                for group in range(shard.row_groups):
                    yield shard.read_group(group, columns)
