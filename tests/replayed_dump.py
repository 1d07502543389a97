"""A dump on Ray whose engines replay the rows of a cache that the real teacher wrote: no start to wait for.

    python -m replayed_dump RECORDED '{"pace": 0.05}' --manifest ... (the options of `python -m teacher_dump`)

Everything else is the real thing: driver, actors, packing, writers, claims.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from pipeline.cache import Cache
from pipeline.config import parse_into
from pipeline.errors import UserError, run_command
from pipeline.schema import unit_name
from teacher_dump.rows import CapturedRow, PackedRow
from teacher_dump.work import Work


@dataclass(frozen=True)
class Script:
    """How the engines behave.

    Attributes:
        pace: seconds of one step.
        rows: rows of one step.
        dies_at: shards at whose first row the process ends.
        complains_at: shards at whose first row a sentence is raised.
        steps_file: a line is added here for every step, to count the work.
        waits_at: a shard; at it and those after it engines wait until the file `until` is there, so that the dump is
            not over before the test has done what it is to do.
    """

    pace: float = 0.02
    rows: int = 4
    dies_at: tuple[str, ...] = ()
    complains_at: tuple[str, ...] = ()
    steps_file: str = ""
    waits_at: str = ""
    until: str = ""


class ReplayEngine:
    """Gives out recorded rows, after a look whether the text packed now is what was recorded."""

    def __init__(self, recorded: Path, script: Script) -> None:
        self.cache, self.script = Cache(recorded), script
        self.rows_per_step = script.rows

    def stream_units(self, units: Iterable[tuple[int, Iterable[PackedRow]]]) -> Iterator[tuple[int, CapturedRow]]:
        """As `TeacherEngine` does: a step's rows are read before those of the step before it are handed out."""
        waiting: list[tuple[int, CapturedRow]] = []
        for step in self._steps(units):
            yield from waiting
            waiting = step
        yield from waiting

    def _steps(self, units: Iterable[tuple[int, Iterable[PackedRow]]]) -> Iterator[list[tuple[int, CapturedRow]]]:
        for unit, rows in units:
            with self.cache.open(self.cache.record(unit)) as shard:
                columns = shard.read_group(0)
            source = iter(rows)
            while step := list(islice(source, self.rows_per_step)):
                self._act(unit_name(unit), step)
                yield [(unit, captured(columns, row)) for row in step]

    def _act(self, name: str, step: list[PackedRow]) -> None:
        if name in self.script.dies_at:
            os._exit(1)
        if name in self.script.complains_at:
            raise UserError(f"{name} is poison")
        while self.script.waits_at and name >= self.script.waits_at and not os.path.exists(self.script.until):
            time.sleep(0.01)
        time.sleep(self.script.pace)
        if self.script.steps_file:
            with open(self.script.steps_file, "a") as file:
                file.write(f"{name} {len(step)} {os.getpid()}\n")

    def close(self) -> None:
        pass


def captured(columns: dict[str, np.ndarray], packed: PackedRow) -> CapturedRow:
    at, length = packed.row, packed.length
    np.testing.assert_array_equal(columns["input_ids"][at][:length], packed.input_ids_L)
    return CapturedRow(
        packed=packed,
        topk_ids_LK=columns["topk_ids"][at][:length].astype(np.int32),
        topk_logits_LK=columns["topk_logits"][at][:length],
        target_logit_L=columns["target_logit"][at][:length],
        lse_L=columns["lse"][at][:length],
        log_tail_LR=columns["log_tail"][at][:length],
        attn_map_Gnn=columns["attn_map"][at].astype(np.float32),
        hidden_WD=columns["hidden"][at],
    )


def start(recorded: Path, script: Script, work: Work) -> ReplayEngine:
    return ReplayEngine(recorded, script)


def main() -> int:
    from replayed_dump import Script, start  # not of __main__: actors unpickle them by name

    from teacher_dump.dump import for_devices, run_with
    from teacher_dump.ray_cluster import EngineRoom, connected
    from teacher_dump.ray_workers import RayWorkers
    from teacher_dump.settings import DumpConfig

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    told = {name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(sys.argv[2]).items()}
    make = partial(start, Path(sys.argv[1]), Script(**told))
    config = parse_into(DumpConfig, "replayed_dump", "", "--manifest", sys.argv[3:])
    with connected(config.ray, logging.info) as ray:
        room = EngineRoom(ray, config.gpus, config.engine.tensor_parallel)
        config = for_devices(config, room.on_gpu)
        result = run_with(config, lambda *work: RayWorkers(work[0], work[1], room, work[2], make).run())
    print(json.dumps({"written": result.written, "seconds": round(result.seconds, 3), "lost": len(result.lost)}))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
