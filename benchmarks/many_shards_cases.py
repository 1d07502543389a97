"""The cases of `benchmarks.many_shards`, each in a process of its own: what it takes and what memory it needs.

    python -m benchmarks.many_shards_cases CASE CACHE

Memory is the growth of the process while the case runs, at its peak: what importing takes is left out.
"""

from __future__ import annotations

import contextlib
import cProfile
import io
import json
import pstats
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np

from benchmarks.many_shards_cache import STRIDE
from pipeline.cache import Cache
from pipeline.errors import UserError
from pipeline.index import write_index

MARK = "many_shards result: "


class Meter:
    """Time and memory of the part of a case that counts; with a profile if one is asked for."""

    def __init__(self, profile: bool = False) -> None:
        self.seconds = 0.0
        self.cpu_s = 0.0
        self.memory_mb = 0.0
        self.hot_spots: list[str] = []
        self._profile = profile

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        profile = cProfile.Profile() if self._profile else None
        before = _resident("VmRSS", reset=True)
        started, cpu = time.perf_counter(), time.process_time()
        if profile is not None:
            profile.enable()
        try:
            yield
        finally:
            if profile is not None:
                profile.disable()
                self.hot_spots = _hottest(profile)
            self.seconds, self.cpu_s = time.perf_counter() - started, time.process_time() - cpu
            self.memory_mb = max(0.0, (_resident("VmHWM") - before) / 1e6)


def _resident(field: str, reset: bool = False) -> int:
    """Bytes of this process in memory: now (VmRSS), or at most since the last reset (VmHWM)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def _hottest(profile: cProfile.Profile, lines: int = 12) -> list[str]:
    """The functions that took the most time by themselves: seconds, calls, name."""
    text = io.StringIO()
    found = pstats.Stats(profile, stream=text)
    rows = []
    for (file, _, name), (_, calls, own, _, _) in found.stats.items():  # type: ignore[attr-defined]
        rows.append((own, calls, f"{Path(file).name}:{name}" if file != "~" else name))
    return [f"{own:9.2f} s {calls:12,} calls  {name}" for own, calls, name in sorted(rows, reverse=True)[:lines]]


def opening(path: Path, meter: Meter) -> dict[str, Any]:
    """Open the cache: manifest only."""
    with meter():
        Cache(path)
    return {}


def listing(path: Path, meter: Meter) -> dict[str, Any]:
    """`Cache.shards`: from the index if there is one, else from every JSON."""
    cache = Cache(path)
    with meter():
        found = len(cache.shards())
    return {"found": found}


def listing_without_index(path: Path, meter: Meter) -> dict[str, Any]:
    (path / "index.json").unlink(missing_ok=True)
    return listing(path, meter)


def indexing(path: Path, meter: Meter) -> dict[str, Any]:
    """Build the index from nothing."""
    (path / "index.json").unlink(missing_ok=True)
    cache = Cache(path)
    with meter():
        cache.build_index()
    return {"index_bytes": _index_bytes(cache)}


def _index_bytes(cache: Cache) -> int:
    """Size of an index whose footer digests differ, as those of real shards do."""
    entries = cache.shards()
    shape = entries.footer_sha256.shape
    entries.columns["footer_sha256"] = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        write_index(Path(folder), entries, {"compat_id": "", "data_id": ""})
        return sum(file.stat().st_size for file in Path(folder).glob("index-*.parquet"))


def indexing_again(path: Path, meter: Meter) -> dict[str, Any]:
    """Build the index where one is there already and nothing is new."""
    cache = Cache(path)
    with meter():
        cache.build_index()
    return {}


def a_work(path: Path, more: int = 0) -> Any:
    """What a dump works from, for the shards that are there and `more`; without a teacher and a corpus, which
    neither planning nor claiming looks at."""
    from teacher_dump.corpus import CorpusConfig
    from teacher_dump.corpus_files import SourceFile
    from teacher_dump.plan import Plan
    from teacher_dump.settings import DumpConfig
    from teacher_dump.work import Work

    plan = json.loads((path / "plan.json").read_text())
    shards = plan["heldout_from"] // plan["stride"] - 1
    cache = Cache(path)
    file = SourceFile("none", "text", plan["extent"], plan["extent"], "none")
    tokens = cache.manifest.data["tokens_per_shard"]
    config = DumpConfig(CorpusConfig("none"), path, shards=shards + more, heldout_shards=0, tokens_per_shard=tokens)
    made = Plan((file,), plan["stride"], plan["stride"] * (shards + more + 1), plan["stride"] * (shards + more + 1))
    return Work(config, cast(Any, None), made, cache.manifest, cache.spec, path)


def pending(path: Path, meter: Meter) -> dict[str, Any]:
    """A dump that goes on: which units are still to be done. All are there but 100."""
    from teacher_dump.pending import pending_units

    work = a_work(path, 100)
    with meter():
        found = len(pending_units(work))
    return {"found": found}


def clearing(path: Path, meter: Meter) -> dict[str, Any]:
    """A dump starts: claims and temporaries of dead writers."""
    from pipeline.claim import clear_dead_claims

    with meter():
        clear_dead_claims(path)
    return {}


def next_units(path: Path, meter: Meter) -> dict[str, Any]:
    """Take the next 100 units that nobody has: look whether they are done, claim them, release them."""
    from pipeline.claim import try_claim
    from pipeline.schema import unit_name
    from teacher_dump.work import is_done

    work = a_work(path, 100)
    units = [work.plan.unit(work.config.shards - 100 + i, "train") for i in range(100)]
    with meter():
        for unit in units:
            claim = None if is_done(work, unit) else try_claim(path, unit_name(unit.unit))
            assert claim is not None
            claim.release()
    return {}


def data_module(path: Path, meter: Meter) -> dict[str, Any]:
    """What `python -m student` asks of its data before it builds the loader."""
    from student.data.loader import CacheDataModule

    with meter():
        data = CacheDataModule(str(path), batch_rows=32)
        found = {"steps": data.steps_per_epoch, "tokens": data.train_tokens}
    return found


def _loader(path: Path) -> Any:
    from student.data.loader import TrainLoader

    return TrainLoader([Cache(path)], batch_rows=32, seed=0, window=16)


def loader(path: Path, meter: Meter) -> dict[str, Any]:
    """Build the training loader."""
    import student.data.loader  # noqa: F401 - torch and Lightning are no part of what is measured

    with meter():
        made = _loader(path)
    return {"batches": len(made)}


def first_rows(path: Path, meter: Meter) -> dict[str, Any]:
    """Which rows the first batch of an epoch has."""
    made = _loader(path)
    with meter():
        next(made.plan(0, 0))
    return {}


def resumed_rows(path: Path, meter: Meter) -> dict[str, Any]:
    """Which rows the next batch has, in the middle of an epoch."""
    made = _loader(path)
    with meter():
        next(made.plan(0, len(made) // 2))
    return {}


def verifying(path: Path, meter: Meter) -> dict[str, Any]:
    """What `verify` does beside its shards: which there are, gaps, strays, ranges covered twice."""
    from pipeline.folder_checks import covered_twice, find_missing, shard_stems, stray_files, unit_of
    from pipeline.verify import parquet_bytes

    with meter():
        stems = shard_stems(path)
        parquet_bytes(path, stems)
        units = {unit for stem in stems if (unit := unit_of(stem)) is not None}
        find_missing(path, units, None)
        stray_files(path)
        covered_twice([("train", unit * STRIDE, (unit + 1) * STRIDE, unit) for unit in sorted(units)])
    return {"found": len(units)}


CASES: dict[str, tuple[str, Callable[[Path, Meter], dict[str, Any]]]] = {
    "open": ("open the cache", opening),
    "list_json": ("list shards, no index", listing_without_index),
    "index": ("build the index", indexing),
    "index_again": ("build it again", indexing_again),
    "list": ("list shards by the index", listing),
    "pending": ("dump: which units are left", pending),
    "clear": ("dump: clear dead claims", clearing),
    "next": ("dump: take 100 units", next_units),
    "data": ("train: open the data", data_module),
    "loader": ("train: make the loader", loader),
    "first": ("train: rows of the first batch", first_rows),
    "resume": ("train: rows after half an epoch", resumed_rows),
    "verify": ("verify: all but the shards", verifying),
}
"""Name -> (what it is, how it is done), in an order in which each finds what it needs: `index` before `list`."""


def main() -> int:
    name, path, *profile = sys.argv[1:]
    meter = Meter(bool(profile))
    try:
        found = CASES[name][1](Path(path), meter)
    except MemoryError:
        print(MARK + json.dumps({"beyond": "memory"}))
        return 0
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    for line in meter.hot_spots:
        print(line)
    print(MARK + json.dumps({"seconds": meter.seconds, "cpu_s": meter.cpu_s, "memory_mb": meter.memory_mb, **found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
