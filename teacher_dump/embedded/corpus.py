"""The embedded corpus: English Wikipedia of March 2006 (enwik8, 10^8 bytes of XML) as documents of plain prose.

`prepare_corpus` builds `enwik8.jsonl.zst` once: one object {"id": title, "text": title, blank line, prose} a line, in
the dump's order, as independent zstd frames of about 1 MiB of text, so that a reader can begin in the middle. The last
page, which enwik8 cuts in the middle, is dropped, as are redirects, pages outside the article namespace and pages
without prose. `enwik8.json`, written last, says that it is complete.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.commit import commit_file, commit_json, read_json
from pipeline.errors import UserError
from pipeline.packages import PackageFile, exclusive, fetch
from teacher_dump.embedded.wikitext import clean, is_article, pages

SOURCE = PackageFile(
    requirement="mingru-pytorch==0.2.1",
    filename="mingru_pytorch-0.2.1.tar.gz",
    sha256="fc9b278b4e04db930a5cd4cdab36e2713b1d6e14084269b161d4f133819e758d",
    source=True,
    megabytes=37,
)
MEMBER = "mingru_pytorch-0.2.1/data/enwik8.gz"
ENWIK8_BYTES = 100_000_000
ENWIK8_MD5 = "a1fa5ffddb56f4953e226637dabbb36a"

FRAME_BYTES = 1 << 20
ZSTD_LEVEL = 3


@dataclass(frozen=True)
class CorpusFacts:
    """What was written: documents, the bytes of their text, and the sha256 of the uncompressed lines."""

    documents: int
    text_bytes: int
    stream_sha256: str


PINNED = CorpusFacts(
    documents=8564,
    text_bytes=71_079_349,
    stream_sha256="f0c6cbaec3bb23da98ca142c5e1687d84090ba519b1e8919c7e471c96d33e1d2",
)
"""Facts of the one corpus every machine must have; `prepare_corpus` refuses any other."""


def prepare_corpus(root: Path) -> Path:
    """`root/enwik8.jsonl.zst`, built first if it is not there: about half a minute, 40 MB of memory, 37 MB fetched.

    Raises:
        UserError: the source could not be fetched, is damaged, or became another text than the pinned one.
    """
    final, record = root / "enwik8.jsonl.zst", root / "enwik8.json"
    if corpus_ready(root):
        return final
    with exclusive(root, "enwik8"):
        if corpus_ready(root):
            return final
        archive = fetch(SOURCE, root / "downloads")
        record.unlink(missing_ok=True)
        commit_file(final, lambda temporary: _build(archive, temporary))
        commit_json(record, {**asdict(PINNED), "file_bytes": final.stat().st_size})
        archive.unlink()
    return final


def corpus_ready(root: Path) -> bool:
    """Is the pinned corpus there, whole?"""
    final, record = root / "enwik8.jsonl.zst", root / "enwik8.json"
    if not (record.is_file() and final.is_file()):
        return False
    try:
        return read_json(record) == {**asdict(PINNED), "file_bytes": final.stat().st_size}
    except UserError:
        return False


def _build(archive: Path, temporary: Path) -> None:
    facts = write_frames(articles(enwik8_lines(archive)), temporary)
    if facts != PINNED:
        raise UserError(
            f"{archive}: cleaning enwik8 gave {facts.documents} documents with sha256 {facts.stream_sha256}, not the "
            f"{PINNED.documents} with {PINNED.stream_sha256} that every machine must have: use Python 3.11, "
            f"3.12 or 3.13"
        )


def enwik8_lines(archive: Path) -> Iterator[str]:
    """Lines of enwik8, streamed out of the source distribution.

    Raises:
        UserError: the archive does not hold the 10^8 bytes that enwik8 is.
    """
    digest, size = hashlib.md5(usedforsecurity=False), 0
    with tarfile.open(archive, "r:gz") as tar:
        member = tar.extractfile(MEMBER)
        assert member is not None
        with gzip.open(member) as stream:
            for line in io.BufferedReader(stream, 1 << 20):  # type: ignore[arg-type, type-var]
                digest.update(line)
                size += len(line)
                yield line.decode("utf-8", errors="ignore")  # the last character is cut, as the last page is
    if size != ENWIK8_BYTES or digest.hexdigest() != ENWIK8_MD5:
        raise UserError(
            f"{archive}: {MEMBER} holds {size} bytes with md5 {digest.hexdigest()}, not enwik8 (md5 "
            f"{ENWIK8_MD5}): delete "
            "the file and run the command again"
        )


def articles(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(title, title and prose) of every article that has prose, in order."""
    for page in pages(lines):
        if is_article(page) and (prose := clean(page.text)):
            yield page.title, f"{page.title}\n\n{prose}"


def write_frames(documents: Iterable[tuple[str, str]], path: Path) -> CorpusFacts:
    """Write (id, text) documents as JSON lines in independent zstd frames cut at line ends."""
    import zstandard

    compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True, write_content_size=True)
    digest, count, text_bytes = hashlib.sha256(), 0, 0
    frame = bytearray()
    with open(path, "wb") as file:
        for name, text in documents:
            line = json.dumps({"id": name, "text": text}, ensure_ascii=False).encode() + b"\n"
            digest.update(line)
            count += 1
            text_bytes += len(text.encode())
            frame += line
            if len(frame) >= FRAME_BYTES:
                file.write(compressor.compress(frame))
                frame.clear()
        if frame:
            file.write(compressor.compress(frame))
    return CorpusFacts(count, text_bytes, digest.hexdigest())
