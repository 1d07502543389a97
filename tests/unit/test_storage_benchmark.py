"""The benchmark of storage at toy sizes: layouts keep the rows, a smaller K is what a dump would store."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers_cache import toy_logits, write_toy_cache

from benchmarks.layouts import CHANGES, ArraysLayout, ShardLayout
from benchmarks.measured import versions
from benchmarks.smaller_k import with_smaller_k
from benchmarks.storage import Options, in_groups, load_rows, main, run
from pipeline.cache import Cache
from pipeline.errors import UserError
from pipeline.shard import Columns
from teacher_dump.kernels.head_topk import head_topk

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_cache(tmp_path_factory.mktemp("cache") / "c", units=2, rows=4, length=32, k=24, tail_samples=2)


def assert_same(found: Columns, wanted: Columns) -> None:
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        if name == "doc_ids":
            assert found[name] == values
        else:
            np.testing.assert_array_equal(found[name], values, err_msg=name)


@pytest.mark.parametrize("k", [1, 8, 23])
def test_smaller_k_is_what_a_dump_with_it_would_store(path: Path, k: int) -> None:
    cache = Cache(path)
    columns, spec = with_smaller_k(next(cache.groups("train")), cache.spec, k)
    logits_NV = torch.from_numpy(toy_logits(path, "train", 0)).flatten(0, 1)
    rows = head_topk(logits_NV, torch.full((len(logits_NV),), -1), k, spec.taus)
    assert spec == replace(cache.spec, k=k, tail_samples=0) and columns.keys() >= spec.shapes().keys()
    assert "tail_ids" not in columns
    np.testing.assert_array_equal(columns["topk_ids"].reshape(-1, k), rows.ids_NK.numpy())
    np.testing.assert_array_equal(columns["topk_logits"].reshape(-1, k), rows.logits_NK.numpy())
    np.testing.assert_allclose(columns["log_tail"].reshape(-1, 4), rows.log_tail_NR.numpy(), rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(columns["lse"].reshape(-1), rows.lse_N.numpy(), rtol=1e-6, atol=2e-6)


def test_smaller_k_keeps_padding_and_refuses_a_larger_one(tmp_path: Path) -> None:
    cache = Cache(write_toy_cache(tmp_path / "c", units=1, length=64, packing="document"))
    columns = next(cache.groups("train"))
    narrow, _ = with_smaller_k(columns, cache.spec, 3)
    padding = np.arange(64)[None, :] >= columns["length"][:, None]
    assert padding.any() and (np.isnan(narrow["log_tail"]).all(-1) == padding).all()
    with pytest.raises(ValueError, match="k=9"):
        with_smaller_k(columns, cache.spec, 9)


@pytest.mark.parametrize("name", CHANGES)
def test_every_parquet_layout_keeps_the_rows_and_counts_every_byte(path: Path, tmp_path: Path, name: str) -> None:
    cache = Cache(path)
    spec = replace(cache.spec, group_tokens=96)
    groups = in_groups(load_rows(cache, 256), spec)
    assert [len(group["length"]) for group in groups] == [3, 3, 2]
    layout = ShardLayout(tmp_path, spec, groups, next(cache.records()), name)
    for found, wanted in zip(layout.read(), groups, strict=True):
        assert_same(found, wanted)
    layout.write()
    file = tmp_path / "shard-00000.parquet"
    assert (tmp_path / "again.parquet").stat().st_size == file.stat().st_size == layout.bytes
    sizes = layout.column_bytes()
    footer = int.from_bytes(file.read_bytes()[-8:-4], "little")
    assert sizes["footer"] == footer + 12 and sum(sizes.values()) == layout.bytes  # 12: magic twice, footer's length
    codec = pq.ParquetFile(file).metadata.row_group(0).column(4).compression
    assert codec == ("SNAPPY" if name == "pyarrow's defaults" else "ZSTD")


def test_a_column_alone_is_what_the_shard_has_of_it(path: Path, tmp_path: Path) -> None:
    cache = Cache(path)
    groups = in_groups(load_rows(cache, 256), cache.spec)
    layout = ShardLayout(tmp_path, cache.spec, groups, next(cache.records()))
    shard = pq.ParquetFile(tmp_path / "shard-00000.parquet")
    assert shard.schema_arrow.names[:4] == ["sequence_id", "length", "next_id", "doc_ids"]
    for at, name in enumerate(shard.schema_arrow.names):
        for found, wanted in zip(layout.read_column(name), groups, strict=True):
            assert_same(found, {name: wanted[name]})
        plain = layout.read_column_plain(name)
        layout.write_column(name)
        alone = pq.ParquetFile(tmp_path / "column.parquet", page_checksum_verification=True)
        assert alone.read().equals(plain) and plain.column_names == [name]
        ours, there = (file.metadata.row_group(0) for file in (alone, shard))
        assert ours.num_columns == 1
        for fact in ("encodings", "compression", "total_compressed_size", "is_stats_set"):
            assert getattr(ours.column(0), fact) == getattr(there.column(at), fact), (name, fact)


def test_zstd_levels_are_different_files(tmp_path: Path) -> None:
    cache = Cache(write_toy_cache(tmp_path / "c", units=1, rows=16, length=128, k=24))
    groups = [load_rows(cache, 2048)]
    sizes = [
        ShardLayout(tmp_path / str(i), cache.spec, groups, next(cache.records()), name).bytes
        for i, name in enumerate(("ours, zstd 1", "ours", "ours, zstd 9"))
    ]
    assert sizes[0] > sizes[2] and len(set(sizes)) == 3


def test_arrays_keep_the_rows(path: Path, tmp_path: Path) -> None:
    cache = Cache(path)
    groups = in_groups(load_rows(cache, 256), replace(cache.spec, group_tokens=128))
    layout = ArraysLayout(tmp_path / "arrays", groups)
    for found, wanted in zip(layout.read(), groups, strict=True):
        assert_same(found, wanted)
    assert layout.bytes > sum(group["topk_logits"].nbytes + group["topk_ids"].nbytes for group in groups)


@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (32, 1), (33, 2), (130, 5), (10_000, 8)])
def test_rows_are_taken_in_order_over_shards(path: Path, tokens: int, rows: int) -> None:
    columns = load_rows(Cache(path), tokens)
    expected = [*range(4), *((1 << 32) + row for row in range(4))][:rows]
    assert columns["sequence_id"].tolist() == expected and len(columns["doc_ids"]) == rows


def test_run_writes_what_it_prints(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Options(path, ks=(4, 24), tokens=128, repetitions=1, results=tmp_path)) == 0
    printed = capsys.readouterr().out
    text = (tmp_path / "storage.json").read_text(encoding="utf-8")
    record = json.loads(text)
    assert record["tokens"] == 128 and record["versions"]["pyarrow"] == versions()["pyarrow"]
    assert [row["layout"] for row in record["rows"] if row["K"] == 4] == [*CHANGES, "uncompressed .npz"]
    four, most = (row for row in record["rows"] if row["layout"] == "ours")
    assert four["bytes"] < most["bytes"] and four["tail_mass"] > most["tail_mass"] > 0
    for name, size in four["columns"].items():
        speeds = [four[f"columns_{speed}_ktok_per_s"].get(name, 0) for speed in ("write", "read", "read_pyarrow")]
        assert (min(speeds) > 0) == (name != "footer") and size > 0
    assert "columns_write_ktok_per_s" not in record["rows"][1]
    assert re.search(r"\n *4  topk_logits +\S+ +\S+ +\S+ +\S+\n", printed)
    assert four["commit"] > 0 and four["write_of_ours"] == four["bytes_of_ours"] == 1.0
    for row in record["rows"]:
        assert row["bytes_per_token"] == pytest.approx(row["bytes"] / 128, rel=1e-3)
        assert f"{row['layout']}" in printed and sum(json.dumps(row) in line for line in text.splitlines()) == 1
        if "columns" in row:
            assert sum(row["columns"].values()) == pytest.approx(row["bytes_per_token"], rel=1e-3)
    line = next(line for line in printed.splitlines() if re.match(r" *4 ", line))
    assert float(line.split()[2]) == pytest.approx(four["bytes_per_token"], rel=1e-3)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--ks", "[8,25]"], "holds K=24"),
        (["--ks", "[]"], "at least one K"),
        (["--repetitions", "0"], "--repetitions 0"),
        (["--tokens", "0"], "--tokens 0"),
        (["--kay", "3"], "--kay"),
    ],
)
def test_wrong_options_are_one_sentence(path: Path, words: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=re.escape(expected)):
        main(["--cache", str(path), *words])
