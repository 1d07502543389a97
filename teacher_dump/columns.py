"""Captured rows become the columns of a row group: padded to T, stacked, in the types of the contract."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.schema import CacheSpec, sequence_id
from pipeline.shard import Columns
from teacher_dump.rows import CapturedRow


@dataclass
class ShardStatistics:
    """Sums over the tokens of one shard."""

    rows: int = 0
    tokens: int = 0
    entropy: float = 0.0  # nats, of the K ids and the tail as one outcome: a lower bound
    tail_mass: float = 0.0  # at tau 1

    def add(self, row: CapturedRow, tau_one: int) -> None:
        log_p_LK = row.topk_logits_LK - row.lse_L[:, None]
        log_r_L = row.log_tail_LR[:, tau_one] - row.lse_L
        p_LK, r_L = np.exp(log_p_LK), np.exp(log_r_L)
        self.rows += 1
        self.tokens += row.packed.length
        self.entropy -= float(_p_log_p(p_LK, log_p_LK).sum() + _p_log_p(r_L, log_r_L).sum())
        self.tail_mass += float(r_L.sum())


def _p_log_p(p: np.ndarray, log_p: np.ndarray) -> np.ndarray:
    """p log p, with its limit 0 where p is 0 (a tail that is empty, a masked logit of -inf)."""
    return p * np.where(p > 0, log_p, 0.0)


def _padded(values: list[np.ndarray], length: int, fill: float, dtype: np.dtype) -> np.ndarray:
    """Stack arrays (L, ...) of different L to (R, length, ...)."""
    stacked = np.empty((len(values), length, *values[0].shape[1:]), dtype=dtype)
    for row, value in enumerate(values):
        stacked[row, : len(value)] = value
        stacked[row, len(value) :] = fill
    return stacked


def to_columns(spec: CacheSpec, unit: int, rows: list[CapturedRow]) -> Columns:
    """Columns of `rows`: ids are 0 and logits, lse and tails NaN beyond a row's length."""
    id_dtype = np.dtype(spec.id_type.to_pandas_dtype())
    T = spec.length

    def ids(values: list[np.ndarray], dtype: np.dtype = id_dtype) -> np.ndarray:
        return _padded(values, T, 0, dtype)

    def numbers(values: list[np.ndarray]) -> np.ndarray:
        return _padded(values, T, np.nan, np.dtype(np.float32))

    int32 = np.dtype(np.int32)
    columns: Columns = {
        "sequence_id": np.array([sequence_id(unit, row.packed.row) for row in rows], dtype=np.int64),
        "length": np.array([row.packed.length for row in rows], dtype=np.int32),
        "next_id": np.array([row.packed.next_id for row in rows], dtype=np.int32),
        "doc_ids": [list(row.packed.doc_ids) for row in rows],
        "segment_ids": ids([row.packed.segment_ids_L for row in rows], int32),
        "input_ids": ids([row.packed.input_ids_L for row in rows], int32),
        "topk_ids": ids([row.topk_ids_LK for row in rows]),
        "topk_logits": numbers([row.topk_logits_LK for row in rows]),
        "target_logit": numbers([row.target_logit_L for row in rows]),
        "lse": numbers([row.lse_L for row in rows]),
        "log_tail": numbers([row.log_tail_LR for row in rows]),
    }
    if spec.block:
        columns["attn_map"] = np.stack([row.attn_map_Gnn for row in rows]).astype(np.float16)  # type: ignore[arg-type, misc]
    if spec.window:
        columns["hidden"] = np.stack([row.hidden_WD for row in rows]).astype(np.float32)  # type: ignore[arg-type, misc]
    if spec.tail_samples:
        columns["tail_ids"] = ids([row.tail_ids_LM for row in rows])  # type: ignore[misc]
        columns["tail_logits"] = numbers([row.tail_logits_LM for row in rows])  # type: ignore[misc]
    return columns


def row_groups(
    spec: CacheSpec, unit: int, captured: Iterable[CapturedRow], statistics: ShardStatistics
) -> Iterator[Columns]:
    """Gather captured rows into row groups of at most `spec.rows_per_group` rows."""
    tau_one = spec.taus.index(1.0)
    group: list[CapturedRow] = []
    for row in captured:
        statistics.add(row, tau_one)
        group.append(row)
        if len(group) == spec.rows_per_group:
            yield to_columns(spec, unit, group)
            group = []
    if group:
        yield to_columns(spec, unit, group)
