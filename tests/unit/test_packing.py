"""Rows are the joined token stream cut at T, or one document each; nothing is lost, doubled or misnamed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from teacher_dump import packing
from teacher_dump.corpus import Document
from teacher_dump.packing import PackingCount, pack
from teacher_dump.rows import PackedRow

SEPARATOR = 1000


def encode(texts: list[str]) -> list[list[int]]:
    """A token a character; a dot is no token, as a text may come to none."""
    return [[ord(c) for c in text if c != "."] for text in texts]


def rows_of(texts: list[str], how: str, length: int, rows: int, count: PackingCount | None = None) -> list[PackedRow]:
    documents = [Document(f"d{n}", text) for n, text in enumerate(texts)]
    return list(
        pack(
            iter(documents),
            encode,
            packing=how,
            length=length,
            rows=rows,
            separator=SEPARATOR,
            count=count or PackingCount(),
        )
    )


def joined(texts: list[str]) -> tuple[list[int], list[int]]:
    """The whole stream, and the number of the document each token belongs to (a separator to the one before it)."""
    ids, owner = [], []
    for number, tokens in enumerate(encode(texts)):
        if tokens:
            ids += [*tokens, SEPARATOR]
            owner += [number] * (len(tokens) + 1)
    return ids, owner


TEXTS = st.lists(st.text("abc.", max_size=12), max_size=12)


@given(TEXTS, st.integers(1, 9), st.integers(1, 20), st.integers(1, 30))
@example(["ab", "c"], 5, 9, 1)  # five tokens with separators: the stream ends exactly with the row
@example(["ab", "c"], 4, 9, 99)
@example([], 4, 9, 99)
def test_stream_rows_are_the_joined_stream(texts: list[str], length: int, rows: int, batch: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BATCH_CHARACTERS", batch)
        found = rows_of(texts, "stream", length, rows)
    ids, owner = joined(texts)
    assert len(found) == min(rows, len(ids) // length)
    for number, row in enumerate(found):
        low, high = number * length, (number + 1) * length
        assert row.row == number and row.length == length
        assert row.input_ids_L.tolist() == ids[low:high] and row.input_ids_L.dtype == np.int32
        assert row.next_id == (ids[high] if high < len(ids) else -1)
        assert row.segment_ids_L[0] == 0 and set(np.diff(row.segment_ids_L)) <= {0, 1}
        assert [row.doc_ids[segment] for segment in row.segment_ids_L] == [f"d{n}" for n in owner[low:high]]
        assert len(row.doc_ids) == row.segment_ids_L[-1] + 1


def test_last_row_knows_the_first_token_of_what_follows() -> None:
    assert [row.next_id for row in rows_of(["abc", "de"], "stream", 4, 9)] == [ord("d")]
    assert [row.next_id for row in rows_of(["abc"], "stream", 4, 9)] == [-1]
    assert [row.next_id for row in rows_of(["abc", "...", ""], "stream", 4, 9)] == [-1]
    assert [row.next_id for row in rows_of(["abc"], "stream", 3, 9)] == [SEPARATOR]
    assert [row.next_id for row in rows_of(["abc", "...", "d"], "stream", 4, 1)] == [ord("d")]


def test_documents_beyond_the_unit_are_not_read() -> None:
    """A unit with its rows full stops: at most one batch of the tokenizer is read ahead."""
    read = []

    def documents():
        for n in range(100):
            read.append(n)
            yield Document(f"d{n}", "x" * packing.BATCH_CHARACTERS)

    count = PackingCount()
    made = list(pack(documents(), encode, packing="stream", length=64, rows=3, separator=SEPARATOR, count=count))
    assert len(made) == 3 and read == [0]
    assert (count.documents, count.text_bytes) == (1, packing.BATCH_CHARACTERS)


@given(TEXTS, st.integers(1, 9), st.integers(1, 20))
def test_document_rows_hold_one_document_each(texts: list[str], length: int, rows: int) -> None:
    count = PackingCount()
    found = rows_of(texts, "document", length, rows, count)
    kept = [(f"d{n}", [*ids, SEPARATOR]) for n, ids in enumerate(encode(texts)) if ids][:rows]
    assert [row.doc_ids for row in found] == [(name,) for name, _ in kept]
    assert [row.row for row in found] == list(range(len(found)))
    for row, (_, ids) in zip(found, kept, strict=True):
        assert row.input_ids_L.tolist() == ids[:length] and 1 <= row.length <= length
        assert row.next_id == (ids[length] if len(ids) > length else -1)
        assert not row.segment_ids_L.any()
    assert count.truncated == sum(len(ids) > length for _, ids in kept)


def test_count_says_what_was_read() -> None:
    count = PackingCount()
    rows_of(["ß", "ab", "."], "stream", 2, 99, count)
    assert (count.documents, count.text_bytes, count.truncated) == (3, 5, 0)
