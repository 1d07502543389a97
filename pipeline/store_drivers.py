"""Drivers of object stores: what to install for a URL, and through which a cache may be written.

Manifest and claims need that of several writers who create an object, one succeeds. fsspec itself looks whether it is
there and then writes, which is no such thing; the drivers below leave it to their stores.
"""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, one_line

AZURE = ("az", "abfs", "abfss")
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"} | dict.fromkeys(AZURE, "adlfs")
EXCLUSIVE = {
    "s3fs.core.S3FileSystem": ("s3fs", (2025, 7)),  # If-None-Match: 2024.12; of small files too: 2025.7
    "gcsfs.core.GCSFileSystem": ("gcsfs", (2024, 12)),  # ifGenerationMatch=0
    "adlfs.spec.AzureBlobFileSystem": ("adlfs", (2024, 12)),  # If-None-Match
    "fsspec.implementations.memory.MemoryFileSystem": ("", ()),  # of one process
}
"""Class of a driver -> its package, and the first version in which `pipe_file(..., mode="create")` is exclusive."""


def unusable(place: str, error: Exception) -> UserError:
    """What to tell of a URL whose driver is unknown, not installed or does not start."""
    protocol = place.partition("://")[0]
    if isinstance(error, ImportError) and protocol in PACKAGES:
        package = PACKAGES[protocol]
        return UserError(
            f"{place}: {protocol}:// needs the package {package}: pip install {package}, or give another folder or "
            "URL (CACHE=..., --cache)"
        )
    if isinstance(error, ImportError | ValueError):
        reason = one_line(error)
    else:  # a library that is missing is told in many lines
        reason = f"the driver of {protocol}:// does not start here ({one_line(str(error).splitlines()[0])[:100]})"
    remedy = "give a folder, or a URL whose fsspec driver is installed (CACHE=..., --cache)"
    return UserError(f"{place}: {reason}: {remedy}")


def require_exclusive(path: Path) -> None:
    """Refuse to write where two writers might both believe that they created an object.

    Args:
        path: on a store.

    Raises:
        UserError: its driver is not known to create exclusively, or only in a later version.
    """
    store: Any = path
    for kind in type(store.fs).__mro__:
        package, least = EXCLUSIVE.get(f"{kind.__module__}.{kind.__name__}", (None, ()))
        if package is None:
            continue
        if least and (found := _version(package)) < least:
            raise UserError(
                f"{path}: {package} {'.'.join(map(str, found))} cannot create an object exclusively, which writing a "
                f"cache needs: pip install '{package}>={'.'.join(map(str, least))}'"
            )
        return
    raise UserError(
        f"{path}: a cache cannot be written through {type(store.fs).__name__}, which is not known to let one of "
        "several writers create an object: dump into a folder, s3://, gs:// or az:// (CACHE=..., --cache) and copy the "
        "cache; reading and training go on"
    )


def _version(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", importlib.metadata.version(package))[:2])
