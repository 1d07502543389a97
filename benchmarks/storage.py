"""`python -m benchmarks.storage`: what a cache costs on real teacher output, by column, by K, beside other layouts.

The rows come from a cache of a large K (dumped first if it is not there); every smaller K is cut from it exactly.
Speeds are thousands of tokens per second of CPU time, all threads counted: what one core does. Files are in the page
cache, so neither the disk nor fsync is in them. Every repetition times all layouts, in an order of its own; a figure
is the fastest repetition, for what disturbs one (other programs, the system looking for memory) only makes it slower.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.layouts import CHANGES, ArraysLayout, Layout, ShardLayout, tokens_of
from benchmarks.measured import RESULTS, Row, cpu_name, cpu_seconds, table, write_results
from benchmarks.smaller_k import with_smaller_k
from pipeline.cache import Cache
from pipeline.config import parse_into
from pipeline.errors import UserError, run_command
from pipeline.manifest import MANIFEST
from pipeline.schema import CacheSpec
from pipeline.shard import Columns, ShardRecord

DESCRIPTION = (
    "Measure bytes per token and the speed of writing and reading, by column and by K, on real teacher output; beside "
    "it pyarrow's defaults, uncompressed arrays and other zstd levels."
)
MANIFEST_FILE = Path(__file__).with_name("storage.yaml")
LENGTH = 512
SHOWN = ("topk_ids", "topk_logits", "log_tail", "attn_map")


@dataclass(frozen=True)
class Options:
    """What to measure."""

    cache: Path = Path("caches/storage")
    """cache with the rows; if there is none, the embedded teacher makes one (benchmarks/storage.yaml)"""
    ks: tuple[int, ...] = (16, 32, 64, 128, 256)
    """the K to measure; none may be larger than the cache's"""
    tokens: int = 131_072
    """tokens to measure on, at most; whole rows of the training shards, in order"""
    repetitions: int = 9
    """how often each write and read is timed; of single columns a third as often"""
    results: Path = RESULTS
    """folder that storage.json is written to"""
    data: Path = Path("data")
    """folder of the embedded teacher and corpus"""


def dump(options: Options) -> None:
    """Make the cache, in a process of its own, so that none of vLLM's threads live in this one."""
    command = [sys.executable, "-m", "teacher_dump", "--manifest", str(MANIFEST_FILE), "--cache", str(options.cache)]
    tokens = -(-options.tokens // LENGTH) * LENGTH
    command += ["--k", str(max(options.ks)), "--length", str(LENGTH), "--tokens_per_shard", str(tokens)]
    command += ["--data", str(options.data)]
    env = {"OMP_NUM_THREADS": str(os.cpu_count()), "TOKENIZERS_PARALLELISM": "false", "VLLM_NO_USAGE_STATS": "1"}
    print(" ".join(command[1:]), file=sys.stderr)
    if subprocess.run(command, env={**env, **os.environ}).returncode:
        raise UserError(f"--cache {options.cache}: its dump failed (see above); mend the cause and run this again")


def load_rows(cache: Cache, tokens: int) -> Columns:
    """Whole rows of the training shards in order, until they hold `tokens` tokens or there are no more."""
    parts: list[Columns] = []
    missing = tokens
    for group in cache.groups("train"):
        ends = np.cumsum(group["length"])
        rows = min(len(ends), int(np.searchsorted(ends, missing)) + 1)
        parts.append({name: values[:rows] for name, values in group.items()})
        missing -= int(ends[rows - 1])
        if missing <= 0:
            break
    return {
        name: sum((part[name] for part in parts), [])
        if isinstance(values, list)
        else np.concatenate([part[name] for part in parts])
        for name, values in parts[0].items()
    }


def in_groups(columns: Columns, spec: CacheSpec) -> list[Columns]:
    """Rows cut into row groups of the size a dump writes."""
    size = spec.rows_per_group
    starts = range(0, len(columns["length"]), size)
    return [{name: values[first : first + size] for name, values in columns.items()} for first in starts]


def measure(folder: Path, columns: Columns, spec: CacheSpec, origin: ShardRecord, repetitions: int) -> list[Row]:
    """One row per layout, ours first.

    `of_ours` fields are multiples of ours (2.0: twice the bytes, twice the speed); `median_over_best` says how much
    longer the median repetition took than the fastest, of writing or reading, whichever is more.

    Args:
        folder: for the files; about 10 times the rows' size.
        columns: the rows, and `spec` their shape.
        origin: record of the shard they come from.
    """
    groups = in_groups(columns, spec)
    tokens = tokens_of(groups)
    shards = [ShardLayout(folder / str(i), spec, groups, origin, name) for i, name in enumerate(CHANGES)]
    layouts: list[Layout] = [*shards, ArraysLayout(folder / "arrays", groups)]
    times = np.zeros((repetitions, len(layouts), 2))
    commits = []
    rng = np.random.default_rng(0)
    for repetition in range(repetitions):
        for i in rng.permutation(len(layouts)):  # what ran before leaves its mark on caches and allocator
            layout = layouts[i]
            times[repetition, i] = cpu_seconds(layout.write), cpu_seconds(layout.read)
            if layout is shards[0]:
                commits.append(cpu_seconds(shards[0].commit))
    best = times.min(axis=0)
    slower = np.median(times, axis=0) / best
    rows: list[Row] = []
    for i, layout in enumerate(layouts):
        row: Row = {
            "layout": layout.name,
            "K": spec.k,
            "bytes": layout.bytes,
            "bytes_per_token": layout.bytes / tokens,
            "bytes_of_ours": layout.bytes / layouts[0].bytes,
            "write": float(tokens / 1e3 / best[i, 0]),
            "write_of_ours": float(best[0, 0] / best[i, 0]),
            "read": float(tokens / 1e3 / best[i, 1]),
            "read_of_ours": float(best[0, 1] / best[i, 1]),
            "median_over_best": float(slower[i].max()),
        }
        if layout is shards[0]:
            row["commit"] = tokens / 1e3 / min(commits)
            row |= column_speeds(shards[0], tokens, -(-repetitions // 3))
        if isinstance(layout, ShardLayout):
            row["columns"] = {name: size / tokens for name, size in layout.column_bytes().items()}
        rows.append(row)
    return rows


def column_speeds(layout: ShardLayout, tokens: int, repetitions: int) -> Row:
    """Of each column: writing a file of it alone, reading it alone out of the shard, with our reader and with pyarrow.

    Returns:
        `columns_SPEED_ktok_per_s` and, as for whole rows, `columns_median_over_best`; dictionaries by column.
    """
    names = layout.spec.arrow_schema().names
    works = {"write": layout.write_column, "read": layout.read_column, "read_pyarrow": layout.read_column_plain}
    cases = [(speed, name) for speed in works for name in names]
    times = np.zeros((repetitions, len(cases)))
    rng = np.random.default_rng(0)
    for repetition in range(repetitions):
        for i in rng.permutation(len(cases)):
            speed, name = cases[i]
            times[repetition, i] = cpu_seconds(partial(works[speed], name))
    best = times.min(axis=0)
    slower = (np.median(times, axis=0) / best).reshape(len(works), -1).max(axis=0)
    found: Row = {f"columns_{speed}_ktok_per_s": {} for speed in works}
    for (speed, name), seconds in zip(cases, best, strict=True):
        found[f"columns_{speed}_ktok_per_s"][name] = float(tokens / 1e3 / seconds)
    return {**found, "columns_median_over_best": dict(zip(names, slower.tolist(), strict=True))}


def by_column(rows: Sequence[Row]) -> list[Row]:
    """The project's own layout, a line for each K and column: bytes per token, then ktok/s of a core."""
    speeds = {"write": "write", "read": "read", "read_pyarrow": "read, pyarrow"}
    return [
        {
            "K": row["K"],
            "column": name,
            "B/token": row["columns"][name],
            **{title: row[f"columns_{speed}_ktok_per_s"][name] for speed, title in speeds.items()},
        }
        for row in rows
        if row["layout"] == "ours"
        for name in SHOWN
        if name in row["columns"]
    ]


def by_k(rows: Sequence[Row]) -> list[Row]:
    """The project's own layout, one line for each K: bytes per token by column, then ktok/s of a core."""
    lines = []
    for row in rows:
        if row["layout"] == "ours":
            shown = {name: row["columns"][name] for name in SHOWN if name in row["columns"]}
            rest = row["bytes_per_token"] - sum(shown.values())
            speeds = {name: row[name] for name in ("write", "commit", "read")}
            total = {"B/token": row["bytes_per_token"]}
            lines.append({"K": row["K"], "tail mass": row["tail_mass"], **total, **shown, "rest": rest, **speeds})
    return lines


def beside_others(rows: Sequence[Row]) -> list[Row]:
    """Every layout, with bytes and speeds as multiples of the project's own in the same run."""
    names = {"K": "K", "layout": "layout", "bytes_per_token": "B/token", "bytes_of_ours": "bytes ×"}
    names |= {"write_of_ours": "write speed ×", "read_of_ours": "read speed ×"}
    return [{name: row[key] for key, name in names.items()} for row in rows]


def run(options: Options) -> int:
    """Measure, print the tables and write `storage.json`.

    Raises:
        UserError: an option is out of range, the cache's K is too small, or the dump failed.
    """
    for name in ("tokens", "repetitions"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: must be at least 1")
    if not options.ks or min(options.ks) < 1:
        raise UserError(f"--ks {list(options.ks)}: must name at least one K, all of them 1 or more")
    if not (options.cache / MANIFEST).is_file() or not Cache(options.cache).shards():
        dump(options)
    cache = Cache(options.cache)
    if max(options.ks) > cache.spec.k:
        raise UserError(f"--ks {max(options.ks)}: {options.cache} holds K={cache.spec.k}; name smaller ones")
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    columns, origin = load_rows(cache, options.tokens), next(cache.records())
    rows: list[Row] = []
    for k in options.ks:
        narrow, spec = with_smaller_k(columns, cache.spec, k)
        log_mass = narrow["log_tail"][..., spec.taus.index(1.0)] - narrow["lse"]
        with tempfile.TemporaryDirectory() as folder:
            measured = measure(Path(folder), narrow, spec, origin, options.repetitions)
        rows += [{**row, "tail_mass": float(np.nanmean(np.exp(log_mass)))} for row in measured]
    facts: dict[str, Any] = {
        "units": "bytes per token; write, commit, read (of columns too) in thousands of tokens per second of CPU time",
        "teacher": cache.manifest.settings["teacher"],
        "corpus": Path(cache.manifest.settings["corpus"]["source"]).name,
        "head_dtype": cache.manifest.compat["head_dtype"],
        "tokens": tokens_of([columns]),
        "rows_per_group": cache.spec.rows_per_group,
        "spec": cache.spec.to_record(),
        "repetitions": options.repetitions,
    }
    device = cpu_name()
    path = write_results("storage", rows, device=device, folder=options.results, **facts)
    text = f"{facts['corpus']}, {facts['teacher']}, {facts['head_dtype']} logits"
    print(f"{facts['tokens']:,} tokens of {text}, on {device}")
    print("\nThe project's shards: bytes per token, and ktok/s of one core\n")
    print(table(by_k(rows)))
    print("\nThe same by column: a file of it alone, and it alone out of a shard\n")
    print(table(by_column(rows)))
    print("\nBeside other layouts of the same rows: × is a multiple of ours in the same run\n")
    print(table(beside_others(rows)))
    print(f"\n{path}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    return run(parse_into(Options, "python -m benchmarks.storage", DESCRIPTION, "--config", arguments))


if __name__ == "__main__":
    sys.exit(run_command(main))
