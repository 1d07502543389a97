"""A shard comes back bit for bit, says what it is, and never gives wrong rows when its bytes were damaged.

Legend: R rows, T tokens a row, K top-k ids.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers_cache import toy_columns, write_toy_cache

from pipeline.cache import Cache
from pipeline.commit import commit_json, new_claim_id, read_json
from pipeline.errors import UserError
from pipeline.schema import HELDOUT_UNIT, METADATA_KEY, CacheSpec, sequence_id, unit_name
from pipeline.shard import (
    Columns,
    DamagedShard,
    ShardFile,
    ShardRecord,
    commit_shard,
    footer_sha256,
    read_record,
    write_parquet,
)

SPEC = CacheSpec(
    length=32,
    vocab_size=61,
    k=8,
    taus=(1.0, 1.5, 2.0),
    block=8,
    groups=2,
    window=16,
    width=4,
    tail_samples=3,
    packing="stream",
)
METADATA = {"split": "train", "compat_id": "c" * 32, "data_id": "d" * 32, "teacher": "toy"}


def describe(rows: int) -> dict[str, Any]:
    return {
        "split": "train",
        "rows": rows,
        "tokens": rows * SPEC.length,
        "short": False,
        "source": {"start": 0, "end": 100},
        "mean_entropy": 1.0,
        "mean_tail_mass": 0.1,
        "compat_id": METADATA["compat_id"],
        "data_id": METADATA["data_id"],
        "versions": {},
        "hardware": "test",
        "seconds": 0.5,
    }


def take(columns: Columns, first: int, last: int) -> Columns:
    return {name: values[first:last] for name, values in columns.items()}


def commit(folder: Path, spec: CacheSpec, groups: list[Columns], unit: int = 0) -> ShardRecord:
    rows = sum(len(group["length"]) for group in groups)
    return commit_shard(folder, unit, spec, METADATA, iter(groups), lambda: describe(rows), new_claim_id())


def read_all(folder: Path, record: ShardRecord, spec: CacheSpec) -> list[Columns]:
    with ShardFile(folder, record, spec) as shard:
        return [shard.read_group(group) for group in range(shard.row_groups)]


def assert_same(found: Columns, wanted: Columns) -> None:
    """Equal values, shapes and bits: NaN payloads and the signs of zeros too."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if name == "doc_ids":
            assert found[name] == value
            continue
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        assert found[name].tobytes() == np.ascontiguousarray(value).tobytes(), name


@pytest.fixture(scope="module")
def columns() -> Columns:
    """Seven rows with every column, padded ones among them and every awkward float."""
    made = toy_columns(replace(SPEC, packing="document"), 0, 7)
    awkward = np.array([np.nan, -np.inf, np.inf, -0.0, 1e-45, 3.4e38, 65504.0], np.float32)
    made["topk_logits"][0, :7, 0] = awkward
    made["log_tail"][1, :, :] = -np.inf
    made["hidden"][0, 0, 0] = 25_000.0
    made["attn_map"][0, 0, 0, 0] = np.float16(6e-8)
    assert np.isnan(made["lse"]).any() and (made["length"] < SPEC.length).any()
    return made


@pytest.fixture(scope="module")
def shard(columns: Columns, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ShardRecord]:
    folder = tmp_path_factory.mktemp("shard")
    return folder, commit(folder, SPEC, [take(columns, 0, 4), take(columns, 4, 7)])


def copy_of(shard: tuple[Path, ShardRecord], folder: Path, data: bytes | None = None) -> ShardRecord:
    source, record = shard
    (folder / record.file).write_bytes((source / record.file).read_bytes() if data is None else data)
    return record


def test_every_column_comes_back_bit_for_bit(shard: tuple[Path, ShardRecord], columns: Columns) -> None:
    groups = read_all(*shard, SPEC)
    assert len(groups) == 2
    assert_same(groups[0], take(columns, 0, 4))
    assert_same(groups[1], take(columns, 4, 7))


def test_some_columns_of_a_group(shard: tuple[Path, ShardRecord], columns: Columns) -> None:
    with ShardFile(*shard, SPEC) as opened:
        assert opened.group_rows == [4, 3]
        assert_same(opened.read_group(1, ["lse", "doc_ids"]), take({n: columns[n] for n in ("lse", "doc_ids")}, 4, 7))


def test_optional_columns_may_be_absent(tmp_path: Path) -> None:
    spec = replace(SPEC, block=0, groups=0, window=0, tail_samples=0)
    wanted = toy_columns(spec, 0, 2)
    assert not wanted.keys() & {"attn_map", "hidden", "tail_ids", "tail_logits"}
    assert_same(read_all(tmp_path, commit(tmp_path, spec, [wanted]), spec)[0], wanted)


def test_whole_vocabulary_has_an_empty_tail(tmp_path: Path) -> None:
    spec = replace(SPEC, k=61, tail_samples=0)
    wanted = toy_columns(spec, 0, 2)
    assert np.isneginf(wanted["log_tail"]).all()
    assert_same(read_all(tmp_path, commit(tmp_path, spec, [wanted]), spec)[0], wanted)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(61, np.uint16), (65_536, np.uint16), (65_537, np.int32), (151_936, np.int32)]
)
def test_ids_are_as_narrow_as_the_vocabulary_allows(vocab_size: int, dtype: type, tmp_path: Path) -> None:
    spec = replace(SPEC, vocab_size=vocab_size)
    wanted = toy_columns(SPEC, 0, 1)
    for name in ("topk_ids", "tail_ids"):
        wanted[name] = wanted[name].astype(dtype)
        wanted[name][0, 0, 0] = vocab_size - 1
    found = read_all(tmp_path, commit(tmp_path, spec, [wanted]), spec)[0]
    assert_same(found, wanted)
    assert found["topk_ids"][0, 0, 0] == vocab_size - 1


def test_id_beyond_the_type_is_refused_and_nothing_becomes_visible(tmp_path: Path) -> None:
    wanted = toy_columns(SPEC, 0, 1)
    wanted["topk_ids"] = wanted["topk_ids"].astype(np.int32)
    wanted["topk_ids"][0, 0, 0] = 65_536
    with pytest.raises((ValueError, OverflowError)):
        commit(tmp_path, SPEC, [wanted])
    assert list(tmp_path.iterdir()) == []


def test_failure_of_the_source_leaves_nothing_visible(columns: Columns, tmp_path: Path) -> None:
    def groups() -> Any:
        yield take(columns, 0, 4)
        raise RuntimeError("the engine died")

    with pytest.raises(RuntimeError, match="the engine died"):
        commit_shard(tmp_path, 0, SPEC, METADATA, groups(), lambda: describe(4), new_claim_id())
    assert list(tmp_path.iterdir()) == []


def test_shard_does_not_exist_before_its_record(tmp_path: Path) -> None:
    """Readers go by JSON files: a Parquet file alone (a crash between the two commits) is not seen."""
    cache = write_toy_cache(tmp_path / "cache", units=2, heldout_units=0, rows=2, length=32, block=8)
    (cache / "shard-00000.json").unlink()
    assert [record.name for record in Cache(cache).shards()] == ["shard-00001"]


def test_metadata_tells_what_the_shard_is(shard: tuple[Path, ShardRecord]) -> None:
    folder, record = shard
    told = json.loads(pq.read_schema(folder / record.file).metadata[METADATA_KEY])
    assert told["shapes"] == {name: list(shape) for name, shape in SPEC.shapes().items()}
    assert told["shapes"]["topk_logits"] == [32, 8] and told["shapes"]["attn_map"] == [2, 4, 4]
    wanted = {"k": 8, "taus": [1.0, 1.5, 2.0], "block": 8, "groups": 2, "length": 32, "vocab_size": 61, **METADATA}
    assert {name: told[name] for name in wanted} == wanted


def test_encoding_is_the_contracts(shard: tuple[Path, ShardRecord]) -> None:
    folder, record = shard
    metadata = pq.read_metadata(folder / record.file)
    for index in range(metadata.num_columns):
        column = metadata.row_group(0).column(index)
        assert column.compression == "ZSTD"
        name = column.path_in_schema.split(".")[0]
        assert not column.has_dictionary_page, name
        if name in SPEC.shapes():
            assert ("BYTE_STREAM_SPLIT" in column.encodings) == (name != "attn_map"), name
            assert not column.is_stats_set, name


def test_record_survives_its_json(shard: tuple[Path, ShardRecord]) -> None:
    folder, record = shard
    assert read_record(folder / "shard-00000.json") == record
    assert (record.rows, record.bytes) == (7, (folder / record.file).stat().st_size)


def test_newer_minor_version_may_add_fields(shard: tuple[Path, ShardRecord], tmp_path: Path) -> None:
    folder, record = shard
    path = tmp_path / "shard-00000.json"
    commit_json(path, {**read_json(folder / "shard-00000.json"), "added_later": 1})
    assert read_record(path) == record


@pytest.mark.parametrize("change", [{"file": "../other.parquet"}, {"file": "shard-00001.parquet"}, {"unit": 5}])
def test_record_that_points_elsewhere_is_refused(
    change: dict[str, Any], shard: tuple[Path, ShardRecord], tmp_path: Path
) -> None:
    path = tmp_path / "shard-00000.json"
    commit_json(path, {**read_json(shard[0] / "shard-00000.json"), **change})
    with pytest.raises(UserError, match=r"shard-00000\.json"):
        read_record(path)


def test_record_without_a_field_is_refused(shard: tuple[Path, ShardRecord], tmp_path: Path) -> None:
    record = read_json(shard[0] / "shard-00000.json")
    del record["footer_sha256"]
    commit_json(tmp_path / "shard-00000.json", record)
    with pytest.raises(UserError, match="footer_sha256"):
        read_record(tmp_path / "shard-00000.json")


def footer_start(data: bytes) -> int:
    return len(data) - 8 - int.from_bytes(data[-8:-4], "little")


def test_any_flipped_bit_of_the_footer_is_refused(shard: tuple[Path, ShardRecord], tmp_path: Path) -> None:
    good = (shard[0] / shard[1].file).read_bytes()
    rng = np.random.default_rng(0)
    start = footer_start(good)
    for position in [*rng.integers(start, len(good), 40), *range(len(good) - 8, len(good))]:
        data = bytearray(good)
        data[position] ^= 1 << int(rng.integers(8))
        record = copy_of(shard, tmp_path, bytes(data))
        with pytest.raises(DamagedShard, match=r"shard-00000\.parquet"):
            ShardFile(tmp_path, record, SPEC)


def test_flipped_bits_in_pages_name_shard_group_and_column(
    shard: tuple[Path, ShardRecord], columns: Columns, tmp_path: Path
) -> None:
    """One flip in the middle of each column chunk of the second row group."""
    good = (shard[0] / shard[1].file).read_bytes()
    metadata = pq.read_metadata(shard[0] / shard[1].file)
    for index in range(metadata.num_columns):
        chunk = metadata.row_group(1).column(index)
        name = chunk.path_in_schema.split(".")[0]
        data = bytearray(good)
        data[chunk.data_page_offset + chunk.total_compressed_size - 2] ^= 1
        record = copy_of(shard, tmp_path, bytes(data))
        with ShardFile(tmp_path, record, SPEC) as opened:
            assert_same(opened.read_group(0), take(columns, 0, 4))  # the other group is whole
            with pytest.raises(DamagedShard, match=rf"shard-00000\.parquet: row group 1, column {name} "):
                opened.read_group(1)


def test_random_flips_anywhere_never_give_wrong_rows(
    shard: tuple[Path, ShardRecord], columns: Columns, tmp_path: Path
) -> None:
    good = (shard[0] / shard[1].file).read_bytes()
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(150):
        data = bytearray(good)
        data[int(rng.integers(footer_start(good)))] ^= 1 << int(rng.integers(8))
        record = copy_of(shard, tmp_path, bytes(data))
        try:
            groups = read_all(tmp_path, record, SPEC)
        except DamagedShard as error:
            assert "shard-00000.parquet" in str(error)
            refused += 1
        else:  # page headers hold statistics and defaults that change nothing
            assert_same(groups[0], take(columns, 0, 4))
            assert_same(groups[1], take(columns, 4, 7))
    assert refused >= 140


@pytest.mark.parametrize("kept", [0, 3, 11, 100, -1, -8, -200])
def test_truncation_is_refused(kept: int, shard: tuple[Path, ShardRecord], tmp_path: Path) -> None:
    data = (shard[0] / shard[1].file).read_bytes()[:kept]
    record = copy_of(shard, tmp_path, data)
    with pytest.raises(DamagedShard, match=r"shard-00000\.parquet has \d+ bytes, its JSON says"):
        ShardFile(tmp_path, record, SPEC)
    with pytest.raises(DamagedShard):  # even where the JSON agreed
        ShardFile(tmp_path, replace(record, bytes=len(data)), SPEC)


def test_missing_parquet_file_is_refused(shard: tuple[Path, ShardRecord], tmp_path: Path) -> None:
    with pytest.raises(DamagedShard, match=r"shard-00000\.parquet is missing"):
        ShardFile(tmp_path, shard[1], SPEC)


def test_shard_of_other_rows_is_refused(shard: tuple[Path, ShardRecord], tmp_path: Path) -> None:
    """A whole Parquet file that is not the one the JSON speaks of."""
    record = shard[1]
    write_parquet(tmp_path / record.file, SPEC, METADATA, [toy_columns(SPEC, 1, 7)])
    size = (tmp_path / record.file).stat().st_size
    with pytest.raises(DamagedShard):
        ShardFile(tmp_path, replace(record, bytes=size), SPEC)
    assert footer_sha256(tmp_path / record.file) != record.footer_sha256


def test_rows_of_a_group_stay_below_the_bound() -> None:
    assert replace(SPEC, length=2048).rows_per_group == 64
    assert replace(SPEC, length=200_000).rows_per_group == 1


def test_sequence_ids_and_names_of_units() -> None:
    assert sequence_id(3, 5) == (3 << 32) + 5
    assert unit_name(3) == "shard-00003" and unit_name(HELDOUT_UNIT + 2) == "heldout-00002"
    assert sequence_id(HELDOUT_UNIT + 1, 7) < 1 << 63


def test_bytes_per_token_are_near_the_contracts(tmp_path: Path) -> None:
    """K=64 and four tails: at most 4*64 + 2*64 + ... raw bytes, and less than 70% of them after encoding."""
    spec = replace(
        SPEC, length=256, vocab_size=700, k=64, taus=(1.0, 1.2, 1.5, 2.0), block=64, window=0, tail_samples=0
    )
    columns = toy_columns(spec, 0, 8)
    columns["topk_logits"] = as_bfloat16(columns["topk_logits"])
    record = commit(tmp_path, spec, [columns])
    raw = sum(np.asarray(columns[name]).nbytes for name in spec.shapes())
    tokens = 8 * spec.length
    assert 384 < raw / tokens < 450
    assert record.bytes / tokens < 0.7 * raw / tokens, f"{record.bytes / tokens:.0f} B/token"


def as_bfloat16(values: np.ndarray) -> np.ndarray:
    return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
