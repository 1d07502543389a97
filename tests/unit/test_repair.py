"""`verify --repair` names exactly what must be dumped again, and removes that and nothing else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers_cache import commit_toy_shard, write_toy_cache

from pipeline.__main__ import main
from pipeline.cache import Cache
from pipeline.claim import try_claim
from pipeline.commit import commit_json, read_json
from pipeline.manifest import read_manifest
from pipeline.repair import Repair
from pipeline.verify import verify_cache


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_cache(
        tmp_path_factory.mktemp("repair") / "c", units=5, heldout_units=2, rows=4, length=32, block=8
    )


@pytest.fixture
def cache(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "c"))


def flip(path: Path, offset: int = -200) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def files(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in cache.rglob("*") if path.is_file()}


def repaired(cache: Path, mode: str) -> Repair:
    result = verify_cache(cache, repair=mode)  # type: ignore[arg-type]
    assert result.repair is not None
    return result.repair


def test_nothing_is_wrong_and_nothing_is_touched(cache: Path) -> None:
    before = files(cache)
    repair = repaired(cache, "remove")
    assert (repair.dump_again, repair.removed, repair.left_alone, repair.mend) == ([], [], [], [])
    assert files(cache) == before
    assert list(repair.lines()) == ["dump again: nothing"]


HARM: dict[str, Callable[[Path], object]] = {
    "page": lambda stem: flip(stem.with_suffix(".parquet"), 700),
    "footer": lambda stem: flip(stem.with_suffix(".parquet"), -100),
    "cut": lambda stem: os.truncate(stem.with_suffix(".parquet"), 500),
    "gone": lambda stem: stem.with_suffix(".parquet").unlink(),
    "record": lambda stem: flip(stem.with_suffix(".json")),
    "record cut": lambda stem: os.truncate(stem.with_suffix(".json"), 20),
    "record empty": lambda stem: os.truncate(stem.with_suffix(".json"), 0),
    "record of another": lambda stem: shutil.copy(stem.with_name("shard-00000.json"), stem.with_suffix(".json")),
    "wrong sum": lambda stem: commit_json(
        stem.with_suffix(".json"), {**read_json(stem.with_suffix(".json")), "tokens": 1}
    ),
    "wrong range": lambda stem: commit_json(
        stem.with_suffix(".json"), {**read_json(stem.with_suffix(".json")), "source": {"start": 7, "end": 9}}
    ),
    "other cache's": lambda stem: commit_json(
        stem.with_suffix(".json"), {**read_json(stem.with_suffix(".json")), "data_id": "0" * 32}
    ),
}


@pytest.mark.parametrize("name", ["shard-00002", "heldout-00001"])
@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_shard_is_removed_and_nothing_else(cache: Path, harm: str, name: str) -> None:
    """A record that is damaged says nothing about its rows: they go too."""
    HARM[harm](cache / name)
    before = files(cache)
    listed = repaired(cache, "list")
    assert listed.dump_again == [name] and listed.removed == [] and files(cache) == before
    removed = repaired(cache, "remove")
    own = {f"{name}.json", f"{name}.parquet"}
    assert removed.dump_again == [name] and set(removed.removed) == own & before.keys()
    assert files(cache) == {file: data for file, data in before.items() if file not in own}
    again = repaired(cache, "list")
    # The last unit of a split leaves no gap behind: nobody can know that there was one.
    assert again.dump_again == ([name] if name == "shard-00002" else []) and again.mend == []
    commit_toy_shard(cache, read_manifest(cache), Cache(cache).shards("heldout")[0].unit + 1, 4)
    commit_toy_shard(cache, read_manifest(cache), 2, 4)
    assert verify_cache(cache).ok


def test_the_json_goes_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader never meets a JSON without its Parquet file, also if the repair is killed in between."""
    flip(cache / "shard-00001.parquet", 700)
    seen = []
    real = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.parent == cache:
            seen.append((path.name, (cache / "shard-00001.json").exists(), (cache / "shard-00001.parquet").exists()))
        real(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    repaired(cache, "remove")
    assert seen == [("shard-00001.json", True, True), ("shard-00001.parquet", False, True)]


def test_what_a_dump_is_writing_is_left_alone(cache: Path) -> None:
    for name in ("shard-00001", "shard-00003"):
        flip(cache / f"{name}.parquet", 700)
    before = files(cache)
    claim = try_claim(cache, "shard-00001")
    assert claim is not None
    with claim:
        assert repaired(cache, "list").left_alone == ["shard-00001"]
        repair = repaired(cache, "remove")
    assert repair.left_alone == ["shard-00001"] and repair.dump_again == ["shard-00003"]
    assert files(cache).keys() == before.keys() - {"shard-00003.json", "shard-00003.parquet"}
    assert "left alone, a dump is writing them: shard-00001" in repair.lines()


def test_a_dead_writers_claim_does_not_protect_damage(cache: Path) -> None:
    flip(cache / "shard-00001.parquet", 700)
    claim = try_claim(cache, "shard-00001")
    assert claim is not None
    claim.release()
    machine = read_claim_machine(cache)
    (cache / "claims" / "shard-00001.json").write_text(f'{{"id": "x", "machine": "{machine}", "pid": 0}}')
    assert repaired(cache, "remove").dump_again == ["shard-00001"]


def read_claim_machine(cache: Path) -> str:
    from pipeline.commit import machine

    return machine()


def test_a_shard_that_was_mended_between_check_and_removal_stays(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(cache / "shard-00001.parquet", 700)

    def mended(folder: Path, name: str) -> object:
        commit_toy_shard(cache, read_manifest(cache), 1, 4)  # the dump was faster
        return try_claim(folder, name)

    monkeypatch.setattr("pipeline.repair.try_claim", mended)
    repair = repaired(cache, "remove")
    assert (repair.dump_again, repair.removed, repair.left_alone) == ([], [], [])
    assert verify_cache(cache).ok


def test_several_shards_and_a_gap(cache: Path) -> None:
    flip(cache / "shard-00004.parquet", 700)
    flip(cache / "heldout-00000.json")
    for suffix in ("json", "parquet"):
        (cache / f"shard-00002.{suffix}").unlink()
    repair = repaired(cache, "remove")
    assert repair.dump_again == ["shard-00002", "shard-00004", "heldout-00000"]
    lines = list(repair.lines())
    assert lines[0] == "dump again: shard-00002 shard-00004 heldout-00000"
    assert "they are removed; then run the dump" in lines[1] and "SHARDS 5, --heldout_shards 1 at least" in lines[1]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("manifest.json", "restore it from a copy; or move it away and run the dump"),
        ("plan.json", "run the dump that made the cache again: it writes this file anew"),
        ("teacher/teacher.json", "run the dump that made the cache again: it writes this file anew"),
        ("teacher/head.safetensors", "run the dump that made the cache again: it writes this file anew"),
    ],
)
def test_other_damage_is_told_with_its_remedy_and_left(cache: Path, name: str, what: str) -> None:
    flip(cache / name, -30)
    before = files(cache)
    repair = repaired(cache, "remove")
    assert files(cache) == before and repair.dump_again == []
    [(file, told)] = repair.mend
    assert file == name and told.startswith(what)


def test_record_under_a_name_that_is_no_shards_is_told(cache: Path) -> None:
    shutil.copy(cache / "shard-00001.json", cache / "shard-1.json")
    before = files(cache)
    repair = repaired(cache, "remove")
    assert files(cache) == before and repair.dump_again == []
    assert repair.mend == [("shard-1.json", "this is no shard's name: move the file away")]


def test_unit_that_the_plan_does_not_have(cache: Path) -> None:
    record = {**read_json(cache / "shard-00001.json"), "unit": 70, "file": "shard-00070.parquet"}
    commit_json(cache / "shard-00070.json", record)
    shutil.copy(cache / "shard-00001.parquet", cache / "shard-00070.parquet")
    repair = repaired(cache, "remove")
    assert repair.removed == ["shard-00070.json", "shard-00070.parquet"]
    assert "shard-00070" not in repair.dump_again and repair.mend[0][0] == "shard-00070.json"


def test_command_line_and_json(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(cache / "shard-00003.parquet", 700)
    command = ["verify", "--cache", str(cache), "--json", str(tmp_path / "v.json"), "--repair"]
    assert main([*command, "list"]) == 1
    assert "dump again: shard-00003\n" in capsys.readouterr().out
    assert read_json(tmp_path / "v.json")["repair"] == {
        "mode": "list",
        "dump_again": ["shard-00003"],
        "removed": [],
        "left_alone": [],
        "mend": [],
    }
    assert main([*command, "remove"]) == 1
    assert "removed: shard-00003.json shard-00003.parquet\n" in capsys.readouterr().out
    record = read_json(tmp_path / "v.json")
    assert record["repair"]["removed"] == ["shard-00003.json", "shard-00003.parquet"]
    assert record["checksum_mb_per_second"] > 0
