"""A compaction of many shards' records, so that a cache of a million shards opens in seconds.

`index.json` names a Parquet file with a row for each shard: what a reader needs to open it. A shard's JSON stays the
truth: a shard whose JSON is gone is passed over, one that is not in the index is read from its JSON, and one whose
file does not agree with the index is looked up in its JSON again. An index can be removed and built anew at any time:

    python -m pipeline index --cache caches/large
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.checked_parquet import CheckedParquet, written_schema
from pipeline.commit import commit_file, commit_json, file_sha256, read_json
from pipeline.errors import UserError, one_line
from pipeline.fields import MOST_COUNT, Fields, check_stays, child
from pipeline.parquet_headers import FIXED_BYTES, INT64, PLAIN, Column
from pipeline.schema import HELDOUT_UNIT, unit_name
from pipeline.store import StoreError, again, is_file, is_remote, names_in, remove
from pipeline.thrift import Malformed

INDEX = "index.json"
WORTH_WHILE = 1000
"""A dump builds the index when so many shards are not in it."""
NUMBERS = ("unit", "bytes", "rows", "tokens")
DIGESTS = ("sha256", "footer_sha256")
NAME = re.compile(r"(shard|heldout)-(\d{5,10})\.(json|parquet)")
MOST_SHARDS = 1 << 22
GROUP_ROWS = 1 << 16
BATCH_ROWS = 1 << 16
PAGE_BUFFER = 1 << 20


@dataclass(frozen=True)
class ShardEntry:
    """What a reader must know of a shard before it opens it."""

    unit: int
    bytes: int
    rows: int
    tokens: int
    sha256: str
    footer_sha256: str

    @property
    def name(self) -> str:
        return unit_name(self.unit)

    @property
    def file(self) -> str:
        return f"{self.name}.parquet"

    @property
    def split(self) -> str:
        return "heldout" if self.unit >= HELDOUT_UNIT else "train"


class ShardEntries(Sequence[ShardEntry]):
    """Entries of N shards in order of units, held as arrays: 96 bytes each. The arrays are shared, not to be changed.

    Attributes:
        unit, bytes, rows, tokens: int64 (N,).
        sha256, footer_sha256: uint8 (N, 32).
    """

    def __init__(self, columns: dict[str, np.ndarray]) -> None:
        unit = columns["unit"]
        if (unit[1:] < unit[:-1]).any():
            order = np.argsort(unit, kind="stable")
            columns = {name: values[order] for name, values in columns.items()}
        self.columns = dict(columns)
        vars(self).update(columns)

    unit: np.ndarray
    bytes: np.ndarray
    rows: np.ndarray
    tokens: np.ndarray
    sha256: np.ndarray
    footer_sha256: np.ndarray

    @classmethod
    def of(cls, records: Iterable[Any]) -> ShardEntries:
        """From objects with the attributes of `ShardEntry`."""
        numbers = {name: array("q") for name in NUMBERS}
        digests = {name: bytearray() for name in DIGESTS}
        for record in records:
            for name, values in numbers.items():
                values.append(getattr(record, name))
            for name, joined in digests.items():
                joined += bytes.fromhex(getattr(record, name))
        columns: dict[str, np.ndarray] = {name: np.array(values, np.int64) for name, values in numbers.items()}
        for name, joined in digests.items():
            columns[name] = np.frombuffer(joined, np.uint8).reshape(-1, 32)
        return cls(columns)

    def select(self, keep: np.ndarray) -> ShardEntries:
        """Those that a mask keeps."""
        if keep.all():
            return self
        return ShardEntries({name: values[keep] for name, values in self.columns.items()})

    def and_also(self, other: ShardEntries) -> ShardEntries:
        if not len(other):
            return self
        return ShardEntries({n: np.concatenate([v, other.columns[n]]) for n, v in self.columns.items()})

    def __len__(self) -> int:
        return len(self.unit)

    @overload
    def __getitem__(self, index: int) -> ShardEntry: ...
    @overload
    def __getitem__(self, index: slice) -> ShardEntries: ...
    def __getitem__(self, index: int | slice) -> ShardEntry | ShardEntries:
        if isinstance(index, slice):
            return ShardEntries({name: values[index] for name, values in self.columns.items()})
        return ShardEntry(
            unit=int(self.unit[index]),
            bytes=int(self.bytes[index]),
            rows=int(self.rows[index]),
            tokens=int(self.tokens[index]),
            sha256=self.sha256[index].tobytes().hex(),
            footer_sha256=self.footer_sha256[index].tobytes().hex(),
        )

    def __iter__(self) -> Iterator[ShardEntry]:
        return (self[i] for i in range(len(self)))


def listed_units(cache: Path, split: str) -> np.ndarray:
    """Units of a split whose JSON is there, ascending, int64; from one listing of the folder."""
    json_N, _ = units_of_files(cache)
    return json_N[(json_N >= HELDOUT_UNIT) == (split == "heldout")]


def units_of_files(cache: Path) -> tuple[np.ndarray, np.ndarray]:
    """Units of both splits whose JSON is there, and those whose Parquet file is, ascending, int64; from one listing."""
    found = {"json": array("q"), "parquet": array("q")}
    for name in names_in(cache):
        if (match := NAME.fullmatch(name)) and (number := int(match[2])) < HELDOUT_UNIT:
            found[match[3]].append(number + HELDOUT_UNIT * (match[1] == "heldout"))
    json_N, parquet_N = (np.sort(np.array(units, np.int64)) for units in found.values())
    return json_N, parquet_N


def read_index(cache: Path) -> tuple[dict[str, Any], ShardEntries] | None:
    """The index's own record and its entries; None if there is none.

    Raises:
        UserError: it is damaged; remove it and build it anew.
    """
    path = cache / INDEX
    if not is_file(path):
        return None
    check_stays(cache, path)
    record = read_json(path)
    while True:
        try:
            return record, _read_entries(cache, record)
        except UserError:
            now = read_json(path)
            if now == record:
                raise
            record = now  # another one was built meanwhile, and the file of this one removed


def _read_entries(cache: Path, record: dict[str, Any]) -> ShardEntries:
    path = cache / INDEX
    given = Fields(record, path)
    file = child(cache, given.text("file"), path)
    remedy = f"remove {path} and run `python -m pipeline index --cache {cache}`"
    try:
        source, sha256 = _fetched(file) if is_file(file) else (file, "")
        if sha256 != given.sha256("sha256"):
            raise UserError(f"{file} is missing or does not match its sha256 in {path}: {remedy}")
        columns = _read_columns(source, given.integer("shards", 0, MOST_SHARDS))
    except StoreError:
        raise
    except (Malformed, OSError, pa.ArrowException) as error:
        raise UserError(f"{file}: {one_line(error)}: {remedy}") from None
    entries = ShardEntries(columns)
    most = {"unit": 2 * HELDOUT_UNIT, "bytes": MOST_COUNT, "rows": 1 << 32, "tokens": MOST_COUNT}
    wrong = [n for n, v in columns.items() if n in most and ((v < (n != "unit")) | (v >= most[n])).any()]
    if wrong or (entries.unit[1:] == entries.unit[:-1]).any():
        raise UserError(f"{file}: {', '.join(wrong) or 'unit'} holds values that no shard has: {remedy}")
    return entries


def _fetched(file: Path) -> tuple[Path | BinaryIO, str]:
    """What the index's columns are read from, and its hex sha256. A store is asked once, not for every column."""
    if not is_remote(file):
        return file, file_sha256(file)
    data = again(file.read_bytes, file)
    return io.BytesIO(data), hashlib.sha256(data).hexdigest()


def _read_columns(source: Path | BinaryIO, shards: int) -> dict[str, np.ndarray]:
    """The arrays of `ShardEntries` from the index's Parquet file, its headers looked at before it is read.

    Raises:
        Malformed: they claim what cannot be.
        OSError, pa.ArrowException: from Arrow.
    """
    arrow = pa.schema([*((n, pa.int64()) for n in NUMBERS), *((n, pa.binary(32)) for n in DIGESTS)])
    columns = [Column(name, INT64, 8, 1, True, (PLAIN,)) for name in NUMBERS]
    columns += [Column(name, FIXED_BYTES, 32, 1, True, (PLAIN,)) for name in DIGESTS]
    # A page after the other: whole columns would be in memory twice, compressed beside it.
    by_page: dict[str, Any] = {"buffer_size": PAGE_BUFFER, "pre_buffer": False}
    checked = CheckedParquet(source, tuple(columns), written_schema(arrow), shards, MOST_SHARDS, **by_page)
    with closing(checked):
        if not checked.parquet.schema_arrow.equals(arrow):
            raise Malformed("another version wrote it")
        for group in range(checked.parquet.num_row_groups):
            checked.check_pages(group)
        return {name: _read_column(checked.parquet, name, shards) for name in arrow.names}


def _read_column(parquet: pq.ParquetFile, name: str, shards: int) -> np.ndarray:
    """int64 (N,) of a number, uint8 (N, 32) of a digest."""
    found = np.empty(shards, np.int64) if name in NUMBERS else np.empty((shards, 32), np.uint8)
    at = 0
    for batch in parquet.iter_batches(BATCH_ROWS, columns=[name], use_threads=False):
        values = batch.column(0)
        if values.null_count:
            raise Malformed("it has empty places")
        raw = values.buffers()[1] or b""
        part = np.frombuffer(raw, found.dtype).reshape(-1, *found.shape[1:])[
            values.offset : values.offset + len(values)
        ]
        found[at : at + len(values)] = part
        at += len(values)
    if at != shards:
        raise Malformed(f"it has {at} rows and says that it has {shards}")
    return found


def write_index(cache: Path, entries: ShardEntries, identities: dict[str, str]) -> None:
    """Commit an index of `entries` and remove the one before it; of no entries there is none.

    Args:
        identities: `compat_id` and `data_id` of the cache.
    """
    arrays = {name: pa.array(entries.columns[name]) for name in NUMBERS}
    for name in DIGESTS:
        data = pa.py_buffer(np.ascontiguousarray(entries.columns[name]))
        arrays[name] = pa.Array.from_buffers(pa.binary(32), len(entries), [None, data])
    table = pa.table(arrays)

    def write(path: Path) -> None:
        pq.write_table(table, path, GROUP_ROWS, compression="zstd", use_dictionary=False, write_page_checksum=True)

    before = {name for name in names_in(cache) if name.startswith("index-") and name.endswith(".parquet")}
    if len(entries):
        name = f"index-{len(entries):08d}-{os.urandom(4).hex()}.parquet"
        digest = commit_file(cache / name, write)
        record = {"file": name, "bytes": digest.bytes, "sha256": digest.sha256, "shards": len(entries), **identities}
        commit_json(cache / INDEX, record)
    else:
        remove(cache / INDEX)
    for old in before:
        remove(cache / old)
