"""`python -m benchmarks.many_shards`: what a cache of a million shards costs to open, list, resume and train from.

The shards are really there: a JSON and a Parquet file each (see `benchmarks/many_shards_cache.py`). Every case runs in
a process of its own; the file system's caches are warm, for the files were just written. Beside the time of the clock
stands that of the CPU, which other programs disturb less.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.many_shards_cache import make_many_shards
from benchmarks.many_shards_cases import CASES, MARK
from benchmarks.measured import RESULTS, Row, cpu_name, table, write_results
from pipeline.config import parse_into
from pipeline.errors import UserError, run_command

DESCRIPTION = (
    "Make caches of many shards on disk and measure time and memory of what is done with all of their shards at once: "
    "opening, listing, indexing, going on with a dump, claiming, and the order of training."
)


@dataclass(frozen=True)
class Options:
    """What to measure."""

    shards: tuple[int, ...] = (20_000, 1_000_000)
    """numbers of shards, a cache each; a million takes 4 GB of disk, 3 million inodes and a few minutes to make"""
    cases: tuple[str, ...] = tuple(CASES)
    """which cases"""
    folder: Path = Path("caches/many-shards")
    """where the caches are made; they are removed afterwards"""
    keep: bool = False
    """leave the caches there, for the next time"""
    limit_s: float = 600.0
    """a case that takes longer is stopped"""
    limit_gb: float = 4.0
    """a case that needs more memory is stopped"""
    profile: bool = False
    """show the functions that take the most time; times are longer then, and no results are written"""
    results: Path = RESULTS
    """folder that many_shards.json is written to"""

    def check(self) -> None:
        """Refuse what cannot work.

        Raises:
            UserError: names the option.
        """
        if not self.shards or min(self.shards) < 1:
            raise UserError(f"--shards {list(self.shards)}: name at least one number, all of them 1 or more")
        unknown = sorted(set(self.cases) - set(CASES))
        if unknown:
            raise UserError(f"--cases {', '.join(unknown)}: there is no such case; known are {', '.join(CASES)}")
        for name in ("limit_s", "limit_gb"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name} {getattr(self, name)}: must be above 0")


def measure(name: str, path: Path, shards: int, options: Options) -> Row:
    """Run one case.

    Raises:
        UserError: it failed; says how.
    """
    command = [sys.executable, "-m", "benchmarks.many_shards_cases", name, str(path)]
    limit = int(options.limit_gb * 1e9)
    row: Row = {"shards": shards, "case": name, "what": CASES[name][0]}
    try:
        done = subprocess.run(
            command + ["profile"] * options.profile,
            stdout=subprocess.PIPE,
            text=True,
            timeout=options.limit_s,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        )
    except subprocess.TimeoutExpired:
        return {**row, "seconds": None, "memory_mb": None, "beyond": f"{options.limit_s:g} s"}
    for line in done.stdout.splitlines():
        if not line.startswith(MARK):
            print(f"  {line}")
            continue
        found = json.loads(line.removeprefix(MARK))
        if found.pop("beyond", None):
            return {**row, "seconds": None, "memory_mb": None, "beyond": f"{options.limit_gb:g} GB"}
        return {**row, **found}
    if done.returncode < 0:  # numpy or Arrow met the limit where nothing could be raised
        return {**row, "seconds": None, "memory_mb": None, "beyond": f"{options.limit_gb:g} GB"}
    raise UserError(f"case {name} of {path} ended with status {done.returncode} and said nothing of time and memory")


def run(options: Options) -> int:
    """Make the caches, measure, print the table and write the results.

    Raises:
        UserError: see `Options.check` and `measure`.
    """
    options.check()
    rows: list[Row] = []
    for shards in options.shards:
        path = options.folder / str(shards)
        started = time.monotonic()
        make_many_shards(path, shards)
        print(f"{path}: {shards:,} shards, made in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        try:
            for name in CASES:
                if name in options.cases:
                    rows.append(measure(name, path, shards, options))
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        finally:
            if not options.keep:
                shutil.rmtree(path)
    print(table(rows, ["shards", "what", "seconds", "cpu_s", "memory_mb", "beyond"]))
    if options.profile:
        return 0
    limits = {"limit_s": options.limit_s, "limit_gb": options.limit_gb}
    path = write_results("many_shards", rows, device=cpu_name(), folder=options.results, settings=limits)
    print(f"\n{path}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    return run(parse_into(Options, "python -m benchmarks.many_shards", DESCRIPTION, "--config", arguments))


if __name__ == "__main__":
    sys.exit(run_command(main))
