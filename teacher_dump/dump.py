"""Stage one end to end: plan -> units -> engine -> shards, resumed wherever it was cut."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from pipeline.cache import Cache
from pipeline.claim import clear_dead_claims
from teacher_dump.gpus import engine_slots
from teacher_dump.progress import DumpProgress
from teacher_dump.settings import DumpConfig
from teacher_dump.shard_loop import take_shards
from teacher_dump.work import is_done, prepare
from teacher_dump.workers import Workers


@dataclass(frozen=True)
class DumpResult:
    """What a dump did: shards written by this run, those the cache has in all, and workers lost on the way."""

    written: int
    shards: int
    tokens: int
    seconds: float
    lost: tuple[str, ...] = ()  # a sentence each


def run_dump(config: DumpConfig) -> DumpResult:
    """Bring a cache to `config.shards` training shards and `config.heldout_shards` held-out ones.

    Raises:
        UserError: see `engine_slots`, `prepare`, `take_shards` and `Workers.run`.
    """
    started = time.monotonic()
    slots = engine_slots(config.gpus, config.engine.tensor_parallel)
    work = prepare(config)
    clear_dead_claims(work.cache)
    units = work.units()
    pending = [unit for unit in units if not is_done(work, unit)]
    tokens = len(pending) * config.tokens_per_shard
    progress = DumpProgress(work.teacher.name, len(units), tokens, len(units) - len(pending))
    lost: list[str] = []
    try:
        if len(slots) > 1 and len(pending) > 1:
            try:
                lost = Workers(work, pending, slots[: len(pending)], progress).run()
            finally:
                clear_dead_claims(work.cache)  # of workers that were killed
        else:
            os.environ.update(slots[0].environment)
            take_shards(work, pending, progress)
    finally:
        progress.close()
    cache = Cache(work.cache)
    tokens = sum(int(cache.shards(split).tokens.sum()) for split in ("train", "heldout"))
    return DumpResult(len(progress.written), len(units), tokens, time.monotonic() - started, tuple(lost))
