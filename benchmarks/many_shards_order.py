"""`python -m benchmarks.many_shards_order`: what a rank needs to know the order of an epoch of 10 T tokens.

The list of shards is made in memory as an index would give it (`benchmarks.many_shards` reads one from a disk); then a
row is asked for, at an epoch's start and in its middle, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.many_shards_cases import Meter
from benchmarks.measured import RESULTS, Row, cpu_name, table, write_results
from benchmarks.processes import in_own_process, report

LENGTH, GROUP_TOKENS, WINDOW = 2048, 131_072, 16
"""T; tokens of a row group and groups mixed at a time, the defaults of a dump and of a training."""
PLACES = {"the first row of an epoch": 0.0, "the next row in its middle": 0.5}


def measure(shards: int, tokens_per_shard: int, place: float) -> Row:
    """One row of an epoch's order, and what it took to come to it."""
    from pipeline.index import ShardEntries
    from student.data.order import RowGroups, epoch_rows

    def same(value: int) -> np.ndarray:
        return np.full(shards, value, np.int64)

    digest = np.zeros((shards, 32), np.uint8)
    sizes = {"bytes": same(1), "rows": same(tokens_per_shard // LENGTH), "tokens": same(tokens_per_shard)}
    entries = ShardEntries({"unit": np.arange(shards), **sizes, "sha256": digest, "footer_sha256": digest})
    meter = Meter()
    with meter():
        groups = RowGroups(entries, GROUP_TOKENS // LENGTH)
        next(epoch_rows(groups, 0, 0, WINDOW, int(place * groups.rows)))
    took = {"seconds": meter.seconds, "cpu_s": meter.cpu_s, "memory_mb": meter.memory_mb}
    return {"row_groups": len(groups), **took}


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=596_047, help="of the cache")
    parser.add_argument("--tokens_per_shard", type=int, default=16_777_216, help="a multiple of 2,048")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON")
    options = parser.parse_args(words)
    rows: list[Row] = []
    for what, place in PLACES.items():
        sizes: dict[str, Any] = {"shards": options.shards, "tokens_per_shard": options.tokens_per_shard}
        found = in_own_process("benchmarks.many_shards_order", {**sizes, "place": place})
        rows.append({"what": what, "shards": options.shards, **found})
    print(table(rows))
    print(write_results("many_shards_order", rows, device=cpu_name(), folder=options.results))
    return 0


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        report(measure(**json.loads(sys.argv[1])))
    else:
        sys.exit(main())
