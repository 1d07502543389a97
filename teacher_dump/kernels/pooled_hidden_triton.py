"""Window sums of hidden states on a GPU, added to a running sum over layers: each layer's output is read once.

Legend: N tokens of all rows one after another, B rows, W windows of the cache's length, D width.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _add_windows(
    x_ptr, y_ptr, stride_n, starts_ptr, sums_ptr, windows, width, window,
    TWO: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """sums[row, w] += sum over the window's tokens of x (+ y)."""
    w, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(starts_ptr + row)
    end = tl.minimum(tl.load(starts_ptr + row + 1), start + (w + 1) * window)
    first = start + w * window
    if first >= end:
        return
    d = part * D + tl.arange(0, D)
    t = tl.arange(0, T)
    total = tl.zeros([T, D], tl.float32)
    for n in range(first, end, T):
        inside = (n + t < end)[:, None] & (d < width)[None, :]
        at = (n + t).to(tl.int64)[:, None] * stride_n + d[None, :]
        total += tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if TWO:
            total += tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
    to = sums_ptr + (row * windows + w).to(tl.int64) * width + d
    tl.store(to, tl.load(to, mask=d < width, other=0.0) + tl.sum(total, 0), mask=d < width)


def add_window_sums(sums_BWD: Tensor, parts_ND: list[Tensor], starts_B1: Tensor, window: int) -> None:
    """Add the window sums of one layer's output to `sums_BWD`.

    Args:
        sums_BWD: float32, contiguous.
        parts_ND: one tensor, or two whose sum is the layer's output; the same strides, contiguous last dimension.
        starts_B1: int32 on the device, B + 1 offsets of the rows in N.
        window: tokens w per window.
    """
    x_ND, y_ND = parts_ND[0], parts_ND[-1]
    rows, windows, width = sums_BWD.shape
    assert x_ND.stride() == y_ND.stride() and x_ND.stride(1) == 1 and len(parts_ND) <= 2
    columns = min(512, triton.next_power_of_2(width))
    _add_windows[(windows, -(-width // columns), rows)](
        x_ND, y_ND, x_ND.stride(0), starts_B1, sums_BWD, windows, width, window,
        TWO=len(parts_ND) == 2, T=min(8, triton.next_power_of_2(window)), D=columns,
    )  # fmt: skip
