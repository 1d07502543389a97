"""From shards to batches: row groups become tensors without Python lists, in an order that anyone can recompute.

The order of an epoch is a function of (seed, epoch, the cache's shards) alone: row groups are shuffled, then rows
across a window of 16 groups. Neither the number of ranks nor of workers enters; a rank takes its rows of every global
batch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule

from pipeline.cache import Cache
from pipeline.errors import UserError
from pipeline.index import ShardEntry
from pipeline.prefetch import ahead
from pipeline.row_checks import check_indices
from pipeline.schema import CacheSpec
from pipeline.shard import Columns, DamagedShard
from pipeline.teacher_folder import TeacherFolder
from student.batch import IGNORE, Batch
from student.identity import RunCache, Teaching, require_same_teacher
from student.ranks import require_equal_shares, share_of

PREFETCH_BATCHES = 4


@dataclass(frozen=True)
class GroupRef:
    """One row group of one committed shard."""

    record: ShardEntry
    group: int
    rows: int


def list_groups(cache: Cache, split: str) -> list[GroupRef]:
    """Row groups of a split in canonical order, from the shards' JSON files alone."""
    size = cache.spec.rows_per_group
    groups = []
    for record in cache.shards(split):
        for group, first in enumerate(range(0, record.rows, size)):
            groups.append(GroupRef(record, group, min(size, record.rows - first)))
    return groups


def epoch_rows(groups: list[GroupRef], seed: int, epoch: int, window: int) -> Iterator[tuple[int, int]]:
    """(group, row) pairs of one epoch, every row once, in the order that (seed, epoch) decides."""
    order = np.random.default_rng([seed, epoch, 0]).permutation(len(groups))
    for start in range(0, len(order), window):
        chosen = order[start : start + window]
        pairs = np.concatenate(
            [np.stack([np.full(groups[g].rows, g), np.arange(groups[g].rows)], axis=1) for g in chosen]
        )
        np.random.default_rng([seed, epoch, 1 + start]).shuffle(pairs)
        yield from map(tuple, pairs.tolist())


class GroupReader:
    """Row groups of one cache as NumPy columns; the most recent ones are kept decoded."""

    def __init__(self, cache: Cache, groups: list[GroupRef], keep: int) -> None:
        self.cache, self.groups, self.keep = cache, groups, keep
        self._decoded: OrderedDict[int, Columns] = OrderedDict()

    def group(self, index: int) -> Columns:
        if index in self._decoded:
            self._decoded.move_to_end(index)
            return self._decoded[index]
        ref = self.groups[index]
        columns = ["sequence_id", "length", "next_id", *self.cache.spec.shapes()]
        with self.cache.open(ref.record) as shard:
            if shard.group_rows[ref.group : ref.group + 1] != [ref.rows]:
                raise DamagedShard(
                    f"{shard.path}: its row groups hold {shard.group_rows} rows, not {ref.rows} at number {ref.group}: "
                    "another version wrote it; dump the cache again"
                )
            values = shard.read_group(ref.group, [c for c in columns if not c.startswith("tail_")])
        check_indices(values, self.cache.spec, f"{shard.path}: row group {ref.group}")
        self._decoded[index] = values
        while len(self._decoded) > self.keep:
            self._decoded.popitem(last=False)
        return values

    def batch(self, pairs: list[tuple[int, int]]) -> Batch:
        """Rows as one batch."""
        # A batch across two windows may need more groups than are kept: each is decoded once all the same.
        decoded = {index: self.group(index) for index in dict.fromkeys(group for group, _ in pairs)}
        columns: Columns = {}
        for name in decoded[pairs[0][0]]:
            columns[name] = np.stack([decoded[group][name][row] for group, row in pairs])
        return to_batch(columns, self.cache.spec)


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
        taus=spec.taus,
        tokens=int(length_B.sum()),
    )


class TrainLoader:
    """Batches of one epoch after another; its state is (epoch, batches done), the same on every rank.

    Several caches take turns in a random order that (seed, epoch) decides; a batch holds rows of one cache. Rows that
    do not fill the last batch of a cache are left for another epoch's order.
    """

    def __init__(
        self, caches: Sequence[Cache], batch_rows: int, seed: int, window: int, rank: int = 0, ranks: int = 1
    ) -> None:
        self.batch_rows, self.seed, self.window, self.rank, self.ranks = batch_rows, seed, window, rank, ranks
        self.groups = [list_groups(cache, "train") for cache in caches]
        self.readers = [GroupReader(c, g, window + 1) for c, g in zip(caches, self.groups, strict=True)]
        self.batches = [sum(ref.rows for ref in groups) // batch_rows for groups in self.groups]
        self.epoch = 0
        self.done = 0

    def __len__(self) -> int:
        return sum(self.batches)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.done = state["epoch"], state["done"]

    def plan(self, epoch: int, skip: int) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """(cache, rows) of the epoch's batches after the first `skip`."""
        turns = np.repeat(np.arange(len(self.batches)), self.batches)
        np.random.default_rng([self.seed, epoch, 2**31]).shuffle(turns)
        streams = [epoch_rows(groups, self.seed, epoch, self.window) for groups in self.groups]
        for number, cache in enumerate(turns.tolist()):
            rows = [next(streams[cache]) for _ in range(self.batch_rows)]
            if number >= skip:
                yield cache, rows

    def __iter__(self) -> Iterator[Batch]:
        if self.done >= len(self):
            self.epoch, self.done = self.epoch + 1, 0
        epoch, skip = self.epoch, self.done
        on_gpu = torch.cuda.is_available()

        def make() -> Iterator[Batch]:
            for cache, rows in self.plan(epoch, skip):
                batch = self.readers[cache].batch(share_of(rows, self.rank, self.ranks))
                yield batch.pin_memory() if on_gpu else batch

        for batch in ahead(make, PREFETCH_BATCHES):
            self.done += 1
            yield batch


class SplitLoader:
    """Batches of a split in stored order, every row once, the last batch smaller.

    Several ranks take the rows of a batch in turn. One that a small batch leaves without a row gets the first row with
    no targets, which counts for nothing: all ranks take as many steps.
    """

    def __init__(self, caches: Sequence[Cache], split: str, batch_rows: int, rank: int = 0, ranks: int = 1) -> None:
        self.caches, self.split, self.batch_rows, self.rank, self.ranks = caches, split, batch_rows, rank, ranks

    def __len__(self) -> int:
        return sum(-(-ref.rows // self.batch_rows) for c in self.caches for ref in list_groups(c, self.split))

    def __iter__(self) -> Iterator[Batch]:
        for cache in self.caches:
            reader = GroupReader(cache, list_groups(cache, self.split), keep=1)
            for index, ref in enumerate(reader.groups):
                for first in range(0, ref.rows, self.batch_rows):
                    rows = range(first, min(first + self.batch_rows, ref.rows))
                    own = rows[self.rank :: self.ranks]
                    batch = reader.batch([(index, row) for row in own or rows[:1]])
                    yield batch if own else batch.without_targets()


class CacheDataModule(LightningDataModule):
    """Training and held-out batches of one or several caches of one `compat_id`.

    The shards that are committed when it is made are its shards, whatever a dump adds later.

    Args:
        cache: folder of a cache, or several.
        batch_rows: rows of a global batch, over all ranks.
        seed: of the order.
        window_groups: row groups whose rows are shuffled together; that many are held decoded in memory.

    Raises:
        UserError: no such cache, caches of different teachers, no committed shard, or a batch larger than the cache.
    """

    def __init__(self, cache: str | list[str], batch_rows: int = 32, seed: int = 0, window_groups: int = 16) -> None:
        super().__init__()
        paths = [cache] if isinstance(cache, str) else list(cache)
        if not paths:
            raise UserError("--data.cache is empty: name a cache folder")
        for name, value in (("batch_rows", batch_rows), ("window_groups", window_groups)):
            if value < 1:
                raise UserError(f"--data.{name} {value}: must be at least 1")
        if seed < 0:
            raise UserError(f"--data.seed {seed}: must not be negative")
        self.caches = [RunCache(path) for path in paths]
        self.batch_rows, self.seed, self.window_groups = batch_rows, seed, window_groups
        for other in self.caches[1:]:
            require_same_teacher(Teaching.of(other), Teaching.of(self.caches[0]), "Only caches of one train together")
        for opened in self.caches:
            rows = sum(record.rows for record in opened.shards("train"))
            if rows < batch_rows:
                raise UserError(
                    f"{opened.path} has {rows} training rows, data.batch_rows is {batch_rows}: dump more "
                    f"shards, or set "
                    "data.batch_rows lower"
                )

    @property
    def teacher(self) -> TeacherFolder:
        return self.caches[0].teacher

    def setup(self, stage: str) -> None:
        """Every rank reads the shards that the first one found: a dump may be adding some at this moment."""
        if self.trainer is not None and self.trainer.world_size > 1:
            found = self.trainer.strategy.broadcast([cache.ranges() for cache in self.caches])
            for cache, ranges in zip(self.caches, found, strict=True):
                cache.use(ranges, "rank 0")

    @property
    def compat(self) -> dict[str, Any]:
        return self.caches[0].manifest.compat

    @property
    def compat_id(self) -> str:
        return self.caches[0].manifest.compat_id

    @property
    def specs(self) -> list[CacheSpec]:
        return [cache.spec for cache in self.caches]

    @property
    def max_length(self) -> int:
        return max(spec.length for spec in self.specs)

    @property
    def taus(self) -> tuple[float, ...]:
        """Temperatures, from the lowest to the highest that every cache's tails cover."""
        low = max(min(spec.taus) for spec in self.specs)
        high = min(max(spec.taus) for spec in self.specs)
        return tuple(sorted({tau for spec in self.specs for tau in spec.taus if low <= tau <= high}))

    @property
    def has_hidden(self) -> bool:
        return all(spec.window > 0 for spec in self.specs)

    @property
    def hidden_window(self) -> int:
        return self.specs[0].window

    @property
    def pool_block(self) -> int:
        """b of the first cache; 0 if any cache has no maps."""
        return self.specs[0].block if all(spec.block > 0 for spec in self.specs) else 0

    @property
    def groups(self) -> int:
        return self.specs[0].groups

    @property
    def train_tokens(self) -> int:
        """Tokens of the committed training shards."""
        return sum(record.tokens for cache in self.caches for record in cache.shards("train"))

    @property
    def steps_per_epoch(self) -> int:
        return sum(sum(r.rows for r in c.shards("train")) // self.batch_rows for c in self.caches)

    def train_dataloader(self) -> Any:
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        require_equal_shares(self.batch_rows, ranks)
        return TrainLoader(self.caches, self.batch_rows, self.seed, self.window_groups, rank, ranks)

    def val_dataloader(self) -> Any:
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return SplitLoader(self.caches, "heldout", self.batch_rows, rank, ranks)

    def heldout_batches(self, batch_rows: int) -> Iterator[Batch]:
        """Held-out rows in stored order."""
        return iter(SplitLoader(self.caches, "heldout", batch_rows))

    def train_batches(self, batch_rows: int) -> Iterator[Batch]:
        """Training rows in stored order, for evaluation."""
        return iter(SplitLoader(self.caches, "train", batch_rows))
