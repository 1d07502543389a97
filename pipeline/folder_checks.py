"""The checks of `verify` that concern files, the teacher folder and the plan rather than rows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.commit import file_sha256, read_json
from pipeline.errors import UserError
from pipeline.fields import Fields
from pipeline.manifest import Manifest
from pipeline.schema import HELDOUT_UNIT, unit_name
from pipeline.shard import ShardRecord
from pipeline.teacher_folder import TeacherFolder

SHARD_NAME = re.compile(r"(shard|heldout)-\d{5,}")
OWN_FILES = re.compile(r"manifest\.json|plan\.json|index\.json|index-.*\.parquet|teacher|claims")
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
        if not path.is_file():
            problems.append(Problem(f"teacher/{name}", "is missing, though teacher.json names it"))
            whole = False
        elif path.stat().st_size != expected["bytes"] or file_sha256(path) != expected["sha256"]:
            problems.append(Problem(f"teacher/{name}", "differs from its digest in teacher.json: restore it"))
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
    return problems + (check_head(teacher) if whole else [])


def check_head(teacher: TeacherFolder) -> list[Problem]:
    """Shapes of head and embedding, and the bytes of every token."""
    problems = []
    for name, check in (("head.safetensors", teacher.check_head), ("token_bytes.parquet", teacher.token_bytes)):
        try:
            check()
        except UserError as error:
            problems.append(Problem(f"teacher/{name}", str(error)))
    return problems


def check_plan(cache: Path, records: list[ShardRecord]) -> list[Problem]:
    """Each unit covers the range the plan gives it, and no range is covered twice."""
    try:
        plan = Fields(read_json(cache / "plan.json", MOST_PLAN_BYTES), cache / "plan.json")
        stride, heldout_from, extent = (plan.integer(name) for name in ("stride", "heldout_from", "extent"))
    except UserError as error:
        return [Problem("plan.json", str(error))]
    problems = []
    end_of: dict[str, tuple[int, str]] = {}
    for record in records:
        heldout = record.unit >= HELDOUT_UNIT
        number = record.unit - HELDOUT_UNIT if heldout else record.unit
        start = number * stride + (heldout_from if heldout else 0)
        limit = extent if heldout else heldout_from
        given = (record.source.get("start"), record.source.get("end"))
        if given != (start, start + stride) or start + stride > limit:
            message = f"source range {given} is not the plan's {(start, start + stride)} below {limit}"
            problems.append(Problem(f"{record.name}.json", message))
        previous = end_of.get(record.split, (0, ""))
        if isinstance(given[0], int) and given[0] < previous[0]:
            problems.append(Problem(f"{record.name}.json", f"source range {given} overlaps that of {previous[1]}"))
        end_of[record.split] = (given[1] or 0, record.name)
    return problems


def find_missing(records: list[ShardRecord], shards: int | None) -> tuple[list[str], list[Problem]]:
    """Names of units that are not there; problems only where the caller knows how many there must be."""
    train = {record.unit for record in records if record.unit < HELDOUT_UNIT}
    heldout = {record.unit for record in records if record.unit >= HELDOUT_UNIT}
    wanted = set(range(shards if shards is not None else max(train, default=-1) + 1))
    gaps = wanted - train
    held = set(range(HELDOUT_UNIT, max(heldout, default=HELDOUT_UNIT - 1) + 1)) - heldout
    missing = [unit_name(unit) for unit in sorted(gaps | held)]
    if shards is None:
        return missing, []
    return missing, [Problem(f"{name}.json", "is missing: run the dump again") for name in missing]


def stray_files(cache: Path) -> list[Problem]:
    """Files that belong to no committed shard: leftovers, unfinished writes, and what others put there."""
    notes = []
    committed = {path.stem for path in cache.glob("*.json") if SHARD_NAME.fullmatch(path.stem)}
    for path in sorted(cache.iterdir()):
        if OWN_FILES.fullmatch(path.name) or (path.stem in committed and path.suffix in (".json", ".parquet")):
            continue
        if path.name.startswith(".") and path.suffix == ".tmp":
            text = "temporary of an unfinished write; the next dump clears it when its writer is gone"
        elif path.suffix == ".parquet" and SHARD_NAME.fullmatch(path.stem):
            text = "has no JSON: not committed, readers pass it over, a dump writes it again"
        else:
            text = "is not part of the cache"
        notes.append(Problem(path.name, text))
    for path in sorted((cache / "claims").glob("*.json")):
        notes.append(Problem(f"claims/{path.name}", "a dump is writing this shard, or was interrupted at it"))
    if (cache / "teacher" / "teacher.json").is_file():
        try:
            listed = {*TeacherFolder(cache / "teacher").files, "teacher.json"}
        except UserError:
            return notes
        strays = sorted(p.name for p in (cache / "teacher").iterdir() if p.name not in listed)
        notes += [Problem(f"teacher/{name}", "is not part of the cache") for name in strays]
    return notes
