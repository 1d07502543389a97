"""A Parquet file taken apart into page headers, pages and footer, and put together again with changes in it."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from chaos.thrift_tree import field, read_tree, write_tree

UNCOMPRESSED, COMPRESSED, CRC, VALUES_OF = 2, 3, 4, 5
"""Field numbers of a page header."""


@dataclass
class Page:
    """One page: its header as bytes, and what follows it."""

    header: bytes
    content: bytes


class ParquetParts:
    """The parts of a file: `footer` bytes, and for every column chunk in stored order its pages."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        length = int.from_bytes(data[-8:-4], "little")
        self.footer = data[-8 - length : -8]
        metadata = pq.read_metadata(pa.BufferReader(data))
        self.codecs: list[str] = []
        self.chunks: list[list[Page]] = []
        for group in range(metadata.num_row_groups):
            for index in range(metadata.num_columns):
                column = metadata.row_group(group).column(index)
                start = column.data_page_offset
                if column.dictionary_page_offset:
                    start = min(start, column.dictionary_page_offset)
                self.chunks.append(_pages(data, start, start + column.total_compressed_size))
                self.codecs.append(column.compression.lower())

    def tree(self) -> list[Any]:
        return read_tree(self.footer)[0]

    def with_pages(self, number: int, pages: list[Page]) -> bytes:
        """The file with the pages of chunk `number` replaced, and a footer that says where everything lies now."""
        chunks = [*self.chunks[:number], pages, *self.chunks[number + 1 :]]
        footer, body = self.tree(), bytearray(b"PAR1")
        metas = [field(chunk, 3)[2] for group in field(footer, 4)[2][1] for chunk in field(group, 1)[2][1]]
        for meta, of in zip(metas, chunks, strict=True):
            before, places = len(body), []
            for page in of:
                places.append(len(body))
                body += page.header + page.content
            names = [11, 9] if any(entry[0] == 11 for entry in meta) else [9]  # the dictionary page comes first
            for name, place in zip(names, places, strict=False):
                field(meta, name)[2] = place
            field(meta, 7)[2] = len(body) - before
        return closed(bytes(body), write_tree(footer))

    def with_footer(self, data: bytes, footer: bytes) -> bytes:
        """`data` with another footer."""
        return closed(data[: len(data) - 8 - len(self.footer)], footer)

    def rewritten(self, number: int, index: int, content: bytes) -> Page:
        """A page with other uncompressed content, its sizes and checksum right."""
        page = self.chunks[number][index]
        header, _ = read_tree(page.header)
        codec = self.codecs[number]
        packed = content if codec == "uncompressed" else pa.compress(content, codec, asbytes=True)
        field(header, UNCOMPRESSED)[2], field(header, COMPRESSED)[2] = len(content), len(packed)
        if any(entry[0] == CRC for entry in header):
            crc = zlib.crc32(packed)
            field(header, CRC)[2] = crc - (1 << 32) if crc >> 31 else crc
        return Page(write_tree(header), packed)

    def content(self, number: int, index: int) -> bytes:
        """A page's content, uncompressed."""
        page = self.chunks[number][index]
        if self.codecs[number] == "uncompressed":
            return page.content
        size = field(read_tree(page.header)[0], UNCOMPRESSED)[2]
        try:
            return bytes(pa.decompress(page.content, size, self.codecs[number], asbytes=True))
        except OSError:  # levels of pages of the second version are not compressed
            return page.content


def closed(body: bytes, footer: bytes) -> bytes:
    return body + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def _pages(data: bytes, start: int, end: int) -> list[Page]:
    pages = []
    while start < end:
        header, after = read_tree(data, start)
        stop = after + field(header, COMPRESSED)[2]
        pages.append(Page(data[start:after], data[after:stop]))
        start = stop
    return pages
