"""What a dump checks and mends before its engine starts: manifest, plan and teacher folder of an existing cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from helpers_prepared import dump_config, write_prepared_cache

from pipeline.errors import UserError
from pipeline.verify import verify_cache
from teacher_dump.pending import wanted_units
from teacher_dump.settings import DumpConfig
from teacher_dump.work import is_done, prepare


@pytest.fixture
def config(tmp_path: Path) -> DumpConfig:
    config = dump_config(tmp_path)
    write_prepared_cache(config)
    return config


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_a_prepared_cache_is_whole_and_the_same_command_changes_nothing(config: DumpConfig) -> None:
    files = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in config.cache.rglob("*.*")}
    work = prepare(config)
    assert all(is_done(work, unit) for unit in wanted_units(work))
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in config.cache.rglob("*.*")} == files
    result = verify_cache(config.cache)
    assert result.ok, result.problems


@pytest.mark.parametrize(
    "name", ["plan.json", "teacher/teacher.json", "teacher/head.safetensors", "teacher/token_bytes.parquet"]
)
@pytest.mark.parametrize("harm", ["flipped", "gone"])
def test_what_verify_says_the_dump_writes_anew_it_does(config: DumpConfig, name: str, harm: str) -> None:
    path = config.cache / name
    before = path.read_bytes()
    if harm == "gone":
        path.unlink()
    else:
        flip(path)
    result = verify_cache(config.cache, repair="list")
    assert {problem.file for problem in result.problems} == {name} and result.repair is not None
    assert result.repair.mend[0][1].startswith("run the dump that made the cache again")
    prepare(config)
    assert path.read_bytes() == before
    assert verify_cache(config.cache).ok


def test_a_lost_manifest_is_written_again_for_the_same_settings_only(config: DumpConfig) -> None:
    flip(config.cache / "manifest.json")
    with pytest.raises(UserError, match=r"manifest\.json .*restore it"):
        prepare(config)
    (config.cache / "manifest.json").rename(config.cache / "moved")
    with pytest.raises(
        UserError, match=r"has no manifest\.json, and heldout-00000\.json has data_id [0-9a-f]{32}, these"
    ):
        prepare(replace(config, k=7))
    assert not (config.cache / "manifest.json").exists()
    work = prepare(config)
    assert all(is_done(work, unit) for unit in wanted_units(work))
    assert verify_cache(config.cache).ok


def test_damage_is_mended_for_the_same_teacher_and_corpus_only(config: DumpConfig, tmp_path: Path) -> None:
    flip(config.cache / "plan.json")
    flip(config.cache / "teacher" / "head.safetensors")
    before = {path: path.read_bytes() for path in config.cache.rglob("*.*")}
    corpus = Path(config.corpus.source)
    corpus.write_bytes(corpus.read_bytes().replace(b"the", b"teh", 1))
    with pytest.raises(UserError, match="corpus: cache has '[0-9a-f]{32}', asked for '[0-9a-f]{32}'"):
        prepare(config)
    assert {path: path.read_bytes() for path in config.cache.rglob("*.*")} == before
