"""Reading a cache: manifest, teacher folder and the shards that are committed at this moment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import UserError
from pipeline.fields import check_stays
from pipeline.manifest import read_manifest
from pipeline.row_checks import check_indices
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
        """The teacher folder.

        Raises:
            UserError: it is incomplete or damaged, a link out of the cache, or another vocabulary's or width's.
        """
        check_stays(self.path, self.path / "teacher")
        teacher = TeacherFolder(self.path / "teacher")
        for name in ("vocab_size", "width"):
            own, given = getattr(self.spec, name), getattr(teacher.facts, name)
            if own != given:
                raise UserError(
                    f"{teacher.path}/teacher.json: {name} is {given}, the manifest's is {own}: the folder is another "
                    "cache's; restore it"
                )
        return teacher

    def shards(self, split: str = "train") -> list[ShardRecord]:
        """Records of the committed shards of `split`, ordered by unit.

        Raises:
            UserError: a record is damaged or belongs to another cache.
        """
        pattern = "heldout-*.json" if split == "heldout" else "shard-*.json"
        records = [read_record(path) for path in sorted(self.path.glob(pattern))]
        for record in records:
            for field in ("compat_id", "data_id"):
                if getattr(record, field) != getattr(self.manifest, field):
                    raise UserError(
                        f"{self.path / (record.name + '.json')}: {field} is {getattr(record, field)}, the cache's is "
                        f"{getattr(self.manifest, field)}: the shard was copied from another cache; remove it"
                    )
        return sorted(records, key=lambda record: record.unit)

    def find(self, shard: int, split: str = "train") -> ShardRecord:
        """The record of shard number `shard` of `split`."""
        unit = shard + HELDOUT_UNIT if split == "heldout" else shard
        path = self.path / f"{unit_name(unit)}.json"
        if not path.is_file():
            here = len(list(self.path.glob("shard-*.json")))
            raise UserError(f"{path} is missing: the cache has {here} training shards; name another one (SHARD=...)")
        return read_record(path)

    def open(self, record: ShardRecord) -> ShardFile:
        """Open a shard; its size and footer digest are checked."""
        return ShardFile(self.path, record, self.spec)

    def groups(self, split: str, columns: list[str] | None = None) -> Iterator[Columns]:
        """Every row group of `split` in order, as NumPy columns, ids and lengths in their ranges."""
        for record in self.shards(split):
            with self.open(record) as shard:
                for group in range(shard.row_groups):
                    values = shard.read_group(group, columns)
                    check_indices(values, self.spec, f"{shard.path}: row group {group}")
                    yield values
