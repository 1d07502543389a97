"""Whether a run, its checkpoints and the caches it is given belong together, and which units of a cache are the run's.

`compat` of a manifest must agree between caches, student and checkpoints; `data` must agree for an exact resume. What
differs is named field by field, with both values.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache import SPLITS, Cache
from pipeline.errors import UserError
from pipeline.index import ShardEntries
from pipeline.local_copies import LocalCopies
from pipeline.manifest import differences, identity
from pipeline.schema import HELDOUT_UNIT, unit_name

UnitRanges = list[list[int]]
"""[first unit, last unit, rows of each], in ascending order: what a run was started on."""

OF_TEACHER = {
    "teacher": "teacher_sha256",
    "tokenizer": "tokenizer_sha256",
    "vocab_size": "vocab_size",
    "logit_scale": "logit_scale",
    "soft_cap": "soft_cap",
}
"""Field of `compat` -> the fact of `teacher.json` that it was made of."""


@dataclass(frozen=True)
class Teaching:
    """The `compat` of a cache, a run or a checkpoint, and where it stands.

    Attributes:
        where: file or folder, for messages.
        compat_id: its identity.
        fields: its fields; None where only the id was kept.
    """

    where: str
    compat_id: str
    fields: dict[str, Any] | None

    @staticmethod
    def of(cache: Cache) -> Teaching:
        return Teaching(str(cache.path), cache.manifest.compat_id, cache.manifest.compat)


def require_same_teacher(found: Teaching, wanted: Teaching, remedy: str) -> None:
    """Raise `UserError`, naming every field of `compat` in which the two differ, and both values."""
    if found.compat_id == wanted.compat_id:
        return
    if found.fields is None or wanted.fields is None:
        told = [("compat_id", repr(found.compat_id), repr(wanted.compat_id))]
    else:
        told = differences(found.fields, wanted.fields)
    fields = "; ".join(f"{name} is {a} in {found.where}, {b} in {wanted.where}" for name, a, b in told)
    raise UserError(f"{found.where} and {wanted.where} are of different teachers: {fields}. {remedy}")


def require_teacher_facts(compat: dict[str, Any], run: Path, facts: Any, folder: Path) -> None:
    """Raise `UserError` if a teacher folder is not the one that a run's `compat` describes."""
    of_folder = {**compat, **{name: getattr(facts, fact) for name, fact in OF_TEACHER.items() if name in compat}}
    told = [f"{name} is {a} in {run}/run.json, {b} in {folder}" for name, a, b in differences(compat, of_folder)]
    if told:
        raise UserError(f"{folder} is another teacher's: {'; '.join(told)}. Restore the run's own teacher folder")


class RunCache(Cache):
    """A cache as a run reads it: the shards that were committed when the run was started, however many came since.

    The list is taken once, so that a dump may go on beside the training.
    """

    def __init__(self, path: Path | str, copies: LocalCopies | None = None) -> None:
        super().__init__(path, copies)
        self._entries = {split: super(RunCache, self).shards(split) for split in SPLITS}

    def shards(self, split: str = "train") -> ShardEntries:
        return self._entries[split]

    def ranges(self) -> UnitRanges:
        """The units it has, as compactly as they go."""
        ranges: UnitRanges = []
        for entries in filter(len, self._entries.values()):
            new_N = np.ones(len(entries), bool)  # where a range begins
            new_N[1:] = (np.diff(entries.unit) != 1) | (np.diff(entries.rows) != 0)
            first = np.flatnonzero(new_N)
            last = np.append(first[1:], len(entries)) - 1
            ranges += np.stack([entries.unit[first], entries.unit[last], entries.rows[first]], axis=1).tolist()
        return ranges

    def use(self, ranges: UnitRanges, run: Path | str) -> None:
        """Read these units from now on and no others.

        A shard that was dumped again meanwhile is taken: its record has the cache's data_id, and that decides the rows.

        Raises:
            UserError: units of the run are not there, or have another number of rows; names them.
        """
        split_of = {split: [r for r in ranges if (r[0] >= HELDOUT_UNIT) == (split == "heldout")] for split in SPLITS}
        unit_of = {s: _join([np.arange(first, last + 1) for first, last, _ in own]) for s, own in split_of.items()}
        there = {split: super(RunCache, self).shards(split) for split in SPLITS}
        missing = [unit for s in SPLITS for unit in unit_of[s][~np.isin(unit_of[s], there[s].unit)].tolist()]
        if missing:
            raise UserError(
                f"{self.path} lacks {name_units(missing)}, which {run} was started on: dump again what is missing "
                f"(make dump-teacher), or start a new --run with --init_from {run}"
            )
        for split, own in split_of.items():
            entries = there[split].select(np.isin(there[split].unit, unit_of[split]))
            rows_N = _join([np.full(last + 1 - first, rows) for first, last, rows in own])
            for index in np.flatnonzero(entries.rows != rows_N).tolist():
                raise UserError(
                    f"{self.path / entries[index].name}.json holds {entries.rows[index]} rows, {run} was started on "
                    f"{rows_N[index]}: its rows are others now; start a new --run with --init_from {run}"
                )
            self._entries[split] = entries


def _join(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def name_units(units: list[int]) -> str:
    """Units in ascending order as words: `shard-00001, shard-00004 to shard-00009`."""
    words: list[tuple[int, int]] = []
    for unit in units:
        if words and words[-1][1] == unit - 1:
            words[-1] = (words[-1][0], unit)
        else:
            words.append((unit, unit))
    return ", ".join(unit_name(a) + (f" to {unit_name(b)}" if b > a else "") for a, b in words)


def cache_record(cache: RunCache) -> dict[str, Any]:
    """What `data.json` keeps of a cache."""
    manifest = cache.manifest
    return {"path": str(cache.path), "compat": manifest.compat, "data": manifest.data, "units": cache.ranges()}


def require_same_data(run: Path, records: list[dict[str, Any]], caches: list[RunCache]) -> None:
    """Compare the caches a run was started on with those it is given now, and restrict them to the run's units.

    Raises:
        UserError: names every field that differs with both values, or the units that are gone.
    """
    again = f"Name the same caches, or start a new --run with --init_from {run}"
    if len(records) != len(caches):
        before = ", ".join(record["path"] for record in records)
        raise UserError(f"{run} was started on {len(records)} caches ({before}), --cache names {len(caches)}. {again}")
    told = []
    for record, cache in zip(records, caches, strict=True):
        if identity(record["data"]) != cache.manifest.data_id:
            found = differences(record["data"], cache.manifest.data)
            fields = "; ".join(f"{name} was {a}, is {b}" for name, a, b in found)
            told.append(f"{cache.path} holds other rows than {record['path']} did: {fields}")
    if told:
        raise UserError(f"{run} cannot go on: {'; '.join(told)}. {again}")
    for record, cache in zip(records, caches, strict=True):
        cache.use(record["units"], run)
