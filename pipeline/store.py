"""Caches on object stores: any URL that fsspec knows (`s3://`, `gs://`, `memory://`), used as a path.

`UPath` gives such a URL the methods of `pathlib.Path`; this module adds what a commit needs and tries again where a
network failed.
A `Path` in this project is either; what differs between the two is here and in `commit.py`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from pipeline.errors import UserError

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
    again(put)


def remote_sha256(path: Path) -> str:
    """Hex sha256 of an object as the store returns it now, not as some cache has it."""
    store: Any = path
    digest = hashlib.sha256()
    with store.fs.open(store.path, "rb", cache_type="none") as file:
        while block := file.read(CHUNK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def again(task: Callable[[], T]) -> T:
    """Do what may fail because of a network, up to `ATTEMPTS` times with growing pauses; the last error is raised."""
    import tenacity

    final = (FileExistsError, PermissionError, FileNotFoundError, IsADirectoryError)
    return tenacity.Retrying(
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=LONGEST_WAIT),
        retry=tenacity.retry_if_exception(lambda e: isinstance(e, OSError) and not isinstance(e, final)),
        reraise=True,
    )(task)
