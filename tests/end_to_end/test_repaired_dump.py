"""Damage, `verify --repair remove`, the dump again: the cache is what it was, row for row."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from helpers_dump import REPOSITORY, SHARDS, assert_same_rows, dump, environment, rows

from pipeline.commit import read_json


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 8
    path.write_bytes(data)


def verify(cache: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", "verify", "--cache", str(cache), *more]
    return subprocess.run(command, env=environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


def test_repaired_cache_is_the_undisturbed_one(teacher: Path, corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(undisturbed, tmp_path / "cache"))
    flip(cache / "shard-00003.parquet", 2000)  # a page: the dump alone would take this shard for whole
    flip(cache / "shard-00007.json", 300)
    flip(cache / "heldout-00000.parquet", -40)
    (cache / "shard-00011.parquet").unlink()
    flip(cache / "teacher" / "head.safetensors", 5000)
    flip(cache / "plan.json", 100)
    before = {path.name: path.stat().st_mtime_ns for path in cache.glob("*.parquet")}

    told = tmp_path / "verify.json"
    found = verify(cache, "--repair", "remove", "--json", str(told))
    assert found.returncode == 1, found.stderr
    damaged = ["shard-00003", "shard-00007", "shard-00011", "heldout-00000"]
    repair = read_json(told)["repair"]
    assert repair["dump_again"] == damaged and f"dump again: {' '.join(damaged)}\n" in found.stdout
    assert sorted(file for file, _ in repair["mend"]) == ["plan.json", "teacher/head.safetensors"]

    done = dump(teacher, corpus, cache, SHARDS)
    assert done.returncode == 0, done.stderr
    assert "(4 shards written now" in done.stdout
    found = verify(cache)
    assert found.returncode == 0, found.stdout
    after = rows(cache)
    assert after.keys() == rows(undisturbed).keys()
    assert_same_rows(rows(undisturbed), after)
    kept = {path.name: path.stat().st_mtime_ns for path in cache.glob("*.parquet") if path.stem not in damaged}
    assert kept == {name: time for name, time in before.items() if Path(name).stem not in damaged}
    for name in ("manifest.json", "plan.json", "teacher/head.safetensors", "teacher/teacher.json"):
        assert (cache / name).read_bytes() == (undisturbed / name).read_bytes(), name
