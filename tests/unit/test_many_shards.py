"""What is done with all shards of a cache at once grows little with their number: memory, and files opened and folders
listed; time is not looked at. A million shards are the benchmark's (`python -m benchmarks.many_shards`)."""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections import Counter
from pathlib import Path

import pytest
from helpers_fork import SERVER

from benchmarks import many_shards_order
from benchmarks.many_shards import main
from benchmarks.many_shards_cache import TOKENS_PER_SHARD, make_many_shards
from benchmarks.many_shards_cases import CASES, Meter
from pipeline.cache import Cache
from pipeline.errors import UserError, run_command
from pipeline.verify import check_unit, read_plan

FEW, MANY = 10_000, 40_000
AIM = 500.0
"""Bytes a shard: 500 MB for a million of them."""
OPENED = {"list_json": 1, "index": 1}
"""Files that a case opens of each shard: its JSON, where there is no index; no other case opens any."""
Taken = tuple[float, int, int]
"""Bytes of memory; files opened and folders listed in the cache."""


def grown(name: str, path: str, answer: multiprocessing.SimpleQueue[Taken]) -> None:
    """A case in a process of its own, whose memory nothing was freed in before."""
    seen: Counter[str] = Counter()

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if event in ("open", "os.listdir", "os.scandir") and str(arguments[0]).startswith(path):
            seen[event] += 1

    sys.addaudithook(note)
    meter = Meter()
    CASES[name][1](Path(path), meter)
    answer.put((1e6 * meter.memory_mb, seen["open"], seen["os.listdir"] + seen["os.scandir"]))


def taken(name: str, path: Path) -> Taken:
    answer: multiprocessing.SimpleQueue[Taken] = SERVER.SimpleQueue()
    process = SERVER.Process(target=grown, args=(name, str(path), answer))
    process.start()
    process.join(60)
    assert process.exitcode == 0, f"{name} failed"
    return answer.get()


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("many")
    for shards in (FEW, MANY):
        make_many_shards(folder / str(shards), shards)
        Cache(folder / str(shards)).build_index()
    return {shards: folder / str(shards) for shards in (FEW, MANY)}


@pytest.mark.skipif(sys.platform != "linux", reason="peaks of memory are read from /proc")
@pytest.mark.parametrize("name", CASES)
def test_memory_and_files_of_a_shard(name: str, caches: dict[int, Path]) -> None:
    if name == "list":  # the case before it that lists without an index has removed it
        for path in caches.values():
            Cache(path).build_index()
    seen: list[float] = []
    while len(seen) < 3 and not any(found < AIM for found in seen):  # on a busy machine threads overlap in other ways
        (few, opened_few, listed_few), (many, opened_many, listed_many) = (taken(name, caches[n]) for n in (FEW, MANY))
        seen.append((many - few) / (MANY - FEW))
    assert min(seen) < AIM, f"{CASES[name][0]}: {seen} bytes a shard"
    assert opened_many - opened_few == OPENED.get(name, 0) * (MANY - FEW), f"{CASES[name][0]}: files opened"
    assert listed_many == listed_few, f"{CASES[name][0]}: folders listed"


def test_the_shards_are_those_of_a_real_cache(tmp_path: Path) -> None:
    """Nothing is measured on records or files that a dump would not write."""
    make_many_shards(tmp_path / "c", 3)
    cache = Cache(tmp_path / "c")
    assert cache.shards().unit.tolist() == [0, 1, 2] and cache.shards().tokens.tolist() == [TOKENS_PER_SHARD] * 3
    with cache.open(cache.shards()[2]) as shard:
        assert shard.row_groups == 8 and not shard.read_group(7)["topk_ids"].any()
    plan, problems = read_plan(cache.path)
    assert not problems
    said = " ".join(str(problem) for problem in check_unit(cache.path, cache.manifest, plan, "shard-00001").problems)
    assert "sha256" in said and "footer" not in said, "its rows are zeros"


def test_the_benchmark_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--shards", "[50]", "--folder", str(tmp_path / "caches"), "--results", str(tmp_path)]
    assert main([*words, "--cases", '["index", "list"]']) == 0
    record = json.loads((tmp_path / "many_shards.json").read_text())
    assert [(row["case"], row["shards"]) for row in record["rows"]] == [("index", 50), ("list", 50)]
    assert record["rows"][1]["found"] == 50 and record["rows"][0]["index_bytes"] > 64 * 50
    assert "list shards by the index" in capsys.readouterr().out
    assert not (tmp_path / "caches" / "50").exists()
    assert main([*words, "--cases", '["list_json"]', "--limit_s", "0.01"]) == 0
    assert json.loads((tmp_path / "many_shards.json").read_text())["rows"][0]["beyond"] == "0.01 s"


def test_the_order_of_an_epoch_is_measured_for_as_many_row_groups_as_are_said(tmp_path: Path) -> None:
    words = ["--shards", "7", "--tokens_per_shard", "1048576", "--results", str(tmp_path)]
    assert many_shards_order.main(words) == 0
    rows = json.loads((tmp_path / "many_shards_order.json").read_text())["rows"]
    assert [row["row_groups"] for row in rows] == [7 * 8] * 2 and all(row["seconds"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shards", "[0]"], "--shards .0.: name at least one number"),
        (["--cases", '["open", "shut"]'], "--cases shut: there is no such case; known are open, list_json"),
        (["--limit_gb", "0"], "--limit_gb 0.0: must be above 0"),
    ],
)
def test_mistakes_are_one_sentence(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        main(words)
    assert run_command(lambda: main(words)) == 2
