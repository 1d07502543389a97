"""Row groups of a cache as NumPy columns, decoded in threads before they are needed, and rows of them as batches."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from pipeline.cache import Cache
from pipeline.row_checks import check_indices
from pipeline.schema import CacheSpec
from pipeline.shard import Columns, DamagedShard
from pipeline.store import is_remote
from student.data.batch import IGNORE, Batch
from student.data.order import RowGroups

OPTIONAL = ("attn_map", "hidden", "tail_ids", "tail_logits")
"""Columns that only some losses want: reading one that nobody looks at costs what reading it costs."""
USUAL = ("attn_map", "hidden")
"""Those that are read unless others are asked for."""
THREADS = 2
"""Decoding releases Python's lock; one thread reads some 0.4 million tokens a second at K=64."""
THREADS_REMOTE = 4
"""Of a remote cache, each waits for its row group to arrive."""


class GroupReader:
    """Row groups of one cache; the most recent ones are kept decoded.

    Args:
        cache: the cache.
        groups: its row groups.
        keep: groups that are kept decoded besides those asked for ahead.
        optional: which of the columns `OPTIONAL` are read, where the cache holds them.
    """

    def __init__(self, cache: Cache, groups: RowGroups, keep: int, optional: Collection[str] = USUAL) -> None:
        self.cache, self.groups = cache, groups
        shaped = [name for name in cache.spec.shapes() if name not in OPTIONAL or name in optional]
        self.columns = ["sequence_id", "length", "next_id", *shaped]
        self.threads = THREADS_REMOTE if is_remote(cache.path) else THREADS
        self.keep = keep + self.threads
        self._decoded: OrderedDict[int, Columns] = OrderedDict()
        self._coming: dict[int, Future[Columns]] = {}
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")

    def will_need(self, groups: Iterable[int]) -> None:
        """Begin to decode the first few of `groups`, which are asked for soon."""
        for index in groups:
            if len(self._coming) >= self.threads:
                return
            if index not in self._decoded and index not in self._coming:
                self._coming[index] = self._pool.submit(self._decode, index)

    def group(self, index: int) -> Columns:
        """A row group's columns.

        Raises:
            DamagedShard: see `ShardFile`.
        """
        if index in self._decoded:
            self._decoded.move_to_end(index)
            return self._decoded[index]
        coming = self._coming.pop(index, None)
        values = self._decode(index) if coming is None else coming.result()
        self._decoded[index] = values
        while len(self._decoded) > self.keep:
            self._decoded.popitem(last=False)
        return values

    def _decode(self, index: int) -> Columns:
        number, rows = self.groups.find(index)[1], self.groups.rows_of(index)
        with self.cache.open(self.groups.shard(index)) as shard:
            if shard.group_rows[number : number + 1] != [rows]:
                raise DamagedShard(
                    f"{shard.path}: its row groups hold {shard.group_rows} rows, not {rows} at number {number}: "
                    "another version wrote it; dump the cache again"
                )
            values = shard.read_group(number, self.columns)
        check_indices(values, self.cache.spec, f"{shard.path}: row group {number}")
        return values

    def batch(self, pairs: list[tuple[int, int]]) -> Batch:
        """Rows, as (group, row) each, as one batch."""
        decoded = {index: self.group(index) for index in dict.fromkeys(group for group, _ in pairs)}
        columns: Columns = {}
        for name in decoded[pairs[0][0]]:
            columns[name] = np.stack([decoded[group][name][row] for group, row in pairs])
        return to_batch(columns, self.cache.spec)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def to_batch(columns: Columns, spec: CacheSpec) -> Batch:
    """NumPy columns of B rows as a batch; maps become float32."""
    length_B = torch.from_numpy(columns["length"].astype(np.int64))
    input_ids_BT = torch.from_numpy(columns["input_ids"].astype(np.int64))
    next_B = torch.from_numpy(columns["next_id"].astype(np.int64))
    positions_T = torch.arange(spec.length)
    target_BT = torch.roll(input_ids_BT, -1, dims=1)
    target_BT[positions_T[None, :] >= length_B[:, None] - 1] = IGNORE
    rows_B = torch.arange(len(length_B))
    target_BT[rows_B, length_B - 1] = torch.where(next_B >= 0, next_B, IGNORE)
    return Batch(
        sequence_id_B=torch.from_numpy(columns["sequence_id"]),
        length_B=length_B,
        input_ids_BT=input_ids_BT,
        segment_ids_BT=torch.from_numpy(columns["segment_ids"]),
        target_BT=target_BT,
        topk_ids_BTK=torch.from_numpy(columns["topk_ids"].astype(np.int32)),
        topk_logits_BTK=torch.from_numpy(columns["topk_logits"]),
        target_logit_BT=torch.from_numpy(columns["target_logit"]),
        lse_BT=torch.from_numpy(columns["lse"]),
        log_tail_BTR=torch.from_numpy(columns["log_tail"]),
        attn_map_BGnn=torch.from_numpy(columns["attn_map"].astype(np.float32)) if "attn_map" in columns else None,
        hidden_BWD=torch.from_numpy(columns["hidden"]) if "hidden" in columns else None,
        tail_ids_BTM=torch.from_numpy(columns["tail_ids"].astype(np.int32)) if "tail_ids" in columns else None,
        tail_logits_BTM=torch.from_numpy(columns["tail_logits"]) if "tail_logits" in columns else None,
        taus=spec.taus,
        tokens=int(length_B.sum()),
    )
