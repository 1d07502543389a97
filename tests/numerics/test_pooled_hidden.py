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
def test_kernel_agrees_with_plain_torch(window: int, width: int, parts: int) -> None:
    torch.manual_seed(3)
    lengths = (130, 1, 64)
    starts = [0, *accumulate(lengths)]
    parts_ND = [torch.randn(200, width).half() for _ in range(parts)]
    sums_BWD = torch.ones(3, 130 // window + 1, width, device=DEVICE)
    starts_B1 = torch.tensor(starts, dtype=torch.int32, device=DEVICE)
    add_window_sums(sums_BWD, [part.to(DEVICE) for part in parts_ND], starts_B1, window)
    expected = 1 + sum(window_sums(part.double(), starts, window, 130 // window + 1) for part in parts_ND)
    torch.testing.assert_close(sums_BWD.cpu(), expected.float(), rtol=1e-5, atol=1e-5)
