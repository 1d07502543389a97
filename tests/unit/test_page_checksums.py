"""The pass over a shard's bytes sees what reading the rows sees, without reading them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers_cache import write_toy_cache
from hypothesis import given
from hypothesis import strategies as st

from pipeline.page_checksums import check_pages


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three row groups, every optional column."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.schema.ROW_GROUP_TOKENS", 2 * 32)
        sizes = dict(rows=6, length=32, block=8, window=8, tail_samples=2, units=1, heldout_units=0)
        return write_toy_cache(tmp_path_factory.mktemp("c") / "c", **sizes) / "shard-00000.parquet"  # type: ignore[arg-type]


def readable(path: Path, group: int, column: str) -> bool:
    with pq.ParquetFile(path, page_checksum_verification=True, memory_map=False) as file:
        try:
            file.read_row_group(group, columns=[column], use_threads=False)
        except (OSError, pa.ArrowException):
            return False
    return True


def test_a_whole_file(shard: Path) -> None:
    found = check_pages(shard, pq.read_metadata(shard))
    assert found.sha256 == hashlib.sha256(shard.read_bytes()).hexdigest()
    assert found.damaged == []
    assert found.pages >= 3 * len(pq.read_schema(shard).names)


def test_many_pages_dictionaries_statistics_and_both_page_versions(tmp_path: Path) -> None:
    """What other writers may put into a file: our reader of page headers must find its way through."""
    values = np.random.default_rng(0).integers(0, 50, 20_000)
    table = pa.table({"a": values, "b": [str(v) for v in values], "c": pa.array([[1.5] * (v % 3) for v in values])})
    for version in ("1.0", "2.0"):
        path = tmp_path / f"{version}.parquet"
        options = {"data_page_version": version, "data_page_size": 2000, "row_group_size": 7000}
        pq.write_table(table, path, write_page_checksum=True, write_page_index=True, **options)
        found = check_pages(path, pq.read_metadata(path))
        assert found.damaged == [] and found.pages > 30
        assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_pages_without_a_checksum_are_told(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1, 2]}), tmp_path / "x.parquet", write_page_checksum=False)
    found = check_pages(tmp_path / "x.parquet", pq.read_metadata(tmp_path / "x.parquet"))
    assert found.damaged == [(0, "a", "page 0 has no checksum")]


@given(st.integers(0, 2**40), st.integers(0, 7))
def test_any_flipped_bit_is_seen_and_its_column_named(shard: Path, place: int, bit: int) -> None:
    """Every column that can no longer be read is named, and no other row group or column than the flipped one."""
    metadata = pq.read_metadata(shard)
    data = bytearray(shard.read_bytes())
    place %= len(data)
    data[place] ^= 1 << bit
    path = shard.with_name("flipped")
    path.write_bytes(data)
    found = check_pages(path, metadata)
    assert found.sha256 == hashlib.sha256(data).hexdigest()
    hit = set()
    for group in range(metadata.num_row_groups):
        for index in range(metadata.row_group(group).num_columns):
            chunk = metadata.row_group(group).column(index)
            if chunk.data_page_offset <= place < chunk.data_page_offset + chunk.total_compressed_size:
                hit.add((group, chunk.path_in_schema.split(".")[0]))
    named = {(group, column) for group, column, _ in found.damaged}
    assert named <= hit
    try:
        unreadable = {at for at in hit if not readable(path, *at)}
    except (OSError, pa.ArrowException):  # the flip is in the footer, whose digest is another check
        return
    assert unreadable <= named


def test_a_footer_that_points_elsewhere_is_no_reason_to_fail(shard: Path, tmp_path: Path) -> None:
    metadata = pq.read_metadata(shard)
    path = tmp_path / "short.parquet"
    path.write_bytes(shard.read_bytes()[:900])
    found = check_pages(path, metadata)
    assert "the footer gives it a place it cannot have" in {reason for *_, reason in found.damaged}
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
