"""Which units are left: the same answer with and without an index, and without opening what the index holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers_cache import write_toy_cache

from pipeline.cache import Cache
from pipeline.schema import HELDOUT_UNIT
from teacher_dump import pending
from teacher_dump.pending import Units, pending_units
from teacher_dump.plan import Plan
from teacher_dump.settings import DumpConfig
from teacher_dump.work import Work

PLAN = Plan((), 10, 1000, 1500)


def work(cache: Path, shards: int, heldout: int, units: str = "") -> Work:
    config = DumpConfig(cache, "toy", shards=shards, heldout_shards=heldout, units=units)
    return Work(config, None, PLAN, Cache(cache).manifest, Cache(cache).spec, cache)  # type: ignore[arg-type]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return write_toy_cache(tmp_path / "cache", units=5, heldout_units=1, rows=2, length=32, block=8)


def numbers(found: Units) -> list[int]:
    return [unit.unit for unit in found]


@pytest.mark.parametrize("indexed", [False, True])
def test_what_is_missing_damaged_or_new_is_left(cache: Path, indexed: bool) -> None:
    if indexed:
        Cache(cache).build_index()
    (cache / "shard-00001.json").unlink()
    (cache / "shard-00003.parquet").unlink()
    assert numbers(pending_units(work(cache, 7, 2))) == [HELDOUT_UNIT + 1, 1, 3, 5, 6]
    assert numbers(pending_units(work(cache, 7, 2, "3:6"))) == [3, 5]
    assert numbers(pending_units(work(cache, 3, 0))) == [1]
    data = (cache / "shard-00002.parquet").read_bytes()
    (cache / "shard-00002.parquet").write_bytes(data[:-1])
    found = numbers(pending_units(work(cache, 5, 1)))
    assert found == ([1, 3] if indexed else [1, 2, 3]), "damage within a shard of the index is verify's business"


def test_shards_of_the_index_are_not_opened(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Cache(cache).build_index()
    monkeypatch.setattr(pending, "is_done", lambda *_: pytest.fail("a shard of the index was opened"))
    assert len(pending_units(work(cache, 5, 1))) == 0


def test_a_damaged_index_is_passed_over(cache: Path) -> None:
    Cache(cache).build_index()
    (cache / "index.json").write_text("{}")
    assert numbers(pending_units(work(cache, 6, 1))) == [5]


def test_units_are_a_sequence(cache: Path) -> None:
    units = Units(PLAN, np.array([HELDOUT_UNIT + 2, 0, 7]))
    assert [unit.split for unit in units] == ["heldout", "train", "train"] and len(units[1:]) == 2
    assert (units[2].start, units[2].end, units[0].start) == (70, 80, 1020)
