"""Every document of a corpus belongs to exactly one range, and a range is read without what comes before it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.errors import UserError
from teacher_dump import corpus_files
from teacher_dump.corpus import CorpusConfig, Document, describe_corpus, read_range
from teacher_dump.corpus_files import SourceFile, describe_file, index_frames

TEXTS = [f"document {n} " + "word ß " * (n * 7 % 23) for n in range(60)]
DOCUMENTS = [Document(f"d{n}", text) for n, text in enumerate(TEXTS)]


def json_lines(first: int = 0, last: int = len(TEXTS)) -> bytes:
    return b"".join(
        json.dumps({"id": d.id, "text": d.text}, ensure_ascii=n % 2 == 0).encode() + b"\n"
        for n, d in list(enumerate(DOCUMENTS))[first:last]
    )


def write_jsonl(folder: Path) -> str:
    (folder / "a.jsonl").write_bytes(json_lines())
    return str(folder / "a.jsonl")


def write_jsonl_odd(folder: Path) -> str:
    """Blank lines between, CRLF endings, a byte-order mark, and no newline at the end."""
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json_lines().replace(b"\n", b"\r\n \r\n")[:-5])
    return str(folder / "a.jsonl")


def write_one_frame(folder: Path) -> str:
    (folder / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(json_lines()))
    return str(folder / "a.jsonl.zst")


def write_frames(folder: Path) -> str:
    """A frame for every three documents, cut in the middle of a line, with skippable frames as pzstd writes them."""
    data, step = json_lines(), len(json_lines()) // 20
    skippable = (0x184D2A50).to_bytes(4, "little") + (4).to_bytes(4, "little") + b"abcd"
    frames = [skippable + zstandard.ZstdCompressor().compress(data[i : i + step]) for i in range(0, len(data), step)]
    (folder / "a.jsonl.zst").write_bytes(b"".join(frames))
    return str(folder / "a.jsonl.zst")


def write_parquet(folder: Path) -> str:
    table = pa.table({"id": [d.id for d in DOCUMENTS], "other": range(len(TEXTS)), "text": TEXTS})
    pq.write_table(table, folder / "a.parquet", row_group_size=7)
    return str(folder / "a.parquet")


def write_parquet_files(folder: Path) -> str:
    table = pa.table({"id": [d.id for d in DOCUMENTS], "text": TEXTS})
    for n, (first, last) in enumerate([(0, 10), (10, 11), (11, 60)]):
        pq.write_table(table.slice(first, last - first), folder / f"{n}.parquet", row_group_size=20)
    return str(folder / "*.parquet")


def write_files(folder: Path) -> str:
    (folder / "1.jsonl").write_bytes(json_lines(0, 1))
    (folder / "2.json").write_bytes(json_lines(1, 30)[:-1])
    (folder / "3.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(json_lines(30, 60)))
    (folder / "README.md").write_text("no corpus file")
    return str(folder)


KINDS = {
    "jsonl": write_jsonl,
    "jsonl with blank lines and CRLF": write_jsonl_odd,
    "zst of one frame": write_one_frame,
    "zst of many frames": write_frames,
    "parquet": write_parquet,
    "parquet files": write_parquet_files,
    "folder of several files": write_files,
}


@pytest.fixture(scope="module", params=sorted(KINDS))
def corpus(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[CorpusConfig, list[SourceFile]]:
    """One corpus of every kind, all of the same documents; frames are indexed finely enough to matter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_files, "INDEX_STRIDE", 300)
        config = CorpusConfig(KINDS[request.param](tmp_path_factory.mktemp("corpus")))
        files = describe_corpus(config, Path("data"))
    return config, files


def read_all(config: CorpusConfig, files: list[SourceFile], cuts: list[int]) -> list[Document]:
    """Documents of consecutive ranges, one after the other."""
    found: list[Document] = []
    for start, end in zip(cuts, cuts[1:], strict=False):
        found += read_range(config, files, start, end)
    return found


@given(st.lists(st.integers(0, 10**6), max_size=12))
def test_consecutive_ranges_give_every_document_once(
    corpus: tuple[CorpusConfig, list[SourceFile]], draws: list[int]
) -> None:
    config, files = corpus
    extent = sum(file.extent for file in files)
    cuts = [0, *sorted(draw % (extent + 1) for draw in draws), extent]
    assert read_all(config, files, cuts) == DOCUMENTS


def test_cuts_at_every_position(corpus: tuple[CorpusConfig, list[SourceFile]]) -> None:
    config, files = corpus
    extent = sum(file.extent for file in files)
    for start in range(0, extent, 1 if extent < 100 else 97):
        assert read_all(config, files, [0, start, extent]) == DOCUMENTS
    edge = files[0].extent
    assert read_all(config, files, [0, edge - 1, edge, min(edge + 1, extent), extent]) == DOCUMENTS


PARAGRAPH = st.lists(st.sampled_from(["a", "word ß", "  indented", "x" * 70]), min_size=1, max_size=3)
GAP = st.lists(st.sampled_from(["", "", "  ", "\t \t", " " * 900]), min_size=1, max_size=3)


@given(
    st.lists(st.tuples(PARAGRAPH, GAP), min_size=1, max_size=6),
    st.sampled_from(["\n", "\r\n"]),
    st.lists(st.integers(0, 10**6), max_size=5),
    st.booleans(),
)
@example([(["aaa"], ["   "]), (["b"], [""])], "\n", [8], False)  # a blank line of spaces just before the cut
def test_paragraphs_of_text(
    tmp_path: Path, parts: list[tuple[list[str], list[str]]], newline: str, draws: list[int], ends: bool
) -> None:
    path = tmp_path / "a.txt"
    wanted = [newline.join(lines) for lines, _ in parts]
    text = "".join(newline.join([*lines, *gap, ""]) for lines, gap in parts)
    path.write_bytes(text.encode() if ends else text.rstrip().encode())
    config = CorpusConfig(str(path))
    files = describe_corpus(config, Path("data"))
    starts = [found.id.rsplit(":", 1)[1] for found in read_range(config, files, 0, files[0].extent)]
    cuts = sorted([*(draw % (files[0].extent + 1) for draw in draws), *map(int, starts)])
    found = read_all(config, files, [0, *cuts, files[0].extent])
    assert [document.text.rstrip() for document in found] == [w.rstrip() for w in wanted]
    data = path.read_bytes()
    for document in found:
        position = int(document.id.rsplit(":", 1)[1])
        assert data[position:].startswith(document.text.encode()), "the id does not say where the document begins"


def test_text_cut_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for newline in (b"\n", b"\r\n"):
        path.write_bytes(newline.join([b"", b"one", b"more", b"", b"two", b" ", b"", b"three", b"", b""]))
        config = CorpusConfig(str(path))
        files = describe_corpus(config, Path("data"))
        wanted = [(b"one" + newline + b"more").decode(), "two", "three"]
        for cut in range(files[0].extent + 1):
            assert [d.text for d in read_all(config, files, [0, cut, files[0].extent])] == wanted


def test_documents_without_an_id_are_named_by_their_place(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "first"}\n{"text": "second", "id": 7}\n{"text": "third"}\n')
    config = CorpusConfig(str(path))
    files = describe_corpus(config, Path("data"))
    whole = list(read_range(config, files, 0, files[0].extent))
    assert [d.id for d in whole] == ["a.jsonl:0", "7", "a.jsonl:46"]  # not the folder: it is no part of the data
    assert list(read_range(config, files, 40, files[0].extent)) == whole[2:]


def test_other_field_names(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "hello", "url": "http://x"}\n')
    config = CorpusConfig(str(path), text_field="body", id_field="url")
    assert list(read_range(config, describe_corpus(config, Path("data")), 0, 99)) == [Document("http://x", "hello")]


def test_local_data_set_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`hub:` also takes a data set folder on disk; `datasets` says which of its files make the split."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    table = pa.table({"id": [d.id for d in DOCUMENTS], "text": TEXTS})
    pq.write_table(table.slice(0, 40), folder / "data" / "train-00000-of-00002.parquet")
    pq.write_table(table.slice(40), folder / "data" / "train-00001-of-00002.parquet")
    pq.write_table(table.slice(0, 3), folder / "data" / "test-00000-of-00001.parquet")
    config = CorpusConfig(f"hub:{folder}")
    files = describe_corpus(config, Path("data"))
    assert read_all(config, files, [0, 13, 45, 60]) == DOCUMENTS
    with pytest.raises(UserError, match=r"corpus\.hub_split dev: .* has the splits .*train"):
        describe_corpus(CorpusConfig(f"hub:{folder}", hub_split="dev"), Path("data"))
    with pytest.raises(UserError, match="hub:.*nowhere"):
        describe_corpus(CorpusConfig(f"hub:{tmp_path}/nowhere"), Path("data"))


class CountedFile(io.BytesIO):
    """Notes the lowest position read and how many bytes were."""

    first: int | None = None
    count = 0

    def read(self, size: int | None = -1, /) -> bytes:
        return self._note(super().read(size))

    def readline(self, size: int | None = -1, /) -> bytes:
        return self._note(super().readline(size))

    def readinto(self, buffer: Any, /) -> int:
        return len(self._note(bytes(memoryview(buffer)[: super().readinto(buffer)])))

    def _note(self, block: bytes) -> bytes:
        self.count += len(block)
        start = self.tell() - len(block)
        self.first = start if self.first is None else min(self.first, start)
        return block


def counted(path: str, monkeypatch: pytest.MonkeyPatch) -> CountedFile:
    opened = CountedFile(Path(path).read_bytes())
    monkeypatch.setattr(corpus_files, "_open", lambda path: opened)
    return opened


def test_range_of_json_lines_reads_nothing_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = describe_file(write_jsonl(tmp_path), "text")
    opened = counted(file.path, monkeypatch)
    low, high = file.extent // 2, file.extent // 2 + 500
    assert list(file.read(low, high, "text", "id", 10**6))
    assert opened.first is not None and low - 1 <= opened.first <= low
    assert opened.count < 500 + 2 * max(len(line) for line in json_lines().splitlines(True))


def test_range_of_text_looks_back_a_kilobyte_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("some words\n\n" * 5000)
    file = describe_file(str(path), "text")
    opened = counted(file.path, monkeypatch)
    low = file.extent // 2
    assert list(file.read(low, low + 100, "text", "id", 10**6))
    assert opened.first is not None and opened.first >= low - 1100 and opened.count < 1500


def test_range_of_frames_starts_at_the_frame_that_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_files, "INDEX_STRIDE", 1)
    file = describe_file(write_frames(tmp_path), "text")
    assert len(file.index) >= 20
    opened = counted(file.path, monkeypatch)
    low = file.extent * 3 // 4
    assert list(file.read(low, low + 500, "text", "id", 10**6))
    holds = max(entry for entry in file.index if entry[1] <= low - 1)
    assert opened.first == holds[0] > 0.6 * Path(file.path).stat().st_size


def test_frame_index_is_right(tmp_path: Path) -> None:
    frames = [b"a" * 700_000, b"b" * 700_000, b"", b"c" * 5]
    data = b"".join(zstandard.ZstdCompressor().compress(frame) for frame in frames)
    index, extent = index_frames(io.BytesIO(data), "x")
    assert extent == 1_400_005
    assert [uncompressed for _, uncompressed in index] == [0, 1_400_000]
    for compressed, _ in index:
        assert data[compressed : compressed + 4] == b"\x28\xb5\x2f\xfd"


def test_parquet_reads_only_the_row_groups_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = describe_file(write_parquet(tmp_path), "text")
    assert file.extent == 60 and [first for _, first in file.index] == list(range(0, 60, 7))
    asked: list[list[int]] = []
    real = pq.ParquetFile.iter_batches

    def spy(self: pq.ParquetFile, *args: Any, row_groups: list[int], **more: Any) -> Any:
        asked.append(row_groups)
        return real(self, *args, row_groups=row_groups, **more)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    assert [position for position, _ in file.read(20, 30, "text", "id", 10**6)] == list(range(20, 30))
    assert asked == [[2], [3], [4]]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def parquet_without_text(folder: Path) -> Path:
    pq.write_table(pa.table({"body": ["x"]}), folder / "a.parquet")
    return folder / "a.parquet"


def parquet_without_rows(folder: Path) -> Path:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "a.parquet")
    return folder / "a.parquet"


def parquet_with_a_null(folder: Path) -> Path:
    pq.write_table(pa.table({"text": ["x", None]}), folder / "a.parquet")
    return folder / "a.parquet"


def parquet_cut(folder: Path) -> Path:
    return write(folder / "a.parquet", Path(write_parquet(folder)).read_bytes()[:-20])


def parquet_damaged(folder: Path) -> Path:
    data = bytearray(Path(write_parquet(folder)).read_bytes())
    metadata = pq.read_metadata(folder / "a.parquet")
    for index in range(metadata.num_row_groups):
        chunk = metadata.row_group(index).column(2)
        data[chunk.data_page_offset : chunk.data_page_offset + 20] = b"\xff" * 20
    return write(folder / "a.parquet", bytes(data))


def mixed(folder: Path) -> Path:
    pq.write_table(pa.table({"text": ["x"]}), folder / "a.parquet")
    (folder / "b.jsonl").write_bytes(json_lines())
    return folder


GOOD_ZST = zstandard.ZstdCompressor(write_checksum=True).compress(json_lines())
BAD = {
    "missing": (lambda d: d / "a.jsonl", r"a\.jsonl is missing"),
    "glob without a match": (lambda d: d / "*.jsonl", r"no file matches"),
    "empty folder": (lambda d: d, r"no file matches"),
    "empty": (lambda d: write(d / "a.jsonl", b""), r"a\.jsonl is empty"),
    "empty zst": (lambda d: write(d / "a.jsonl.zst", zstandard.compress(b"")), r"a\.jsonl\.zst is empty"),
    "not UTF-8 in json": (
        lambda d: write(d / "a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n'),
        r"a\.jsonl: byte 24 is not UTF-8 \(0xe9\)",
    ),
    "not UTF-8 in text": (lambda d: write(d / "a.txt", b"abc\n\nab\xff\n"), r"a\.txt: byte 7 is not UTF-8 \(0xff\)"),
    "truncated zst": (lambda d: write(d / "a.jsonl.zst", GOOD_ZST[:-10]), r"a\.jsonl\.zst was cut in the middle"),
    "half a second frame": (
        lambda d: write(d / "a.jsonl.zst", GOOD_ZST + GOOD_ZST[:100]),
        r"a\.jsonl\.zst was cut in the middle",
    ),
    "flipped zst": (
        lambda d: write(d / "a.jsonl.zst", GOOD_ZST[:200] + bytes([GOOD_ZST[200] ^ 1]) + GOOD_ZST[201:]),
        r"a\.jsonl\.zst is no valid zstd",
    ),
    "no zst": (lambda d: write(d / "a.jsonl.zst", json_lines()), r"a\.jsonl\.zst is no valid zstd"),
    "no text field": (
        lambda d: write(d / "a.jsonl", b'{"text": "a"}\n{"body": "b"}\n'),
        r"a\.jsonl: the document at position 14 has no text in field 'text' \(found \['body'\]\)",
    ),
    "text is a number": (lambda d: write(d / "a.jsonl", b'{"text": 5}\n'), r"a\.jsonl.*no text in field 'text'"),
    "line is a list": (lambda d: write(d / "a.jsonl", b'{"text": "a"}\n[1]\n'), r"a\.jsonl.*found list"),
    "json array": (lambda d: write(d / "a.json", b'[{"text": "a"}]'), r"a\.json is a JSON array"),
    "not json": (lambda d: write(d / "a.jsonl", b'{"text": "a"}\n{"text": \n'), r"a\.jsonl: the line at byte 14"),
    "half a surrogate pair": (
        lambda d: write(d / "a.jsonl", b'{"text": "a"}\n{"text": "a \\ud83d"}\n'),
        r"a\.jsonl: the document at position 14 .*\\ud83d",
    ),
    "line too long": (
        lambda d: write(d / "a.jsonl", b'{"text": "a"}\n' + b"x" * 5000),
        r"a\.jsonl.*position 14 .*2000",
    ),
    "paragraph too long": (lambda d: write(d / "a.txt", b"a\n\n" + b"word\n" * 1000), r"a\.txt.*position 3 .*2000"),
    "unknown ending": (lambda d: write(d / "a.csv", b"text\na\n"), r"a\.csv: its ending is none of"),
    "mixed kinds": (mixed, r"parquet files cannot be mixed"),
    "parquet without the column": (parquet_without_text, r"a\.parquet has no column 'text' \(found \['body'\]\)"),
    "parquet without rows": (parquet_without_rows, r"a\.parquet has no rows"),
    "parquet with a null": (parquet_with_a_null, r"a\.parquet: the document at position 1 has no text"),
    "parquet cut short": (parquet_cut, r"a\.parquet is no readable parquet file"),
    "parquet damaged": (parquet_damaged, r"a\.parquet is no readable parquet file"),
    "no parquet": (
        lambda d: write(d / "a.parquet", b"PAR1 is what it says"),
        r"a\.parquet is no readable parquet file",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_that_names_the_file(name: str, tmp_path: Path) -> None:
    make, said = BAD[name]
    config = CorpusConfig(str(make(tmp_path)), max_document_bytes=2000)
    with pytest.raises(UserError, match=said) as raised:
        files = describe_corpus(config, Path("data"))
        list(read_range(config, files, 0, sum(file.extent for file in files)))
    assert "\n" not in str(raised.value)
    assert str(tmp_path) in str(raised.value), "the message does not say where"


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json_lines())
    before = describe_file(str(path), "text").fingerprint
    moved = write(tmp_path / "b.jsonl", json_lines())
    assert describe_file(str(moved), "text").fingerprint == before
    changed = bytearray(json_lines())
    changed[500] ^= 1
    write(path, bytes(changed))
    assert describe_file(str(path), "text").fingerprint != before


def test_large_files_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_files, "FULL_HASH_BYTES", 1000)
    monkeypatch.setattr(corpus_files, "BLOCK", 64)
    path = write(tmp_path / "a.txt", b"0123456789abcdef" * 4096)
    before = describe_file(str(path), "text").fingerprint
    for position in (0, 65_535):
        data = bytearray(path.read_bytes())
        data[position] ^= 1
        assert describe_file(str(write(tmp_path / "b.txt", bytes(data))), "text").fingerprint != before
    assert describe_file(str(write(tmp_path / "b.txt", path.read_bytes())), "text").fingerprint == before


def test_layout_survives_its_record(tmp_path: Path) -> None:
    for make in (write_frames, write_parquet, write_jsonl):
        file = describe_file(make(tmp_path), "text")
        assert SourceFile.from_record(json.loads(json.dumps(file.to_record()))) == file
