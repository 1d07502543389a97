"""Documents become sequences of T tokens.

`stream`: documents joined by a separator and cut at T, one causal context a row as in pre-training. `document`: one
document a row, ended by the separator where it fits, padded by the shard writer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from teacher_dump.corpus import Document
from teacher_dump.rows import PackedRow

Encode = Callable[[list[str]], list[list[int]]]
"""Texts to token ids, without special tokens."""

BATCH_CHARACTERS = 65_536
"""Text handed to the tokenizer at once: enough to use its threads, little beside a unit."""


@dataclass
class PackingCount:
    """What was read to make a unit's rows."""

    documents: int = 0
    text_bytes: int = 0
    truncated: int = 0  # documents cut at T (`document` packing only)


@dataclass
class _Stream:
    """Tokens waiting to be cut into rows, with the document each came from."""

    ids: list[int] = field(default_factory=list)
    owner: list[int] = field(default_factory=list)


def tokenized(documents: Iterable[Document], encode: Encode, count: PackingCount) -> Iterator[tuple[str, list[int]]]:
    """(document id, token ids) in order, encoded in batches."""
    batch: list[Document] = []
    held = 0
    for document in documents:
        batch.append(document)
        held += len(document.text)
        if held >= BATCH_CHARACTERS:
            yield from _encode_batch(batch, encode, count)
            batch, held = [], 0
    yield from _encode_batch(batch, encode, count)


def _encode_batch(batch: list[Document], encode: Encode, count: PackingCount) -> Iterator[tuple[str, list[int]]]:
    encoded = encode([document.text for document in batch]) if batch else []
    for document, ids in zip(batch, encoded, strict=True):
        count.documents += 1
        count.text_bytes += len(document.text.encode())
        yield document.id, ids


def pack_stream(
    documents: Iterable[tuple[str, list[int]]], length: int, rows: int, separator: int
) -> Iterator[PackedRow]:
    """At most `rows` rows of exactly `length` tokens; what does not fill a row is left.

    The separator follows every document and belongs to it. `next_id` is the first token of what follows the row, -1
    where the stream ends with it.
    """
    stream = _Stream()
    names: list[str] = []
    made = 0
    for name, ids in documents:
        if not ids:
            continue
        names.append(name)
        stream.ids += [*ids, separator]
        stream.owner += [len(names) - 1] * (len(ids) + 1)
        while len(stream.ids) > length and made < rows:
            yield _cut(stream, names, length, made)
            made += 1
        if made == rows:
            return
    if len(stream.ids) == length and made < rows:
        yield _cut(stream, names, length, made)


def _cut(stream: _Stream, names: list[str], length: int, row: int) -> PackedRow:
    ids = np.asarray(stream.ids[:length], dtype=np.int32)
    owner = np.asarray(stream.owner[:length], dtype=np.int32)
    next_id = stream.ids[length] if len(stream.ids) > length else -1
    del stream.ids[:length], stream.owner[:length]
    documents = tuple(names[i] for i in range(owner[0], owner[-1] + 1))
    return PackedRow(row, ids, next_id, owner - owner[0], documents)


def pack_documents(
    documents: Iterable[tuple[str, list[int]]], length: int, rows: int, separator: int, count: PackingCount
) -> Iterator[PackedRow]:
    """At most `rows` rows, one document each; a longer document is cut at `length` and its next token is `next_id`."""
    made = 0
    for name, ids in documents:
        if not ids:
            continue
        stream = [*ids, separator]
        kept = np.asarray(stream[:length], dtype=np.int32)
        next_id = stream[length] if len(stream) > length else -1
        count.truncated += next_id != -1
        yield PackedRow(made, kept, next_id, np.zeros(len(kept), dtype=np.int32), (name,))
        made += 1
        if made == rows:
            return


def pack(
    documents: Iterable[Document],
    encode: Encode,
    *,
    packing: str,
    length: int,
    rows: int,
    separator: int,
    count: PackingCount,
) -> Iterator[PackedRow]:
    """Rows of one unit from its documents, by the packing the manifest names."""
    ids = tokenized(documents, encode, count)
    if packing == "stream":
        return pack_stream(ids, length, rows, separator)
    return pack_documents(ids, length, rows, separator, count)
