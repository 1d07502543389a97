"""The epoch's order: every row once, groups mixed over the window, no more groups at once than the window needs."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Any

import numpy as np
import pytest

from pipeline.index import ShardEntries, ShardEntry
from student.data import order
from student.data.order import RowGroups, epoch_rows, group_order


def groups(rows: list[int], size: int) -> RowGroups:
    digest = "00" * 32
    return RowGroups(ShardEntries.of(ShardEntry(i, 1, r, r, digest, digest) for i, r in enumerate(rows)), size)


def test_groups_of_shards_of_unequal_size() -> None:
    table = groups([7, 1, 3, 9], 3)
    assert len(table) == 3 + 1 + 1 + 3 and table.rows == 20
    assert [table.find(g) for g in range(8)] == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (3, 0), (3, 1), (3, 2)]
    assert [table.rows_of(g) for g in range(8)] == [3, 3, 1, 1, 3, 3, 3, 3]
    assert table.shard(4).name == "shard-00002"
    assert len(groups([], 3)) == 0


@pytest.mark.parametrize("window", [1, 3, 16, 100])
@pytest.mark.parametrize("rows", [[1], [5, 2], [40] * 12, [9, 30, 1] * 7])
def test_every_row_once(rows: list[int], window: int) -> None:
    table = groups(rows, 10)
    wanted = Counter((g, r) for g in range(len(table)) for r in range(table.rows_of(g)))
    assert Counter(epoch_rows(table, 3, 1, window)) == wanted


@pytest.mark.parametrize("window", [1, 4, 16])
def test_no_more_groups_than_the_window_at_once(window: int) -> None:
    table = groups([200] * 8, 20)  # 80 groups
    pairs = list(epoch_rows(table, 0, 0, window))
    first, last = {}, {}
    for at, (group, _) in enumerate(pairs):
        first.setdefault(group, at)
        last[group] = at
    open_at_once = [sum(first[g] <= at <= last[g] for g in first) for at in range(0, len(pairs), 7)]
    assert max(open_at_once) <= window + 1
    assert np.mean(open_at_once[len(open_at_once) // 3 : -len(open_at_once) // 3]) > 0.6 * window, "hardly mixed"
    places = {int(group): p for p, group in enumerate(group_order(len(table), 0, 0))}
    assert sorted(first, key=first.__getitem__)[0] == min(places, key=places.__getitem__)


def test_rows_of_a_group_are_mixed_and_epochs_differ() -> None:
    table = groups([64], 64)
    orders = [[row for _, row in epoch_rows(table, seed, epoch, 4)] for seed in (0, 1) for epoch in (0, 1)]
    assert all(order != sorted(order) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert orders[0] == [row for _, row in epoch_rows(table, 0, 0, 4)]


@pytest.mark.parametrize("skip", [0, 1, 20, 333, 1599, 1600])
def test_skipping_rows_is_the_rest_of_the_order(skip: int) -> None:
    table = groups([200] * 8, 20)
    assert list(epoch_rows(table, 0, 0, 4, skip)) == list(epoch_rows(table, 0, 0, 4))[skip:]


def test_a_million_shards_begin_at_once() -> None:
    """The order is made as it is read: the first rows of 8 million groups take no walk over all of them."""
    count = 1_000_000
    zeros = np.zeros((count, 32), np.uint8)
    rows = np.full(count, 64)
    columns = {"unit": np.arange(count), "bytes": rows, "rows": rows, "tokens": rows, "sha256": zeros}
    table = RowGroups(ShardEntries({**columns, "footer_sha256": zeros}), 8)
    assert len(table) == 8_000_000
    first = list(islice(epoch_rows(table, 0, 0, 16), 1000))
    assert len({group for group, _ in first}) > 16 and table.rows_of(first[0][0]) == 8


@pytest.mark.parametrize("window", [1, 3, 5, 40])
def test_skipping_needs_the_last_groups_only(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest is the same from every row on, and the places of the groups long past are not drawn."""
    table = groups([7, 7, 3, 12, 5, 1, 9], 3)
    monkeypatch.setattr(order, "PIECE", 4)
    whole = list(epoch_rows(table, 0, 1, window))
    for skip in range(len(whole) + 2):
        assert list(epoch_rows(table, 0, 1, window, skip)) == whole[skip:]
    table, drawn, real = groups([40] * 100, 20), [], order._places

    def places(*arguments: Any) -> np.ndarray:
        drawn.append(arguments[-1])
        return real(*arguments)

    monkeypatch.setattr(order, "_places", places)
    next(epoch_rows(table, 0, 0, window, 3000))
    assert min(drawn) >= 3000 // 20 - 2 * window - 1
