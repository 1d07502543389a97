"""How every file of a cache or run becomes visible: all of it, checked, or not at all.

The protocol (one place, used for shards, JSON, plans, teacher folders, checkpoints and reports). On a file system:

    temporary name with the claim's id -> write -> close -> fsync -> forget cached pages -> read back: sha256 of what
    was meant, and page checksums -> rename -> fsync the folder

On an object store (any fsspec URL), which has no rename but shows an object only when its upload is complete:

    write beside -> check -> upload under the final name -> read back: sha256 of what was meant

A shard's JSON is committed after its Parquet file, so on both a reader never sees a half-written file under a name it
looks for. JSON files end with a digest of their own content, so that a damaged one is told from a good one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipeline.errors import UserError, named, one_line
from pipeline.store import exists, is_file, is_remote, open_file, upload

CHUNK_BYTES = 1 << 20
MOST_JSON_BYTES = 4 << 20
"""Bytes of a JSON file that is read, unless its reader says otherwise; ours have a few thousand. Parsing takes up to 25
times as much memory, which many empty lists need."""
MOST_JSON_DEPTH = 32


@dataclass(frozen=True)
class FileDigest:
    """Size in bytes and hex sha256 of a committed file."""

    bytes: int
    sha256: str


def new_claim_id() -> str:
    """An id for one writer: host, process, a digest of what the process number is unique in, and a random part."""
    return f"{host_name()}-{os.getpid()}-{machine_digest()}{secrets.token_hex(4)}"


def machine() -> str:
    """What process numbers are unique in: this host since it booted, and the container this process sees."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # only Linux has these
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def machine_digest() -> str:
    """`machine` in 6 hex digits, as ids carry it: who sees a temporary of its own machine can ask for its process."""
    return hashlib.sha256(machine().encode()).hexdigest()[:6]


def host_name() -> str:
    """This machine's name as ids carry it."""
    return "".join(c if c.isalnum() else "-" for c in socket.gethostname())[:32]


def temporary_path(final: Path, claim: str) -> Path:
    """Where `final` is written before it is committed: same folder, hidden, named after the claim."""
    return final.with_name(f".{final.name}.{claim}.tmp")


def file_sha256(path: Path, start: int = 0, length: int | None = None) -> str:
    """Hex sha256 of a file, or of `length` bytes of it from `start`."""
    digest = hashlib.sha256()
    try:
        with open_file(path) as file:
            file.seek(start)
            left = length
            while left is None or left > 0:
                block = file.read(CHUNK_BYTES if left is None else min(CHUNK_BYTES, left))
                if not block:
                    break
                digest.update(block)
                left = None if left is None else left - len(block)
    except OSError as error:
        raise named(error, path) from error
    return digest.hexdigest()


class DigestingFile:
    """A file open for writing that takes the sha256 of what it is told to write, whatever the disk makes of it."""

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] = open(path, "wb")  # noqa: SIM115 - closed by whoever opened this
        self._digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self._digest.update(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    @property
    def closed(self) -> bool:
        return self._file.closed

    def sha256(self) -> str:
        return self._digest.hexdigest()

    def __enter__(self) -> DigestingFile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def fsync_folder(folder: Path) -> None:
    """Make renames and removals in `folder` survive a power cut; a store answers when they do."""
    if is_remote(folder):
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def commit_file(
    final: Path,
    write: Callable[[Path], object],
    *,
    claim: str | None = None,
    check: Callable[[Path], None] | None = None,
    exclusive: bool = False,
) -> FileDigest:
    """Write `final` by the protocol above.

    Args:
        final: the name readers see, on a file system or an object store.
        write: writes and closes the temporary file whose path it is given; may return the hex sha256 of what it meant
            to write (a str), which is then compared with what is read back.
        claim: the writer's id; a new one if None.
        check: looks at the closed temporary and raises if it is not what was meant.
        exclusive: raise FileExistsError instead of replacing an existing `final`.

    Raises:
        OSError: from the file system or store, or EIO where what was written reads back differently; `final` is
            untouched (on a store: not the new file) and the temporary removed where that is possible.
    """
    if is_remote(final):
        with tempfile.TemporaryDirectory(prefix="distil-xlstm-") as scratch:
            temporary = Path(scratch) / final.name
            digest = _written(temporary, write, check)
            upload(temporary, final, digest.sha256, exclusive=exclusive)
        return digest
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(final, claim or new_claim_id())
    try:
        digest = _written(temporary, write, check)
        publish(temporary, final, exclusive=exclusive)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise named(error, final) from error
        raise
    return digest


def _written(path: Path, write: Callable[[Path], object], check: Callable[[Path], None] | None) -> FileDigest:
    """Write a file, bring it to the disk, and look at what is there."""
    meant = write(path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # so that it is read from the disk, not from memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    found = file_sha256(path)
    if isinstance(meant, str) and found != meant:
        raise OSError(errno.EIO, "what was written reads back differently: the disk is not to be trusted", str(path))
    if check is not None:
        check(path)
    return FileDigest(path.stat().st_size, found)


def publish(temporary: Path, final: Path, *, exclusive: bool = False) -> None:
    """The last step: give a synced temporary its final name and sync the folder."""
    if exclusive:
        os.link(temporary, final)
        temporary.unlink()
    else:
        os.replace(temporary, final)
    fsync_folder(final.parent)


def commit_bytes(final: Path, data: bytes, *, claim: str | None = None, exclusive: bool = False) -> FileDigest:
    """Commit a file that is already in memory."""

    def write(path: Path) -> str:
        path.write_bytes(data)
        return hashlib.sha256(data).hexdigest()

    return commit_file(final, write, claim=claim, exclusive=exclusive)


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value that digests and identities are taken over."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


DIGEST_END = re.compile(rb',\n "digest": "([0-9a-f]{64})"\n}\n\Z')
"""The last line of a JSON file: the sha256 of all bytes before it."""


def commit_json(final: Path, record: dict[str, Any], *, claim: str | None = None, exclusive: bool = False) -> None:
    """Commit a JSON object, not an empty one, with a digest of itself as its last field."""
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False).removesuffix("\n}").encode()
    digest = hashlib.sha256(text).hexdigest()
    commit_bytes(final, text + f',\n "digest": "{digest}"\n}}\n'.encode(), claim=claim, exclusive=exclusive)


def read_json(path: Path, most: int = MOST_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object written by `commit_json` and check its digest; the digest field itself is left out.

    Args:
        most: bytes of the file, at most.

    Raises:
        UserError: the file is missing or larger than `most`, is no JSON object, is nested more than `MOST_JSON_DEPTH`
            deep, or its digest does not match its content.
    """
    try:
        data = read_limited(path, most)
        end = DIGEST_END.search(data, max(0, len(data) - 128))
        if end is None or hashlib.sha256(data[: end.start()]).hexdigest().encode() != end[1]:
            raise UserError(f"{path} does not match the digest at its end: it was damaged or edited; restore it")
        record = json.loads(data.decode("utf-8"), parse_constant=_no_number)
        check_depth(record)
        if b"\\u" in data:  # half a surrogate pair can be spelled, but not be written or printed
            canonical_json(record)
    except (ValueError, RecursionError) as error:  # also NaN, huge integers and broken UTF-8
        reason = one_line(error)[:200]
        raise UserError(f"{path} is not valid JSON ({reason}): it was damaged; restore it from a copy") from None
    if not isinstance(record, dict):
        raise UserError(f"{path} holds no JSON object: something else wrote it; restore it from a copy")
    del record["digest"]
    return record


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def read_text(path: Path, most: int = MOST_JSON_BYTES) -> str:
    """The text of a regular file of at most `most` bytes.

    Raises:
        UserError: as `read_limited`.
        UnicodeDecodeError: it is not UTF-8.
    """
    return read_limited(path, most).decode("utf-8")


def read_limited(path: Path, most: int) -> bytes:
    """The bytes of a regular file of at most `most` bytes.

    Raises:
        UserError: there is none, it is no regular file (reading a pipe would never end), or it is larger.
        OSError: it cannot be read, or a store does not say whether it is there.
    """
    if not is_file(path):
        raise UserError(f"{path} {'is no regular file: remove it' if exists(path) else 'is missing'}")
    try:
        with open_file(path) as file:
            data = file.read(most + 1)
    except FileNotFoundError:  # removed this moment
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise named(error, path) from error
    if len(data) > most:
        raise UserError(f"{path} has more than {most} bytes, none of its kind has: it was damaged; restore it")
    return data


def check_depth(value: Any) -> None:
    """Raises ValueError where a JSON value is nested more than `MOST_JSON_DEPTH` deep."""
    level = [value]
    for _ in range(MOST_JSON_DEPTH):
        within: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                within += item.values()
            elif isinstance(item, list):
                within += item
        level = [item for item in within if isinstance(item, dict | list)]
        if not level:
            return
    raise ValueError(f"nested more than {MOST_JSON_DEPTH} deep")
