"""Pooled attention and pooled hidden states against dense float64 references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from teacher_dump.kernels.pooled_attention import AttentionShape, pooled_attention
from teacher_dump.kernels.pooled_hidden import pooled_hidden

HEADS, KV_HEADS, WIDTH = 6, 2, 32


def dense(q_THE: Tensor, k_THkvE: Tensor, shape: AttentionShape, block: int, blocks: int) -> Tensor:
    """The definition of P[I, J], one element of A at a time."""
    length = q_THE.shape[0]
    k_THE = k_THkvE.double().repeat_interleave(HEADS // KV_HEADS, dim=1)
    scores = torch.einsum("the,she->hts", q_THE.double(), k_THE) * shape.scale
    if shape.soft_cap:
        scores = shape.soft_cap * torch.tanh(scores / shape.soft_cap)
    t, s = torch.arange(length)[:, None], torch.arange(length)[None, :]
    if shape.alibi_H is not None:
        scores = scores + shape.alibi_H.double()[:, None, None] * (s - t)
    hidden = s > t
    if shape.window:
        hidden = hidden | (t - s >= shape.window)
    scores = scores.masked_fill(hidden, -torch.inf)
    if shape.sinks_H is not None:
        sinks = shape.sinks_H.double()[:, None, None].expand(HEADS, length, 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    pooled = torch.zeros(blocks, blocks, dtype=torch.float64)
    for i in range(-(-length // block)):
        queries = weights[:, i * block : (i + 1) * block]
        for j in range(-(-length // block)):
            pooled[i, j] = queries[..., j * block : (j + 1) * block].sum() / (HEADS * queries.shape[1])
    return pooled


SHAPES = {
    "plain": AttentionShape(0.2),
    "soft cap": AttentionShape(0.2, soft_cap=1.5),
    "window": AttentionShape(0.2, window=37),
    "window of one": AttentionShape(0.2, window=1),
    "alibi": AttentionShape(0.2, alibi_H=torch.logspace(-2, 0, HEADS)),
    "sinks": AttentionShape(0.2, sinks_H=torch.linspace(-2, 2, HEADS)),
    "all": AttentionShape(0.2, 50, 2.0, torch.logspace(-2, 0, HEADS), torch.linspace(-2, 2, HEADS)),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("block", "blocks", "lengths"), [(8, 40, (320, 1, 203)), (32, 9, (257, 32)), (160, 2, (161,))])
def test_matches_dense_reference(name: str, block: int, blocks: int, lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    total = sum(lengths) + 5  # a padded step: what lies beyond the rows is not read
    q_NHE, k_NHkvE = torch.randn(total, HEADS, WIDTH), torch.randn(total, KV_HEADS, WIDTH)
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    pooled = pooled_attention(q_NHE, k_NHkvE, starts, SHAPES[name], block, blocks)
    for row, (start, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        expected = dense(q_NHE[start:end], k_NHkvE[start:end], SHAPES[name], block, blocks)
        torch.testing.assert_close(pooled[row].double(), expected, rtol=1e-5, atol=1e-6)


def test_rows_sum_to_one_and_padding_is_zero() -> None:
    torch.manual_seed(1)
    q_NHE, k_NHkvE = torch.randn(75, HEADS, WIDTH).bfloat16(), torch.randn(75, KV_HEADS, WIDTH).bfloat16()
    pooled = pooled_attention(q_NHE, k_NHkvE, [0, 75], AttentionShape(0.2), 16, 8)[0]
    torch.testing.assert_close(pooled.sum(-1), torch.tensor([1.0] * 5 + [0.0] * 3))
    assert (pooled.triu(1) == 0).all() and (pooled[5:] == 0).all()


@pytest.mark.parametrize("window", [1, 7, 16])
def test_pooled_hidden_means_valid_tokens_only(window: int) -> None:
    torch.manual_seed(2)
    lengths, windows = (48, 13, 1), 48 // window + 1
    hidden_ND = torch.randn(sum(lengths), 5) * 1000
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    pooled = pooled_hidden(hidden_ND, starts, window, windows)
    assert torch.equal(pooled, pooled.bfloat16().float())
    for row, (start, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        for w in range(windows):
            tokens = hidden_ND[start:end][w * window : (w + 1) * window].double()
            expected = tokens.mean(0) if len(tokens) else torch.zeros(5, dtype=torch.float64)
            torch.testing.assert_close(pooled[row, w].double(), expected, rtol=2**-8, atol=1e-6)
