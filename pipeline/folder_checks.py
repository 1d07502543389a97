"""The checks of `verify` that concern files, the teacher folder and the plan rather than rows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from pipeline.claim import is_held
from pipeline.commit import file_sha256, read_json
from pipeline.errors import UserError
from pipeline.fields import Fields
from pipeline.manifest import MANIFEST, Manifest
from pipeline.schema import HELDOUT_UNIT, unit_name
from pipeline.store import is_file, names_in, size_of
from pipeline.teacher_folder import TeacherFolder, local_teacher

SHARD_NAME = re.compile(r"(shard|heldout)-\d{5,}")
MOST_MISSING = 100_000
"""Missing shards that are named one by one."""
OWN_FILES = re.compile(r"manifest\.json|plan\.json|index\.json|index-.*\.parquet|README\.md|teacher|claims")
MOST_PLAN_BYTES = 64 << 20
"""Bytes of plan.json: an index of 1.4 million frames or row groups, some 1.4 TB of text."""


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be, and where."""

    file: str
    message: str
    row_group: int | None = None
    column: str | None = None

    def __str__(self) -> str:
        group = "" if self.row_group is None else f", row group {self.row_group}"
        column = "" if self.column is None else f", column {self.column}"
        return f"{self.file}{group}{column}: {self.message}"


def check_teacher(cache: Path, manifest: Manifest) -> list[Problem]:
    """The files of `teacher/` against their digests, and their facts against the manifest."""
    try:
        teacher = TeacherFolder(cache / "teacher")
    except UserError as error:
        return [Problem("teacher/teacher.json", str(error))]
    problems = []
    whole = True
    for name, expected in sorted(teacher.files.items()):
        path = teacher.path / name
        if not is_file(path):
            problems.append(Problem(f"teacher/{name}", "is missing, though teacher.json names it"))
            whole = False
        elif size_of(path) != expected["bytes"] or file_sha256(path) != expected["sha256"]:
            problems.append(Problem(f"teacher/{name}", "differs from its digest in teacher.json"))
            whole = False
    for name in sorted({"config.json", "head.safetensors", "token_bytes.parquet"} - teacher.files.keys()):
        problems.append(Problem("teacher/teacher.json", f"does not name {name}, which students need"))
        whole = False
    facts = teacher.facts
    for name, value in (
        ("teacher", facts.teacher_sha256),
        ("tokenizer", facts.tokenizer_sha256),
        ("vocab_size", facts.vocab_size),
    ):
        if manifest.compat.get(name) != value:
            problems.append(
                Problem("teacher/teacher.json", f"{name} is {value}, the manifest's {manifest.compat.get(name)}")
            )
    return problems + (check_head(TeacherFolder(local_teacher(cache / "teacher"))) if whole else [])


def check_head(teacher: TeacherFolder) -> list[Problem]:
    """Shapes of head and embedding, and the bytes of every token."""
    problems = []
    for name, check in (("head.safetensors", teacher.check_head), ("token_bytes.parquet", teacher.token_bytes)):
        try:
            check()
        except UserError as error:
            problems.append(Problem(f"teacher/{name}", str(error)))
    return problems


@dataclass(frozen=True)
class PlanRanges:
    """Which part of the corpus each unit covers, as plan.json says."""

    stride: int
    heldout_from: int
    extent: int

    def of(self, unit: int) -> tuple[int, int]:
        """[start, end) of a unit."""
        heldout = unit >= HELDOUT_UNIT
        start = (unit - HELDOUT_UNIT if heldout else unit) * self.stride + (self.heldout_from if heldout else 0)
        return start, start + self.stride

    def limit(self, unit: int) -> int:
        """Where the part of the corpus ends that a unit of this split may cover."""
        return self.extent if unit >= HELDOUT_UNIT else self.heldout_from

    def has(self, unit: int) -> bool:
        """Whether the corpus has text for it."""
        return self.of(unit)[1] <= self.limit(unit)


def read_plan(cache: Path) -> tuple[PlanRanges | None, list[Problem]]:
    """The plan, None if it cannot be trusted; and what is wrong with it."""
    try:
        plan = Fields(read_json(cache / "plan.json", MOST_PLAN_BYTES), cache / "plan.json")
        return PlanRanges(*(plan.integer(name) for name in ("stride", "heldout_from", "extent"))), []
    except UserError as error:
        return None, [Problem("plan.json", str(error))]


def covered_twice(sources: list[tuple[str, int, int, int]]) -> list[Problem]:
    """Problems of (split, start, end, unit) whose ranges overlap within a split."""
    problems = []
    last: dict[str, tuple[int, int]] = {}
    for split, start, end, unit in sorted(sources):
        previous = last.get(split)
        if previous is not None and start < previous[0]:
            message = f"source range {(start, end)} overlaps that of {unit_name(previous[1])}"
            problems.append(Problem(f"{unit_name(unit)}.json", message))
        if previous is None or end > previous[0]:
            last[split] = (end, unit)
    return problems


def find_missing(cache: Path, units: set[int], shards: int | None) -> tuple[list[str], list[Problem], list[Problem]]:
    """Units below the highest committed one, or below `shards`, that are not there.

    Returns:
        Their names; problems, one each; notes instead for those that a live writer works on at this moment.
    """
    train = sorted(unit for unit in units if unit < HELDOUT_UNIT)
    heldout = sorted(unit for unit in units if unit >= HELDOUT_UNIT)
    gaps = list(_gaps(train, 0, shards or 0)) + list(_gaps(heldout, HELDOUT_UNIT, 0))
    missing, problems, notes = [], [], []
    # One file called shard-999999999.json must not make a list of a billion.
    for name in map(unit_name, islice(chain.from_iterable(gaps), MOST_MISSING)):
        if is_held(cache, name):
            notes.append(Problem(f"{name}.json", "is missing: a dump is writing this shard"))
        elif not is_file(cache / f"{name}.json"):  # committed since `units` were listed
            problems.append(Problem(f"{name}.json", "is missing: dump it to close the gap"))
            missing.append(name)
    more = sum(map(len, gaps)) - MOST_MISSING
    if more > 0:
        problems.append(
            Problem(MANIFEST, f"{more} more shards are missing: are names of shards as the dump made them?")
        )
    return missing, problems, notes


def _gaps(units: list[int], first: int, end: int) -> Iterator[range]:
    """Ranges of units from `first` up to the last there is, or to `end`, that are not among `units` (ascending)."""
    for unit in units:
        if unit > first:
            yield range(first, unit)
        first = unit + 1
    if end > first:
        yield range(first, end)


def shard_stems(cache: Path) -> list[str]:
    """Names of all shards that have a JSON, in order of units."""
    names = (name for name in names_in(cache) if name.startswith(("shard-", "heldout-")))
    stems = [name.removesuffix(".json") for name in names if name.endswith(".json")]
    return sorted(stems, key=lambda stem: (unit_of(stem) is None, unit_of(stem) or 0, stem))


def unit_of(stem: str) -> int | None:
    """The unit whose files are called `stem`; None if that is no shard's name."""
    if not SHARD_NAME.fullmatch(stem):
        return None
    split, _, digits = stem.partition("-")
    unit = int(digits) + (HELDOUT_UNIT if split == "heldout" else 0)
    return unit if unit_name(unit) == stem else None


def stray_files(cache: Path) -> list[Problem]:
    """Files that belong to no committed shard: leftovers, unfinished writes, and what others put there."""
    notes = []
    jsons = (name.removesuffix(".json") for name in names_in(cache) if name.endswith(".json"))
    committed = {stem for stem in jsons if SHARD_NAME.fullmatch(stem)}

    def belongs(name: str) -> bool:
        stem, _, ending = name.rpartition(".")
        return stem in committed and ending in ("json", "parquet") or OWN_FILES.fullmatch(name) is not None

    for name in sorted(name for name in names_in(cache) if not belongs(name)):
        stem, _, ending = name.rpartition(".")
        if name.startswith(".") and ending == "tmp":
            text = "temporary of an unfinished write; the next dump clears it when its writer is gone"
        elif ending == "parquet" and SHARD_NAME.fullmatch(stem):
            text = "has no JSON: not committed, readers pass it over, a dump writes it again"
        else:
            text = "is not part of the cache"
        notes.append(Problem(name, text))
    claims = names_in(cache / "claims") if "claims" in names_in(cache) else ()
    for name in sorted(name for name in claims if name.endswith(".json")):
        notes.append(Problem(f"claims/{name}", "a dump is writing this shard, or was interrupted at it"))
    if is_file(cache / "teacher" / "teacher.json"):
        try:
            listed = {*TeacherFolder(cache / "teacher").files, "teacher.json"}
        except UserError:
            return notes
        strays = sorted(name for name in names_in(cache / "teacher") if name not in listed)
        notes += [Problem(f"teacher/{name}", "is not part of the cache") for name in strays]
    return notes
