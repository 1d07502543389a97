"""Plain pooled attention against its definition in float64."""

from __future__ import annotations

import pytest
import torch
from helpers_attention import HEADS, KV_HEADS, SHAPES, WIDTH, dense

from teacher_dump.kernels.pooled_attention_reference import AttentionShape, pooled_attention


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
