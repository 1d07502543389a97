"""Caches on object stores: any URL that fsspec knows (`s3://`, `gs://`, `memory://`), used as a path.

`UPath` gives such a URL the methods of `pathlib.Path`; this module adds what a commit needs and tries again where a
network failed.
A `Path` in this project is either; what differs between the two is here and in `commit.py`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

from pipeline.errors import UserError, one_line

CHUNK_BYTES = 8 << 20
ATTEMPTS = 5
LONGEST_WAIT = 30.0

T = TypeVar("T")


def is_remote(path: Path) -> bool:
    """Whether a path lies on an object store rather than in a file system of this machine."""
    return not isinstance(path, Path)


def open_path(place: str | Path) -> Path:
    """A folder or file by path or URL.

    Raises:
        UserError: the URL's protocol is unknown, or its driver is not installed.
    """
    if not isinstance(place, str) or "://" not in place:
        return Path(place) if isinstance(place, str) else place
    from upath import UPath

    try:
        # Listings are not cached: another writer's shards must be seen.
        path = UPath(place, use_listings_cache=False)
        _ = path.fs
    except (ValueError, ImportError) as error:
        raise UserError(f"{place}: {error}: use a folder, or a URL whose fsspec driver is installed") from None
    return cast(Path, path)


def names_in(folder: Path) -> Iterator[str]:
    """Names of what a folder holds, from one listing; nothing where there is no such folder on a store."""
    if not is_remote(folder):
        with os.scandir(folder) as entries:
            for entry in entries:
                yield entry.name
        return
    store: Any = folder
    with contextlib.suppress(FileNotFoundError):
        for path in again(lambda: store.fs.ls(store.path, detail=False), folder):
            yield path.rstrip("/").rsplit("/", 1)[-1]


def sizes_in(folder: Path) -> dict[str, int]:
    """Bytes of every file in a folder, by name."""
    if not is_remote(folder):
        with os.scandir(folder) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    store: Any = folder
    found = again(lambda: store.fs.ls(store.path, detail=True), folder)
    return {item["name"].rsplit("/", 1)[-1]: int(item["size"]) for item in found if item["type"] == "file"}


def upload(source: Path, final: Path, sha256: str, *, exclusive: bool = False) -> None:
    """Put a local file under its final name on a store, and read it back.

    Args:
        source: the local file.
        final: its place on the store.
        sha256: of the file.
        exclusive: raise FileExistsError instead of replacing an object that differs.

    Raises:
        FileExistsError: see `exclusive`.
        OSError: the store failed `ATTEMPTS` times, or does not return what was uploaded; the object is removed then.
    """
    store: Any = final
    filesystem, name = store.fs, store.path

    def put() -> None:
        if exclusive:
            try:
                filesystem.pipe_file(name, source.read_bytes(), mode="create")
            except FileExistsError:
                if remote_sha256(final) != sha256:  # an earlier attempt of ours may have arrived all the same
                    raise
        else:
            filesystem.put_file(str(source), name)
        if remote_sha256(final) != sha256:
            with contextlib.suppress(OSError):
                filesystem.rm_file(name)
            raise OSError(errno.EIO, "the store does not return what was uploaded", str(final))

    if not exclusive:
        filesystem.makedirs(filesystem._parent(name), exist_ok=True)
    again(put, final)


def remote_sha256(path: Path) -> str:
    """Hex sha256 of an object as the store returns it now, not as some cache has it."""
    store: Any = path
    digest = hashlib.sha256()
    with store.fs.open(store.path, "rb", cache_type="none") as file:
        while block := file.read(CHUNK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def again(task: Callable[[], T], place: Path | None = None) -> T:
    """Do what may fail because of a network, up to `ATTEMPTS` times with growing pauses.

    Raises:
        OSError: the last failure; a driver's own kind of exception is told as one that names `place`.
    """
    import tenacity

    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=LONGEST_WAIT),
        retry=tenacity.retry_if_exception(_may_pass),
        reraise=True,
    )
    try:
        return retrying(task)
    except OSError:
        raise
    except Exception as error:
        if not _of_driver(error):
            raise
        raise OSError(errno.EIO, f"the store failed {ATTEMPTS} times: {one_line(error)}", str(place or "")) from error


FINAL = (FileExistsError, PermissionError, FileNotFoundError, IsADirectoryError, NotADirectoryError)
DRIVERS = ("botocore", "aiobotocore", "aiohttp", "s3fs", "gcsfs", "google", "adlfs", "azure", "fsspec", "urllib3")


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, OSError) and not isinstance(error, FINAL) or _of_driver(error)


def _of_driver(error: BaseException) -> bool:
    """Whether a network driver raised it: they have kinds of their own that are no OSError."""
    return any(kind.__module__.split(".")[0] in DRIVERS for kind in type(error).__mro__)
