"""Which unit of work reads which part of the corpus.

Unit i is a pure function of (corpus, split, tokens per shard, i), never of the number of shards asked for: training
units cut the corpus into equal ranges from its beginning, held-out units do the same in its held-out last part. The
plan is stored in the cache (`plan.json`), so that a corpus that changed under it is noticed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.commit import commit_json, read_json
from pipeline.errors import UserError
from pipeline.fields import Fields
from pipeline.folder_checks import MOST_PLAN_BYTES
from pipeline.manifest import identity
from pipeline.schema import HELDOUT_UNIT
from teacher_dump.corpus import CorpusConfig, Document, describe_corpus, list_files, read_range
from teacher_dump.corpus_files import SourceFile, fingerprint_of, kind_of

PLAN = "plan.json"
MOST_FILES = 1 << 20


@dataclass(frozen=True)
class Unit:
    """One shard's worth of work: positions [start, end) of the concatenated corpus files."""

    unit: int
    split: str
    start: int
    end: int


@dataclass(frozen=True)
class Plan:
    """The corpus's layout and how units cut it.

    Attributes:
        files: layout of every file.
        stride: positions a unit spans.
        heldout_from: documents that begin here or later are held out.
        extent: end of the corpus.
    """

    files: tuple[SourceFile, ...]
    stride: int
    heldout_from: int
    extent: int

    @property
    def train_units(self) -> int:
        return self.heldout_from // self.stride

    @property
    def heldout_units(self) -> int:
        return (self.extent - self.heldout_from) // self.stride

    @property
    def corpus_id(self) -> str:
        """Identity of the text itself: what the files contain, in order, not where they lie."""
        return identity({"files": [file.fingerprint for file in self.files]})

    def unit(self, index: int, split: str) -> Unit:
        """Training unit or held-out unit number `index`.

        Raises:
            UserError: the corpus has fewer units; names how many.
        """
        total = self.train_units if split == "train" else self.heldout_units
        if index >= total:
            option = "shards" if split == "train" else "heldout_shards"
            share = "" if split == "train" else ", or corpus.heldout_fraction higher"
            raise UserError(
                f"--{option} {index + 1}: the corpus has text for {total} {split} shards of this size "
                f"({self.stride} {self.files[0].unit} each): ask for fewer, or set tokens_per_shard or "
                f"corpus.range_bytes lower{share}"
            )
        start = index * self.stride + (self.heldout_from if split == "heldout" else 0)
        number = index + (HELDOUT_UNIT if split == "heldout" else 0)
        return Unit(number, split, start, start + self.stride)

    def documents(self, config: CorpusConfig, unit: Unit) -> Iterator[Document]:
        """The documents that begin in the unit's range, in order."""
        return read_range(config, list(self.files), unit.start, unit.end)

    def to_record(self) -> dict[str, Any]:
        return {
            "stride": self.stride,
            "heldout_from": self.heldout_from,
            "extent": self.extent,
            "files": [file.to_record() for file in self.files],
        }


def make_plan(config: CorpusConfig, files: list[SourceFile], tokens_per_shard: int) -> Plan:
    """Cut the corpus into units.

    Raises:
        UserError: the corpus is too small for a single training unit.
    """
    extent = sum(file.extent for file in files)
    text_bytes = sum(file.text_bytes for file in files)
    wanted = max(config.range_bytes, math.ceil(tokens_per_shard * config.bytes_per_token))
    stride = max(1, math.ceil(wanted * extent / text_bytes))  # bytes, or rows of the mean size
    plan = Plan(tuple(files), stride, extent - math.ceil(extent * config.heldout_fraction), extent)
    if plan.train_units == 0:
        raise UserError(
            f"corpus.source {config.source}: its {text_bytes} bytes of text are less than one shard's {wanted}: set "
            "corpus.range_bytes or tokens_per_shard lower, or take a larger corpus"
        )
    return plan


def open_plan(cache: Path, config: CorpusConfig, tokens_per_shard: int, data_root: Path) -> Plan:
    """The cache's plan, made now if there is none yet or it is damaged (it is stored by `store_plan`).

    The manifest's data_id says whether a plan made anew is the one the shards were cut by. A stored one is checked
    against the files: an index of a large compressed file is not built twice.

    Raises:
        UserError: a file changed, vanished or came after the plan was made; names it.
    """
    path = cache / PLAN
    record = _stored(path)
    if record is None:
        return make_plan(config, describe_corpus(config, data_root), tokens_per_shard)
    given = Fields(record, path)
    stored = [SourceFile.from_record(entry, path) for entry in given.list("files", MOST_FILES)]
    now = list_files(config, data_root)
    if len(now) != len(stored):
        then, here = {_base(file.path) for file in stored}, {_base(place) for place in now}
        moved = [f"{name} is gone" for name in sorted(then - here)] + [f"{name} is new" for name in sorted(here - then)]
        raise UserError(
            f"corpus.source {config.source} has {len(now)} files, {path} was made with {len(stored)}"
            f"{' (' + ', '.join(moved[:5]) + ')' if moved else ''}: a corpus must not change under a cache; restore "
            "it, or dump into another folder (CACHE=...)"
        )
    files = []
    for place, file in zip(now, stored, strict=True):
        found = _fingerprint(place)
        if found != file.fingerprint:
            raise UserError(
                f"corpus file {place} changed since {path} was made (fingerprint {found[:12]}, was "
                f"{file.fingerprint[:12]}): restore it, or dump into another folder (CACHE=...)"
            )
        if kind_of(place) != file.kind:
            raise UserError(f"{path} says {place} is {file.kind}, its name says {kind_of(place)}: restore the plan")
        files.append(replace(file, path=place))
    return make_plan(config, files, tokens_per_shard)


def _base(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _fingerprint(place: str) -> str:
    import fsspec

    try:
        with fsspec.open(place, "rb") as raw:
            size = raw.seek(0, 2)
            raw.seek(0)
            return fingerprint_of(place, raw, size)
    except FileNotFoundError:
        raise UserError(
            f"corpus file {place} is missing: restore it, or dump into another folder (CACHE=...)"
        ) from None


def store_plan(cache: Path, plan: Plan, claim: str) -> None:
    """Write `plan.json` unless it is there and whole.

    Raises:
        UserError: the corpus has so many files or pieces that no reader would take its plan.
    """
    if _stored(cache / PLAN) is not None:
        return
    record = plan.to_record()
    size = len(json.dumps(record, indent=1))
    if size > MOST_PLAN_BYTES - 1000:
        raise UserError(
            f"corpus.source: its {len(plan.files)} files and their row groups or frames make a plan of {size} bytes, "
            f"readers take {MOST_PLAN_BYTES}: dump it in parts, each into a cache of its own; a run reads several"
        )
    commit_json(cache / PLAN, record, claim=claim)


def _stored(path: Path) -> dict[str, Any] | None:
    """The content of plan.json; None if it is missing or damaged."""
    try:
        return read_json(path, MOST_PLAN_BYTES)
    except UserError:
        return None
