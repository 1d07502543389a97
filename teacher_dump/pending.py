"""Which units are left to write, found without opening a million shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np

from pipeline.errors import UserError
from pipeline.index import read_index, units_of_files
from pipeline.schema import HELDOUT_UNIT
from teacher_dump.plan import Plan, Unit
from teacher_dump.work import Work, is_done


class Units(Sequence[Unit]):
    """Units of a plan, held as their numbers."""

    def __init__(self, plan: Plan, numbers: np.ndarray) -> None:
        self.plan, self.numbers = plan, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Unit: ...
    @overload
    def __getitem__(self, index: slice) -> Units: ...
    def __getitem__(self, index: int | slice) -> Unit | Units:
        if isinstance(index, slice):
            return Units(self.plan, self.numbers[index])
        number = int(self.numbers[index])
        if number >= HELDOUT_UNIT:
            return self.plan.unit(number - HELDOUT_UNIT, "heldout")
        return self.plan.unit(number, "train")


def wanted_units(work: Work) -> Units:
    """All units this run shall see to, held-out ones first."""
    train = work.config.unit_range()
    heldout = range(0 if train.start else work.config.heldout_shards)
    return Units(work.plan, np.concatenate([np.array(heldout, np.int64) + HELDOUT_UNIT, np.array(train, np.int64)]))


def pending_units(work: Work) -> Units:
    """Those of them that are not committed.

    A shard of the index, which was whole when that was built, is done if both its files are there; of the others JSON,
    size and footer digest are compared (`is_done`). Damage within a shard is `verify`'s business.
    """
    wanted = wanted_units(work)
    try:
        found = read_index(work.cache)
    except UserError:
        found = None  # a damaged index is built anew at the end
    listed, files = units_of_files(work.cache)
    indexed = found[1].unit if found is not None else np.zeros(0, np.int64)
    indexed = indexed[np.isin(indexed, listed) & np.isin(indexed, files)]
    done = set()
    for unit in Units(work.plan, wanted.numbers[np.isin(wanted.numbers, listed) & ~np.isin(wanted.numbers, indexed)]):
        if is_done(work, unit):
            done.add(unit.unit)
    done_N = np.concatenate([indexed, np.array(sorted(done), np.int64)])
    return Units(work.plan, wanted.numbers[~np.isin(wanted.numbers, done_N)])
