"""The GPU's pooled attention against its definition in float64: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from helpers_attention import HEADS, KV_HEADS, SHAPES, dense
from torch import Tensor

from teacher_dump.kernels.pooled_attention_reference import AttentionShape, pooled_attention
from teacher_dump.kernels.pooled_attention_triton import add_pooled_attention, row_lse, unit_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_gpu(
    q_NHE: Tensor, k_NHkvE: Tensor, lengths: tuple[int, ...], shape: AttentionShape, block: int, blocks: int
) -> Tensor:
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    units = block // unit_of(block)
    pooled = torch.zeros(len(lengths), 2, blocks * units, blocks * units, device=DEVICE)
    inputs = q_NHE.to(DEVICE), k_NHkvE.to(DEVICE), starts, max(lengths)
    for weight in (0.25, 0.75):  # two layers of a group
        add_pooled_attention(pooled[:, 1], *inputs, None, shape, block, weight)
    assert (pooled[:, 0] == 0).all()
    return pooled[:, 1].unflatten(2, (blocks, units)).sum(3).unflatten(1, (blocks, units)).sum(2).cpu()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    ("width", "block", "blocks", "lengths"),
    [
        (32, 8, 40, (320, 1, 203)),
        (64, 32, 9, (257, 32)),
        (96, 160, 2, (161,)),
        (128, 64, 5, (129, 300)),
        (256, 48, 3, (130,)),
    ],
)
def test_matches_dense_reference(name: str, width: int, block: int, blocks: int, lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    total = sum(lengths) + 5  # a padded step: what lies beyond the rows is not read
    q_NHE, k_NHkvE = torch.randn(total, HEADS, width), torch.randn(total, KV_HEADS, width)
    pooled = on_gpu(q_NHE, k_NHkvE, lengths, SHAPES[name], block, blocks)
    start = 0
    for row, length in enumerate(lengths):
        at = slice(start, start := start + length)
        expected = dense(q_NHE[at], k_NHkvE[at], SHAPES[name], block, blocks)
        torch.testing.assert_close(pooled[row].double(), expected, rtol=2e-5, atol=2e-6)


def eager(q_THE: Tensor, k_THE: Tensor, shape: AttentionShape, block: int, blocks: int) -> Tensor:
    """Attention as it is written down, in the dtype of its inputs, pooled in float32."""
    scores = torch.einsum("the,she->hts", q_THE, k_THE) * shape.scale
    if shape.soft_cap:
        scores = torch.tanh(scores / shape.soft_cap) * shape.soft_cap
    length = len(q_THE)
    before = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    hidden = (before < 0) | (before >= (shape.window or length))
    mean = scores.masked_fill(hidden, -torch.inf).softmax(-1).mean(0).float()
    beyond = blocks * block - length
    padded = torch.nn.functional.pad(mean, (0, beyond, 0, beyond))
    sums = padded.unflatten(1, (blocks, block)).sum(2).unflatten(0, (blocks, block)).sum(1)
    return sums / (length - torch.arange(blocks) * block).clamp(1, block)[:, None]


@pytest.mark.parametrize("name", ["plain", "window", "soft cap"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width"), [(6, 6, 64), (6, 1, 64), (6, 3, 64), (6, 3, 96), (6, 3, 128), (6, 3, 256)]
)
@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(
            torch.bfloat16, marks=pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter's dot lacks it")
        ),
        torch.float16,
    ],
)
def test_no_further_from_float32_than_plain_torch_is(
    heads: int, kv_heads: int, width: int, name: str, dtype: torch.dtype
) -> None:
    """Error against float32 at most that of eager attention in the same dtype, plus its rounding."""
    torch.manual_seed(1)
    lengths, block, blocks = (150, 64), 16, 10
    q_NHE, k_NHkvE = torch.randn(214, heads, width).to(dtype), torch.randn(214, kv_heads, width).to(dtype)
    shape = replace(SHAPES[name], scale=width**-0.5)
    pooled = on_gpu(q_NHE, k_NHkvE, lengths, shape, block, blocks)
    exact = pooled_attention(q_NHE.float(), k_NHkvE.float(), [0, 150, 214], shape, block, blocks)
    k_NHE = k_NHkvE.repeat_interleave(heads // kv_heads, 1)
    plain = torch.stack(
        [eager(q_NHE[at], k_NHE[at], shape, block, blocks) for at in (slice(0, 150), slice(150, 214))]
    )  # fmt: skip
    assert (pooled - exact).abs().max() <= (plain - exact).abs().max() + torch.finfo(dtype).eps / 8


def test_row_lse() -> None:
    torch.manual_seed(2)
    q_NHE, k_NHkvE = torch.randn(140, HEADS, 32), torch.randn(140, KV_HEADS, 32)
    starts = torch.tensor([0, 140], dtype=torch.int32, device=DEVICE)
    lse_HN = row_lse(q_NHE.to(DEVICE), k_NHkvE.to(DEVICE), starts, 140, AttentionShape(0.2)).cpu()
    scores = torch.einsum("the,she->hts", q_NHE.double(), k_NHkvE.double().repeat_interleave(3, 1)) * 0.2
    scores.masked_fill_(torch.ones(140, 140, dtype=torch.bool).triu(1), -torch.inf)
    torch.testing.assert_close(lse_HN.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
