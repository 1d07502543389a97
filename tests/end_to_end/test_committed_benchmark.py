"""The case `committed` of `benchmarks.dump_throughput`, a toy teacher in vLLM: figures, and where its time goes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers_dump import write_toy_corpus, write_toy_teacher

from benchmarks import host_times
from benchmarks.dump_throughput import measure
from benchmarks.measured import file_system, usable_cores
from benchmarks.throughput_case import Case
from pipeline.cache import Cache


def test_where_the_hosts_time_goes(tmp_path: Path) -> None:
    teacher = write_toy_teacher(tmp_path / "teacher")
    text = write_toy_corpus(tmp_path / "text.jsonl", documents=3000)
    profile, cache = tmp_path / "profile.txt", tmp_path / "cache"
    case = Case(
        "committed", str(teacher), 2048, 64, 8, 16, 2, tokens_per_shard=1024, dummy=False, cache=str(cache),
        text=str(text), profile=str(profile),
    )  # fmt: skip
    found = measure(case)
    assert found["tokens"] == Cache(cache).shards("train").tokens.sum() == 2048
    assert (found["cores"], found["file_system"]) == (usable_cores(), file_system(tmp_path))
    said = profile.read_text(encoding="utf-8").splitlines()
    assert said[0].startswith("2,048 tokens from text to committed shards in ")
    fields = [re.split("  +", line) for line in said[4:]]
    seconds = {(thread, what): float(spent) for thread, what, spent, _ in fields}
    engine = [spent for (thread, _), spent in seconds.items() if thread == "engine"]
    assert sum(engine) == pytest.approx(found["seconds"], rel=1e-2)
    for what in (host_times.STEP, host_times.TAKE, host_times.PUT, host_times.PLACE, host_times.LAST, host_times.CLOSE):
        assert seconds["engine", what] > 0, what
    rest = {what: spent for (thread, what), spent in seconds.items() if thread != "engine"}
    assert set(rest) == {host_times.TEXT, host_times.IDLE, "encoding, reading back, committing"}
    assert min(rest.values()) > 0 and seconds["engine", "the rest"] > 0
