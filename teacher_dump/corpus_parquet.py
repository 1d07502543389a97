"""Parquet files of a corpus: read batch by batch, so that no file a stranger made can fill the memory.

What reading takes: the compressed pages of a row group's text (and id) column, one uncompressed page of at most
`MOST_PAGE_BYTES`, a batch of at most `BATCH_BYTES` or one value, and the text of one document. A small page can stand
for much text (a dictionary's long value in every row): batches get smaller where pages are large.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import UserError
from pipeline.parquet_headers import (
    BYTE_STREAM_SPLIT,
    CHUNK,
    DICTIONARY_PAGE,
    PLAIN,
    PLAIN_DICTIONARY,
    RLE_DICTIONARY,
    SCHEMA_ELEMENT,
    Chunk,
    Leaf,
    check_place,
    leaves_of,
    need,
    pages,
)
from pipeline.schema import MOST_ID_BYTES
from pipeline.thrift import I64, Items, Malformed, Reader

MOST_FOOTER_BYTES = 16 << 20
MOST_PAGE_BYTES = 1 << 30
MOST_PAGE_VALUES = 1 << 24
BATCH_BYTES = 64 << 20
BATCH_ROWS = 256
MOST_COLUMNS = 10_000
ENCODINGS = (PLAIN, PLAIN_DICTIONARY, RLE_DICTIONARY, BYTE_STREAM_SPLIT)
"""Delta encodings are not among them: a page of 20 bytes can make Arrow allocate 8 GB for its lengths."""
_passed: set[tuple[bytes, int]] = set()


class CorpusParquet:
    """A Parquet file of a corpus.

    Args:
        path: for messages.
        raw: the open file.

    Raises:
        Malformed: footer or page headers claim what cannot be; from every method.
        OSError, pa.ArrowException: from Arrow.
    """

    def __init__(self, path: str, raw: BinaryIO) -> None:
        self.path = path
        self._held = HeldRanges(raw)
        self._before = check_corpus_footer(raw)
        self.file = pq.ParquetFile(self._held, thrift_string_size_limit=MOST_FOOTER_BYTES)
        self.metadata = self.file.metadata
        self._types = {field.name: field.type for field in self.file.schema_arrow}

    def check_text(self, name: str) -> None:
        """Raises `UserError` unless the column `name` is there, once, and holds text."""
        names = self.file.schema_arrow.names
        shown = ", ".join(names[:20])
        if names.count(name) != 1:
            found = f"has no column {name!r}" if name not in names else f"has several columns {name!r}"
            raise UserError(f"corpus file {self.path} {found} (found {names[:20]}): set corpus.text_field")
        if not _is_text(self._types[name]):
            raise UserError(
                f"corpus file {self.path}: column {name!r} holds {self._types[name]}, no text (columns: {shown}): set "
                "corpus.text_field"
            )

    def rows(self, group: int, text: str, name: str, limit: int) -> Iterator[dict[str, Any]]:
        """The rows of a row group, in order: {text: ..., name: ...}, the second only where the column is there.

        A text of more than `limit` bytes comes as its length, an int, instead.
        """
        self.check_text(text)
        names = [text]
        kind = self._types.get(name)
        if name != text and kind is not None and not pa.types.is_nested(kind) and self._names_once(name):
            names.append(name)
        size = self._check_pages(group, names)
        try:
            for batch in self.file.iter_batches(batch_size=size, row_groups=[group], columns=names):
                columns = [_plain(batch.column(i)) for i in range(batch.num_columns)]
                lengths = pc.binary_length(columns[0]).to_pylist()
                id_lengths = pc.binary_length(columns[1]).to_pylist() if len(columns) > 1 and _is_text(kind) else None
                for row in range(batch.num_rows):
                    long = (lengths[row] or 0) > limit
                    value = {text: lengths[row] if long else columns[0][row].as_py()}
                    if len(columns) > 1 and not (id_lengths and (id_lengths[row] or 0) > MOST_ID_BYTES):
                        value[name] = columns[1][row].as_py()
                    yield value
        finally:
            self._held.ranges.clear()

    def _names_once(self, name: str) -> bool:
        return bool(self.file.schema_arrow.names.count(name) == 1)

    def _check_pages(self, group: int, names: list[str]) -> int:
        """Look at the page headers of some columns; returns how many rows a batch may have."""
        metadata = self.metadata.row_group(group)
        largest = 1
        for index in range(metadata.num_columns):
            column = metadata.column(index)
            if column.path_in_schema not in names:
                continue
            start = column.data_page_offset
            if column.dictionary_page_offset:
                start = min(start, column.dictionary_page_offset)
            length = column.total_compressed_size
            if not 4 <= start <= start + length <= self._before:
                raise Malformed(f"row group {group}: its pages lie outside the file")
            self._held.hold(start, length)
            most = 1
            for page in pages(self._held.read_at, Chunk(start, length, column.num_values)):
                smallest = 4 if column.physical_type == "BYTE_ARRAY" else 1
                if page.uncompressed > MOST_PAGE_BYTES or page.values > MOST_PAGE_VALUES:
                    raise UserError(
                        f"corpus file {self.path}: row group {group}, column {column.path_in_schema} has a page of "
                        f"{page.values} values in {page.uncompressed} bytes; at most {MOST_PAGE_VALUES} in "
                        f"{MOST_PAGE_BYTES} are read: write the file again with smaller row groups"
                    )
                if page.type != DICTIONARY_PAGE and page.encoding not in ENCODINGS:
                    raise UserError(
                        f"corpus file {self.path}: column {column.path_in_schema} has encoding {page.encoding}, "
                        "which says only within its pages how much reading takes: write the file again in plain or "
                        "dictionary encoding, pyarrow's own (pq.write_table(pq.read_table(FILE), NEW))"
                    )
                if page.type == DICTIONARY_PAGE and not 0 <= page.values <= page.uncompressed // smallest:
                    raise Malformed(
                        f"row group {group}: a dictionary of {page.values} values in {page.uncompressed} bytes"
                    )
                most = max(most, page.uncompressed)
            largest += most
        return max(1, min(BATCH_ROWS, BATCH_BYTES // largest))


class HeldRanges(io.RawIOBase):
    """A file of which some ranges are held in memory: what was looked at is what Arrow gets, and nothing is fetched
    twice."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._position = 0
        self.ranges: list[tuple[int, bytes]] = []

    def hold(self, start: int, length: int) -> None:
        self._raw.seek(start)
        data = self._raw.read(length)
        if len(data) < length:
            raise Malformed(f"it ends within its pages, at byte {start + len(data)}")
        self.ranges.append((start, data))

    def read_at(self, offset: int, count: int) -> bytes:
        for start, data in self.ranges:
            if start <= offset and offset + count <= start + len(data):
                return data[offset - start : offset - start + count]
        self._raw.seek(offset)
        return self._raw.read(count)

    def read(self, size: int = -1) -> bytes:
        if size < 0:
            size = max(0, self._raw.seek(0, io.SEEK_END) - self._position)
        data = self.read_at(self._position, size)
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position}.get(whence)
        self._position = offset + (self._raw.seek(0, io.SEEK_END) if base is None else base)
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def check_corpus_footer(raw: BinaryIO) -> int:
    """Look at a footer before Arrow parses it: every item of its lists must be there and whole, so that it takes no
    more than some 50 times its own bytes. Returns how many bytes of the file stand before it.

    Raises:
        Malformed: it is no footer, or larger than `MOST_FOOTER_BYTES`.
    """
    size = raw.seek(0, io.SEEK_END)
    raw.seek(max(0, size - 8))
    tail = raw.read(8)
    length = int.from_bytes(tail[:4], "little")
    if size < 12 or tail[4:] != b"PAR1" or length + 12 > size:
        raise Malformed("it does not end as a parquet file does")
    if length > MOST_FOOTER_BYTES:
        raise Malformed(f"its footer has {length} bytes; at most {MOST_FOOTER_BYTES} are read")
    before = size - 8 - length
    raw.seek(before)
    footer = raw.read(length)
    key = (hashlib.sha256(footer).digest(), size)
    if key not in _passed:
        _Walk().footer(footer)
        if len(_passed) >= 4096:
            _passed.clear()
        _passed.add(key)
    return before


class _Walk:
    """A walk through a footer, which may have a thousand row groups: nothing of them is kept."""

    def __init__(self) -> None:
        self.elements: list[dict[str, Any]] = []
        self.leaves: list[Leaf] = []
        self.column = 0

    def footer(self, footer: bytes) -> None:
        chunks = Items(CHUNK, MOST_COLUMNS, each=self.chunk)
        group = {1: ("columns", chunks), 3: ("rows", I64), 4: ("sorting", Items({}, MOST_COLUMNS))}
        layout = {
            2: ("schema", Items(SCHEMA_ELEMENT, 4 * MOST_COLUMNS, each=self.elements.append)),
            3: ("rows", I64),
            4: ("groups", Items(group, len(footer), each=self.group)),
            5: ("metadata", Items({}, 1024)),
            7: ("orders", Items({}, MOST_COLUMNS)),
            8: ("encryption", {}),
        }
        found = Reader(footer).struct(layout)
        need(found, "schema", "rows", "groups")
        if "encryption" in found:
            raise Malformed("it is encrypted")

    def chunk(self, chunk: dict[str, Any]) -> None:
        self.leaves = self.leaves or leaves_of(self.elements)
        if self.column >= len(self.leaves):
            raise Malformed(f"a row group has more than the {len(self.leaves)} columns of its schema")
        check_place(chunk, self.leaves[self.column])
        self.column += 1

    def group(self, group: dict[str, Any]) -> None:
        need(group, "columns", "rows")
        if self.column != len(self.leaves):
            raise Malformed(f"a row group has {self.column} columns, its schema {len(self.leaves)}")
        self.column = 0


def _is_text(kind: pa.DataType | None) -> bool:
    if kind is not None and pa.types.is_dictionary(kind):
        kind = kind.value_type
    return kind in (pa.string(), pa.large_string(), pa.string_view())


def _plain(column: pa.Array) -> pa.Array:
    """A dictionary's values in place of its indices, and views as plain texts."""
    if pa.types.is_dictionary(column.type):
        column.validate(full=True)  # indices come as they stand in the file
        column = column.dictionary_decode()
    return column.cast(pa.large_string()) if column.type == pa.string_view() else column
