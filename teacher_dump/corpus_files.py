"""One corpus file: its kind, its extent, its fingerprint, and how a range of it is read without the rest."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
import zstandard

from pipeline.errors import UserError, named, one_line
from pipeline.fields import Fields
from pipeline.thrift import Malformed
from teacher_dump.corpus_parquet import CorpusParquet

FULL_HASH_BYTES = 256 << 20
"""Local files up to this size are hashed whole; of larger ones, 64 blocks spread over the file."""
BLOCK = 1 << 20
INDEX_STRIDE = 1 << 20
FED_BYTES = 1024
"""Compressed bytes given to zstd at once: at its greatest ratio they become 32 MB."""
MOST_WINDOW = 1 << 27
"""Bytes of text that a zstd frame may refer back to, and so the memory that reading it takes."""
MOST_RATIO = 1000
"""Text that shrinks to less than a thousandth is no text; smaller files may."""
RATIO_BYTES = 1 << 28
MOST_INDEX = 1 << 22
BLANK_BYTES = 1024
"""A line of white space shorter than this is blank: how far back one must look to see whether a paragraph begins."""
ENDINGS = {
    ".parquet": "parquet",
    ".jsonl.zst": "jsonl.zst",
    ".json.zst": "jsonl.zst",
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
}
INDEXED = ("parquet", "jsonl.zst")


def kind_of(path: str) -> str | None:
    """The kind a file's name says, None if it is none of ours."""
    return next((kind for ending, kind in ENDINGS.items() if path.lower().endswith(ending)), None)


@dataclass(frozen=True)
class SourceFile:
    """Layout of one file.

    Attributes:
        path: local path or URL.
        kind: parquet, jsonl, jsonl.zst or text.
        extent: bytes of uncompressed text, or rows of a parquet file.
        text_bytes: bytes of text (for parquet: of the text column, uncompressed).
        fingerprint: changes when the file's content does.
        index: for jsonl.zst, (compressed offset, uncompressed offset) of frames; for parquet, the first row of each
            row group.
    """

    path: str
    kind: str
    extent: int
    text_bytes: int
    fingerprint: str
    index: tuple[tuple[int, int], ...] = ()

    @property
    def unit(self) -> str:
        return "rows" if self.kind == "parquet" else "bytes"

    def to_record(self) -> dict[str, Any]:
        return {**asdict(self), "index": [list(entry) for entry in self.index]}

    @classmethod
    def from_record(cls, record: Any, where: object = "plan.json") -> SourceFile:
        """A file of a plan.

        Args:
            where: the plan, for messages.

        Raises:
            UserError: a field is missing, or has a type or value it cannot have.
        """
        given = Fields(record, f"{where}: a file")
        kind = given.choice("kind", tuple(ENDINGS.values()))
        index = tuple(tuple(entry) if isinstance(entry, list) else () for entry in given.list("index", MOST_INDEX))
        whole = all(len(entry) == 2 and all(type(n) is int and 0 <= n < 1 << 60 for n in entry) for entry in index)
        if not whole or (kind in INDEXED and index[:1] not in (((0, 0),),)):
            raise given.refusal("index", "a list of pairs of offsets that begins with 0, 0")
        return cls(
            path=given.text("path"),
            kind=kind,
            extent=given.integer("extent", 1, 1 << 60),
            text_bytes=given.integer("text_bytes", 1, 1 << 60),
            fingerprint=given.text("fingerprint", 200),
            index=index,  # type: ignore[arg-type]
        )

    def read(self, low: int, high: int, text: str, name: str, limit: int) -> Iterator[tuple[int, Any]]:
        """(position, raw value) of the documents that begin in [low, high)."""
        try:
            yield from self._documents(low, high, text, name, limit)
        except OSError as error:
            raise named(error, self.path) from error

    def _documents(self, low: int, high: int, text: str, name: str, limit: int) -> Iterator[tuple[int, Any]]:
        if self.kind == "parquet":
            yield from self._read_rows(low, high, text, name, limit)
            return
        with _open(self.path) as raw:
            try:
                stream, position = self._seek(raw, low)
                lines = _paragraphs(stream, position, limit, self.path) if self.kind == "text" else None
                for start, line in lines or _lines(stream, position, limit, self.path):
                    if start >= high:
                        return
                    if start >= low and line.strip():
                        yield start, line
            except zstandard.ZstdError as error:
                raise _no_zstd(self.path, error) from None

    def _seek(self, raw: BinaryIO, low: int) -> tuple[BinaryIO, int]:
        """A stream that begins shortly before `low`: enough to see whether a line or paragraph begins at `low`."""
        before = max(low - (BLANK_BYTES + 1 if self.kind == "text" else 1), 0)
        if self.kind == "jsonl.zst":
            compressed, position = max(entry for entry in self.index if entry[1] <= before)
            raw.seek(compressed)
            reader = zstandard.ZstdDecompressor(max_window_size=MOST_WINDOW).stream_reader(raw, read_across_frames=True)
            _skip(reader, before - position, self.path)
            return io.BufferedReader(reader, BLOCK), before  # type: ignore[arg-type, return-value]
        raw.seek(before)
        return raw, before

    def _read_rows(self, low: int, high: int, text: str, name: str, limit: int) -> Iterator[tuple[int, Any]]:
        with _open(self.path) as raw:
            file = _parquet(self.path, lambda: CorpusParquet(self.path, raw))
            if file.metadata.num_row_groups != len(self.index):
                raise UserError(
                    f"corpus file {self.path} has {file.metadata.num_row_groups} row groups, the plan says "
                    f"{len(self.index)}: the plan is another file's; dump into another folder (CACHE=...)"
                )
            for group, (_, first) in enumerate(self.index):
                rows = file.metadata.row_group(group).num_rows
                if first + rows <= low or first >= high:
                    continue
                position = first
                values = file.rows(group, text, name, limit)
                while position < high and (value := _parquet(self.path, partial(next, values, None))) is not None:
                    if position >= low:
                        if isinstance(value[text], int):
                            raise _too_long(self.path, position, limit)
                        yield position, value
                    position += 1
                values.close()


def _open(path: str) -> Any:
    try:
        return fsspec.open(path, "rb").open()
    except FileNotFoundError:
        raise UserError(f"corpus file {path} is missing: mend corpus.source, or bring the file back") from None


def _skip(reader: Any, count: int, path: str) -> None:
    while count > 0:
        block = reader.read(min(count, BLOCK))
        if not block:
            raise UserError(f"{path} ends early: the zstd stream was cut; fetch the file again")
        count -= len(block)


def _lines(stream: BinaryIO, position: int, limit: int, path: str) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of every line that begins after `position`; the one `position` falls into is passed over."""
    passing = position > 0
    while True:
        line = stream.readline(limit)
        if passing and line:
            position += len(line)
            passing = not line.endswith(b"\n")
            continue
        if not line:
            return
        if len(line) >= limit:
            raise _too_long(path, position, limit)
        yield position, line
        position += len(line)


def _paragraphs(stream: BinaryIO, position: int, limit: int, path: str) -> Iterator[tuple[int, bytes]]:
    """(offset, text) of runs of non-blank lines; a run that may have begun before `position` is passed over."""
    begun, parts, held = position, list[bytes](), 0
    inside = position > 0  # until a blank line is seen, we may be within a paragraph of the range before
    for start, line in _lines(stream, position, limit, path):
        if line.strip() or len(line) >= BLANK_BYTES:
            if not inside:
                if not parts:
                    begun, held = start, 0
                parts.append(line)
                held += len(line)
                if held >= limit:
                    raise _too_long(path, begun, limit)
        else:
            if parts:
                yield begun, b"".join(parts).rstrip(b"\r\n")
            inside, parts = False, []
    if parts:
        yield begun, b"".join(parts).rstrip(b"\r\n")


def _too_long(path: str, position: int, limit: int) -> UserError:
    return UserError(
        f"{path}: the document at position {position} is longer than {limit} bytes: split it, or raise "
        "corpus.max_document_bytes"
    )


def describe_file(path: str, text_field: str) -> SourceFile:
    """Read a file's layout; its text is not read (a zstd file is decompressed once to find its frames).

    Raises:
        UserError: missing, empty, truncated, of an unknown kind, or a parquet file without the text column.
    """
    kind = kind_of(path)
    if kind is None:
        raise UserError(f"corpus file {path}: its ending is none of {', '.join(ENDINGS)}; rename or convert it")
    with _open(path) as raw:
        size = raw.seek(0, 2)
        if size == 0:
            raise UserError(f"corpus file {path} is empty: remove it from corpus.source, or fetch it again")
        raw.seek(0)
        fingerprint = fingerprint_of(path, raw, size)
        raw.seek(0)
        if kind == "parquet":
            return _describe_parquet(path, raw, fingerprint, text_field)
        if kind == "jsonl.zst":
            index, extent = index_frames(raw, path)
            return SourceFile(path, kind, extent, extent, fingerprint, index)
        if raw.read(1) == b"[" and kind == "jsonl":
            raise UserError(
                f"corpus file {path} is a JSON array: give one object a line (jq -c '.[]' FILE > NEW.jsonl)"
            )
    return SourceFile(path, kind, size, size, fingerprint)


def _describe_parquet(path: str, raw: Any, fingerprint: str, text_field: str) -> SourceFile:
    file = _parquet(path, lambda: CorpusParquet(path, raw))
    file.check_text(text_field)
    metadata = file.metadata
    if metadata.num_rows == 0:
        raise UserError(f"corpus file {path} has no rows: remove it from corpus.source")
    first, starts, text_bytes = 0, [], 0
    for group in range(metadata.num_row_groups):
        meta = metadata.row_group(group)
        starts.append((group, first))
        if meta.num_rows < 0:
            raise UserError(f"corpus file {path} has a row group of {meta.num_rows} rows: fetch it again")
        first += meta.num_rows
        for column in range(meta.num_columns):
            if meta.column(column).path_in_schema == text_field:
                text_bytes += max(0, meta.column(column).total_uncompressed_size)
    return SourceFile(path, "parquet", first, max(text_bytes, 1), fingerprint, tuple(starts))


def _parquet(path: str, read: Callable[[], Any]) -> Any:
    """What `read` returns; Arrow's complaints name the file."""
    try:
        return read()
    except (pa.ArrowException, OSError, Malformed, UnicodeDecodeError) as error:
        raise UserError(f"corpus file {path} is no readable parquet file ({one_line(error)}): fetch it again") from None


def _no_zstd(path: str, error: Exception) -> UserError:
    return UserError(f"corpus file {path} is no valid zstd data ({one_line(error)}): fetch it again")


def index_frames(raw: BinaryIO, path: str) -> tuple[tuple[tuple[int, int], ...], int]:
    """Frames of a zstd file as (compressed, uncompressed) offsets about INDEX_STRIDE apart, and its whole length.

    Raises:
        UserError: no zstd data, damaged, cut in the middle of a frame, or made to fill a memory or disk.
    """
    entries: list[tuple[int, int]] = []
    consumed, produced = 0, 0
    pending = memoryview(b"")
    while True:
        if not pending:
            pending = memoryview(raw.read(BLOCK))
            if not pending:
                break
        if not entries or produced - entries[-1][1] >= INDEX_STRIDE:
            entries.append((consumed, produced))
        frame = zstandard.ZstdDecompressor(max_window_size=MOST_WINDOW).decompressobj()
        try:
            while not frame.eof:
                if not pending:
                    pending = memoryview(raw.read(BLOCK))
                    if not pending:
                        raise UserError(f"corpus file {path} was cut in the middle of a zstd frame: fetch it again")
                produced += len(frame.decompress(pending[:FED_BYTES]))
                used = min(FED_BYTES, len(pending)) - len(frame.unused_data)
                consumed += used
                pending = pending[used:]
                if produced > RATIO_BYTES + MOST_RATIO * consumed:
                    raise UserError(
                        f"corpus file {path}: its first {consumed} bytes hold {produced} bytes of text, more than "
                        f"{MOST_RATIO} times as many: that is no text; remove it from corpus.source"
                    )
        except zstandard.ZstdError as error:
            raise _no_zstd(path, error) from None
    if produced == 0:
        raise UserError(f"corpus file {path} is empty once decompressed: remove it from corpus.source")
    return tuple(entries), produced


def fingerprint_of(path: str, raw: BinaryIO, size: int) -> str:
    """A digest that changes with the file: of all of it, of samples (large files), or the
    store's own."""
    digest = hashlib.sha256(str(size).encode())
    if not Path(path).is_file():
        filesystem, inner = fsspec.core.url_to_fs(path)
        info = filesystem.info(inner)
        mark = next((info[key] for key in ("ETag", "etag", "blob_id", "sha256", "mtime") if info.get(key)), None)
        digest.update(str(mark).encode())
        return digest.hexdigest()
    if size <= FULL_HASH_BYTES:
        while block := raw.read(BLOCK):
            digest.update(block)
        return digest.hexdigest()
    for i in range(64):
        raw.seek(i * (size - BLOCK) // 63)
        digest.update(raw.read(BLOCK))
    return digest.hexdigest()
