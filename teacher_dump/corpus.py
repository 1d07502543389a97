"""Where documents come from: a corpus is a list of files whose layout is known without reading their text.

A position in a file is a byte offset of the uncompressed text (json lines, text) or a row number (parquet). A document
belongs to the range in which it *begins*, so ranges that do not overlap never share a document. Readers seek: a range
is read without what comes before it (a zstd file from the frame that holds it).
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from pipeline.errors import UserError, one_line
from pipeline.schema import MOST_ID_BYTES
from teacher_dump.corpus_files import SourceFile, describe_file, kind_of
from teacher_dump.embedded import resolve_embedded


@dataclass(frozen=True)
class CorpusConfig:
    """A corpus: manifests/corpora/*.yaml hold these fields."""

    source: str
    """`embedded:enwik8`, `embedded:shakespeare`, `hub:NAME` (a data set on the Hugging Face hub or a local data set
    folder), or a path, glob or URL of .parquet, .jsonl, .json (one object a line), .jsonl.zst or .txt files (documents
    separated by blank lines)"""
    text_field: str = "text"
    """field or column that holds a document's text"""
    id_field: str = "id"
    """field or column that holds a document's id; where a document lacks it, or has one of more than 1024 bytes,
    FILE:POSITION serves"""
    hub_config: str | None = None
    """configuration name of a hub data set"""
    hub_split: str = "train"
    """split of a hub data set"""
    hub_revision: str | None = None
    """git revision of a hub data set"""
    heldout_fraction: float = 0.05
    """documents that begin in this last part of the corpus are held out: no training unit contains them"""
    bytes_per_token: float = 6.0
    """a unit is given this much text for each of its tokens; too little, and units fall short"""
    range_bytes: int = 262_144
    """a unit is given at least this much text, so that small units still meet the start of a document"""
    max_document_bytes: int = 16_000_000
    """a longer line or document stops the run, naming file and position, instead of filling the memory: tokenising
    takes some 130 bytes for each of its bytes; raised, the dump goes on where it stopped"""


@dataclass(frozen=True)
class Document:
    """One document: its id, and its text."""

    id: str
    text: str


def list_files(config: CorpusConfig, data_root: Path) -> list[str]:
    """Paths or URLs of the corpus's files, in a stable order.

    Raises:
        UserError: nothing is there, or the hub does not answer.
    """
    source = config.source
    if source.startswith("embedded:"):
        return [str(resolve_embedded(source, data_root))]
    if source.startswith("hub:"):
        return _hub_files(config)
    if "://" in source:
        filesystem, path = fsspec.core.url_to_fs(source)
        found = sorted(filesystem.glob(path)) if glob.has_magic(path) else [path]
        files = [filesystem.unstrip_protocol(p) for p in found]
    elif Path(source).is_dir():
        files = [str(p) for p in sorted(Path(source).rglob("*")) if p.is_file() and kind_of(str(p)) is not None]
    else:
        files = sorted(glob.glob(source, recursive=True)) if glob.has_magic(source) else [source]
    if not files:
        raise UserError(f"corpus.source {source}: no file matches; name .parquet, .jsonl, .jsonl.zst or .txt files")
    return files


def _hub_files(config: CorpusConfig) -> list[str]:
    """Data files of a hub data set, as the `datasets` library resolves them."""
    import datasets

    name = config.source.removeprefix("hub:")
    try:
        builder = datasets.load_dataset_builder(name, config.hub_config, revision=config.hub_revision)
    except Exception as error:  # the hub's client raises many kinds
        raise UserError(
            f"corpus.source {config.source}: the data set could not be opened ({one_line(error)})"
        ) from None
    resolved = builder.config.data_files or {}
    if config.hub_split not in resolved:
        known = ", ".join(map(str, resolved)) or "none"
        raise UserError(f"corpus.hub_split {config.hub_split}: {name} has the splits {known}")
    return [str(file) for file in resolved[config.hub_split]]


def describe_corpus(config: CorpusConfig, data_root: Path) -> list[SourceFile]:
    """The layout of every file: kind, extent, fingerprint and, for compressed files, an index of frames.

    Raises:
        UserError: a file is missing, empty, truncated, of an unknown kind, or of another kind than the first.
    """
    files = [describe_file(path, config.text_field) for path in list_files(config, data_root)]
    kinds = {file.unit for file in files}
    if len(kinds) > 1:
        raise UserError(f"corpus.source {config.source}: parquet files cannot be mixed with other kinds in one corpus")
    return files


def read_range(config: CorpusConfig, files: list[SourceFile], start: int, end: int) -> Iterator[Document]:
    """Documents that begin at positions [start, end) of the concatenated files, in order.

    Raises:
        UserError: a document is not UTF-8, not JSON, too long, or lacks the text field; names file and position.
    """
    base = 0
    for file in files:
        low, high = max(start - base, 0), min(end - base, file.extent)
        if low < high:
            for position, value in file.read(low, high, config.text_field, config.id_field, config.max_document_bytes):
                yield _document(config, file, position, value)
        base += file.extent


def _document(config: CorpusConfig, file: SourceFile, position: int, value: Any) -> Document:
    # Not the folder: rows do not depend on where a corpus lies.
    where = f"{file.path.rsplit('/', 1)[-1][-255:]}:{position}"
    if file.kind == "text":
        return Document(where, _decode(file, position, value))
    if isinstance(value, bytes):
        try:
            value = json.loads(_decode(file, position, value))
        except (ValueError, RecursionError) as error:  # lists within lists, a thousand deep
            raise UserError(
                f"{file.path}: the line at byte {position} is not JSON ({one_line(error)}); mend or remove it"
            ) from None
    if not isinstance(value, dict) or not isinstance(value.get(config.text_field), str):
        found = sorted(value)[:20] if isinstance(value, dict) else type(value).__name__
        raise UserError(
            f"{file.path}: the document at position {position} has no text in field {config.text_field!r} "
            f"(found {found}): "
            "name the right one with corpus.text_field"
        )
    name = value.get(config.id_field)
    name = str(name) if isinstance(name, str | int | float) else where
    if len(name) > MOST_ID_BYTES or len(name.encode("utf-8", "replace")) > MOST_ID_BYTES:
        name = where
    document = Document(name, value[config.text_field])
    try:
        document.id.encode(), document.text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{file.path}: the document at position {position} holds half a surrogate pair "
            f"(\\u{ord(error.object[error.start]):04x}), which is no character: mend or remove it"
        ) from None
    return document


def _decode(file: SourceFile, position: int, value: bytes) -> str:
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file.path}: byte {position + error.start} is not UTF-8 (0x{value[error.start]:02x}): convert the "
            f"file, for "
            "example with iconv"
        ) from None
    return text.removeprefix("\ufeff") if position == 0 else text  # the mark some editors begin a file with
