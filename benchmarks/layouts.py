"""Ways to put the same rows on a disk: the project's shards, at several zstd levels, and what it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.commit import file_sha256
from pipeline.inspection import column_facts
from pipeline.schema import CacheSpec
from pipeline.shard import Columns, ShardFile, ShardRecord, commit_shard, read_back, write_parquet

METADATA = {"split": "train"}
CHANGES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "ours": lambda options: options,
    "ours, zstd 1": lambda options: {**options, "compression_level": 1},
    "ours, zstd 9": lambda options: {**options, "compression_level": 9},
    "pyarrow's defaults": lambda options: {},  # snappy, dictionaries, statistics, no checksums
}
"""Parquet layout -> its options for pyarrow's writer, from ours."""


@dataclass(frozen=True)
class ChangedSpec(CacheSpec):
    """A shard's shape, written with other options."""

    layout: str = field(default="ours")

    def write_options(self) -> dict[str, Any]:
        return CHANGES[self.layout](super().write_options())


@dataclass(frozen=True)
class ColumnSpec(CacheSpec):
    """A shard's shape, of which one column alone is written, with the options that it has in a shard."""

    column: str = field(default="")

    def arrow_schema(self, metadata: dict[str, Any] | None = None) -> pa.Schema:
        whole = super().arrow_schema(metadata)
        return pa.schema([whole.field(self.column)], metadata=whole.metadata)

    def write_options(self) -> dict[str, Any]:
        options = super().write_options()
        paths = [path for path in options["column_encoding"] if path.partition(".")[0] == self.column]
        for name in ("column_encoding", "compression_level"):
            options[name] = {path: options[name][path] for path in paths}
        return {**options, "write_statistics": [path for path in options["write_statistics"] if path in paths]}


class Layout(Protocol):
    """One way to store some row groups; made once, after which its file is there to be read."""

    name: str
    bytes: int

    def write(self) -> None:
        """Encode all rows to a file again."""

    def read(self) -> list[Columns]:
        """All rows back as NumPy columns, with the checks that the layout has."""


class ShardLayout:
    """A Parquet shard, written and read through `pipeline.shard`.

    Args:
        folder: made and filled.
        spec: shape of the rows.
        groups: row groups.
        origin: record of the shard that the rows were taken from.
        name: a key of `CHANGES`.
    """

    def __init__(
        self, folder: Path, spec: CacheSpec, groups: list[Columns], origin: ShardRecord, name: str = "ours"
    ) -> None:
        self.name = name
        self.folder, self.groups = folder, groups
        self.spec = ChangedSpec(**{f.name: getattr(spec, f.name) for f in fields(spec)}, layout=name)
        counts = {"rows": sum(len(group["length"]) for group in groups), "tokens": tokens_of(groups)}
        decided = {"unit", "file", "bytes", "sha256", "footer_sha256"}
        described = {key: value for key, value in {**asdict(origin), **counts}.items() if key not in decided}
        self.record = commit_shard(folder, 0, self.spec, METADATA, groups, lambda: described, "benchmark")
        self.bytes = self.record.bytes

    def write(self) -> None:
        write_parquet(self.folder / "again.parquet", self.spec, METADATA, self.groups)

    def commit(self) -> None:
        """What committing adds to writing: read back with page checksums, and sha256. The fsync is the disk's."""
        path = self.folder / self.record.file
        read_back(path, self.spec)
        file_sha256(path)

    def read(self) -> list[Columns]:
        with ShardFile(self.folder, self.record, self.spec) as shard:
            return [shard.read_group(group) for group in range(shard.row_groups)]

    def write_column(self, name: str) -> None:
        """A file of one column alone."""
        spec = ColumnSpec(**{f.name: getattr(self.spec, f.name) for f in fields(CacheSpec)}, column=name)
        write_parquet(self.folder / "column.parquet", spec, METADATA, self.groups)

    def read_column(self, name: str) -> list[Columns]:
        """One column of the shard, with the checks of the whole."""
        with ShardFile(self.folder, self.record, self.spec) as shard:
            return [shard.read_group(group, [name]) for group in range(shard.row_groups)]

    def read_column_plain(self, name: str) -> pa.Table:
        """One column of the shard as pyarrow alone reads it: no checksums."""
        return pq.read_table(self.folder / self.record.file, columns=[name], use_threads=False)

    def column_bytes(self) -> dict[str, int]:
        """Compressed bytes of every column, page headers included; `footer` is all the rest of the file."""
        with ShardFile(self.folder, self.record, self.spec) as shard:
            sizes = {column.name: column.compressed_bytes for column in column_facts(shard)}
        return {**sizes, "footer": self.bytes - sum(sizes.values())}


class ArraysLayout:
    """One uncompressed .npz per row group: NumPy's own, the CRC of a zip entry its only check."""

    name = "uncompressed .npz"

    def __init__(self, folder: Path, groups: list[Columns]) -> None:
        self.folder, self.groups = folder, groups
        folder.mkdir(parents=True)
        self.write()
        self.bytes = sum(path.stat().st_size for path in folder.iterdir())

    def write(self) -> None:
        for number, group in enumerate(self.groups):
            plain = {**group, "doc_ids": np.array(["\n".join(names) for names in group["doc_ids"]])}
            np.savez(self.folder / f"{number}.npz", **plain)

    def read(self) -> list[Columns]:
        groups = []
        for number in range(len(self.groups)):
            with np.load(self.folder / f"{number}.npz") as arrays:
                columns: Columns = {name: arrays[name] for name in arrays.files}
            columns["doc_ids"] = [joined.split("\n") for joined in columns["doc_ids"].tolist()]
            groups.append(columns)
        return groups


def tokens_of(groups: list[Columns]) -> int:
    """Tokens that count, padding left out."""
    return sum(int(group["length"].sum()) for group in groups)
