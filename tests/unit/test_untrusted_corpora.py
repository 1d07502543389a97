"""Corpora from strangers: whatever a file expands to, reading it takes no more memory than stated, and ends.

Each reads in a process of its own whose address space is limited; its peak is compared with what an ordinary corpus of
the same kind takes, plus the stated figure.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from chaos.parquet_parts import Page, ParquetParts, closed
from chaos.thrift_tree import field, read_tree, varint, write_tree

from pipeline.errors import UserError
from pipeline.schema import MOST_ID_BYTES
from teacher_dump import corpus_parquet
from teacher_dump.corpus import CorpusConfig, describe_corpus, read_range
from teacher_dump.corpus_files import index_frames

REPOSITORY = Path(__file__).resolve().parents[2]
LIMIT = 16_000_000
"""The default of corpus.max_document_bytes."""
READ = """
import json, resource, sys, time
import numpy, pyarrow.parquet, zstandard, fsspec
from pathlib import Path
from pipeline.errors import UserError
from teacher_dump.corpus import CorpusConfig, describe_corpus, read_range
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with open("/proc/self/statm") as file:
    now = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + int(sys.argv[2]), resource.RLIM_INFINITY))
config, said, count, started = CorpusConfig(sys.argv[1]), None, 0, time.monotonic()
try:
    files = describe_corpus(config, Path("data"))
    for document in read_range(config, files, 0, sum(file.extent for file in files)):
        count += 1
        if count == 20:
            break
except UserError as error:
    said = str(error)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
print(json.dumps({"said": said, "documents": count, "mb": grown, "seconds": time.monotonic() - started}))
"""


def read_apart(path: Path, address_space: int = 1 << 30) -> dict[str, Any]:
    """What reading a corpus says and takes, in a process that may grow by `address_space`."""
    command = [sys.executable, "-c", READ, str(path), str(address_space)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    environment["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # others reserve a GB of addresses at their start
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout))


def frames(text: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=3).compress(text)


def sparse(path: Path, head: bytes, size: int) -> Path:
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(size)
    return path


def line_of_a_gigabyte(folder: Path) -> Path:
    return sparse(folder / "a.jsonl", b'{"text": "x"}\n{"text": "', 1 << 30)


def text_of_a_gigabyte(folder: Path) -> Path:
    return sparse(folder / "a.txt", b"first\n\nsecond", 1 << 30)


def bomb(folder: Path) -> Path:
    """0.5 MB that unpack to 16 GB."""
    (folder / "a.jsonl.zst").write_bytes(frames(bytes(1 << 28)) * 64)
    return folder / "a.jsonl.zst"


def bomb_of_one_frame(folder: Path) -> Path:
    """The same in one frame, made of blocks of one repeated byte: 4 bytes each that unpack to 128 KB."""
    block = ((1 << 17) << 3 | 1 << 1).to_bytes(3, "little") + b"x"
    last = ((1 << 17) << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"x"
    header = b"\x28\xb5\x2f\xfd" + bytes([0, 0x70])  # no size, a window of 16 MB
    (folder / "a.jsonl.zst").write_bytes(header + block * 130_000 + last)
    return folder / "a.jsonl.zst"


def small_bomb(folder: Path) -> Path:
    """200 MB in a line: below what is refused as a whole, above what a line may have."""
    (folder / "a.jsonl.zst").write_bytes(frames(b'{"text": "x"}\n{"text": "' + b"x" * 200_000_000))
    return folder / "a.jsonl.zst"


def wide_window(folder: Path) -> Path:
    """A frame that asks for a window of 1 GB."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=30, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (folder / "a.jsonl.zst").write_bytes(compressor.compress(b'{"text": "x"}\n') + compressor.flush())
    return folder / "a.jsonl.zst"


def line_of_many_lists(folder: Path) -> Path:
    """Just within the limit of a line: five million lists."""
    (folder / "a.jsonl").write_bytes(b'{"x": [' + b"[]," * 5_200_000 + b'0], "text": "x"}\n')
    return folder / "a.jsonl"


def nested_line(folder: Path) -> Path:
    (folder / "a.jsonl").write_bytes(b'{"text": "x"}\n{"text": ' + b"[" * 10_000_000 + b"\n")
    return folder / "a.jsonl"


def digits(folder: Path) -> Path:
    (folder / "a.jsonl").write_bytes(b'{"text": "x"}\n{"n": ' + b"9" * 10_000_000 + b', "text": "x"}\n')
    return folder / "a.jsonl"


def document_of_100_mb(folder: Path) -> Path:
    (folder / "a.jsonl").write_bytes(b'{"text": "x"}\n{"text": "' + b"word " * 20_000_000 + b'"}\n')
    return folder / "a.jsonl"


def table(folder: Path, texts: pa.Array, **options: Any) -> Path:
    options = {"compression": "zstd", "write_statistics": False, "store_schema": False, **options}
    pq.write_table(pa.table({"text": texts}), folder / "a.parquet", **options)
    return folder / "a.parquet"


def value_of_1_5_gb(folder: Path) -> Path:
    """One value of a page that says it has 1.5 GB, and would have."""
    path = table(folder, pa.array(["x"]), use_dictionary=False, compression="none")
    parts = ParquetParts(path.read_bytes())
    header = read_tree(parts.chunks[0][0].header)[0]
    field(header, 2)[2] = 1_500_000_000
    path.write_bytes(parts.with_pages(0, [Page(write_tree(header), parts.chunks[0][0].content)]))
    return path


def value_of_100_mb(folder: Path) -> Path:
    return table(folder, pa.array(["x", "y" * 100_000_000]), use_dictionary=False)


def one_value_a_million_times(folder: Path) -> Path:
    """2 KB: a dictionary of one text of 15 MB, in 200,000 rows."""
    rows = pa.DictionaryArray.from_arrays(pa.array([0] * 200_000, pa.int32()), pa.array(["x" * 15_000_000]))
    return table(folder, rows, dictionary_pagesize_limit=1 << 30)


def rows_that_repeat_the_one_before(folder: Path) -> Path:
    rows = pa.array(["x" * 1_000_000] * 100)
    return table(folder, rows, use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"})


def two_billion_lengths(folder: Path) -> Path:
    """A page that says within itself that it has 2 x 10^9 lengths of texts."""
    path = table(
        folder,
        pa.array(["ab"] * 1000),
        use_dictionary=False,
        compression="none",
        column_encoding={"text": "DELTA_LENGTH_BYTE_ARRAY"},
    )
    parts = ParquetParts(path.read_bytes())
    content = parts.content(0, 0)
    start = bytes([0x80, 1, 4])
    more = content.replace(start + varint(1000), start + varint(2_000_000_000), 1)
    assert more != content
    path.write_bytes(parts.with_pages(0, [parts.rewritten(0, 0, more)]))
    return path


def many_column_chunks(folder: Path) -> Path:
    """A footer of 3 MB with a million column chunks, each of which Arrow would hold as 1 KB."""
    path = table(folder, pa.array(["x"]))
    parts = ParquetParts(path.read_bytes())
    tree = parts.tree()
    group = field(tree, 4)[2][1][0]
    field(group, 1)[2] = (12, [[[2, 6, 0]]] * 5000)
    field(tree, 4)[2] = (12, [group] * 200)
    path.write_bytes(closed(parts.data[: -8 - len(parts.footer)], write_tree(tree)))
    return path


HARMS: dict[str, tuple[Callable[[Path], Path], float, str]] = {
    "a line of 1 GB": (line_of_a_gigabyte, 64, r"a\.jsonl: the document at position 14 is longer than 16000000 bytes"),
    "a text of 1 GB": (text_of_a_gigabyte, 64, r"a\.txt: the document at position 7 is longer than 16000000 bytes"),
    "a zstd bomb": (bomb, 64, r"a\.jsonl\.zst: its first \d+ bytes hold \d+ bytes of text"),
    "a zstd bomb of one frame": (bomb_of_one_frame, 128, r"a\.jsonl\.zst: its first \d+ bytes hold \d+ bytes of text"),
    "a small zstd bomb": (small_bomb, 64, r"a\.jsonl\.zst: the document at position 14 is longer than"),
    "a window of 1 GB": (wide_window, 16, r"a\.jsonl\.zst is no valid zstd data"),
    "a line of many lists": (line_of_many_lists, 500, ""),
    "a nested line": (nested_line, 64, r"a\.jsonl: the line at byte 14 is not JSON"),
    "an integer of 10 MB": (digits, 64, r"a\.jsonl: the line at byte 14 is not JSON"),
    "a document of 100 MB": (document_of_100_mb, 64, r"a\.jsonl: the document at position 14 is longer than"),
    "a value of 1.5 GB": (
        value_of_1_5_gb,
        16,
        r"a\.parquet: .* has a page of 1 values in 1500000000",
    ),
    "a value of 100 MB": (value_of_100_mb, 320, r"a\.parquet: the document at position 1 is longer than"),
    "one value in many rows": (one_value_a_million_times, 320, ""),
    "rows that repeat": (rows_that_repeat_the_one_before, 16, r"a\.parquet: column text has encoding 7"),
    "lengths within a page": (two_billion_lengths, 16, r"a\.parquet: column text has encoding 6"),
    "column chunks": (many_column_chunks, 64, r"a\.parquet is no readable parquet file \(meta is missing\)"),
}
"""What is read -> (how it is made, by how many MB the process may grow, what is said)."""


@pytest.mark.parametrize("name", HARMS)
def test_memory_stays_within_what_is_stated(name: str, tmp_path: Path) -> None:
    make, most_mb, said = HARMS[name]
    found = read_apart(make(tmp_path))
    if said:
        assert found["said"] is not None and re.search(said, found["said"]), found
        assert str(tmp_path) in found["said"] and "\n" not in found["said"] and len(found["said"]) < 1000
    else:
        assert found["said"] is None and found["documents"] > 0
    assert found["mb"] < most_mb and found["seconds"] < 30, found


def test_documents_up_to_the_limit_are_read(tmp_path: Path) -> None:
    """As long as a line may be, in the characters that take most memory."""
    text = "\U0001f600" + "x" * (LIMIT - 100)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    found = read_apart(tmp_path / "a.jsonl")
    assert found["documents"] == 1 and found["mb"] < 16 * LIMIT / 1e6


def read(config: CorpusConfig) -> list[Any]:
    files = describe_corpus(config, Path("data"))
    return list(read_range(config, files, 0, sum(file.extent for file in files)))


def test_frames_and_index_do_not_depend_on_how_zstd_is_fed() -> None:
    """Frames that end everywhere within what is fed at once."""
    texts = [os.urandom(n * 37 % 5000) for n in range(200)]
    data = b"".join(map(frames, texts))
    index, extent = index_frames(io.BytesIO(data), "x")
    assert extent == sum(map(len, texts)) and index == ((0, 0),)


def test_long_and_odd_ids_are_replaced_by_the_place(tmp_path: Path) -> None:
    ids = ["a", "b" * MOST_ID_BYTES, "c" * (MOST_ID_BYTES + 1), "ß" * 600, 5, 1.5, None, {"x": [1]}, [[[]]]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"id": name, "text": "t"}) + "\n" for name in ids))
    found = [document.id for document in read(CorpusConfig(str(tmp_path / "a.jsonl")))]
    assert found[:2] == ids[:2] and found[4:6] == ["5", "1.5"]
    assert all(name.startswith("a.jsonl:") for name in [*found[2:4], *found[6:]])
    pq.write_table(pa.table({"id": ids[:4], "text": ["t"] * 4}), tmp_path / "a.parquet")
    assert [d.id for d in read(CorpusConfig(str(tmp_path / "a.parquet")))] == [*ids[:2], "a.parquet:2", "a.parquet:3"]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"text": [1, 2]}, "column 'text' holds int64, no text"),
        ({"text": [["a"], ["b"]]}, "column 'text' holds list"),
        ({"text": [b"a", b"b"]}, "column 'text' holds binary"),
    ],
)
def test_columns_that_are_no_text(columns: dict[str, list[Any]], said: str, tmp_path: Path) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=rf"a\.parquet.*{said}"):
        read(CorpusConfig(str(tmp_path / "a.parquet")))


def test_texts_of_every_kind_of_column(tmp_path: Path) -> None:
    texts = ["a", "ß" * 40, "", "end"]
    for number, kind in enumerate(
        (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.string_view())
    ):
        path = tmp_path / f"{number}.parquet"
        table = pa.table({"id": pa.array([1, 2, 3, 4]), "text": pa.array(texts).cast(kind)})
        pq.write_table(table, path, row_group_size=3)
        assert [(d.id, d.text) for d in read(CorpusConfig(str(path)))] == list(zip("1234", texts, strict=True))


def test_names_twice(tmp_path: Path) -> None:
    twice = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="has several columns 'text'"):
        read(CorpusConfig(str(tmp_path / "a.parquet")))


def test_batches_get_smaller_where_pages_are_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = pq.ParquetFile.iter_batches

    def spy(self: pq.ParquetFile, batch_size: int, **more: Any) -> Any:
        sizes.append(batch_size)
        return real(self, batch_size=batch_size, **more)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    for text in ("x" * 100, "x" * 8_000_000):
        pq.write_table(pa.table({"text": [text] * 20}), tmp_path / "a.parquet", dictionary_pagesize_limit=1 << 30)
        assert len(read(CorpusConfig(str(tmp_path / "a.parquet")))) == 20
    assert sizes[0] == corpus_parquet.BATCH_ROWS and 1 <= sizes[1] <= 8
