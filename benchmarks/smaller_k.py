"""A cache of a smaller K from one of a larger K, exactly: the first k of every position, the rest moved to the tail.

Legend: R rows, T tokens a row, K ids kept before and k after, S temperatures, D = K - k dropped.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pipeline.schema import CacheSpec
from pipeline.shard import Columns


def with_smaller_k(columns: Columns, spec: CacheSpec, k: int) -> tuple[Columns, CacheSpec]:
    """What a dump with k would have stored.

    Ids, logits and lse are the same numbers; `log_tail` is summed in float64 and rounded once, so it differs from a
    dump's own by float32 rounding. Draws from the tail are left out: those of K are no draws from the larger tail of k.

    Args:
        columns: rows of a cache of shape `spec`; values are shared with the result where they do not change.
        k: 1 <= k <= spec.k.

    Returns:
        the columns and their spec.
    """
    if not 1 <= k <= spec.k:
        raise ValueError(f"k={k} cannot be cut from K={spec.k}")
    narrow = {name: values for name, values in columns.items() if name not in ("tail_ids", "tail_logits")}
    if k < spec.k:
        taus_S = np.array(spec.taus)
        tail_RTS = np.empty_like(columns["log_tail"])
        for row, dropped_TD in enumerate(columns["topk_logits"][..., k:]):  # row by row: the sums are float64
            scaled_TDS = dropped_TD[..., None].astype(np.float64) / taus_S
            tail_RTS[row] = _log_sum(scaled_TDS, columns["log_tail"][row].astype(np.float64))
        narrow["topk_ids"] = np.ascontiguousarray(columns["topk_ids"][..., :k])
        narrow["topk_logits"] = np.ascontiguousarray(columns["topk_logits"][..., :k])
        narrow["log_tail"] = tail_RTS
    return narrow, replace(spec, k=k, tail_samples=0)


def _log_sum(scaled_TDS: np.ndarray, tail_TS: np.ndarray) -> np.ndarray:
    """log(sum over D of exp(scaled) + exp(tail)); NaN where a position is padding."""
    top_TS = np.maximum(scaled_TDS.max(axis=1), tail_TS)  # dropped logits are finite, so the maximum is
    return top_TS + np.log(np.exp(scaled_TDS - top_TS[:, None]).sum(axis=1) + np.exp(tail_TS - top_TS))
