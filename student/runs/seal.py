"""A checkpoint ends with a digest of itself, as every JSON here does: a damaged one is told before it is loaded.

torch writes checkpoints as zip archives. The seal is the archive's comment, which every zip reader passes over:
`sha256 ` and 64 hex digits, over all bytes before it.
"""

from __future__ import annotations

import hashlib
import struct
import zipfile
from pathlib import Path

from pipeline.errors import UserError

CHUNK_BYTES = 8 << 20
LABEL = b"sha256 "
COMMENT_BYTES = len(LABEL) + 64
END_BYTES = 22
"""Of a zip archive's last record, whose last two bytes are the length of the comment after it."""
END_SIGNATURE = b"PK\x05\x06"


class DamagedCheckpoint(UserError):
    """A checkpoint whose bytes are not what was written."""


def seal(path: Path) -> None:
    """Put the seal on a checkpoint that torch has just written."""
    with open(path, "r+b") as file:
        file.seek(max(0, path.stat().st_size - END_BYTES))
        end = file.read(END_BYTES)
        if not end.startswith(END_SIGNATURE) or not end.endswith(b"\0\0"):
            raise ValueError(f"{path} does not end as torch's archives do")
        file.seek(-2, 2)
        file.write(struct.pack("<H", COMMENT_BYTES))
        file.flush()
        digest = _sha256(path, path.stat().st_size)
        file.seek(0, 2)
        file.write(LABEL + digest.encode())


def check_seal(path: Path) -> None:
    """Compare a checkpoint with its seal, and see that reading it takes no more memory than the file is long.

    Raises:
        DamagedCheckpoint: the file is cut, was changed, has no seal, or holds compressed parts.
    """
    size = path.stat().st_size
    remedy = "restore it from a copy, put checkpoints/best.ckpt in its place, or start another --run"
    with open(path, "rb") as file:
        file.seek(max(0, size - COMMENT_BYTES - END_BYTES))
        end, comment = file.read(END_BYTES), file.read()
    if not (end.startswith(END_SIGNATURE) and end[-2:] == struct.pack("<H", COMMENT_BYTES) and LABEL in comment[:7]):
        raise DamagedCheckpoint(
            f"{path} cannot be read as a checkpoint (it does not end with a digest of itself): it was cut or damaged, "
            f"or something else wrote it; {remedy}"
        )
    if _sha256(path, size - COMMENT_BYTES).encode() != comment[len(LABEL) :]:
        raise DamagedCheckpoint(
            f"{path} cannot be read as a checkpoint (it does not match the digest at its end): it was damaged; {remedy}"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except zipfile.BadZipFile as error:
        raise DamagedCheckpoint(f"{path} cannot be read as a checkpoint ({error}); {remedy}") from None
    packed = any(part.compress_type != zipfile.ZIP_STORED for part in parts)
    if packed or sum(part.file_size for part in parts) > size:
        raise DamagedCheckpoint(
            f"{path} cannot be read as a checkpoint (its parts are larger than the file): torch did not write it; "
            f"{remedy}"
        )


def _sha256(path: Path, length: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while length:
            block = file.read(min(CHUNK_BYTES, length))
            if not block:
                break
            digest.update(block)
            length -= len(block)
    return digest.hexdigest()
