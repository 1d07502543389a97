"""Mean hidden states over windows of w tokens, rounded to bfloat16 values.

Legend: N tokens of all rows one after another, B rows, W windows of the cache's length, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pooled_hidden(hidden_ND: Tensor, starts: list[int], window: int, windows: int) -> Tensor:
    """Mean over the valid tokens of each window: (B, W, D) float32 holding bfloat16 values; empty windows are zero.

    Args:
        hidden_ND: float32.
        starts: B + 1 offsets of the rows in N.
        window: tokens w per window.
        windows: W of the cache's full length.
    """
    pooled_BWD = hidden_ND.new_zeros((len(starts) - 1, windows, hidden_ND.shape[1]))
    for row, (start, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        full = (end - start) // window
        tokens_LD = hidden_ND[start:end]
        pooled_BWD[row, :full] = tokens_LD[: full * window].unflatten(0, (full, window)).mean(1)
        if full * window < end - start:
            pooled_BWD[row, full] = tokens_LD[full * window :].mean(0)
    return pooled_BWD.to(torch.bfloat16).float()
