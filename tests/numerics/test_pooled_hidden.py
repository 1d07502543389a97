"""Pooled hidden states against means in float64; the GPU's kernel on a GPU, else in Triton's interpreter."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

from teacher_dump.kernels.pooled_hidden import StepHidden
from teacher_dump.kernels.pooled_hidden_reference import window_sums
from teacher_dump.kernels.pooled_hidden_triton import add_window_sums

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("window", [1, 7, 16])
def test_means_of_valid_tokens_and_layers(window: int) -> None:
    torch.manual_seed(2)
    lengths, windows = [48, 13, 1], 48 // window + 1
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    layers_LND = torch.randn(3, sum(lengths) + 4, 5) * 1000
    hidden = StepHidden(len(lengths), window, windows, 5, DEVICE)
    for layer_ND in layers_LND.to(DEVICE):
        hidden.add([layer_ND / 4, layer_ND * 3 / 4], starts)
    pooled = hidden.finish(lengths, 3).cpu()
    assert torch.equal(pooled, pooled.bfloat16().float())
    for row, (start, length) in enumerate(zip(starts.tolist(), lengths, strict=False)):
        for w in range(windows):
            tokens = layers_LND[:, start : start + length][:, w * window : (w + 1) * window].double()
            expected = tokens.mean((0, 1)) if tokens.numel() else torch.zeros(5, dtype=torch.float64)
            torch.testing.assert_close(pooled[row, w].double(), expected, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize(("window", "width"), [(1, 3), (5, 40), (64, 576)])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kernel_sums_in_float32(window: int, width: int, parts: int, dtype: torch.dtype) -> None:
    """Whatever the dtype it reads, against float64; no further from it than plain torch, which sums in float32 too."""
    torch.manual_seed(3)
    lengths = (130, 1, 64)
    starts = [0, *accumulate(lengths)]
    parts_ND = [torch.randn(200, width).to(dtype) for _ in range(parts)]
    windows = 130 // window + 1
    sums_BWD = torch.ones(3, windows, width, device=DEVICE)
    starts_B1 = torch.tensor(starts, dtype=torch.int32, device=DEVICE)
    add_window_sums(sums_BWD, [part.to(DEVICE) for part in parts_ND], starts_B1, window)
    exact_BWD = torch.ones(3, windows, width, dtype=torch.float64)
    for row, (start, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        for w, first in enumerate(range(start, end, window)):
            at = slice(first, min(first + window, end))
            exact_BWD[row, w] += sum(part[at].double().sum(0) for part in parts_ND)
    plain_BWD = 1 + sum(window_sums(part, starts, window, windows) for part in parts_ND)
    torch.testing.assert_close(sums_BWD.cpu().double(), exact_BWD, rtol=1e-5, atol=1e-5)
    off, plain_off = ((x.cpu() - exact_BWD).abs().max() for x in (sums_BWD, plain_BWD))
    assert off <= plain_off + 4 * torch.finfo(torch.float32).eps * exact_BWD.abs().max()
