"""Parquet files from strangers: what a header claims is compared with what can be right before Arrow allocates it."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chaos.fuzz_parquet import BOMB, BOMB_BYTES, footer_digest
from chaos.parquet_parts import Page, ParquetParts
from chaos.thrift_tree import Claim, field, read_tree, write_tree
from helpers_cache import write_toy_cache
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import checked_parquet, parquet_headers, schema
from pipeline.cache import Cache
from pipeline.commit import commit_json, read_json
from pipeline.errors import UserError
from pipeline.page_checksums import BadPage, _pages
from pipeline.parquet_headers import leaves_of
from pipeline.schema import MOST_ID_BYTES
from pipeline.shard import DamagedShard, ShardFile, ShardRecord
from pipeline.teacher_folder import TeacherFolder
from pipeline.thrift import BINARY, I32, I64, Items, Malformed, Reader

SHARD = "shard-00000.parquet"
LSE = 9
"""Number of the column `lse` among the columns of a row group."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three row groups of two rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "ROW_GROUP_TOKENS", 64)
        return write_toy_cache(tmp_path_factory.mktemp("made") / "c", units=1, rows=6, length=32, block=8)


@pytest.fixture(scope="module")
def parts(cache: Path) -> ParquetParts:
    return ParquetParts((cache / SHARD).read_bytes())


def opened(cache: Path, folder: Path, data: bytes) -> ShardFile:
    """The shard of a stranger: `data`, with a record that suits it."""
    whole = Cache(cache)
    (folder / SHARD).write_bytes(data)
    record = {**vars(whole.record(0)), "bytes": len(data), "footer_sha256": footer_digest(data)}
    return ShardFile(folder, ShardRecord(**record), whole.spec)


def read_all(shard: ShardFile) -> None:
    with shard:
        for group in range(shard.row_groups):
            shard.read_group(group)


def meta(tree: list[Any], group: int = 1, column: int = LSE) -> list[Any]:
    """ColumnMetaData of a chunk."""
    return list(field(field(field(tree, 4)[2][1][group], 1)[2][1][column], 3)[2])


def put(numbers: list[Any], number: int, value: Any) -> None:
    field(numbers, number)[2] = value


FOOTERS: dict[str, tuple[Callable[[list[Any]], Any], str]] = {
    "a million row groups": (lambda t: put(t, 4, Claim(10**6, 12)), "a list of 1000000 items"),
    "a million columns": (lambda t: put(field(t, 4)[2][1][0], 1, Claim(10**6, 12)), "a list of 1000000 items"),
    "a billion elements": (lambda t: put(t, 2, Claim(10**9, 12)), "a list of 1000000000 items"),
    "many empty row groups": (lambda t: put(t, 4, (12, [[]] * 5000)), "5000 items, at most 4096"),
    "a column too many": (lambda t: field(field(t, 4)[2][1][0], 1)[2][1].append([]), "columns has 13 items"),
    "a column too few": (lambda t: field(field(t, 4)[2][1][0], 1)[2][1].pop(), "row group 0 has 11 columns"),
    "more values": (lambda t: put(meta(t), 5, 2**40), "row group 1, column lse: it claims 1099511627776 values"),
    "negative values": (lambda t: put(meta(t), 5, -1), "row group 1, column lse: it claims -1 values"),
    "more bytes": (lambda t: put(meta(t), 6, 2**40), "row group 1, column lse: it claims 1099511627776 bytes"),
    "a place in the footer": (lambda t: put(meta(t, 2), 7, 10**6), "row group 2, column lse: its pages lie at"),
    "a place beyond the file": (lambda t: put(meta(t), 9, 2**50), "row group 1, column lse: its pages lie at"),
    "a place before the file": (lambda t: put(meta(t), 9, -5), "row group 1, column lse: it claims .* bytes at -5"),
    "the place of another column": (lambda t: put(meta(t), 9, 4), "row group 1, column lse: its pages lie at"),
    "no compression": (lambda t: put(meta(t), 4, 0), "row group 1, column lse: .* codec 0"),
    "another type": (lambda t: put(meta(t), 1, 6), "row group 1, column lse: its type is 6"),
    "a dictionary": (lambda t: meta_insert(t, [11, I64, 40]), "row group 1, column lse: it has a dictionary"),
    "another file": (lambda t: chunk_insert(t, [1, BINARY, b"/etc/passwd"]), "in another file"),
    "encryption": (lambda t: chunk_insert(t, [9, BINARY, b"x"]), "encrypted"),
    "more rows": (lambda t: put(field(t, 4)[2][1][0], 3, 10**9), "values"),
    "more rows in all": (lambda t: put(t, 3, 7), "says 7 rows, its row groups hold 6"),
    "a row group less": (lambda t: (field(t, 4)[2][1].pop(), put(t, 3, 4)), "has 4 rows, its JSON says 6"),
    "a field twice": (lambda t: t.insert(2, [3, I64, 6]), "rows stands there twice"),
    "another column's name": (
        lambda t: put(field(t, 2)[2][1][1], 4, b"sequence"),
        "columns are not the manifest's: seq",
    ),
    "a column of texts": (lambda t: put(field(t, 2)[2][1][1], 1, 6), "columns are not the manifest's"),
    "statistics that end Arrow's process": (lambda t: chunk_sizes(t), "its statistics count 3 definition levels"),
    "nested without end": (lambda t: t.append([20, 12, nested(40)]), "nested more than 16"),
}


def meta_insert(tree: list[Any], entry: list[Any]) -> None:
    numbers = field(field(field(tree, 4)[2][1][1], 1)[2][1][LSE], 3)[2]
    numbers.append(entry)


def chunk_insert(tree: list[Any], entry: list[Any]) -> None:
    chunk = field(field(tree, 4)[2][1][1], 1)[2][1][LSE]
    chunk.append(entry) if entry[0] > 3 else chunk.insert(0, entry)


def chunk_sizes(tree: list[Any]) -> None:
    numbers = field(field(field(tree, 4)[2][1][1], 1)[2][1][LSE], 3)[2]
    numbers[:] = [entry for entry in numbers if entry[0] != 16]
    numbers.append([16, 12, [[3, 9, (6, [1, 1, 1])]]])


def nested(depth: int) -> list[Any]:
    return [[1, 12, nested(depth - 1)]] if depth else []


@pytest.mark.parametrize("name", FOOTERS)
def test_footer_that_claims_what_cannot_be(name: str, cache: Path, parts: ParquetParts, tmp_path: Path) -> None:
    change, said = FOOTERS[name]
    tree = parts.tree()
    change(tree)
    before = pa.default_memory_pool().max_memory()
    with pytest.raises(DamagedShard, match=rf"shard-00000\.parquet: .*{said}"):
        read_all(opened(cache, tmp_path, parts.with_footer(parts.data, write_tree(tree))))
    assert pa.default_memory_pool().max_memory() <= before + (1 << 20)


def test_the_same_file_put_together_again_is_right(cache: Path, parts: ParquetParts, tmp_path: Path) -> None:
    assert parts.with_footer(parts.data, write_tree(parts.tree())) == parts.data
    assert parts.with_pages(LSE, parts.chunks[LSE]) == parts.data
    read_all(opened(cache, tmp_path, parts.data))


def test_length_of_the_footer(cache: Path, parts: ParquetParts, tmp_path: Path) -> None:
    for length in (0, 1, 10**6, 2**31 - 1, 2**32 - 1):
        data = parts.data[:-8] + length.to_bytes(4, "little") + b"PAR1"
        with pytest.raises(DamagedShard, match=SHARD):
            opened(cache, tmp_path, data)
    most = checked_parquet.FOOTER_BYTES + checked_parquet.CHUNK_BYTES * schema.MOST_GROUPS * 12
    with open(tmp_path / "long", "wb") as file:  # sparse
        file.truncate(most + 100)
        file.seek(0, io.SEEK_END)
        file.write((most + 1).to_bytes(4, "little") + b"PAR1")
    columns, elements, _ = checked_parquet.shard_columns(Cache(cache).spec)
    with pytest.raises(Malformed, match="its footer has"):
        checked_parquet.CheckedParquet(tmp_path / "long", columns, elements, None, 2)


def header_of(page: Page) -> list[Any]:
    return read_tree(page.header)[0]


PAGES: dict[str, tuple[Callable[[list[Any]], Any], str]] = {
    "2 GB": (lambda h: put(h, 2, 2**31 - 1), "page 0 claims 2147483647 bytes, 64 values take at most"),
    "negative bytes": (lambda h: put(h, 2, -1), r"a page of \d+ bytes \(-1 unpacked\)"),
    "more than the chunk": (lambda h: put(h, 3, 10**6), "a page of 1000000 bytes"),
    "negative compressed bytes": (lambda h: put(h, 3, -2), "a page of -2 bytes"),
    "2 billion values": (lambda h: put(field(h, 5)[2], 1, 2**31 - 1), "page 0 claims 2147483647 values"),
    "no values": (lambda h: put(field(h, 5)[2], 1, 0), "page 0 claims 0 values"),
    "fewer values": (lambda h: put(field(h, 5)[2], 1, 63), "its pages hold 63 values, the footer says 64"),
    "a dictionary's encoding": (lambda h: put(field(h, 5)[2], 2, 8), "page 0 has type 0 and encoding 8"),
    "an encoding of lengths": (lambda h: put(field(h, 5)[2], 2, 7), "page 0 has type 0 and encoding 7"),
    "other levels": (lambda h: put(field(h, 5)[2], 3, 4), "page 0 has type 0"),
    "a dictionary page": (
        lambda h: (put(h, 1, 2), field(h, 5).__setitem__(0, 7)),
        "page 0 has type 2 and encoding 9",
    ),
    "an index page": (lambda h: put(h, 1, 1), "its pages hold 0 values"),
    "a type there is not": (lambda h: put(h, 1, 9), "a page of type 9"),
    "no checksum": (lambda h: h.pop(3), "page 0 has no checksum"),
    "a list without end": (lambda h: h.append([30, 9, Claim(2**40, 1)]), "ends within|items"),
}


@pytest.mark.parametrize("name", PAGES)
def test_page_that_claims_what_cannot_be(name: str, cache: Path, parts: ParquetParts, tmp_path: Path) -> None:
    change, said = PAGES[name]
    number = 12 + LSE  # of the second row group
    page = parts.chunks[number][0]
    header = header_of(page)
    change(header)
    shard = opened(cache, tmp_path, parts.with_pages(number, [Page(write_tree(header), page.content)]))
    before = pa.default_memory_pool().max_memory()
    with shard:
        shard.read_group(0)
        shard.read_group(1, ["input_ids", "length"])
        with pytest.raises(DamagedShard, match=rf"shard-00000\.parquet: row group 1, column lse: .*({said})"):
            shard.read_group(1)
        shard.read_group(2)
    assert pa.default_memory_pool().max_memory() <= before + (1 << 20)


@pytest.mark.parametrize("said", [BOMB_BYTES, 2**31 - 1, 300])
def test_a_bomb_is_not_set_off(said: int, cache: Path, parts: ParquetParts, tmp_path: Path) -> None:
    """Twenty kilobytes that unpack to 256 MB."""
    header = header_of(parts.chunks[LSE][0])
    put(header, 2, said)
    put(header, 3, len(BOMB))
    put(header, 4, 0)
    with opened(cache, tmp_path, parts.with_pages(LSE, [Page(write_tree(header), BOMB)])) as shard:
        before = pa.default_memory_pool().max_memory()
        with pytest.raises(DamagedShard, match="row group 0, column lse"):
            shard.read_group(0)
        assert pa.default_memory_pool().max_memory() <= before + (1 << 20)


def test_ids_of_documents_are_bounded(cache: Path, parts: ParquetParts, tmp_path: Path) -> None:
    number = 3
    content = parts.content(number, 0)
    longest = 64 * (MOST_ID_BYTES + 5) + 1024
    for size, right in ((longest + 1, False), (MOST_ID_BYTES, True)):
        data = parts.with_pages(number, [parts.rewritten(number, 0, content + bytes(size))])
        with opened(cache, tmp_path, data) as shard:
            if right:  # bytes after the last value are nobody's
                shard.read_group(0)
            else:
                with pytest.raises(DamagedShard, match="row group 0, column doc_ids: page 0 claims"):
                    shard.read_group(0)


def test_id_that_is_no_text(cache: Path, parts: ParquetParts, tmp_path: Path) -> None:
    content = parts.content(3, 0).replace(b"doc-", b"\xff\xfe\xfd\xfc")
    with (
        opened(cache, tmp_path, parts.with_pages(3, [parts.rewritten(3, 0, content)])) as shard,
        pytest.raises(DamagedShard, match="row group 0, column doc_ids"),
    ):
        shard.read_group(0)


def test_many_pages_are_walked_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    real = checked_parquet.check_pages
    monkeypatch.setattr(
        checked_parquet, "check_pages", lambda at, chunk, column: (looked.append(column.name), real(at, chunk, column))
    )
    whole = Cache(cache)
    with whole.open(whole.shards()[0]) as shard:
        shard.read_group(0, ["lse"])
        shard.read_group(0, ["lse", "length"])
    assert looked == ["lse", "length"]


# token_bytes.parquet


def give(folder: Path, data: bytes) -> TeacherFolder:
    (folder / "token_bytes.parquet").write_bytes(data)
    record = read_json(folder / "teacher.json")
    record["files"]["token_bytes.parquet"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    commit_json(folder / "teacher.json", record)
    return TeacherFolder(folder)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return write_toy_cache(tmp_path / "c", units=0, heldout_units=0) / "teacher"


def written(values: list[bytes], ids: list[int] | None = None, **options: Any) -> bytes:
    table = pa.table(
        {"token_id": pa.array(ids or range(len(values)), pa.int32()), "bytes": pa.array(values, pa.binary())}
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **{"compression": "zstd", "write_page_checksum": True, **options})
    return bytes(sink.getvalue().to_pybytes())


def test_token_bytes_of_any_encoding_come_back(teacher: Path) -> None:
    values = [bytes([n]) * (n % 7) for n in range(61)]
    assert give(teacher, written(values)).token_bytes() == values
    assert give(teacher, written(values, use_dictionary=False, row_group_size=20)).token_bytes() == values
    assert give(teacher, written(values, dictionary_pagesize_limit=20, write_batch_size=8)).token_bytes() == values


def test_one_long_value_for_every_id(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few hundred bytes that would become 61 x 3 MB."""
    monkeypatch.setattr(checked_parquet, "MOST_TOKEN_BYTES", 4 << 20)
    checked_parquet._token_columns.cache_clear()
    data = written([b"x" * 3_000_000] * 61, dictionary_pagesize_limit=1 << 24)
    assert len(data) < 5000
    before = pa.default_memory_pool().max_memory()
    with pytest.raises(UserError, match=r"token_bytes\.parquet: its tokens take more than"):
        give(teacher, data).token_bytes()
    assert pa.default_memory_pool().max_memory() < before + (20 << 20)
    with pytest.raises(UserError, match=r"token_bytes\.parquet: .*bytes"):
        give(teacher, written([b"x" * 5_000_000] * 61, dictionary_pagesize_limit=1 << 24)).token_bytes()
    checked_parquet._token_columns.cache_clear()


def test_token_bytes_of_others(teacher: Path) -> None:
    values = [b"x"] * 61
    for data, said in (
        (written(values[:60]), "has 60 ids, the vocabulary 61"),
        (written(values * 2), "row groups of"),
        (written(values, ids=[*range(60), 5]), "not 0 to 60 in order"),
        (written(values, column_encoding={"bytes": "DELTA_BYTE_ARRAY"}, use_dictionary=False), "encoding 7"),
        (b"PAR1" * 10, "does not end as|footer"),
    ):
        with pytest.raises(UserError, match=rf"token_bytes\.parquet: .*({said})"):
            give(teacher, data).token_bytes()
    parts = ParquetParts(written([bytes([n]) for n in range(61)]))
    pages = parts.chunks[1]
    content = bytearray(parts.content(1, 1))
    content[-40:] = b"\xff" * 40  # indices beyond the dictionary
    with pytest.raises(UserError, match=r"token_bytes\.parquet: .*dictionary"):
        give(teacher, parts.with_pages(1, [pages[0], parts.rewritten(1, 1, bytes(content))])).token_bytes()


# The walk itself


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_read(data: bytes) -> None:
    layout = {1: ("a", I32), 2: ("b", BINARY), 3: ("c", {1: ("d", Items(I64, 5))}), 4: ("e", Items(BINARY, 5))}
    reader = Reader(data)
    try:
        found = reader.struct(layout)
    except Malformed:
        return
    assert reader.position <= len(data) and found.keys() <= {"a", "b", "c", "e"}
    assert all(isinstance(found[name], of) for name, of in (("a", int), ("b", bytes), ("c", dict)) if name in found)


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_any_page_header_ends_the_walk_of_verify(data: bytes) -> None:
    try:
        for _ in _pages(memoryview(data)):
            pass
    except BadPage:
        pass


def test_lists_that_say_they_are_long_take_no_time() -> None:
    started = time.monotonic()
    for item in (1, 5, 8, 12):
        header = bytes([0x19, 0xF0 | item]) + b"\xff" * 8 + b"\x7f"
        with pytest.raises(Malformed):
            Reader(header).struct({})
        with pytest.raises(BadPage):
            list(_pages(memoryview(header)))
    assert time.monotonic() - started < 30  # billions of entries would take hours


def test_leaves_of_a_schema() -> None:
    def element(name: str, repetition: int, **more: int) -> dict[str, Any]:
        return {"name": name.encode(), "repetition": repetition, **more}

    root = {"name": b"schema", "children": 2}
    tree = [root, element("a", 0, type=1), element("b", 1, children=1), element("c", 2, children=1)]
    found = leaves_of([*tree, element("d", 1, type=6)])
    assert [(leaf.type, leaf.definition, leaf.repetition) for leaf in found] == [(1, 0, 0), (6, 3, 1)]
    for wrong in (
        [],
        [root],
        tree,
        [*tree, element("d", 1, type=6), element("e", 0, type=1)],
        [element("a", 0, type=1)],
    ):
        with pytest.raises(Malformed):
            leaves_of(wrong)
    with pytest.raises(Malformed):
        leaves_of([root, element("a", 0), element("b", 0, type=1)])
    deep = [{"name": b"s", "children": 1}, *(element("g", 0, children=1) for _ in range(100)), element("d", 0, type=1)]
    with pytest.raises(Malformed, match="nested"):
        leaves_of(deep)
    assert parquet_headers.MOST_NESTED < 100
