"""The order in which an epoch reads a cache's rows: a function of (seed, epoch, the shards) alone.

Row groups are shuffled. The rows of the p-th group then get the places p + U(0, window) of the epoch, and rows are read
by their place: at any time rows of `window` groups are mixed, one group comes in as another one goes, and no more than
`window` + 1 groups are needed at once.

Legend: N shards, S row groups, p a group's place in the shuffled order.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pipeline.index import ShardEntries, ShardEntry

PIECE = 1 << 18
"""Groups whose rows are counted at one time."""


class RowGroups:
    """The row groups of N shards in canonical order, held as two numbers a shard.

    Args:
        entries: the shards.
        size: rows of a row group; a shard's last one may have fewer.
    """

    def __init__(self, entries: ShardEntries, size: int) -> None:
        self.entries, self.size = entries, size
        counts_N = -(-entries.rows // size)
        self.first_N = np.concatenate([[0], np.cumsum(counts_N)])
        self.rows = int(entries.rows.sum())

    def __len__(self) -> int:
        return int(self.first_N[-1])

    def find(self, group: int) -> tuple[int, int]:
        """(shard, number of the group within it)."""
        shard = int(np.searchsorted(self.first_N, group, side="right")) - 1
        return shard, group - int(self.first_N[shard])

    def shard(self, group: int) -> ShardEntry:
        return self.entries[self.find(group)[0]]

    def rows_of(self, group: int) -> int:
        """Rows of a group."""
        return int(self.rows_of_each(np.array([group]))[0])

    def rows_of_each(self, group_M: np.ndarray) -> np.ndarray:
        """Rows of each of M groups."""
        shard_M = np.searchsorted(self.first_N, group_M, side="right") - 1
        return np.minimum(self.size, self.entries.rows[shard_M] - (group_M - self.first_N[shard_M]) * self.size)


def group_order(groups: int, seed: int, epoch: int) -> np.ndarray:
    """The shuffled order of S groups, int32 or int64 (S,)."""
    numbers = np.arange(groups, dtype=np.int32 if groups < 2**31 else np.int64)
    np.random.default_rng([seed, epoch, 0]).shuffle(numbers)
    return numbers


def epoch_rows(groups: RowGroups, seed: int, epoch: int, window: int, skip: int = 0) -> Iterator[tuple[int, int]]:
    """(group, row) of one epoch, every row once, from the one numbered `skip` on."""
    order = group_order(len(groups), seed, epoch)
    start, passed = _last_start(groups, order, seed, epoch, window, skip)
    skip -= passed
    for group_M, row_M in _blocks(groups, order, seed, epoch, window, start):
        if skip >= len(row_M):
            skip -= len(row_M)
            continue
        yield from zip(group_M[skip:].tolist(), row_M[skip:].tolist(), strict=True)
        skip = 0


def _places(groups: RowGroups, order: np.ndarray, seed: int, epoch: int, window: int, p: int) -> np.ndarray:
    """Where the rows of the p-th group come."""
    return p + np.random.default_rng([seed, epoch, 1 + p]).random(groups.rows_of(int(order[p]))) * window


def _last_start(groups: RowGroups, order: np.ndarray, seed: int, epoch: int, window: int, skip: int) -> tuple[int, int]:
    """A step p near which row number `skip` comes, not after it, and how many rows come before p; without reading the
    order up to there: the rows before p are all those of groups up to p - window, and some of the few after them."""
    p, opened = (
        0,
        0,
    )  # rows of groups before the p-th, which cannot come after all of `skip` rows as long as opened <= skip
    while p < len(order):
        ends = opened + np.cumsum(groups.rows_of_each(order[p : p + PIECE]))
        fitting = int(np.searchsorted(ends, skip, side="right"))
        p, opened = p + fitting, int(ends[fitting - 1]) if fitting else opened
        if fitting < len(ends):
            break
    late = sum(int((_places(groups, order, seed, epoch, window, i) >= p).sum()) for i in range(max(0, p - window), p))
    return p, opened - late


def _blocks(
    groups: RowGroups, order: np.ndarray, seed: int, epoch: int, window: int, start: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Groups (M,) and rows (M,) in order, a piece for each step of p from `start` on."""
    place_M, group_M, row_M = np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64)
    for p in range(max(0, start - window), len(order)):
        places = _places(groups, order, seed, epoch, window, p)
        place_M = np.concatenate([place_M, places])
        group_M = np.concatenate([group_M, np.full(len(places), order[p], np.int64)])
        row_M = np.concatenate([row_M, np.arange(len(places))])
        due_M = place_M < p + 1  # groups after this one have later places
        if p >= start:
            now_M = due_M & (place_M >= start)
            order_M = np.argsort(place_M[now_M], kind="stable")
            yield group_M[now_M][order_M], row_M[now_M][order_M]
        place_M, group_M, row_M = place_M[~due_M], group_M[~due_M], row_M[~due_M]
    rest_M = place_M >= start
    order_M = np.argsort(place_M[rest_M], kind="stable")
    yield group_M[rest_M][order_M], row_M[rest_M][order_M]
