"""`verify --repair`: which units must be dumped again, and the removal of their damaged shards and of nothing else.

A shard is removed in the reverse order of its making: the JSON first, so that no reader meets one without its rows. It
is done under the shard's claim and after a second check, so that a dump that has just mended it keeps its work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipeline.claim import is_held, try_claim
from pipeline.commit import fsync_folder
from pipeline.folder_checks import PlanRanges, Problem, unit_of
from pipeline.manifest import MANIFEST
from pipeline.store import is_file, remove

Mode = Literal["list", "remove"]


@dataclass
class Repair:
    """What there is to do, and what was done.

    Attributes:
        mode: list or remove.
        dump_again: names of units that the next dump must write, in order.
        removed: files that were removed.
        left_alone: names of damaged units that a live dump is writing.
        mend: [file, what to do] for what is damaged and no shard.
    """

    mode: Mode
    dump_again: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    left_alone: list[str] = field(default_factory=list)
    mend: list[tuple[str, str]] = field(default_factory=list)

    def lines(self) -> Iterable[str]:
        """For people: a line each."""
        yield f"dump again: {' '.join(self.dump_again) or 'nothing'}"
        if self.dump_again:
            numbers = {name.partition("-")[0]: int(name.partition("-")[2]) + 1 for name in self.dump_again}
            options = {"shard": "SHARDS", "heldout": "--heldout_shards"}
            least = ", ".join(f"{options[split]} {count}" for split, count in numbers.items())
            done = "they are removed" if self.mode == "remove" else "--repair remove takes them away"
            yield f"  {done}; then run the dump that made the cache again, with {least} at least"
        if self.removed:
            yield f"removed: {' '.join(self.removed)}"
        if self.left_alone:
            yield f"left alone, a dump is writing them: {' '.join(self.left_alone)}"
        for file, what in self.mend:
            yield f"{file}: {what}"


def repair_cache(
    cache: Path,
    mode: Mode,
    problems: list[Problem],
    missing: list[str],
    plan: PlanRanges | None,
    still_damaged: Callable[[str], bool],
) -> Repair:
    """Sort what `verify` found into what to do, and remove damaged shards if `mode` says so.

    Args:
        problems: all that were found.
        missing: names of units that have no JSON.
        plan: of the corpus; a unit that it does not have is removed, but can not be dumped.
        still_damaged: checks a unit once more.
    """
    repair = Repair(mode)
    stems = {problem.file: Path(problem.file).stem for problem in problems}
    units = {unit: stem for stem in stems.values() if (unit := unit_of(stem)) is not None}
    for unit, name in sorted(units.items()):
        if name in missing:
            repair.dump_again.append(name)
        elif is_held(cache, name) or (mode == "remove" and not remove_shard(cache, name, still_damaged, repair)):
            if still_damaged(name):
                repair.left_alone.append(name)
        elif plan is None or plan.has(unit):
            repair.dump_again.append(name)
        else:
            repair.mend.append((f"{name}.json", "the corpus has no such unit: it will not be dumped again"))
    others = dict.fromkeys(file for file, stem in stems.items() if unit_of(stem) is None)
    repair.mend += [(file, remedy(file)) for file in others]
    return repair


def remove_shard(cache: Path, name: str, still_damaged: Callable[[str], bool], repair: Repair) -> bool:
    """Remove a damaged shard's JSON, then its Parquet file; False if a dump has it or has mended it meanwhile."""
    claim = try_claim(cache, name)
    if claim is None:
        return False
    with claim:
        if not still_damaged(name):
            return False
        for path in (cache / f"{name}.json", cache / f"{name}.parquet"):
            if is_file(path):
                remove(path)
                fsync_folder(cache)
                repair.removed.append(path.name)
    return True


def remedy(file: str) -> str:
    """What to do about a damaged file that is no shard's."""
    if file == MANIFEST:
        return (
            "restore it from a copy; or move it away and run the dump that made the cache again: it writes a new one "
            "if its settings are those of the shards, and refuses if they are not"
        )
    if file == "plan.json" or file.startswith("teacher/"):
        return "run the dump that made the cache again: it writes this file anew from the same corpus and teacher"
    return "this is no shard's name: move the file away"
