"""Opening Parquet files that a stranger may have made: nothing is allocated that the manifest does not ask for.

What reading a shard's row group may take follows from the manifest alone: the numbers of `CacheSpec.group_bytes`, and
for `doc_ids` at most T names a row of `MOST_ID_BYTES` each. `pipeline/parquet_headers.py` compares every size in footer
and page headers with that before Arrow acts on it.
"""

from __future__ import annotations

import hashlib
import io
from functools import lru_cache, partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.parquet_headers import (
    BYTE_ARRAY,
    BYTE_STREAM_SPLIT,
    FIXED_BYTES,
    FLOAT,
    INT32,
    INT64,
    PLAIN,
    PLAIN_DICTIONARY,
    RLE_DICTIONARY,
    Chunk,
    Column,
    Group,
    check_footer,
    check_pages,
    footer_layout,
)
from pipeline.schema import MOST_GROUPS, MOST_ID_BYTES, CacheSpec
from pipeline.store import open_file
from pipeline.thrift import Malformed, Reader

FOOTER_BYTES = 1 << 20
"""Bytes of a footer, besides `CHUNK_BYTES` for every column of every row group."""
CHUNK_BYTES = 512
REMEMBERED = 4096
WIDTHS = {INT32: 4, INT64: 8, FLOAT: 4}
_passed: set[tuple[Any, ...]] = set()
"""Footers that were looked at: a reader that opens a shard for each of its row groups does so once."""


class CheckedParquet:
    """A Parquet file whose footer was looked at before Arrow parsed it.

    Args:
        source: the file, by path or opened.
        columns: what its columns may hold.
        schema: the schema its footer must have.
        rows: rows it must have in all; None: any number.
        group_rows: rows of a row group, at most.
        options: for `pyarrow.parquet.ParquetFile`.

    Raises:
        Malformed: a header claims what cannot be.
        OSError, pa.ArrowException: from Arrow.
    """

    def __init__(
        self,
        source: Path | BinaryIO,
        columns: tuple[Column, ...],
        schema: list[Any],
        rows: int | None,
        group_rows: int,
        **options: Any,
    ) -> None:
        self.columns = columns
        opened: Any = source
        if isinstance(source, Path):
            opened = open(source, "rb", buffering=0)  # noqa: SIM115
        elif not hasattr(source, "readinto"):  # a path on a store
            opened = open_file(opened)
        self._file: BinaryIO = opened
        self._checked: set[tuple[int, int]] = set()
        try:
            footer, before = self._footer()
            key = (hashlib.sha256(footer).digest(), before, columns, rows, group_rows)
            groups = None
            if key not in _passed:
                groups = check_footer(footer, before, columns, schema, MOST_GROUPS)
                _check_rows(groups, rows, group_rows)
            self.parquet = pq.ParquetFile(
                source if isinstance(source, Path) else opened,
                page_checksum_verification=True,
                memory_map=False,
                thrift_string_size_limit=max(len(footer), 1),
                thrift_container_size_limit=MOST_GROUPS,
                **options,
            )
            if groups is not None:
                self._check_agreement(groups)
                if len(_passed) >= REMEMBERED:
                    _passed.clear()
                _passed.add(key)
        except BaseException:
            self._file.close()
            raise

    def _footer(self) -> tuple[bytes, int]:
        """The footer, and how many bytes stand before it."""
        size = self._file.seek(0, io.SEEK_END)
        tail = self._read_at(max(0, size - 8), 8)
        length = int.from_bytes(tail[:4], "little")
        if size < 12 or tail[4:] != b"PAR1" or length + 12 > size:
            raise Malformed("it does not end as a Parquet file does")
        most = FOOTER_BYTES + CHUNK_BYTES * MOST_GROUPS * len(self.columns)
        if length > most:
            raise Malformed(f"its footer has {length} bytes, at most {most} can be right")
        before = size - 8 - length
        return self._read_at(before, length), before

    def _check_agreement(self, groups: list[Group]) -> None:
        """Arrow must have read the same from the footer."""
        metadata = self.parquet.metadata
        for number in range(metadata.num_row_groups):
            found = metadata.row_group(number)
            own = groups[number] if number < len(groups) else None
            chunks = tuple(_chunk(found.column(index)) for index in range(found.num_columns))
            if own is None or (found.num_rows, chunks) != (own.rows, own.chunks):
                raise Malformed(f"row group {number} can be read in two ways")
        if metadata.num_row_groups != len(groups):
            raise Malformed("its row groups can be read in two ways")

    def check_pages(self, group: int, names: list[str] | None = None) -> None:
        """Look at the page headers of some columns of a row group, once each.

        Raises:
            Malformed: the message begins with the column's name.
        """
        metadata = None
        for index, column in enumerate(self.columns):
            if (names is not None and column.name not in names) or (group, index) in self._checked:
                continue
            metadata = metadata or self.parquet.metadata.row_group(group)
            try:
                check_pages(self._read_at, _chunk(metadata.column(index)), column)
            except Malformed as error:
                raise Malformed(f"{column.name}: {error}") from None
            self._checked.add((group, index))

    def _read_at(self, offset: int, count: int) -> bytes:
        self._file.seek(offset)
        data = self._file.read(count)
        while len(data) < count and (more := self._file.read(count - len(data))):
            data += more
        return data

    def close(self) -> None:
        self.parquet.close()
        self._file.close()


def _chunk(column: Any) -> Chunk:
    start = column.data_page_offset
    if column.dictionary_page_offset:
        start = min(start, column.dictionary_page_offset)
    return Chunk(start, column.total_compressed_size, column.num_values)


def _check_rows(groups: list[Group], rows: int | None, group_rows: int) -> None:
    counts = [group.rows for group in groups]
    if rows is not None and sum(counts) != rows:
        raise Malformed(f"has {sum(counts)} rows, its JSON says {rows}")
    if max(counts, default=0) > group_rows:
        raise Malformed(f"has row groups of {counts[:4]} rows; the contract asks for {group_rows} at most")


def open_shard(source: Path | BinaryIO, spec: CacheSpec, rows: int | None) -> CheckedParquet:
    """A shard's file; `rows`: those its JSON says, None where there is none yet.

    Raises:
        Malformed: footer, rows or columns are not what manifest and JSON say.
        OSError, pa.ArrowException: from Arrow.
    """
    columns, schema, arrow = shard_columns(spec)
    file = CheckedParquet(source, columns, schema, rows, spec.rows_per_group)
    if not file.parquet.schema_arrow.equals(arrow):
        names = sorted({field.name for field in set(arrow) ^ set(file.parquet.schema_arrow)})
        file.close()
        raise Malformed(f"its columns are not the manifest's: {', '.join(names) or 'their order'} differ")
    return file


@lru_cache(maxsize=64)
def shard_columns(spec: CacheSpec) -> tuple[tuple[Column, ...], list[Any], pa.Schema]:
    """(what the columns of a shard may hold, the footer's schema, the Arrow schema)."""
    arrow, shapes, options = spec.arrow_schema(), spec.shapes(), spec.write_options()
    elements = written_schema(arrow, options)
    leaves = [element for element in elements if "children" not in element]
    dictionary = bool(options.get("use_dictionary", True))  # pyarrow's own defaults
    make = partial(
        Column,
        encodings=(PLAIN, PLAIN_DICTIONARY, RLE_DICTIONARY) if dictionary else (PLAIN, BYTE_STREAM_SPLIT),
        codec=options.get("compression", "snappy"),
        dictionary=dictionary,
        checksums=bool(options.get("write_page_checksum", False)),
    )
    columns = []
    for field, leaf in zip(arrow, leaves, strict=True):
        if field.name == "doc_ids":
            columns.append(make("doc_ids", BYTE_ARRAY, MOST_ID_BYTES + 4, spec.length, False))
            continue
        width = leaf["type_length"] if leaf["type"] == FIXED_BYTES else WIDTHS[leaf["type"]]
        columns.append(make(field.name, leaf["type"], width, prod(shapes.get(field.name, ())), True))
    return tuple(columns), elements, arrow


def written_schema(arrow: pa.Schema, options: dict[str, Any] | None = None) -> list[Any]:
    """The schema's elements as a writer puts them in the footer: those of a file without rows."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, arrow, **(options or {})):
        pass
    data = sink.getvalue()
    length = int.from_bytes(data[-8:-4], "little")
    footer = Reader(data[-8 - length : -8]).struct(footer_layout(len(arrow), 4 * len(arrow) + 1, 1))
    return list(footer["schema"])


MOST_TOKEN_BYTES = 64 << 20
"""Bytes of all tokens together."""


@lru_cache(maxsize=4)
def _token_columns(vocab_size: int) -> tuple[tuple[Column, ...], list[Any]]:
    arrow = pa.schema([("token_id", pa.int32()), ("bytes", pa.binary())])
    encodings = (PLAIN, PLAIN_DICTIONARY, RLE_DICTIONARY)
    most = MOST_TOKEN_BYTES + 16 * vocab_size
    make = partial(Column, values=1, exact=True, encodings=encodings, most=most, dictionary=True)
    return (make("token_id", INT32, 4), make("bytes", BYTE_ARRAY, MOST_TOKEN_BYTES)), written_schema(arrow)


def read_token_bytes(path: Path, vocab_size: int) -> list[bytes]:
    """The bytes of ids 0..V-1 from `token_bytes.parquet`; b"" where the file says null.

    Raises:
        Malformed: not the ids 0..V-1 in order, tokens of more than `MOST_TOKEN_BYTES` together, or headers that claim
            what cannot be.
        OSError, pa.ArrowException: from Arrow.
    """
    columns, schema = _token_columns(vocab_size)
    # As a dictionary: one long value may stand for any number of ids.
    file = CheckedParquet(path, columns, schema, None, vocab_size, read_dictionary=["bytes"])
    try:
        types = file.parquet.schema_arrow.types
        rows = file.parquet.metadata.num_rows
        if types != [pa.int32(), pa.dictionary(pa.int32(), pa.binary())]:
            raise Malformed(f"its columns are {', '.join(map(str, types))}, not int32 and binary")
        if rows != vocab_size:
            raise Malformed(f"has {rows} ids, the vocabulary {vocab_size}")
        ids: list[int] = []
        values: list[bytes] = []
        for group in range(file.parquet.num_row_groups):
            file.check_pages(group)
            table = file.parquet.read_row_group(group, use_threads=False)
            ids += table.column("token_id").to_pylist()
            for chunk in table.column("bytes").chunks:
                known = [value or b"" for value in chunk.dictionary.to_pylist()]
                indices = chunk.indices.to_pylist()
                if not all(index is None or 0 <= index < len(known) for index in indices):  # Arrow does not look
                    raise Malformed(f"its dictionary has {len(known)} values, a row asks for another")
                values += [b"" if index is None else known[index] for index in indices]
        if ids != list(range(vocab_size)):
            raise Malformed(f"its ids are not 0 to {vocab_size - 1} in order")
        if sum(map(len, values)) > MOST_TOKEN_BYTES:
            raise Malformed(f"its tokens take more than {MOST_TOKEN_BYTES} bytes")
        return values
    finally:
        file.close()
