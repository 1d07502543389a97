"""The bytes of a shard against its checksums, in one pass over the file and without decompressing a page.

Every page of a Parquet column chunk begins with a header (a Thrift structure in its compact protocol) that holds the
length of what follows and its CRC-32. Reading rows checks the same numbers, but spends most of its time elsewhere.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.commit import CHUNK_BYTES
from pipeline.parquet_headers import MOST_HEADER
from pipeline.store import open_file, size_of
from pipeline.thrift import I32, CutShort, Layout, Malformed, Reader

HEADER: Layout = {3: ("size", I32), 4: ("crc", I32)}
"""The fields of a page header that matter here."""


@dataclass
class Checksums:
    """What one pass over a file found.

    Attributes:
        sha256: hex, of the whole file.
        pages: pages whose CRC was computed.
        damaged: (row group, column, reason) for each column chunk with a page that is not as it was written.
    """

    sha256: str = ""
    pages: int = 0
    damaged: list[tuple[int, str, str]] = field(default_factory=list)


class BadPage(Exception):
    """A page that is not what was written; the text says how."""


def check_pages(path: Path, metadata: pq.FileMetaData) -> Checksums:
    """Hash a Parquet file and compare every page with its CRC; one column chunk is in memory at a time.

    Args:
        path: the file.
        metadata: its footer, which must have been checked before: it says where the column chunks lie.
    """
    found, digest, at = Checksums(), hashlib.sha256(), 0
    chunks = sorted(_chunks(metadata))
    whole = size_of(path)
    # One buffer for all: new memory for each would cost more than the checksums.
    buffer = memoryview(bytearray(max([CHUNK_BYTES, *(min(size, whole) for _, size, *_ in chunks)])))
    with open_file(path, buffering=0) as raw:
        file: Any = raw

        def read(length: int) -> memoryview:
            """The next `length` bytes, fewer at the end of the file."""
            held = 0
            while held < length and (got := file.readinto(buffer[held:length])):
                held += got
            digest.update(buffer[:held])
            return buffer[:held]

        for start, size, group, column in chunks:
            if start < at or size < 0 or start + size > whole:
                found.damaged.append((group, column, "the footer gives it a place it cannot have"))
                continue
            while at < start and (block := read(min(CHUNK_BYTES, start - at))):
                at += len(block)
            data = read(size)
            at += len(data)
            try:
                for _ in _pages(data):
                    found.pages += 1
            except BadPage as error:
                found.damaged.append((group, column, str(error)))
        while read(CHUNK_BYTES):
            pass
    found.sha256 = digest.hexdigest()
    return found


def _chunks(metadata: pq.FileMetaData) -> Iterator[tuple[int, int, int, str]]:
    """(first byte, bytes, row group, column) of every column chunk."""
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for index in range(row_group.num_columns):
            chunk = row_group.column(index)
            start = chunk.data_page_offset
            if chunk.has_dictionary_page and chunk.dictionary_page_offset is not None:
                start = min(start, chunk.dictionary_page_offset)
            yield start, chunk.total_compressed_size, group, chunk.path_in_schema.split(".")[0]


def _pages(data: memoryview) -> Iterator[None]:
    """Walk the pages of a column chunk.

    Raises:
        BadPage: one does not match its checksum, or cannot be found.
    """
    at = number = 0
    while at < len(data):
        try:
            header, length = _header(data, at)
        except Malformed as error:
            raise BadPage(f"the header of page {number} is damaged: {error}") from None
        at += length
        size, crc = header.get("size"), header.get("crc")
        if size is None or size < 0 or at + size > len(data):
            raise BadPage(f"the header of page {number} is damaged")
        if crc is None:
            raise BadPage(f"page {number} has no checksum")
        if zlib.crc32(data[at : at + size]) != crc & 0xFFFFFFFF:
            raise BadPage(f"CRC of page {number} differs")
        at += size
        number += 1
        yield


def _header(data: memoryview, at: int) -> tuple[dict[str, int], int]:
    """A page header and its length."""
    for most in (256, MOST_HEADER):  # few have as many bytes as the first
        reader = Reader(bytes(data[at : at + most]))
        try:
            return reader.struct(HEADER), reader.position
        except CutShort:
            continue
    raise Malformed("it does not end")
