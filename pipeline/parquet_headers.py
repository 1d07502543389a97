"""Parquet's footer and page headers, looked at before Arrow acts on them.

Both say how much a reader must allocate, and nothing in a file that a stranger made need be true: a page of 30 bytes
may claim 2 GB, a footer of 1 KB a list of a million row groups. Here every number that Arrow allocates by is compared
with what can be right, and a page's header is read before the page is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.thrift import BINARY, I32, I64, CutShort, Items, Layout, Malformed, Reader

ReadAt = Callable[[int, int], bytes]
"""(offset, count) -> at most `count` bytes of the file from there."""

INT32, INT64, FLOAT, BYTE_ARRAY, FIXED_BYTES = 1, 2, 4, 6, 7
"""Physical types."""
PLAIN, PLAIN_DICTIONARY, RLE, RLE_DICTIONARY, BYTE_STREAM_SPLIT = 0, 2, 3, 8, 9
"""Encodings."""
PLAIN_TOO = (PLAIN, PLAIN_DICTIONARY)
"""How writers name the encoding of a dictionary's own page."""
CODECS = {"none": 0, "snappy": 1, "zstd": 6}
OPTIONAL, REPEATED = 1, 2
MOST_NESTED = 32
DATA_PAGE, INDEX_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = range(4)
MOST_HEADER = 1 << 20
"""Bytes of a page header; ours take about 30, some writers put the least and greatest text of the page in."""
FIRST_READ = 256

SCHEMA_ELEMENT: Layout = {
    1: ("type", I32),
    2: ("type_length", I32),
    3: ("repetition", I32),
    4: ("name", BINARY),
    5: ("children", I32),
}
CHUNK: Layout = {
    1: ("file_path", BINARY),
    2: ("file_offset", I64),
    3: (
        "meta",
        {
            1: ("type", I32),
            2: ("encodings", Items(I32, 16)),
            3: ("path", Items(BINARY, 64)),
            4: ("codec", I32),
            5: ("values", I64),
            6: ("uncompressed", I64),
            7: ("compressed", I64),
            8: ("metadata", Items({}, 64)),
            9: ("data_page", I64),
            10: ("index_page", I64),
            11: ("dictionary_page", I64),
            13: ("encoding_stats", Items({}, 64)),
            16: (
                "sizes",
                {1: ("texts", I64), 2: ("repetition", Items(I64, 64)), 3: ("definition", Items(I64, 64))},
            ),
            17: ("geospatial", {2: ("types", Items(I32, 64))}),
        },
    ),
    8: ("encryption", {}),
    9: ("encrypted", BINARY),
}
PAGE: Layout = {
    1: ("type", I32),
    2: ("uncompressed", I32),
    3: ("compressed", I32),
    4: ("crc", I32),
    5: ("data", {1: ("values", I32), 2: ("encoding", I32), 3: ("definition", I32), 4: ("repetition", I32)}),
    7: ("dictionary", {1: ("values", I32), 2: ("encoding", I32)}),
    8: ("data_v2", {1: ("values", I32), 4: ("encoding", I32), 5: ("definition", I32), 6: ("repetition", I32)}),
}
PART_OF_PAGE = {DATA_PAGE: "data", DICTIONARY_PAGE: "dictionary", DATA_PAGE_V2: "data_v2"}


@dataclass(frozen=True)
class Column:
    """What one column of a file may hold.

    Attributes:
        name: of the column.
        type: its physical type.
        width: bytes a value takes uncompressed, at most; of texts with the four of their length.
        values: values of a row, at most.
        exact: every row has exactly so many.
        encodings: of its data pages.
        codec: its pages are compressed by; one of `CODECS`.
        most: bytes that all pages of a row group take uncompressed, at most; None: as its values and their width say.
        dictionary: it may have a dictionary page.
        checksums: its pages must have them.
    """

    name: str
    type: int
    width: int
    values: int
    exact: bool
    encodings: tuple[int, ...]
    codec: str = "zstd"
    most: int | None = None
    dictionary: bool = False
    checksums: bool = True

    def most_bytes(self, values: int) -> int:
        """Bytes that so many values take uncompressed, with their levels, at most."""
        most = values * (self.width + 1) + 1024
        return most if self.most is None else min(most, self.most)


@dataclass(frozen=True)
class Chunk:
    """Where a column of a row group lies: bytes [start, start + length) of the file, and how many values it has."""

    start: int
    length: int
    values: int


@dataclass(frozen=True)
class Group:
    """A row group, as the footer has it."""

    rows: int
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Page:
    """What a page's header says."""

    type: int
    uncompressed: int
    compressed: int
    values: int
    encoding: int
    levels: int  # encoding of the levels
    checksum: bool


@dataclass(frozen=True)
class Leaf:
    """A column of numbers or texts, as the schema has it: its type and how deep it lies."""

    type: int
    definition: int
    repetition: int


def leaves_of(schema: list[dict[str, Any]]) -> list[Leaf]:
    """The leaves of a schema, whose elements stand in the order of a walk through the tree.

    Raises:
        Malformed: they make no tree.
    """
    found: list[Leaf] = []
    open_: list[list[int]] = []  # of the groups around: children to come, definition and repetition level
    for number, element in enumerate(schema):
        _text(*need(element, "name"))
        _, definition, repetition = open_[-1] if open_ else [0, 0, 0]
        if number:
            if not open_:
                raise Malformed("its schema has elements outside the tree")
            (kind,) = need(element, "repetition")
            definition, repetition = definition + (kind in (OPTIONAL, REPEATED)), repetition + (kind == REPEATED)
            open_[-1][0] -= 1
        if "type" in element:
            found.append(Leaf(element["type"], definition, repetition))
        elif element.get("children", 0) > 0:
            open_.append([element["children"], definition, repetition])
        else:
            raise Malformed("its schema has an element without a type")
        while open_ and open_[-1][0] == 0:
            open_.pop()
        if len(open_) > MOST_NESTED:
            raise Malformed(f"its schema is nested more than {MOST_NESTED} deep")
    if open_ or not schema or "type" in schema[0]:
        raise Malformed("its schema is not whole")
    return found


def _text(name: bytes) -> None:
    try:
        name.decode()
    except UnicodeDecodeError:
        raise Malformed(f"the name {name[:40]!r} is no UTF-8") from None


def check_place(chunk: dict[str, Any], leaf: Leaf) -> dict[str, Any]:
    """What every column chunk must have, whatever its file is for; returns its metadata.

    Raises:
        Malformed: its pages are elsewhere or encrypted, a field is missing, or its statistics do not suit the schema
            (Arrow ends the process where they do not).
    """
    if chunk.keys() & {"file_path", "encryption", "encrypted"}:
        raise Malformed("its pages are in another file or encrypted")
    need(chunk, "meta")
    meta: dict[str, Any] = chunk["meta"]
    need(meta, "type", "encodings", "path", "codec", "values", "uncompressed", "compressed", "data_page")
    for name in meta["path"]:
        _text(name)
    if meta["type"] != leaf.type:
        raise Malformed(f"its type is {meta['type']}, the schema's {leaf.type}")
    sizes = meta.get("sizes", {})
    for name, level in (("definition", leaf.definition), ("repetition", leaf.repetition)):
        if len(sizes.get(name, ())) not in (0, level + 1):
            raise Malformed(f"its statistics count {len(sizes[name])} {name} levels, it has {level + 1}")
    if "texts" in sizes and leaf.type != BYTE_ARRAY:
        raise Malformed("its statistics count bytes of texts, it has none")
    return meta


def footer_layout(columns: int, elements: int, groups: int) -> Layout:
    """Layout of a footer of at most so many columns, schema elements and row groups."""
    group = {
        1: ("columns", Items(CHUNK, columns)),
        2: ("bytes", I64),
        3: ("rows", I64),
        4: ("sorting", Items({}, columns)),
    }
    return {
        1: ("version", I32),
        2: ("schema", Items(SCHEMA_ELEMENT, elements)),
        3: ("rows", I64),
        4: ("groups", Items(group, groups)),
        5: ("metadata", Items({1: ("key", BINARY), 2: ("value", BINARY)}, 64)),
        7: ("orders", Items({}, columns)),
        8: ("encryption", {}),
        9: ("signing_key", BINARY),
    }


def need(record: dict[str, Any], *names: str) -> list[Any]:
    """Fields that must be there.

    Raises:
        Malformed: one is not.
    """
    missing = [name for name in names if name not in record]
    if missing:
        raise Malformed(f"{', '.join(missing)} is missing")
    return [record[name] for name in names]


def check_footer(
    footer: bytes, before: int, columns: tuple[Column, ...], schema: list[Any], groups: int
) -> list[Group]:
    """Look at a footer.

    Args:
        footer: its bytes.
        before: bytes of the file before it.
        columns: what the columns may hold, in stored order.
        schema: the schema's elements, as `SCHEMA_ELEMENT` has them.
        groups: row groups, at most.

    Raises:
        Malformed: it is no footer, or of another schema, or claims what cannot be; the message says what.
    """
    reader = Reader(footer)
    found = reader.struct(footer_layout(len(columns), len(schema), groups))
    if reader.position != len(footer):
        raise Malformed(f"{len(footer) - reader.position} bytes follow the footer's own")
    if found.keys() & {"encryption", "signing_key"}:
        raise Malformed("the file is encrypted")
    elements, rows, records = need(found, "schema", "rows", "groups")
    if elements != schema:
        raise Malformed(_other_columns(elements, schema))
    leaves = leaves_of(elements)
    result, end = [], 4
    for number, record in enumerate(records):
        chunks, group_rows = need(record, "columns", "rows")
        if len(chunks) != len(columns) or group_rows < 1:
            raise Malformed(f"row group {number} has {len(chunks)} columns and {group_rows} rows")
        places = []
        for chunk, column, leaf in zip(chunks, columns, leaves, strict=True):
            try:
                place = _check_chunk(chunk, column, leaf, group_rows)
                if not end <= place.start <= place.start + place.length <= before:
                    raise Malformed(
                        f"its pages lie at {place.start} to {place.start + place.length}, not in {end} to {before}"
                    )
            except Malformed as error:
                raise Malformed(f"row group {number}, column {column.name}: {error}") from None
            end = place.start + place.length
            places.append(place)
        result.append(Group(group_rows, tuple(places)))
    if sum(group.rows for group in result) != rows:
        raise Malformed(f"says {rows} rows, its row groups hold {sum(group.rows for group in result)}")
    return result


def _other_columns(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> str:
    names = [[str(element.get("name", b"")[:40], "utf-8", "replace") for element in of] for of in (found, wanted)]
    differing = sorted(set(names[0]) ^ set(names[1]))[:8]
    return f"its columns are not the manifest's: {', '.join(differing) or 'their order or types'} differ"


def _check_chunk(chunk: dict[str, Any], column: Column, leaf: Leaf, rows: int) -> Chunk:
    meta = check_place(chunk, leaf)
    codec, values, uncompressed, compressed, start = need(
        meta, "codec", "values", "uncompressed", "compressed", "data_page"
    )
    if codec != CODECS[column.codec]:
        raise Malformed(f"it is compressed by codec {codec}, not by {column.codec}")
    most = rows * column.values
    if not (most if column.exact else rows) <= values <= most:
        raise Malformed(f"it claims {values} values, {rows} rows have {'' if column.exact else 'at most '}{most}")
    limit = column.most_bytes(values) + values + 65_536  # and page headers
    if not 0 <= uncompressed <= limit:
        raise Malformed(f"it claims {uncompressed} bytes uncompressed, {values} values take at most {limit}")
    dictionary = meta.get("dictionary_page", 0)
    if dictionary and not column.dictionary:
        raise Malformed("it has a dictionary, which no writer of this cache makes")
    if compressed < 1 or start < 1 or dictionary < 0:
        raise Malformed(f"it claims {compressed} bytes at {start}")
    return Chunk(min(dictionary, start) if dictionary else start, compressed, values)


def pages(read_at: ReadAt, chunk: Chunk) -> Iterator[Page]:
    """The headers of a chunk's pages, one after another, none of the pages themselves.

    Raises:
        Malformed: a header is damaged, or its page does not lie within the chunk.
    """
    position, end = chunk.start, chunk.start + chunk.length
    while position < end:
        record, size = _page_header(read_at, position, end)
        type_, uncompressed, compressed = need(record, "type", "uncompressed", "compressed")
        position += size
        if uncompressed < 0 or not 0 <= compressed <= end - position:
            raise Malformed(f"a page of {compressed} bytes ({uncompressed} unpacked) where {end - position} are left")
        position += compressed
        if type_ == INDEX_PAGE:
            continue
        if type_ not in PART_OF_PAGE:
            raise Malformed(f"a page of type {type_}")
        (part,) = need(record, PART_OF_PAGE[type_])
        values, encoding = need(part, "values", "encoding")
        levels = RLE if type_ != DATA_PAGE else _levels(part)
        yield Page(type_, uncompressed, compressed, values, encoding, levels, "crc" in record)


def _levels(part: dict[str, Any]) -> int:
    definition, repetition = need(part, "definition", "repetition")
    return definition if definition == repetition else -1


def _page_header(read_at: ReadAt, position: int, end: int) -> tuple[dict[str, Any], int]:
    """(the header, its length)."""
    count = FIRST_READ
    while True:
        count = min(count, end - position)
        data = read_at(position, count)
        reader = Reader(data)
        try:
            return reader.struct(PAGE), reader.position
        except CutShort:
            if len(data) < count or count == end - position or count >= MOST_HEADER:
                raise
        count *= 16


def check_pages(read_at: ReadAt, chunk: Chunk, column: Column) -> None:
    """Look at the page headers of a chunk against what its column may hold.

    Raises:
        Malformed: a page claims what cannot be; the message says what.
    """
    seen = held = 0
    for number, page in enumerate(pages(read_at, chunk)):
        held += page.uncompressed
        if column.checksums and not page.checksum:
            raise Malformed(f"page {number} has no checksum")
        if column.most is not None and held > column.most:
            raise Malformed(f"its pages claim {held} bytes uncompressed, at most {column.most} can be right")
        if page.type == DICTIONARY_PAGE and column.dictionary and number == 0:
            least = 4 if column.type == BYTE_ARRAY else column.width  # bytes of a value
            fits = 0 <= page.values <= min(chunk.values, page.uncompressed // least)
            if not fits or page.encoding not in PLAIN_TOO or page.uncompressed > column.most_bytes(chunk.values):
                raise Malformed(f"its dictionary claims {page.values} values in {page.uncompressed} bytes")
            continue
        if page.type != DATA_PAGE or page.encoding not in column.encodings or page.levels != RLE:
            raise Malformed(f"page {number} has type {page.type} and encoding {page.encoding}, which no writer makes")
        seen += page.values
        if page.values < 1 or seen > chunk.values:
            raise Malformed(f"page {number} claims {page.values} values, the column has {chunk.values} in all")
        most = column.most_bytes(page.values)
        if page.uncompressed > most:
            raise Malformed(f"page {number} claims {page.uncompressed} bytes, {page.values} values take at most {most}")
    if seen != chunk.values:
        raise Malformed(f"its pages hold {seen} values, the footer says {chunk.values}")
