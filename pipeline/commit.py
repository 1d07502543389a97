"""How every file of a cache or run becomes visible: all of it, checked, or not at all.

The protocol (one place, used for shards, JSON, plans, teacher folders and reports):

    temporary name with the claim's id -> write -> close -> read back -> sha256 -> fsync -> rename -> fsync the folder

A reader therefore never sees a half-written file under a final name. JSON files end with a digest of their own
content, so that a damaged one is told from a good one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, one_line

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
    """An id for one writer: host, process and a random part, safe in file names."""
    return f"{host_name()}-{os.getpid()}-{secrets.token_hex(4)}"


def host_name() -> str:
    """This machine's name as ids carry it."""
    return "".join(c if c.isalnum() else "-" for c in socket.gethostname())[:32]


def temporary_path(final: Path, claim: str) -> Path:
    """Where `final` is written before it is committed: same folder, hidden, named after the claim."""
    return final.with_name(f".{final.name}.{claim}.tmp")


def file_sha256(path: Path, start: int = 0, length: int | None = None) -> str:
    """Hex sha256 of a file, or of `length` bytes of it from `start`."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(start)
        left = length
        while left is None or left > 0:
            block = file.read(CHUNK_BYTES if left is None else min(CHUNK_BYTES, left))
            if not block:
                break
            digest.update(block)
            left = None if left is None else left - len(block)
    return digest.hexdigest()


def fsync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def commit_file(
    final: Path,
    write: Callable[[Path], None],
    *,
    claim: str | None = None,
    check: Callable[[Path], None] | None = None,
    exclusive: bool = False,
) -> FileDigest:
    """Write `final` by the protocol above.

    Args:
        final: the name readers see.
        write: writes and closes the temporary file whose path it is given.
        claim: the writer's id; a new one if None.
        check: reads the closed temporary back and raises if it is not what was meant.
        exclusive: raise FileExistsError instead of replacing an existing `final`.

    Raises:
        OSError: from the file system; `final` is untouched and the temporary removed where that is possible.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(final, claim or new_claim_id())
    try:
        write(temporary)
        if check is not None:
            check(temporary)
        digest = FileDigest(temporary.stat().st_size, file_sha256(temporary))
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        publish(temporary, final, exclusive=exclusive)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    return digest


def publish(temporary: Path, final: Path, *, exclusive: bool = False) -> None:
    """The last step: give a synced temporary its final name and sync the folder."""
    if exclusive:
        os.link(temporary, final)
        temporary.unlink()
    else:
        os.replace(temporary, final)
    fsync_folder(final.parent)


def commit_bytes(final: Path, data: bytes, *, claim: str | None = None, exclusive: bool = False) -> FileDigest:
    """Commit a file that is already in memory; the read-back compares every byte."""

    def check(path: Path) -> None:
        if path.read_bytes() != data:
            raise OSError(5, "what was written reads back differently", str(path))

    return commit_file(final, lambda path: _write_bytes(path, data), claim=claim, check=check, exclusive=exclusive)


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value that digests and identities are taken over."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def json_digest(record: dict[str, Any]) -> str:
    """sha256 of a record without its own `digest` field."""
    content = {k: v for k, v in record.items() if k != "digest"}
    return hashlib.sha256(canonical_json(content)).hexdigest()


def commit_json(final: Path, record: dict[str, Any], *, claim: str | None = None, exclusive: bool = False) -> None:
    """Commit a JSON object with a digest of itself as its last field."""
    text = json.dumps({**record, "digest": json_digest(record)}, indent=1, ensure_ascii=False, allow_nan=False)
    commit_bytes(final, (text + "\n").encode(), claim=claim, exclusive=exclusive)


def read_json(path: Path, most: int = MOST_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object written by `commit_json` and check its digest; the digest field itself is left out.

    Args:
        most: bytes of the file, at most.

    Raises:
        UserError: the file is missing or larger than `most`, is no JSON object, is nested more than `MOST_JSON_DEPTH`
            deep, or its digest does not match its content.
    """
    try:
        record = json.loads(read_text(path, most))
        check_depth(record)
        intact = isinstance(record, dict) and record.get("digest") == json_digest(record)
    except (ValueError, RecursionError) as error:  # also NaN, huge integers and broken UTF-8
        reason = one_line(error)[:200]
        raise UserError(f"{path} is not valid JSON ({reason}): it was damaged; restore it from a copy") from None
    if not intact:
        raise UserError(f"{path} does not match the digest at its end: it was damaged or edited; restore it")
    del record["digest"]
    return record


def read_text(path: Path, most: int = MOST_JSON_BYTES) -> str:
    """The text of a regular file of at most `most` bytes.

    Raises:
        UserError: there is none, it is no regular file (reading a pipe would never end), or it is larger.
        UnicodeDecodeError: it is not UTF-8.
    """
    if not path.is_file():
        raise UserError(f"{path} {'is no regular file: remove it' if path.exists() else 'is missing'}")
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise UserError(f"{path} has more than {most} bytes, none of its kind has: it was damaged; restore it")
    return data.decode("utf-8")


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
