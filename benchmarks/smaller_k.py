"""A cache of a smaller K from one of a larger K, exactly: the first k of every position, the rest moved to the tail.

What `--data.k` does to batches (`student/data/cache_view.py`), on the columns of a shard.

Legend: R rows, T tokens a row, K ids kept before and k after, S temperatures, D = K - k dropped.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from pipeline.schema import CacheSpec
from pipeline.shard import Columns
from student.data.cache_view import tail_with


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
        tail_RTS = np.empty_like(columns["log_tail"])
        for row, dropped_TD in enumerate(columns["topk_logits"][..., k:]):  # row by row: the sums are float64
            stored_TS = torch.from_numpy(columns["log_tail"][row])
            tail_RTS[row] = tail_with(torch.from_numpy(dropped_TD), stored_TS, spec.taus).numpy()
        narrow["topk_ids"] = np.ascontiguousarray(columns["topk_ids"][..., :k])
        narrow["topk_logits"] = np.ascontiguousarray(columns["topk_logits"][..., :k])
        narrow["log_tail"] = tail_RTS
    return narrow, replace(spec, k=k, tail_samples=0)
