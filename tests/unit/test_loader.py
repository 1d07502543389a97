"""Batches from shards: every row once an epoch, in an order anyone can recompute, resumed exactly, with right targets.

Legend: B rows of a batch, T tokens a row, V vocabulary.
"""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers_cache import toy_logits, write_toy_cache

from pipeline import schema
from pipeline.cache import Cache
from pipeline.errors import UserError
from pipeline.index import ShardEntry
from pipeline.shard import DamagedShard, ShardFile
from student.data.batch import IGNORE, Batch
from student.data.loader import CacheDataModule, SplitLoader, TrainLoader

ROWS, UNITS, LENGTH = 7, 4, 32


@pytest.fixture(scope="module", autouse=True)
def small_groups() -> Iterator[None]:
    """Row groups of three rows, so that small caches have many, of unequal size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "ROW_GROUP_TOKENS", 3 * LENGTH)
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """28 training rows in 12 groups, 7 held-out rows."""
    path = tmp_path_factory.mktemp("loader") / "cache"
    return Cache(write_toy_cache(path, units=UNITS, rows=ROWS, length=LENGTH, block=8, window=16, tail_samples=2))


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """The same teacher at twice the length: 10 rows, one group each but for a last one."""
    path = tmp_path_factory.mktemp("loader") / "longer"
    return Cache(write_toy_cache(path, units=2, rows=5, length=2 * LENGTH, block=8, window=16))


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Padded rows."""
    path = tmp_path_factory.mktemp("loader") / "documents"
    return Cache(write_toy_cache(path, units=1, rows=9, length=LENGTH, block=8, packing="document"))


def ids(batches: list[Batch]) -> list[list[int]]:
    return [batch.sequence_id_B.tolist() for batch in batches]


def epoch(loader: TrainLoader) -> list[Batch]:
    return list(loader)


def assert_equal(a: Batch, b: Batch) -> None:
    for name, value in vars(a).items():
        other = getattr(b, name)
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, other, rtol=0, atol=0, equal_nan=True, msg=name)
        else:
            assert value == other


def test_every_row_once_an_epoch_but_for_the_last_partial_batch(cache: Cache) -> None:
    loader = TrainLoader([cache], batch_rows=5, seed=0, window=2)
    everything = {(unit << 32) + row for unit in range(UNITS) for row in range(ROWS)}
    left = set()
    for _ in range(3):
        batches = ids(epoch(loader))
        seen = [i for batch in batches for i in batch]
        assert [len(batch) for batch in batches] == [5] * 5 and len(loader) == 5
        assert len(set(seen)) == 25 and set(seen) < everything
        left |= everything - set(seen)
    assert len(left) > 3, "the same rows are left out of every epoch"


def test_order_is_a_function_of_seed_and_epoch(cache: Cache) -> None:
    first = TrainLoader([cache], batch_rows=4, seed=0, window=4)
    again = TrainLoader([cache], batch_rows=4, seed=0, window=4)
    other = TrainLoader([cache], batch_rows=4, seed=1, window=4)
    epochs = [ids(epoch(first)) for _ in range(2)]
    assert epochs == [ids(epoch(again)) for _ in range(2)]
    assert epochs[0] != epochs[1] and ids(epoch(other)) not in epochs


def test_order_does_not_depend_on_reading(cache: Cache) -> None:
    """The global state of random generators plays no part, nor do rows read before."""
    np.random.seed(1)
    torch.manual_seed(1)
    first = ids(epoch(TrainLoader([cache], 4, 0, 4)))
    np.random.seed(2)
    torch.manual_seed(2)
    list(SplitLoader([cache], "train", 3))
    assert ids(epoch(TrainLoader([cache], 4, 0, 4))) == first


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_same_global_batches(cache: Cache, longer: Cache, ranks: int) -> None:
    whole = epoch(TrainLoader([cache, longer], 8, 0, 4))
    parts = [epoch(TrainLoader([cache, longer], 8, 0, 4, rank, ranks)) for rank in range(ranks)]
    assert {len(part) for part in parts} == {len(whole)}
    for number, batch in enumerate(whole):
        shares = [part[number].sequence_id_B.tolist() for part in parts]
        assert [len(share) for share in shares] == [8 // ranks] * ranks
        assert sorted(sum(shares, [])) == sorted(batch.sequence_id_B.tolist())


@pytest.mark.parametrize("done", [0, 1, 4, 6, 7])
def test_resumed_run_gives_identical_batches(cache: Cache, done: int) -> None:
    """Also at the boundary: a state taken after the last batch begins the next epoch."""
    straight = TrainLoader([cache], 4, 0, 4)
    assert len(straight) == 7
    wanted = [*epoch(straight), *epoch(straight)]
    loader = TrainLoader([cache], 4, 0, 4)
    iterator = iter(loader)
    for _ in range(done):
        next(iterator)
    state = loader.state_dict()
    assert state == {"epoch": 0, "done": done}, "prefetched batches are counted as done"
    resumed = TrainLoader([cache], 4, 0, 4)
    resumed.load_state_dict(state)
    found = epoch(resumed)
    if done < 7:
        found += epoch(resumed)
    for a, b in zip(found, wanted[done:], strict=True):
        assert_equal(a, b)


def test_state_in_the_second_epoch_and_on_another_rank(cache: Cache) -> None:
    loader = TrainLoader([cache], 4, 0, 4, rank=1, ranks=2)
    list(loader)
    iterator = iter(loader)
    next(iterator)
    assert loader.state_dict() == {"epoch": 1, "done": 1}
    rest = ids(list(iterator))
    other = TrainLoader([cache], 4, 0, 4, rank=1, ranks=2)
    other.load_state_dict({"epoch": 1, "done": 1})
    assert ids(list(other)) == rest


def test_caches_of_several_lengths_take_turns(cache: Cache, longer: Cache) -> None:
    loader = TrainLoader([cache, longer], 3, seed=0, window=4)
    batches = epoch(loader)
    assert len(batches) == len(loader) == 28 // 3 + 10 // 3
    lengths = [batch.input_ids_BT.shape[1] for batch in batches]
    assert Counter(lengths) == {LENGTH: 9, 2 * LENGTH: 3}
    assert lengths != sorted(lengths) and lengths != sorted(lengths, reverse=True)
    data = CacheDataModule([str(cache.path), str(longer.path)], batch_rows=3, window_groups=4)
    assert (data.max_length, data.steps_per_epoch) == (2 * LENGTH, len(loader))
    assert data.train_tokens == 28 * LENGTH + 10 * 2 * LENGTH
    assert data.has_hidden and data.pool_block == 8
    for a, b in zip(data.train_dataloader(), batches, strict=True):
        assert_equal(a, b)


def test_values_are_the_shards(cache: Cache) -> None:
    by_id = {}
    for columns in cache.groups("train"):
        for row, name in enumerate(columns["sequence_id"]):
            by_id[int(name)] = {column: value[row] for column, value in columns.items()}
    for batch in TrainLoader([cache], 4, 0, 4):
        assert batch.taus == cache.spec.taus
        for row, name in enumerate(batch.sequence_id_B.tolist()):
            wanted = by_id[name]
            for column, tensor in (
                ("input_ids", batch.input_ids_BT),
                ("segment_ids", batch.segment_ids_BT),
                ("topk_ids", batch.topk_ids_BTK),
                ("topk_logits", batch.topk_logits_BTK),
                ("target_logit", batch.target_logit_BT),
                ("lse", batch.lse_BT),
                ("log_tail", batch.log_tail_BTR),
                ("attn_map", batch.attn_map_BGnn),
                ("hidden", batch.hidden_BWD),
            ):
                assert tensor is not None
                np.testing.assert_array_equal(tensor[row].numpy(), wanted[column], err_msg=column)
        assert (batch.topk_ids_BTK.dtype, batch.attn_map_BGnn.dtype) == (torch.int32, torch.float32)  # type: ignore[union-attr]


def test_target_is_the_next_token_also_at_the_last_position(cache: Cache) -> None:
    """Position t's target is token t+1; in a stream the last one is the first token of the row after it."""
    batch = next(iter(SplitLoader([cache], "train", 3)))
    assert torch.equal(batch.target_BT[:, :-1], batch.input_ids_BT[:, 1:])
    assert batch.target_BT[0, -1] == batch.input_ids_BT[1, 0] and batch.target_BT[1, -1] == batch.input_ids_BT[2, 0]
    logits_RTV = torch.from_numpy(toy_logits(cache.path, "train", 0))[:3]
    gathered = logits_RTV.gather(-1, batch.target_BT.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(
        batch.target_logit_BT, torch.where(batch.target_BT >= 0, gathered, torch.nan), equal_nan=True
    )


def test_padding_has_no_target(documents: Cache) -> None:
    seen = Counter[str]()
    for batch in SplitLoader([documents], "train", 4):
        for row in range(len(batch.length_B)):
            length = int(batch.length_B[row])
            target = batch.target_BT[row].tolist()
            assert target[: length - 1] == batch.input_ids_BT[row, 1:length].tolist()
            assert target[length:] == [IGNORE] * (LENGTH - length)
            assert batch.valid_BT[row].tolist() == [True] * length + [False] * (LENGTH - length)
            ended = target[length - 1] == IGNORE
            assert torch.isnan(batch.target_logit_BT[row, length - 1]) == ended
            seen["ended" if ended else "cut"] += 1
            seen["padded"] += length < LENGTH
        assert torch.isnan(batch.lse_BT[~batch.valid_BT]).all() and not torch.isnan(batch.lse_BT[batch.valid_BT]).any()
    assert seen["ended"] and seen["padded"], "the cache holds no padded row"


def test_split_loader_gives_stored_order(cache: Cache, longer: Cache) -> None:
    loader = SplitLoader([cache, longer], "heldout", 2)
    batches = list(loader)
    assert len(batches) == len(loader)
    first = schema.HELDOUT_UNIT << 32
    assert sum(ids(batches), []) == [*range(first, first + 7), *range(first, first + 5)]
    assert all(batch.topk_logits_BTK.isfinite().all() for batch in batches)


@pytest.mark.parametrize("window", [1, 4])
def test_each_group_is_decoded_once_an_epoch(cache: Cache, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = Cache.open

    def spy(self: Cache, shard: ShardEntry) -> ShardFile:
        opened.append(shard.name)
        return real(self, shard)

    monkeypatch.setattr(Cache, "open", spy)
    loader = TrainLoader([cache], batch_rows=4, seed=0, window=window)
    list(loader)
    assert len(opened) <= 12 and loader.readers[0]._coming == {}


def test_a_shard_damaged_under_the_loader_stops_it_by_name(cache: Cache, tmp_path: Path) -> None:
    copy = Cache(shutil.copytree(cache.path, tmp_path / "copy"))
    loader = TrainLoader([copy], batch_rows=4, seed=0, window=2)
    path = copy.path / "shard-00002.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedShard, match=r"shard-00002\.parquet: row group \d, column"):
        list(loader)


def test_another_teachers_cache_is_refused(cache: Cache, tmp_path: Path) -> None:
    other = Cache(write_toy_cache(tmp_path / "other", units=1, rows=ROWS, length=LENGTH, block=8, seed=5))
    with pytest.raises(UserError) as raised:
        CacheDataModule([str(cache.path), str(other.path)], batch_rows=2)
    text = str(raised.value)
    assert "teacher is" in text and str(other.path) in text
    assert cache.manifest.compat["teacher"] in text and other.manifest.compat["teacher"] in text


def test_limits_of_several_caches_are_the_common_ones(cache: Cache, tmp_path: Path) -> None:
    other = write_toy_cache(tmp_path / "other", units=1, rows=ROWS, length=LENGTH, block=0, taus=(1.0, 1.3))
    data = CacheDataModule([str(cache.path), str(other)], batch_rows=2)
    assert (data.taus[0], data.taus[-1]) == (1.0, 1.3)
    assert data.pool_block == 0 and not data.has_hidden
    assert data.compat_id == cache.manifest.compat_id and len({c.manifest.data_id for c in data.caches}) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch_rows": 100}, "has 28 training rows, data.batch_rows is 100"),
        ({"batch_rows": 0}, "--data.batch_rows 0: must be at least 1"),
        ({"window_groups": 0}, "--data.window_groups 0: must be at least 1"),
        ({"seed": -1}, "--data.seed -1"),
        ({"cache": []}, "--data.cache is empty"),
        ({"cache": "nowhere"}, "nowhere is no cache"),
    ],
    ids=str,
)
def test_bad_setting_is_a_sentence(cache: Cache, change: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        CacheDataModule(**{"cache": str(cache.path), "batch_rows": 4, **change})


def test_shards_without_their_json_are_not_read(tmp_path: Path) -> None:
    path = write_toy_cache(tmp_path / "cache", units=2, heldout_units=0, rows=4, length=LENGTH, block=8)
    (path / "shard-00001.json").unlink()
    assert {i >> 32 for batch in ids(epoch(TrainLoader([Cache(path)], 2, 0, 4))) for i in batch} == {0}
    assert list(SplitLoader([Cache(path)], "heldout", 2)) == []


def damage_page(parquet: Path, group: int, column: str) -> None:
    """Flip a bit in the middle of a column chunk."""
    metadata = pq.read_metadata(parquet).row_group(group)
    chunks = [metadata.column(i) for i in range(metadata.num_columns)]
    chunk = next(c for c in chunks if c.path_in_schema.split(".")[0] == column)
    data = bytearray(parquet.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size - 3] ^= 16
    parquet.write_bytes(data)


def test_damaged_page_is_raised_through_the_prefetch_thread(tmp_path: Path) -> None:
    path = write_toy_cache(tmp_path / "cache", units=1, heldout_units=0, rows=6, length=LENGTH, block=8)
    damage_page(path / "shard-00000.parquet", 1, "topk_logits")
    with pytest.raises(DamagedShard, match=r"shard-00000\.parquet: row group 1, column topk_logits"):
        list(TrainLoader([Cache(path)], 2, 0, 4))
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"], "the thread was left"


def test_other_group_size_travels_with_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache whose groups were cut by another rule than this version's: its manifest says so."""
    with monkeypatch.context() as patch:
        patch.setattr(schema, "ROW_GROUP_TOKENS", 2 * LENGTH)
        path = write_toy_cache(tmp_path / "cache", units=1, heldout_units=0, rows=6, length=LENGTH, block=8)
    loader = TrainLoader([Cache(path)], 2, 0, 4)
    assert [loader.groups[0].rows_of(group) for group in range(3)] == [2, 2, 2]
    assert sorted(n for batch in loader for n in batch.sequence_id_B.tolist()) == list(range(6))
