"""The embedded corpus: its file format, the checks on its source, and the one text every machine must have."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import zstandard

from pipeline.commit import commit_json, read_json
from pipeline.errors import UserError
from teacher_dump.embedded import resolve_embedded
from teacher_dump.embedded.corpus import (
    ENWIK8,
    MEMBER,
    PINNED,
    articles,
    enwik8_lines,
)
from teacher_dump.embedded.pinned_text import write_frames

DATA = Path(__file__).resolve().parents[2] / "data"


def frames(path: Path) -> list[bytes]:
    """Every zstd frame of a file, decompressed on its own."""
    data, out = path.read_bytes(), []
    while data:
        one = zstandard.ZstdDecompressor().decompressobj()
        out.append(one.decompress(data))
        assert one.eof
        data = one.unused_data
    return out


def test_frames_stand_alone_and_end_at_line_ends(tmp_path: Path) -> None:
    documents = [(f"Title {i}", f"ünïcode {i} " * 9000) for i in range(40)]
    facts = write_frames(documents, tmp_path / "c.jsonl.zst")
    blocks = frames(tmp_path / "c.jsonl.zst")
    assert len(blocks) > 3
    assert all(block.endswith(b"\n") for block in blocks)
    assert all((1 << 20) <= len(block) < (1 << 20) + 200_000 for block in blocks[:-1])
    stream = b"".join(blocks)
    assert facts.stream_sha256 == hashlib.sha256(stream).hexdigest()
    assert (facts.documents, facts.text_bytes) == (40, sum(len(text.encode()) for _, text in documents))
    lines = [json.loads(line) for line in stream.splitlines()]
    assert [(line["id"], line["text"]) for line in lines] == documents


def test_articles_begin_with_their_title_and_those_without_prose_are_dropped() -> None:
    page = '<title>{}</title>\n<text bytes="1">{}</text>\n'
    dump = page.format("A", "'''A''' is.") + page.format("B", "{{stub}}") + page.format("C", "#REDIRECT [[A]]")
    assert list(articles(dump.splitlines(keepends=True))) == [("A", "A\n\nA is.")]


def test_another_text_than_enwik8_is_refused(tmp_path: Path) -> None:
    content = gzip.compress(b"<title>A</title>\n")
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        member = tarfile.TarInfo(MEMBER)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    with pytest.raises(UserError, match="holds 17 bytes .* not enwik8"):
        list(enwik8_lines(tmp_path / "x.tar.gz"))


@pytest.fixture(scope="module")
def corpus() -> Path:
    return ENWIK8.prepare(DATA)


def test_the_corpus_is_the_pinned_one(corpus: Path) -> None:
    """Digest of the whole text, number and order of documents, unique ids, and prose without markup."""
    digest, titles, markup, count, text_bytes = hashlib.sha256(), [], 0, 0, 0
    with open(corpus, "rb") as raw:
        reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        for line in io.BufferedReader(reader, 1 << 20):  # type: ignore[arg-type, type-var]
            digest.update(line)
            document = json.loads(line)
            titles.append(document["id"])
            text = document["text"]
            assert text.startswith(titles[-1] + "\n\n")
            markup += any(mark in text for mark in ("[[", "]]", "{{", "}}", "''", "<ref", "<br", "</"))
            count += 1
            text_bytes += len(text.encode())
    assert digest.hexdigest() == PINNED.stream_sha256
    assert (count, text_bytes) == (PINNED.documents, PINNED.text_bytes)
    assert (titles[0], titles[-1]) == ("Anarchism", "James Bond")
    assert len(set(titles)) == count
    assert markup <= count // 500


def test_frames_of_the_corpus_are_about_a_mebibyte(corpus: Path) -> None:
    sizes = [len(block) for block in frames(corpus)]
    assert len(sizes) > 60
    assert max(sizes) < 2 << 20


def test_a_finished_corpus_is_not_built_again(corpus: Path) -> None:
    before = corpus.stat()
    assert resolve_embedded("embedded:enwik8", DATA) == corpus
    assert corpus.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("fault", ["short", "other text", "edited", "no record", "no file"])
def test_a_damaged_corpus_is_not_taken_for_ready(corpus: Path, tmp_path: Path, fault: str) -> None:
    record = read_json(DATA / "enwik8.json")
    commit_json(tmp_path / "enwik8.json", record)
    os.link(corpus, tmp_path / corpus.name) if fault != "short" else (tmp_path / corpus.name).write_bytes(b"half")
    assert ENWIK8.ready(tmp_path) is (fault != "short")
    if fault == "other text":
        commit_json(tmp_path / "enwik8.json", {**record, "stream_sha256": "0" * 64})
    elif fault == "edited":
        text = (tmp_path / "enwik8.json").read_text()
        (tmp_path / "enwik8.json").write_text(text.replace("8564", "8565"))
    elif fault == "no record":
        (tmp_path / "enwik8.json").unlink()
    elif fault == "no file":
        (tmp_path / corpus.name).unlink()
    assert not ENWIK8.ready(tmp_path)
