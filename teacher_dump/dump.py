"""Stage one end to end: plan -> units -> engine -> shards, resumed wherever it was cut."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from pipeline.bfloat16 import slow_in_bfloat16
from pipeline.cache import Cache
from pipeline.claim import clear_dead_claims
from pipeline.index import WORTH_WHILE
from pipeline.stop_signals import errors_of_stops, stops_wait
from teacher_dump.engine import default_rows_per_step
from teacher_dump.gpus import EngineSlot, engine_slots
from teacher_dump.pending import Units, pending_units, wanted_units
from teacher_dump.progress import DumpProgress
from teacher_dump.settings import DumpConfig
from teacher_dump.shard_loop import take_shards
from teacher_dump.work import Work, prepare, require_cache
from teacher_dump.workers import Workers

log = logging.getLogger("teacher_dump")


@dataclass(frozen=True)
class DumpResult:
    """What a dump did: shards written by this run, those the cache has in all, and workers lost on the way."""

    written: int
    shards: int
    tokens: int
    seconds: float
    lost: tuple[str, ...] = ()  # a sentence each


Engines = Callable[[Work, Units, DumpProgress], list[str]]
"""Sees to it that units are committed, and looks for stops, which are put off; returns a sentence for every worker lost
on the way."""


def run_dump(config: DumpConfig) -> DumpResult:
    """Bring a cache to `config.shards` training shards and `config.heldout_shards` held-out ones.

    Raises:
        UserError: see `engine_slots`, `prepare`, `take_shards`, `Workers.run`, `connected` and `RayWorkers.run`.
        KeyboardInterrupt: on Ctrl-C, once nothing is half done.
    """
    if not config.ray:
        return run_with(config, partial(on_this_machine, engine_slots(config.gpus, config.engine.tensor_parallel)))
    from teacher_dump.ray_cluster import EngineRoom, connected
    from teacher_dump.ray_workers import RayWorkers

    with connected(config.ray, log.info) as ray:
        room = EngineRoom(ray, config.gpus, config.engine.tensor_parallel)
        config = for_devices(config, room.on_gpu)
        return run_with(config, lambda work, units, progress: RayWorkers(work, units, room, progress).run())


def for_devices(config: DumpConfig, on_gpu: bool) -> DumpConfig:
    """Fix what is left to the devices of the engines, if they are not this machine's."""
    rows = config.engine.rows_per_step or default_rows_per_step(config.length, on_gpu)
    return replace(config, engine=replace(config.engine, rows_per_step=rows))


def run_with(config: DumpConfig, engines: Engines) -> DumpResult:
    """A dump whose missing units `engines` sees to; see `run_dump`."""
    started = time.monotonic()
    with errors_of_stops():
        work = prepare(config)
        clear_dead_claims(work.cache)
        units, pending = wanted_units(work), pending_units(work)
    tokens = len(pending) * config.tokens_per_shard
    with stops_wait():
        progress = DumpProgress(work.teacher.name, len(units), tokens, len(units) - len(pending))
        try:
            lost = engines(work, pending, progress)
        finally:
            progress.close()
            with contextlib.suppress(OSError):  # what failed before it is what is told
                clear_dead_claims(work.cache)  # of workers, or of dumps beside this one, that were killed meanwhile
    require_cache(work)
    cache = Cache(work.cache)
    if progress.written and cache.unindexed() >= WORTH_WHILE:
        cache.build_index()
    there = [cache.shards(split) for split in ("train", "heldout")]
    tokens = sum(int(shards.tokens.sum()) for shards in there)
    return DumpResult(len(progress.written), sum(map(len, there)), tokens, time.monotonic() - started, tuple(lost))


def on_this_machine(slots: list[EngineSlot], work: Work, pending: Units, progress: DumpProgress) -> list[str]:
    """An engine in each slot, for as many as there are units; of one, in this process."""
    if len(pending) and work.config.engine.dtype == "bfloat16" and slow_in_bfloat16():
        log.warning(
            "engine.dtype is bfloat16, which this CPU does not multiply: a new cache with --engine.dtype float32 takes "
            "less than half the time (its logits are then float32, and only students of such caches go with it)"
        )
    if len(slots) > 1 and len(pending) > 1:
        return Workers(work, pending, slots[: len(pending)], progress).run()
    os.environ.update(slots[0].environment)
    take_shards(work, pending, progress)
    return []
