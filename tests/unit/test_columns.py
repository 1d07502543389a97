"""Captured rows become padded columns, and their statistics equal those of the dense distribution.

Legend: R rows, T length of the cache, L of a row, V vocabulary, K top-k ids.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pipeline.schema import CacheSpec, sequence_id
from teacher_dump.columns import ShardStatistics, row_groups, to_columns
from teacher_dump.rows import CapturedRow, PackedRow

SPEC = CacheSpec(
    length=16,
    vocab_size=40,
    k=5,
    taus=(1.0, 2.0),
    block=4,
    groups=2,
    window=8,
    width=3,
    tail_samples=2,
    packing="document",
)


def logsumexp(values: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.exp(values.astype(np.float64)).sum(-1))


def captured(spec: CacheSpec, row: int, length: int, logits_LV: np.ndarray | None = None) -> CapturedRow:
    rng = np.random.default_rng(row)
    if logits_LV is None:
        logits_LV = rng.normal(size=(length, spec.vocab_size)).astype(np.float32) * 3
    order = np.argsort(-logits_LV, axis=-1, kind="stable")
    ids = rng.integers(0, spec.vocab_size, length).astype(np.int32)
    target = np.append(logits_LV[np.arange(length - 1), ids[1:]], np.nan).astype(np.float32)
    rest = np.take_along_axis(logits_LV, order[:, spec.k :], -1)
    return CapturedRow(
        PackedRow(
            row, ids, -1 if row % 2 else 7, np.repeat([0, 1], [length - 1, 1]).astype(np.int32), ("a", f"b{row}")
        ),
        topk_ids_LK=order[:, : spec.k].astype(np.int32),
        topk_logits_LK=np.take_along_axis(logits_LV, order[:, : spec.k], -1),
        target_logit_L=target,
        lse_L=logsumexp(logits_LV).astype(np.float32),
        log_tail_LR=np.stack([logsumexp(rest / tau) for tau in spec.taus], -1).astype(np.float32),
        attn_map_Gnn=rng.random((spec.groups, spec.blocks, spec.blocks)).astype(np.float32),
        hidden_WD=rng.normal(size=(spec.windows, spec.width)).astype(np.float32),
        tail_ids_LM=order[:, -2:].astype(np.int32),
        tail_logits_LM=np.take_along_axis(logits_LV, order[:, -2:], -1),
    )


def test_values_and_padding() -> None:
    rows = [captured(SPEC, 0, 16), captured(SPEC, 1, 9), captured(SPEC, 2, 2)]
    columns = to_columns(SPEC, 3, rows)
    assert columns["sequence_id"].tolist() == [sequence_id(3, row) for row in range(3)]
    assert columns["length"].tolist() == [16, 9, 2] and columns["next_id"].tolist() == [7, -1, 7]
    assert columns["doc_ids"] == [["a", "b0"], ["a", "b1"], ["a", "b2"]]
    for name, shape in SPEC.shapes().items():
        assert columns[name].shape == (3, *shape), name
        assert columns[name].dtype == SPEC.value_type(name).to_pandas_dtype(), name
    pairs: dict[str, list[Any]] = {
        "input_ids": [row.packed.input_ids_L for row in rows],
        "segment_ids": [row.packed.segment_ids_L for row in rows],
        "topk_ids": [row.topk_ids_LK for row in rows],
        "topk_logits": [row.topk_logits_LK for row in rows],
        "target_logit": [row.target_logit_L for row in rows],
        "lse": [row.lse_L for row in rows],
        "log_tail": [row.log_tail_LR for row in rows],
        "tail_ids": [row.tail_ids_LM for row in rows],
        "tail_logits": [row.tail_logits_LM for row in rows],
    }
    for name, values in pairs.items():
        for index, value in enumerate(values):
            np.testing.assert_array_equal(columns[name][index, : len(value)], value, err_msg=name)
            beyond = columns[name][index, len(value) :]
            assert (beyond == 0).all() if name.endswith("ids") else np.isnan(beyond).all(), name
    maps = np.stack([row.attn_map_Gnn for row in rows])  # type: ignore[misc, arg-type]
    np.testing.assert_array_equal(columns["attn_map"], maps.astype(np.float16))
    np.testing.assert_array_equal(columns["hidden"][1], rows[1].hidden_WD)


def test_optional_columns_are_left_out() -> None:
    spec = replace(SPEC, block=0, groups=0, window=0, tail_samples=0)
    columns = to_columns(spec, 0, [captured(SPEC, 0, 16)])
    assert set(columns) == {*spec.shapes(), "sequence_id", "length", "next_id", "doc_ids"}


def test_row_groups_keep_order_and_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(SPEC, group_tokens=4 * SPEC.length + 3)
    statistics = ShardStatistics()
    rows = [captured(SPEC, row, 2 + row) for row in range(9)]
    groups = list(row_groups(spec, 0, iter(rows), statistics))
    assert [len(group["length"]) for group in groups] == [4, 4, 1]
    assert np.concatenate([group["sequence_id"] for group in groups]).tolist() == list(range(9))
    assert (statistics.rows, statistics.tokens) == (9, sum(range(2, 11)))
    assert list(row_groups(SPEC, 0, iter([]), ShardStatistics())) == []


def dense(logits_LV: np.ndarray, k: int) -> tuple[float, float]:
    """Entropy of the K ids and the rest as one outcome, and the rest's mass, summed over positions, in float64."""
    p = np.exp(logits_LV.astype(np.float64))
    p = -np.sort(-p / p.sum(-1, keepdims=True))
    outcomes = np.concatenate([p[:, :k], p[:, k:].sum(-1, keepdims=True)], -1)
    positive = np.where(outcomes > 0, outcomes, 1.0)
    return float(-(positive * np.log(positive)).sum()), float(outcomes[:, -1].sum())


def test_entropy_and_tail_mass_against_the_dense_distribution() -> None:
    rng = np.random.default_rng(0)
    statistics, entropy, mass = ShardStatistics(), 0.0, 0.0
    for row, length in enumerate([16, 5, 1]):
        logits_LV = (4 * rng.normal(size=(length, 40))).astype(np.float32)
        statistics.add(captured(SPEC, row, length, logits_LV), tau_one=0)
        entropy, mass = entropy + dense(logits_LV, 5)[0], mass + dense(logits_LV, 5)[1]
    assert statistics.entropy == pytest.approx(entropy, rel=1e-5)
    assert statistics.tail_mass == pytest.approx(mass, rel=1e-5)


def test_tau_one_is_found_wherever_it_stands() -> None:
    spec = replace(SPEC, taus=(0.5, 1.0))
    logits_LV = np.random.default_rng(1).normal(size=(16, 40)).astype(np.float32)
    statistics = ShardStatistics()
    list(row_groups(spec, 0, [captured(spec, 0, 16, logits_LV)], statistics))
    assert statistics.tail_mass == pytest.approx(dense(logits_LV, 5)[1], rel=1e-5)


def test_whole_vocabulary_and_masked_logits_have_finite_statistics() -> None:
    whole = replace(SPEC, k=40, tail_samples=0)
    logits_LV = np.random.default_rng(2).normal(size=(16, 40)).astype(np.float32)
    logits_LV[:, ::3] = -np.inf
    statistics = ShardStatistics()
    statistics.add(captured(whole, 0, 16, logits_LV), tau_one=0)
    assert statistics.entropy == pytest.approx(dense(logits_LV, 40)[0], rel=1e-5)
    assert statistics.tail_mass == 0.0
