"""Caches on object stores: any URL that fsspec knows (`s3://`, `gs://`, `memory://`), used as a path.

`UPath` gives such a URL the methods of `pathlib.Path`; this module adds what a commit needs and tries again where a
network failed.
A `Path` in this project is either; what differs between the two is here and in `commit.py`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from pipeline.errors import one_line
from pipeline.store_drivers import require_exclusive, unusable

CHUNK_BYTES = 8 << 20
ATTEMPTS = 5
LONGEST_WAIT = 30.0

T = TypeVar("T")


class StoreError(OSError):
    """A store that fails or does not answer, with its URL as `filename`: what lies there is neither known to be there
    nor to be missing, and nothing of it is known to be damaged."""


class NotReturned(StoreError):
    """A store does not return what was uploaded to it."""


def is_remote(path: Path) -> bool:
    """Whether a path lies on an object store rather than in a file system of this machine."""
    return not isinstance(path, Path)


def open_path(place: str | Path) -> Path:
    """A folder or file by path or URL.

    Raises:
        UserError: the URL's protocol is unknown, or its driver is not installed or does not start.
    """
    if not isinstance(place, str) or "://" not in place:
        return Path(place) if isinstance(place, str) else place
    if place.startswith("file://"):
        from fsspec.implementations.local import LocalFileSystem

        return Path(LocalFileSystem._strip_protocol(place))
    from upath import UPath

    try:
        # Listings are not cached: another writer's shards must be seen.
        path = UPath(place, use_listings_cache=False)
        _ = path.fs
    except (ValueError, ImportError, OSError) as error:
        raise unusable(place, error) from None
    return cast(Path, path)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents unless they are there."""
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return
    require_exclusive(folder)
    again(lambda: folder.mkdir(parents=True, exist_ok=True), folder)


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


def is_file(path: Path) -> bool:
    """Whether a file is there. A store must say so: only what it does not find is missing.

    Raises:
        OSError: a store that does not answer (`StoreError`), or refuses.
    """
    return path.is_file() if not is_remote(path) else _entry(path).get("type") == "file"


def exists(path: Path) -> bool:
    """Whether a file or folder is there; raises as `is_file` does."""
    return path.exists() if not is_remote(path) else bool(_entry(path))


def size_of(path: Path) -> int:
    """Bytes of a file.

    Raises:
        FileNotFoundError: it is not there.
        OSError: as `is_file`.
    """
    if not is_remote(path):
        return path.stat().st_size
    store: Any = path
    return int(again(lambda: store.fs.info(store.path), path)["size"])


def _entry(path: Path) -> dict[str, Any]:
    """What a store says of a file or folder, {} if it is not there. fsspec's own `isfile` and `exists` take every
    failure for a no."""
    store: Any = path
    try:
        found: dict[str, Any] = again(lambda: store.fs.info(store.path), path)
    except FileNotFoundError:
        return {}
    return found


def remove(path: Path) -> None:
    """Remove a file; nothing happens if it is not there.

    Raises:
        OSError: it may still be there.
    """
    if not is_remote(path):
        path.unlink(missing_ok=True)
        return
    store: Any = path
    with contextlib.suppress(FileNotFoundError):
        again(lambda: store.fs.rm_file(store.path), path)


def open_file(path: Path, buffering: int = -1) -> IO[bytes]:
    """A file open for reading; `buffering` as for `open`, of a file system's.

    Raises:
        FileNotFoundError: it is not there.
        OSError: as `is_file`, also when it is read.
    """
    return path.open("rb", buffering=buffering) if not is_remote(path) else cast(IO[bytes], StoreFile(path))


class RangedFile(io.RawIOBase):
    """What files of a known size have in common that are read by range: a place of their own.

    Attributes:
        size: bytes.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self._at = size, 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


class StoreFile(RangedFile):
    """A file on a store: a read gives all that was asked for, fewer bytes at its end only, and is tried again."""

    def __init__(self, path: Path) -> None:
        store: Any = path
        self._file: Any = again(lambda: store.fs.open(store.path, "rb"), path)
        super().__init__(self._file.seek(0, io.SEEK_END))
        self._path = path

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self.size - self._at)]
        again(lambda: self._fill(view), self._path)
        self._at += len(view)
        return len(view)

    def _fill(self, view: memoryview) -> None:
        self._file.seek(self._at)
        held = 0
        while held < len(view):
            got = self._file.readinto(view[held:])
            if not got:
                raise OSError(errno.EIO, "the store returned fewer bytes than it said")
            held += got

    def close(self) -> None:
        if not self.closed:
            with contextlib.suppress(AttributeError):  # never opened
                self._file.close()
        super().close()


def upload(source: Path, final: Path, sha256: str, *, exclusive: bool = False) -> None:
    """Put a local file under its final name on a store, and read it back.

    Args:
        source: the local file.
        final: its place on the store.
        sha256: of the file.
        exclusive: raise FileExistsError instead of replacing an object that differs.

    Raises:
        UserError: its driver is none of those that a cache may be written through.
        FileExistsError: see `exclusive`.
        OSError: the store failed `ATTEMPTS` times, or does not return what was uploaded; the object is removed then.
    """
    require_exclusive(final)
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
            raise NotReturned(errno.EIO, "the store does not return what was uploaded", str(final))

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
        FileExistsError, FileNotFoundError, PermissionError, ...: the store's answer, at once.
        StoreError: the last failure, of whatever kind its driver has; names `place`.
        OSError: where `place` is no store's, the last failure.
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
    except PermissionError as error:
        if place is None or not is_remote(place):
            raise
        cause = one_line(error.strerror or error)
        message = f"the store refuses access ({cause}): look at its credentials"
        raise PermissionError(errno.EACCES, message, str(place)) from error
    except Exception as error:
        local = place is not None and not is_remote(place)
        if not _may_pass(error) or isinstance(error, StoreError) or (local and isinstance(error, OSError)):
            raise
        message = f"the store does not answer: look at its endpoint and credentials; tried {ATTEMPTS} times, at last "
        raise StoreError(errno.EIO, message + (one_line(error) or type(error).__name__), str(place or "")) from error


FINAL = (FileExistsError, PermissionError, FileNotFoundError, IsADirectoryError, NotADirectoryError)
DRIVERS = {"botocore", "aiobotocore", "aiohttp", "s3fs", "gcsfs", "google", "adlfs", "azure", "fsspec", "urllib3"} | {
    *("httpx", "httpx2", "httpcore", "httpcore2", "huggingface_hub", "requests"),
}


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, StoreError):  # was tried again already
        return isinstance(error, NotReturned)
    return isinstance(error, OSError) and not isinstance(error, FINAL) or _of_driver(error)


def _of_driver(error: BaseException) -> bool:
    """Whether a network driver raised it: they have kinds of their own that are no OSError."""
    return any(kind.__module__.split(".")[0] in DRIVERS for kind in type(error).__mro__)
