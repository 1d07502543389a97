"""The manifest is created once, and says in words how a run differs from the cache it meets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers_cache import write_toy_cache

from pipeline.cache import Cache
from pipeline.commit import commit_json, read_json
from pipeline.errors import UserError
from pipeline.manifest import Manifest, create_or_match, identity, read_manifest
from pipeline.schema import SCHEMA_MAJOR, CacheSpec

SPEC = CacheSpec(
    length=64,
    vocab_size=61,
    k=8,
    taus=(1.0, 2.0),
    block=16,
    groups=2,
    window=0,
    width=4,
    tail_samples=0,
    packing="stream",
)
WANTED = Manifest(
    compat={"teacher": "a" * 64, "vocab_size": 61, "soft_cap": None, "schema_major": SCHEMA_MAJOR},
    data={"corpus": "b" * 64, **SPEC.to_record()},
    spec=SPEC,
    settings={"shards": 2},
    teacher_path="/models/toy",
    created="2025-01-01T00:00:00+00:00",
)


def test_round_trip(tmp_path: Path) -> None:
    assert create_or_match(tmp_path, WANTED) == WANTED
    assert read_manifest(tmp_path) == WANTED


def test_the_same_identity_continues_and_nothing_is_rewritten(tmp_path: Path) -> None:
    create_or_match(tmp_path, WANTED)
    before = (tmp_path / "manifest.json").read_bytes()
    again = replace(WANTED, settings={"shards": 128}, teacher_path="/elsewhere", created="2026-01-01T00:00:00+00:00")
    assert create_or_match(tmp_path, again) == WANTED
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_other_settings_are_refused_with_every_field_and_both_values(tmp_path: Path) -> None:
    create_or_match(tmp_path, WANTED)
    other = replace(
        WANTED, compat={**WANTED.compat, "soft_cap": 30.0}, data={**WANTED.data, "k": 16, "taus": [1.0], "added": 1}
    )
    with pytest.raises(UserError) as raised:
        create_or_match(tmp_path, other)
    text = str(raised.value)
    for part in (
        "soft_cap: cache has None, asked for 30.0",
        "k: cache has 8, asked for 16",
        "taus: cache has [1.0, 2.0], asked for [1.0]",
        "added: cache has nothing, asked for 1",
    ):
        assert part in text
    assert "vocab_size" not in text and "\n" not in text


def test_identities_follow_from_their_fields_only() -> None:
    assert WANTED.compat_id == replace(WANTED, data={}, settings={}).compat_id
    assert WANTED.compat_id != replace(WANTED, compat={**WANTED.compat, "vocab_size": 62}).compat_id
    assert WANTED.data_id != replace(WANTED, data={**WANTED.data, "seed": 1}).data_id
    assert identity({"a": 1, "b": [1.0]}) == identity({"b": [1.0], "a": 1})


@pytest.mark.parametrize(("schema", "remedy"), [("2.0", "upgrade this software"), ("0.9", "dump the cache again")])
def test_other_major_version_is_refused(schema: str, remedy: str, tmp_path: Path) -> None:
    create_or_match(tmp_path, WANTED)
    record = {**read_json(tmp_path / "manifest.json"), "schema": schema}
    commit_json(tmp_path / "manifest.json", record)
    with pytest.raises(UserError, match=f"schema {schema}.*{remedy}"):
        read_manifest(tmp_path)


def test_newer_minor_version_is_read(tmp_path: Path) -> None:
    create_or_match(tmp_path, WANTED)
    record = {**read_json(tmp_path / "manifest.json"), "schema": f"{SCHEMA_MAJOR}.9", "added_later": True}
    commit_json(tmp_path / "manifest.json", record)
    assert read_manifest(tmp_path) == WANTED


def test_no_cache_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no cache \(manifest\.json is missing\)"):
        read_manifest(tmp_path / "nowhere")


def test_edited_manifest_is_told(tmp_path: Path) -> None:
    create_or_match(tmp_path, WANTED)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"vocab_size": 61', '"vocab_size": 62'))
    with pytest.raises(UserError, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_manifest_whose_ids_do_not_follow_is_told(tmp_path: Path) -> None:
    create_or_match(tmp_path, WANTED)
    commit_json(tmp_path / "manifest.json", {**read_json(tmp_path / "manifest.json"), "compat_id": "0" * 32})
    with pytest.raises(UserError, match="identities do not follow"):
        read_manifest(tmp_path)


def test_shard_copied_from_another_cache_is_told(tmp_path: Path) -> None:
    mine = write_toy_cache(tmp_path / "mine", units=1, heldout_units=0, rows=2)
    other = write_toy_cache(tmp_path / "other", units=2, heldout_units=0, rows=2, seed=1)
    for name in ("shard-00001.json", "shard-00001.parquet"):
        (mine / name).write_bytes((other / name).read_bytes())
    with pytest.raises(UserError, match=r"shard-00001\.json: compat_id is .* copied from another cache"):
        Cache(mine).shards()


def test_splits_are_apart_and_ordered(tmp_path: Path) -> None:
    cache = Cache(write_toy_cache(tmp_path / "cache", units=11, heldout_units=2, rows=1, length=16))
    assert [record.unit for record in cache.shards()] == list(range(11))
    assert [record.name for record in cache.shards("heldout")] == ["heldout-00000", "heldout-00001"]
    assert cache.find(1, "heldout").name == "heldout-00001"
    with pytest.raises(UserError, match=r"shard-00011\.json is missing: the cache has 11 training shards"):
        cache.find(11)
    assert json.loads((cache.path / "shard-00003.json").read_text())["unit"] == 3
