"""Anyone can read a shard: pandas, polars, DuckDB and `datasets` see the same plain numbers, with nothing of ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers_cache import write_toy_cache

from pipeline.cache import Cache
from pipeline.shard import Columns

COLUMNS = ["sequence_id", "length", "input_ids", "topk_ids", "topk_logits", "log_tail", "attn_map", "next_id"]


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Columns]:
    """A padded shard's Parquet file, and its columns as our own reader gives them."""
    folder = write_toy_cache(
        tmp_path_factory.mktemp("cache") / "cache", units=1, heldout_units=0, rows=5, length=32, block=8,
        packing="document",
    )  # fmt: skip
    cache = Cache(folder)
    with cache.open(cache.shards()[0]) as opened:
        columns = opened.read_group(0)
    assert np.isnan(columns["topk_logits"]).any() and columns["attn_map"].dtype == np.float16
    return folder / "shard-00000.parquet", columns


def assert_equal(found: object, name: str, columns: Columns) -> None:
    wanted = columns[name]
    array = np.asarray(found, dtype=wanted.dtype).reshape(wanted.shape)
    np.testing.assert_array_equal(array, wanted, err_msg=name)


def test_pandas(shard: tuple[Path, Columns]) -> None:
    import pandas

    path, columns = shard
    frame = pandas.read_parquet(path)
    for name in COLUMNS:
        values = frame[name].to_numpy()
        assert_equal(np.stack(values) if values.dtype == object else values, name, columns)
    assert [list(ids) for ids in frame["doc_ids"]] == columns["doc_ids"]


def test_polars(shard: tuple[Path, Columns]) -> None:
    import polars

    path, columns = shard
    frame = polars.read_parquet(path)
    for name in COLUMNS:
        assert_equal(frame[name].to_list(), name, columns)
    assert frame["doc_ids"].to_list() == columns["doc_ids"]


def test_duckdb(shard: tuple[Path, Columns]) -> None:
    import duckdb

    path, columns = shard
    names = [*COLUMNS, "doc_ids"]
    connection = duckdb.connect()
    connection.execute("SET threads = 1")
    rows = connection.execute(f"SELECT {', '.join(names)} FROM read_parquet('{path}') ORDER BY sequence_id").fetchall()
    for index, name in enumerate(COLUMNS):
        assert_equal([row[index] for row in rows], name, columns)
    assert [row[-1] for row in rows] == columns["doc_ids"]
    first = connection.execute(f"SELECT max(topk_logits[1]) FROM read_parquet('{path}')").fetchone()
    assert first is not None and first[0] == pytest.approx(columns["topk_logits"][:, 0, 0].max())


def test_datasets(shard: tuple[Path, Columns], tmp_path: Path) -> None:
    import datasets

    path, columns = shard
    loaded = datasets.load_dataset("parquet", data_files=str(path), cache_dir=str(tmp_path), split="train")
    for name in COLUMNS:
        assert_equal(list(loaded[name]), name, columns)
    assert list(loaded["doc_ids"]) == columns["doc_ids"]
