"""One shard: columns in, a committed Parquet file and its JSON out; and back, with every checksum looked at."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.checked_parquet import open_shard
from pipeline.commit import CHUNK_BYTES, DigestingFile, commit_file, commit_json, read_json
from pipeline.errors import UserError, one_line
from pipeline.fields import MOST_COUNT, Fields, check_stays
from pipeline.index import ShardEntry
from pipeline.local_copies import LocalCopies
from pipeline.parts import PartsFile
from pipeline.schema import HELDOUT_UNIT, CacheSpec, unit_name
from pipeline.store import StoreError, is_remote, open_file, remove, size_of
from pipeline.thrift import Malformed

Columns = dict[str, Any]
"""Column name -> values of R rows: a NumPy array whose first axis is R, or a list of lists of strings for `doc_ids`."""


@dataclass(frozen=True)
class ShardRecord:
    """What a shard's JSON says; the shard exists when this file does."""

    unit: int
    split: str
    file: str
    bytes: int
    sha256: str
    footer_sha256: str
    rows: int
    tokens: int
    short: bool  # the unit's source range held fewer tokens than planned
    source: dict[str, Any]
    mean_entropy: float  # nats, lower bound from K+1 outcomes
    mean_tail_mass: float  # at tau 1
    compat_id: str
    data_id: str
    versions: dict[str, str]
    hardware: str
    seconds: float

    @property
    def name(self) -> str:
        return unit_name(self.unit)


class DamagedShard(UserError):
    """A shard whose bytes are not what was committed; the message names shard, row group and column."""


def to_table(spec: CacheSpec, schema: pa.Schema, columns: Columns) -> pa.Table:
    """R rows of NumPy columns as an Arrow table of `schema`; values are not copied where types allow."""
    shapes = spec.shapes()
    arrays: list[pa.Array] = []
    for field in schema:
        values = columns[field.name]
        if field.name in shapes:
            flat = np.ascontiguousarray(values).reshape(-1)
            numbers = pa.array(flat, type=field.type.value_type)
            arrays.append(pa.FixedSizeListArray.from_arrays(numbers, type=field.type))
        else:
            arrays.append(pa.array(values, type=field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def write_parquet(path: Path, spec: CacheSpec, metadata: dict[str, Any], groups: Iterable[Columns]) -> str:
    """Write row groups to `path` and return the sha256 of what was written. Each item of `groups` is one row group."""
    schema = spec.arrow_schema(metadata)
    with DigestingFile(path) as file:
        with pq.ParquetWriter(file, schema, **spec.write_options()) as writer:
            for columns in groups:
                writer.write_table(to_table(spec, schema, columns))
        return file.sha256()


def footer_sha256(path: Path) -> str:
    """Hex sha256 of a Parquet footer: page checksums do not cover it, so it has a digest of its own.

    Raises:
        DamagedShard: the file is too short or does not end as Parquet does.
    """
    with open_file(path) as file:
        return footer_digest(file, size_of(path), path)


def footer_digest(file: Any, size: int, path: Path) -> str:
    """The same of an open file of `size` bytes; `path` is for messages."""
    file.seek(max(0, size - 8))
    tail = file.read(8)
    length = int.from_bytes(tail[:4], "little")
    if size < 12 or tail[4:] != b"PAR1" or length + 12 > size:
        raise DamagedShard(f"{path} does not end as a Parquet file does: it was cut or damaged; dump it again")
    file.seek(size - 8 - length)
    digest, left = hashlib.sha256(), length + 8
    while left and (block := file.read(min(CHUNK_BYTES, left))):
        digest.update(block)
        left -= len(block)
    return digest.hexdigest()


def commit_shard(
    folder: Path,
    unit: int,
    spec: CacheSpec,
    metadata: dict[str, Any],
    groups: Iterable[Columns],
    describe: Any,
    claim: str,
) -> ShardRecord:
    """Write one unit's rows as `NAME.parquet`, then its JSON, each by the commit protocol.

    Args:
        folder: the cache.
        unit: unit number.
        spec: shape of the rows.
        metadata: stored in the Parquet key-value metadata.
        groups: row groups, consumed as they come; an exception in it leaves nothing visible.
        describe: called once after the last group; returns the `ShardRecord` fields that the rows decide (a dict).
        claim: the writer's id.
    """
    final, record_path = folder / f"{unit_name(unit)}.parquet", folder / f"{unit_name(unit)}.json"
    remove(record_path)  # a damaged shard is dumped again: it must not be seen half replaced
    digest = commit_file(
        final,
        lambda path: write_parquet(path, spec, metadata, groups),
        claim=claim,
        check=lambda path: read_back(path, spec),
    )
    record = ShardRecord(
        unit=unit,
        file=final.name,
        bytes=digest.bytes,
        sha256=digest.sha256,
        footer_sha256=footer_sha256(final),
        **describe(),
    )
    commit_json(record_path, asdict(record), claim=claim)
    return record


def read_back(path: Path, spec: CacheSpec) -> None:
    """Read every page of a shard with its checksum; raises OSError if one does not match, and `Malformed` where a
    reader would refuse it."""
    with closing(open_shard(path, spec, None)) as checked:
        for group in range(checked.parquet.num_row_groups):
            checked.check_pages(group)
            checked.parquet.read_row_group(group, use_threads=False)


def read_record(path: Path) -> ShardRecord:
    """The JSON beside a shard; fields that a newer minor version added are passed over.

    Raises:
        UserError: it is missing or damaged, a field has a type or value it cannot have, or it is another shard's.
    """
    check_stays(path.parent, path)
    record = read_json(path)
    missing = {f.name for f in fields(ShardRecord)} - record.keys()
    if missing:
        raise UserError(f"{path} lacks the fields {sorted(missing)}: it was not written by this version; dump it again")
    given = Fields(record, path)
    unit, name = given.integer("unit", 0, 2 * HELDOUT_UNIT - 1), given.text("file")
    if path.stem != unit_name(unit) or name != f"{path.stem}.parquet":
        raise UserError(
            f"{path} is the record of {unit_name(unit)} and names the file {name!r}: it was renamed or "
            "copied; remove it and dump the shard again"
        )
    source = given.fields("source")
    for place in source.record.keys() & {"start", "end"}:
        source.integer(place)
    versions = given.object("versions")
    if not all(isinstance(version, str) for version in versions.values()):
        raise given.refusal("versions", "an object of texts")
    return ShardRecord(
        unit=unit,
        split=given.choice("split", ("train", "heldout")),
        file=name,
        bytes=given.integer("bytes", 1),
        sha256=given.sha256("sha256"),
        footer_sha256=given.sha256("footer_sha256"),
        rows=given.integer("rows", 1, (1 << 32) - 1),
        tokens=given.integer("tokens", 1),
        short=given.flag("short"),
        source=source.record,
        mean_entropy=given.number("mean_entropy"),
        mean_tail_mass=given.number("mean_tail_mass"),
        compat_id=given.text("compat_id"),
        data_id=given.text("data_id"),
        versions=versions,
        hardware=given.text("hardware"),
        seconds=given.number("seconds", 0, MOST_COUNT),
    )


class ShardFile:
    """An open shard: the footer's digest is checked before it is parsed, page checksums while reading.

    Args:
        folder: the cache.
        record: what its JSON or the index says.
        spec: shape of the rows.
        copies: where parts of a remote shard are kept.

    Raises:
        DamagedShard: on opening or reading; never returns wrong rows.
        OSError: a remote store that does not answer.
    """

    def __init__(
        self, folder: Path, record: ShardRecord | ShardEntry, spec: CacheSpec, copies: LocalCopies | None = None
    ) -> None:
        self.path = folder / record.file
        self.record = record
        self.spec = spec
        check_stays(folder, self.path)
        self.parts = self._remote(copies) if is_remote(self.path) else None
        if self.parts is None:
            if not self.path.is_file():
                raise DamagedShard(f"{self.path} is missing, though its JSON is there: dump it again")
            size = self.path.stat().st_size
            if size != record.bytes:
                raise DamagedShard(f"{self.path} has {size} bytes, its JSON says {record.bytes}: dump it again")
        if self._footer_differs():
            raise DamagedShard(f"{self.path}: the footer does not match the digest in its JSON: dump it again")
        try:
            self._checked = open_shard(self.parts or self.path, spec, record.rows)  # type: ignore[arg-type]
        except StoreError:
            raise
        except (Malformed, OSError, pa.ArrowException) as error:
            raise DamagedShard(f"{self.path}: {one_line(error)}: dump the shard again") from None
        self._file = self._checked.parquet

    def _remote(self, copies: LocalCopies | None) -> PartsFile:
        try:
            return PartsFile(self.path, self.record.bytes, self.record.sha256, copies)
        except FileNotFoundError:
            raise DamagedShard(f"{self.path} is missing, though its JSON is there: dump it again") from None
        except EOFError:
            raise DamagedShard(
                f"{self.path} has fewer bytes than the {self.record.bytes} of its JSON: dump it again"
            ) from None

    def _footer_differs(self) -> bool:
        if self.parts is None:
            return footer_sha256(self.path) != self.record.footer_sha256
        with contextlib.suppress(DamagedShard):
            if footer_digest(self.parts, self.parts.size, self.path) == self.record.footer_sha256:
                return False
        self.parts.forget()  # the local copy may be what is damaged
        return footer_digest(self.parts, self.parts.size, self.path) != self.record.footer_sha256

    @property
    def row_groups(self) -> int:
        return self._file.num_row_groups

    @property
    def group_rows(self) -> list[int]:
        return [self._file.metadata.row_group(i).num_rows for i in range(self.row_groups)]

    @property
    def parquet(self) -> pq.ParquetFile:
        return self._file

    def read_group(self, group: int, columns: list[str] | None = None) -> Columns:
        """Row group `group` as NumPy arrays (R, *shape), without a copy where Arrow allows; `doc_ids` as lists."""
        if self.parts is None:
            table = self._table(group, columns)
        else:
            start, end = self.group_range(group)
            self.parts.hold(start, end)
            try:
                table = self._table(group, columns)
            except DamagedShard:
                self.parts.forget()  # the local copy may be what is damaged
                table = self._table(group, columns)
            finally:
                self.parts.drop(start, end)
        shapes = self.spec.shapes()
        values: Columns = {}
        for name in table.column_names:
            chunk = table.column(name).combine_chunks()
            if isinstance(chunk, pa.ChunkedArray):
                chunk = chunk.chunk(0)
            if name in shapes:
                numbers = chunk.flatten().to_numpy(zero_copy_only=True)
                values[name] = numbers.reshape(len(chunk), *shapes[name])
            elif name == "doc_ids":
                try:
                    values[name] = chunk.to_pylist()
                except UnicodeDecodeError as error:
                    raise DamagedShard(
                        f"{self.path}: row group {group}, column doc_ids: an id is no UTF-8 ({error}): dump it again"
                    ) from None
            else:
                values[name] = chunk.to_numpy(zero_copy_only=True)
        return values

    def _table(self, group: int, columns: list[str] | None) -> pa.Table:
        self.check_pages(group, columns)
        try:
            return self._file.read_row_group(group, columns=columns, use_threads=False)
        except StoreError:
            raise
        except (OSError, pa.ArrowException) as error:
            raise self._damage(group, columns, error) from error

    def group_range(self, group: int) -> tuple[int, int]:
        """Where the bytes of a row group begin and end."""
        found = self._file.metadata.row_group(group)
        chunks = [found.column(index) for index in range(found.num_columns)]
        start = min(chunk.data_page_offset for chunk in chunks)
        return start, max(chunk.data_page_offset + chunk.total_compressed_size for chunk in chunks)

    def check_pages(self, group: int, columns: list[str] | None = None) -> None:
        """Look at the page headers of some columns of a row group: a page may not claim more than the manifest says.

        Raises:
            DamagedShard: one does.
        """
        try:
            self._checked.check_pages(group, columns)
        except Malformed as error:
            raise DamagedShard(
                f"{self.path}: row group {group}, column {one_line(error)}: run `make verify`, then dump it again"
            ) from None

    def _damage(self, group: int, columns: list[str] | None, error: Exception) -> DamagedShard:
        """Name the column: read them one by one until one fails."""
        for name in columns or self._file.schema_arrow.names:
            try:
                self._file.read_row_group(group, columns=[name], use_threads=False)
            except StoreError:
                raise
            except (OSError, pa.ArrowException):
                return DamagedShard(
                    f"{self.path}: row group {group}, column {name} does not match its page checksums "
                    f"({one_line(error)}): run `make verify`, then dump the shard again"
                )
        return DamagedShard(
            f"{self.path}: row group {group} could not be read ({one_line(error)}): dump the shard again"
        )

    def close(self) -> None:
        self._checked.close()

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
