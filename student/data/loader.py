"""From shards to batches: row groups become tensors without Python lists, in an order that anyone can recompute.

The order of an epoch (`order.py`) is a function of (seed, epoch, the cache's shards) alone. Neither the number
of ranks nor of threads enters; a rank takes its rows of every global batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule

from pipeline.cache import Cache
from pipeline.errors import UserError
from pipeline.local_copies import LocalCopies, default_folder
from pipeline.prefetch import ahead
from pipeline.schema import CacheSpec
from pipeline.store import is_remote, open_path
from pipeline.teacher_folder import TeacherFolder
from student.data.batch import Batch
from student.data.cache_view import CacheView
from student.data.group_reader import USUAL, GroupReader
from student.data.order import RowGroups, epoch_rows
from student.runs.identity import RunCache, Teaching, require_same_teacher
from student.training.ranks import require_equal_shares, share_of

PREFETCH_BATCHES = 4
GROUPS_AHEAD = 5
"""So many row groups' worth of rows are looked ahead in the order, for what to decode next."""


class TrainLoader:
    """Batches of one epoch after another; its state is (epoch, batches done), the same on every rank.

    Several caches take turns in a random order that (seed, epoch) decides; a batch holds rows of one cache. Rows that
    do not fill the last batch of a cache are left for another epoch's order.
    """

    def __init__(
        self,
        caches: Sequence[Cache],
        batch_rows: int,
        seed: int,
        window: int,
        rank: int = 0,
        ranks: int = 1,
        optional: Collection[str] = USUAL,
    ) -> None:
        self.batch_rows, self.seed, self.window, self.rank, self.ranks = batch_rows, seed, window, rank, ranks
        self.groups = [RowGroups(cache.shards("train"), cache.spec.rows_per_group) for cache in caches]
        spans = [-(-batch_rows // groups.size) for groups in self.groups]  # groups that a batch's rows come and go in
        self.ahead = [GROUPS_AHEAD * groups.size // batch_rows + 1 for groups in self.groups]
        self.readers = [
            GroupReader(c, g, window + 1 + span, optional)
            for c, g, span in zip(caches, self.groups, spans, strict=True)
        ]
        self.batches = [groups.rows // batch_rows for groups in self.groups]
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
        turns = np.repeat(np.arange(len(self.batches), dtype=np.uint16), self.batches)  # a million shards have many
        np.random.default_rng([self.seed, epoch, 2**31]).shuffle(turns)
        done = np.bincount(turns[:skip], minlength=len(self.batches)) * self.batch_rows
        streams = [
            epoch_rows(groups, self.seed, epoch, self.window, int(rows))
            for groups, rows in zip(self.groups, done, strict=True)
        ]
        for cache in turns[skip:].tolist():
            yield cache, [next(streams[cache]) for _ in range(self.batch_rows)]

    def __iter__(self) -> Iterator[Batch]:
        if self.done >= len(self):
            self.epoch, self.done = self.epoch + 1, 0
        epoch, skip = self.epoch, self.done
        on_gpu = torch.cuda.is_available()

        def make() -> Iterator[Batch]:
            shares = ((cache, share_of(rows, self.rank, self.ranks)) for cache, rows in self.plan(epoch, skip))
            upcoming = deque(islice(shares, max(self.ahead)))
            while upcoming:
                for cache, reader in enumerate(self.readers):
                    reader.will_need(dict.fromkeys(group for c, rows in upcoming if c == cache for group, _ in rows))
                cache, rows = upcoming.popleft()
                upcoming.extend(islice(shares, 1))
                batch = self.readers[cache].batch(rows)
                yield batch.pin_memory() if on_gpu else batch

        for batch in ahead(make, PREFETCH_BATCHES):
            self.done += 1
            yield batch


class SplitLoader:
    """Batches of a split in stored order, every row once, the last batch smaller.

    Several ranks take the rows of a batch in turn. One that a small batch leaves without a row gets the first row with
    no targets, which counts for nothing: all ranks take as many steps.
    """

    def __init__(
        self,
        caches: Sequence[Cache],
        split: str,
        batch_rows: int,
        rank: int = 0,
        ranks: int = 1,
        optional: Collection[str] = USUAL,
    ) -> None:
        self.caches, self.split, self.batch_rows, self.rank, self.ranks = caches, split, batch_rows, rank, ranks
        self.optional = optional

    def __len__(self) -> int:
        return sum(
            -(-groups.rows_of(index) // self.batch_rows) for _, groups in self._groups() for index in range(len(groups))
        )

    def __iter__(self) -> Iterator[Batch]:
        for cache, groups in self._groups():
            reader = GroupReader(cache, groups, 1, self.optional)
            for index in range(len(groups)):
                reader.will_need(range(index, min(index + 2, len(groups))))
                rows = groups.rows_of(index)
                for first in range(0, rows, self.batch_rows):
                    whole = range(first, min(first + self.batch_rows, rows))
                    own = whole[self.rank :: self.ranks]
                    batch = reader.batch([(index, row) for row in own or whole[:1]])
                    yield batch if own else batch.without_targets()
            reader.close()

    def _groups(self) -> Iterator[tuple[Cache, RowGroups]]:
        for cache in self.caches:
            yield cache, RowGroups(cache.shards(self.split), cache.spec.rows_per_group)


class CacheDataModule(LightningDataModule):
    """Training and held-out batches of one or several caches of one `compat_id`.

    The shards that are committed when it is made are its shards, whatever a dump adds later.

    Args:
        cache: folder of a cache, or several.
        batch_rows: rows of a global batch, over all ranks.
        seed: of the order.
        window_groups: row groups whose rows are shuffled together; that many are held decoded in memory.
        local_copies: folder on a local disk for what is read of a cache on an object store; None: `distil-xlstm/parts`
            in the user's cache folder.
        local_copies_gb: size of that folder at most, in GB; 0 keeps nothing.
        k: train on the first so many ids of every position, the others' mass in the tail, as if the dump had kept no
            more; null: the cache's K. Held-out rows keep it.
        hidden_window: train on hidden states averaged over windows of so many tokens, a multiple of the cache's; null:
            the cache's.

    Raises:
        UserError: no such cache, caches of different teachers, no committed shard, a batch larger than the cache, or a
            k or hidden_window that it cannot give.
    """

    def __init__(
        self,
        cache: str | list[str],
        batch_rows: int = 32,
        seed: int = 0,
        window_groups: int = 16,
        local_copies: str | None = None,
        local_copies_gb: float = 50.0,
        k: int | None = None,
        hidden_window: int | None = None,
    ) -> None:
        super().__init__()
        paths = [cache] if isinstance(cache, str) else list(cache)
        if not paths:
            raise UserError("--data.cache is empty: name a cache folder")
        for name, value in (("batch_rows", batch_rows), ("window_groups", window_groups)):
            if value < 1:
                raise UserError(f"--data.{name} {value}: must be at least 1")
        if seed < 0:
            raise UserError(f"--data.seed {seed}: must not be negative")
        copies = None
        if local_copies_gb > 0 and any(is_remote(open_path(path)) for path in paths):
            copies = LocalCopies(Path(local_copies or default_folder() / "parts"), int(local_copies_gb * 1e9))
        self.caches = [RunCache(path, copies) for path in paths]
        self.batch_rows, self.seed, self.window_groups = batch_rows, seed, window_groups
        self.view, self.optional = CacheView(k, hidden_window), tuple(USUAL)
        for other in self.caches[1:]:
            require_same_teacher(Teaching.of(other), Teaching.of(self.caches[0]), "Only caches of one train together")
        for opened in self.caches:
            self.view.check(opened.spec, opened.path)
            rows = int(opened.shards("train").rows.sum())
            if rows < batch_rows:
                raise UserError(
                    f"{opened.path} has {rows} training rows, data.batch_rows is {batch_rows}: dump more shards, or "
                    "set data.batch_rows lower"
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
    def tail_samples(self) -> int:
        """M, draws of every position's tail; 0 if a cache has none."""
        return min(spec.tail_samples for spec in self.specs)

    @property
    def keeps_k(self) -> bool:
        """Whether all stored ids are trained on."""
        return self.view.k is None or all(spec.k == self.view.k for spec in self.specs)

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
        return sum(int(cache.shards("train").tokens.sum()) for cache in self.caches)

    @property
    def steps_per_epoch(self) -> int:
        return sum(int(cache.shards("train").rows.sum()) // self.batch_rows for cache in self.caches)

    def read_only(self, optional: Collection[str]) -> None:
        """Of the optional columns, read these for training and no others; `group_reader.OPTIONAL` lists them."""
        self.optional = tuple(optional)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """A training batch as it is trained on, made where the student is: on a GPU that takes next to no time."""
        return self.view.of(batch) if self.trainer is not None and self.trainer.training else batch

    def train_dataloader(self) -> Any:
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        require_equal_shares(self.batch_rows, ranks)
        return TrainLoader(self.caches, self.batch_rows, self.seed, self.window_groups, rank, ranks, self.optional)

    def val_dataloader(self) -> Any:
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return SplitLoader(self.caches, "heldout", self.batch_rows, rank, ranks, optional=())

    def heldout_batches(self, batch_rows: int) -> Iterator[Batch]:
        """Held-out rows in stored order."""
        return iter(SplitLoader(self.caches, "heldout", batch_rows))

    def train_batches(self, batch_rows: int) -> Iterator[Batch]:
        """Training rows in stored order, for evaluation."""
        return iter(SplitLoader(self.caches, "train", batch_rows))
