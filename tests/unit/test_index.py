"""The index of many shards: what it holds, and that the JSON files stay the truth."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from helpers_cache import commit_toy_shard, toy_columns, write_toy_cache

from pipeline import index
from pipeline.__main__ import main
from pipeline.cache import Cache
from pipeline.commit import commit_json, read_json
from pipeline.errors import UserError
from pipeline.index import ShardEntries, listed_units
from pipeline.schema import HELDOUT_UNIT
from pipeline.shard import DamagedShard


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "c"
    return write_toy_cache(path, units=4, heldout_units=2, rows=2, length=32, block=8)


@pytest.fixture
def cache(whole: Path, tmp_path: Path) -> Cache:
    return Cache(shutil.copytree(whole, tmp_path / "c"))


def forbid_json(monkeypatch: pytest.MonkeyPatch, allowed: tuple[str, ...] = ()) -> None:
    """Reading a shard's JSON fails the test, unless it is one of `allowed`."""
    from pipeline import cache as module

    real = module.read_record

    def read_record(path: Path) -> object:
        assert path.name in allowed, f"{path.name} was read"
        return real(path)

    monkeypatch.setattr(module, "read_record", read_record)


def test_the_index_says_what_the_json_files_say(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {split: list(cache.shards(split)) for split in ("train", "heldout")}
    records = list(cache.records("train"))
    assert main(["index", "--cache", str(cache.path)]) == 0
    assert "index of 6 shards written" in capsys.readouterr().out
    forbid_json(monkeypatch)
    for split, entries in before.items():
        found = cache.shards(split)
        assert list(found) == entries and found.tokens.sum() == sum(entry.tokens for entry in entries)
    for entry, record in zip(before["train"], records, strict=True):
        assert all(getattr(entry, name) == getattr(record, name) for name in ("name", "file", "split", *vars(entry)))
        with cache.open(entry) as shard:
            assert shard.read_group(0)["length"].sum() == entry.tokens


def test_new_shards_are_read_from_their_json_and_gone_ones_passed_over(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.build_index()
    commit_toy_shard(cache.path, cache.manifest, 9, 2)
    (cache.path / "shard-00001.json").unlink()
    forbid_json(monkeypatch, allowed=("shard-00009.json",))
    assert cache.shards().unit.tolist() == [0, 2, 3, 9]
    assert len(cache.shards("heldout")) == 2
    assert cache.build_index() == 6 and len(list(cache.path.glob("index-*.parquet"))) == 1


def test_a_shard_that_was_dumped_again_is_read_as_it_is_now(cache: Cache) -> None:
    entry = cache.shards()[1]
    cache.build_index()
    columns = toy_columns(cache.spec, 1, 2, seed=5)
    commit_toy_shard(cache.path, cache.manifest, 1, 2, columns=columns)
    assert cache.shards()[1] == entry, "the index does not know"
    with cache.open(entry) as shard:
        np.testing.assert_array_equal(shard.read_group(0)["input_ids"], columns["input_ids"])
    (cache.path / entry.file).write_bytes(b"PAR1damagedPAR1")
    with pytest.raises(DamagedShard, match="shard-00001.parquet"):
        cache.open(entry)


@pytest.mark.parametrize("harm", ["file", "gone", "digest", "identity", "elsewhere"])
def test_a_damaged_or_foreign_index_is_named(cache: Cache, harm: str) -> None:
    cache.build_index()
    path = cache.path / "index.json"
    file = next(cache.path.glob("index-*.parquet"))
    if harm == "file":
        data = bytearray(file.read_bytes())
        data[40] ^= 1
        file.write_bytes(data)
    elif harm == "gone":
        file.unlink()
    elif harm == "digest":
        path.write_text(path.read_text().replace('"shards": 6', '"shards": 7'))
    elif harm == "identity":
        commit_json(path, {**read_json(path), "data_id": "another"})
    else:
        commit_json(path, {**read_json(path), "file": "../index.parquet"})
    with pytest.raises(UserError, match="index"):
        cache.shards()


def test_a_shard_that_vanishes_while_it_is_listed_is_passed_over(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = listed_units(cache.path, "train")
    (cache.path / "shard-00002.json").unlink()
    monkeypatch.setattr("pipeline.cache.listed_units", lambda path, split: listed)
    assert cache.shards().unit.tolist() == [0, 1, 3] and [r.unit for r in cache.records()] == [0, 1, 3]
    (cache.path / "shard-00002.json").write_text("{}")
    with pytest.raises(UserError, match=r"shard-00002\.json"):
        cache.shards()


def test_an_index_that_is_replaced_while_it_is_read(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its record was read, and the file that it names is gone when it is looked for: the new one is read."""
    cache.build_index()
    before = index.read_json(cache.path / "index.json")
    cache.build_index()
    answers = [before]
    monkeypatch.setattr(index, "read_json", lambda path: answers.pop() if answers else read_json(path))
    forbid_json(monkeypatch)
    assert cache.shards().unit.tolist() == [0, 1, 2, 3] and not answers


def test_an_index_of_several_row_groups(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "GROUP_ROWS", 4)
    monkeypatch.setattr(index, "BATCH_ROWS", 3)
    before = list(cache.shards())
    assert cache.build_index() == 6
    file = cache.path / read_json(cache.path / "index.json")["file"]
    assert pq.ParquetFile(file).metadata.num_row_groups == 2
    forbid_json(monkeypatch)
    assert list(cache.shards()) == before


def test_without_shards_there_is_no_index(cache: Cache) -> None:
    cache.build_index()
    for path in (*cache.path.glob("shard-*"), *cache.path.glob("heldout-*")):
        path.unlink()
    assert cache.build_index() == 0
    assert not list(cache.path.glob("index*")) and len(cache.shards()) == 0


def test_a_damaged_index_is_built_anew(cache: Cache) -> None:
    assert cache.unindexed() == 6
    cache.build_index()
    assert cache.unindexed() == 0
    commit_toy_shard(cache.path, cache.manifest, 4, 2)
    assert cache.unindexed() == 1
    (cache.path / "index.json").write_text("{}")
    assert cache.unindexed() == 7 and cache.build_index() == 7 and cache.unindexed() == 0


def test_a_store_is_asked_for_the_index_once(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.build_index()
    store = fsspec.filesystem("memory")
    store.put(str(cache.path), "/index-on-a-store", recursive=True)
    remote = Cache("memory://index-on-a-store")
    asked: list[str] = []
    opened = MemoryFileSystem._open

    def note(self: MemoryFileSystem, path: str, *more: object, **given: object) -> object:
        asked.append(path)
        return opened(self, path, *more, **given)

    monkeypatch.setattr(MemoryFileSystem, "_open", note)
    try:
        assert list(remote.shards()) == list(cache.shards())
    finally:
        store.rm("/index-on-a-store", recursive=True)
    assert sum(path.endswith(".parquet") for path in asked) == 1, asked


def test_listing_knows_its_files(cache: Cache) -> None:
    for name in (
        "shard-12.json",
        "shard-0000x.json",
        "shard-00000.json.bak",
        "heldout-123456.json",
        ".shard-00007.json",
    ):
        (cache.path / name).write_text("{}")
    assert listed_units(cache.path, "train").tolist() == [0, 1, 2, 3]
    assert listed_units(cache.path, "heldout").tolist() == [HELDOUT_UNIT + i for i in (0, 1, 123456)]


def test_entries_are_a_sequence_of_little_memory(cache: Cache) -> None:
    entries = cache.shards()
    assert [entry.unit for entry in entries[1:3]] == [1, 2] and len(entries[:0]) == 0
    assert sum(values.nbytes for values in entries.columns.values()) == 96 * len(entries)
    shuffled = ShardEntries.of([entries[2], entries[0], entries[1]])
    assert shuffled.unit.tolist() == [0, 1, 2] and json.dumps(vars(shuffled[0])) == json.dumps(vars(entries[0]))
