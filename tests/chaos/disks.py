"""Disks that really are full, read-only, gone or not ours: small file systems mounted for a trial.

What needs a mount is left out, and said, where this process may not mount.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from chaos.checks import Outcome, committed_shards
from chaos.children import Child
from chaos.endings import as_command, judged, told
from chaos.figure import Figure
from chaos.recorded import Stage, run_recorded
from chaos.trials import fresh

NOBODY = 65534
ENOUGH = "64m"


def experiments(stage: Stage, rng: random.Random, trials: int) -> list[Figure]:
    figures = [vanishing_folder(stage, rng, trials)]
    if os.getuid() == 0:
        figures.append(not_ours(stage))
    if not may_mount(stage.folder / "mounts"):
        return [*figures, Figure("faults", "real file systems: this process may not mount any", 0, 0)]
    return [*figures, full_disk(stage, rng, trials), read_only_disk(stage), unmounted(stage, rng, trials)]


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)


def unmount(place: Path) -> None:
    subprocess.run(["umount", "-l", str(place)], check=True, capture_output=True)


def may_mount(place: Path) -> bool:
    place.mkdir(exist_ok=True)
    try:
        mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place))
    except (OSError, subprocess.CalledProcessError):
        return False
    unmount(place)
    return True


def full_disk(stage: Stage, rng: random.Random, trials: int) -> Figure:
    """A file system of a random size that is too small, then made larger."""
    needed = sum(path.stat().st_size for path in stage.config.cache.rglob("*") if path.is_file())
    outcomes, ends, names = [], Counter[str](), []
    for number in range(trials):
        disk = stage.folder / "disk"
        disk.mkdir(exist_ok=True)
        size = rng.randint(20_000, int(0.95 * needed))
        mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk))
        try:

            def mend(disk: Path = disk) -> None:
                mount("-o", f"remount,size={ENOUGH}", str(disk))

            outcome, end = harmed(stage, disk / f"full-{number}", errno.ENOSPC, mend=mend)
        finally:
            unmount(disk)
        outcomes.append(outcome)
        ends[end] += 1
        names.append(f"disk of {size} bytes")
    return told(stage, "a file system that is full (tmpfs), then larger", outcomes, names, ends)


def read_only_disk(stage: Stage) -> Figure:
    """A cache of one shard on a file system that became read-only."""
    disk = stage.folder / "disk"
    disk.mkdir(exist_ok=True)
    mount("-t", "tmpfs", "-o", f"size={ENOUGH}", "tmpfs", str(disk))
    try:
        cache = disk / "read-only"
        begun(stage, cache)
        mount("-o", "remount,ro", str(disk))
        outcome, end = harmed(stage, cache, errno.EROFS, mend=lambda: mount("-o", "remount,rw", str(disk)))
    finally:
        unmount(disk)
    return told(stage, "a file system that became read-only (tmpfs)", [outcome], ["read-only"], Counter([end]))


def unmounted(stage: Stage, rng: random.Random, trials: int) -> Figure:
    """The file system goes at a random moment after the first shard, and an empty folder stands in its place."""
    outcomes, ends, names = [], Counter[str](), []
    for number in range(trials):
        behind, disk = stage.cache(f"behind-{number}"), stage.folder / "disk"
        behind.mkdir()
        disk.mkdir(exist_ok=True)
        mount("--bind", str(behind), str(disk))
        cache, moment = disk / "cache", rng.uniform(0, 0.6 * stage.seconds)

        def vanish(cache: Path = cache, disk: Path = disk, moment: float = moment) -> None:
            wait_for_shard(cache)
            time.sleep(moment)
            unmount(disk)

        def mend(behind: Path = behind, disk: Path = disk) -> None:
            shutil.rmtree(disk)  # what the dump wrote where the file system had been
            disk.mkdir()
            mount("--bind", str(behind), str(disk))

        try:
            outcome, end = harmed(stage, cache, 0, during=vanish, mend=mend)
        finally:
            unmount(disk)
        outcomes.append(outcome)
        ends[end] += 1
        names.append(f"unmounted {moment * 1000:.1f} ms after the first shard")
    return told(stage, "a file system unmounted while a dump runs", outcomes, names, ends)


def vanishing_folder(stage: Stage, rng: random.Random, trials: int) -> Figure:
    """The cache's folder is moved away at a random moment after the first shard, and put back for the next run."""
    outcomes, ends, names = [], Counter[str](), []
    for number in range(trials):
        cache, _ = fresh(stage, f"vanishing-{number}")
        away, moment = stage.cache(f"away-{number}"), rng.uniform(0, 0.6 * stage.seconds)

        def vanish(cache: Path = cache, away: Path = away, moment: float = moment) -> None:
            wait_for_shard(cache)
            time.sleep(moment)
            cache.rename(away)

        def mend(cache: Path = cache, away: Path = away) -> None:
            shutil.rmtree(cache, ignore_errors=True)
            away.rename(cache)

        outcome, end = harmed(stage, cache, 0, during=vanish, mend=mend)
        outcomes.append(outcome)
        ends[end] += 1
        names.append(f"moved away {moment * 1000:.1f} ms after the first shard")
    return told(stage, "the cache's folder is moved away while a dump runs", outcomes, names, ends)


def not_ours(stage: Stage) -> Figure:
    """A folder that this user may read and not write (as nobody: root may everything)."""
    cache, _ = fresh(stage, "not-ours")
    begun(stage, cache)
    outcome, end = harmed(stage, cache, errno.EACCES, before=lambda: os.setuid(NOBODY))
    return told(stage, "a cache of one shard that this user may not write", [outcome], ["not ours"], Counter([end]))


def begun(stage: Stage, cache: Path) -> None:
    """A cache that has one shard."""
    few = Stage(stage.folder, stage.at(cache, shards=1, heldout_shards=0), stage.rows, stage.recording)
    Child(lambda: bool(run_recorded(few, cache))).result()


def wait_for_shard(cache: Path) -> None:
    deadline = time.monotonic() + 10
    while not committed_shards(cache) and time.monotonic() < deadline:
        time.sleep(0.0005)


def harmed(
    stage: Stage,
    cache: Path,
    code: int,
    *,
    before: Callable[[], None] = lambda: None,
    during: Callable[[], None] = lambda: None,
    mend: Callable[[], None] = lambda: None,
) -> tuple[Outcome, str]:
    """A dump whose words must name the cache, and the cause `code` where it is known."""
    log = stage.folder / "trials" / f"{cache.name}.log"
    with contextlib.suppress(FileNotFoundError):
        log.unlink()

    def body() -> tuple[int, list[tuple[str, str]]]:
        before()
        return as_command(stage, cache, log), [(str(cache), os.strerror(code) if code else "")]

    return judged(stage, cache, log, body, mend, during)
