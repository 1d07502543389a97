"""Sums of hidden states over windows of w tokens, in plain torch.

Legend: N tokens of all rows one after another, B rows, W windows of the cache's length, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def window_sums(hidden_ND: Tensor, starts: list[int], window: int, windows: int) -> Tensor:
    """Sum over the tokens of each window: (B, W, D) float32; empty windows are zero.

    Args:
        hidden_ND: any float dtype.
        starts: B + 1 offsets of the rows in N.
        window: tokens w per window.
        windows: W of the cache's full length.
    """
    sums_BWD = torch.zeros((len(starts) - 1, windows, hidden_ND.shape[1]), device=hidden_ND.device)
    for row, (start, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        full = (end - start) // window
        tokens_LD = hidden_ND[start:end].float()
        sums_BWD[row, :full] = tokens_LD[: full * window].unflatten(0, (full, window)).sum(1)
        if full * window < end - start:
            sums_BWD[row, full] = tokens_LD[full * window :].sum(0)
    return sums_BWD
