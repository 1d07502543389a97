"""Power lost after a kill, on a disk that keeps nothing it was not told to: simulated from a `Watch`'s log.

What a process wrote and did not sync is cut at a random length; a rename or link whose folder was not synced since is
taken back, each with even odds. A real file system keeps more than that; the protocol must not need it to.
"""

from __future__ import annotations

import os
import random
from pathlib import Path


def lose_power(cache: Path, log: Path, rng: random.Random) -> None:
    """Leave of `cache` what a disk may keep after the operations in `log`."""
    synced: set[int] = set()
    pending: list[tuple[str, int, Path, Path]] = []
    for line in log.read_text().splitlines() if log.is_file() else ():
        step, inode, *places = line.split()
        if step == "write":
            synced.discard(int(inode))
        elif step == "fsync":
            synced.add(int(inode))
            pending = [entry for entry in pending if str(entry[3].parent) != places[0]]
        else:
            pending.append((step, int(inode), Path(places[0]), Path(places[1])))
    for path in sorted(cache.rglob("*")):
        if path.is_file() and path.stat().st_ino not in synced:
            os.truncate(path, rng.randint(0, path.stat().st_size))
    for step, inode, source, target in reversed(pending):
        if not target.is_file() or target.stat().st_ino != inode or rng.random() < 0.5:
            continue
        if step == "rename":
            os.rename(target, source)
        else:
            target.unlink()
