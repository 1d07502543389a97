"""The pooled implicit attention against its dense definition, in value and gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from xlstm.blocks.mlstm.backends import parallel_stabilized_simple

from student.blocks.implicit_attention import dense_implicit_attention, pool_dense, pooled_implicit_attention


def cell_inputs(length: int, dtype: torch.dtype, forget_bias: float = 2.0, seed: int = 0) -> list[Tensor]:
    """q, k, input and forget gates of 2 rows and 3 heads of width 5, with gradients."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, 3, length, 5, generator=generator, dtype=dtype) for _ in range(2))
    igate = 2 * torch.randn(2, 3, length, generator=generator, dtype=dtype)
    fgate = forget_bias + torch.randn(2, 3, length, generator=generator, dtype=dtype)
    return [x.requires_grad_() for x in (q, k, igate, fgate)]


# Forget biases: fast decay, where exp(-m) is the normaliser, and long memory, where the sum is.
@pytest.mark.parametrize("forget_bias", [-3.0, 2.0, 6.0])
@pytest.mark.parametrize(("length", "block"), [(24, 8), (21, 7), (5, 5), (6, 1), (15, 3)])
def test_pooled_equals_dense_in_value_and_gradient(length: int, block: int, forget_bias: float) -> None:
    inputs = cell_inputs(length, torch.float64, forget_bias)
    pooled = pooled_implicit_attention(*inputs, block)
    dense = pool_dense(dense_implicit_attention(*inputs), block)
    torch.testing.assert_close(pooled, dense, atol=1e-12, rtol=1e-10)
    weight = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1), dtype=pooled.dtype)
    ours = torch.autograd.grad((pooled * weight).sum(), inputs)
    theirs = torch.autograd.grad((dense * weight).sum(), inputs)
    for name, got, expected in zip(("q", "k", "igate", "fgate"), ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-11, rtol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_both_branches_of_the_normaliser_are_covered_by_the_cases_above() -> None:
    inputs = cell_inputs(24, torch.float64)
    row_sums = dense_implicit_attention(*inputs).sum(-1).abs()
    share = (row_sums > 1 - 1e-9).double().mean().item()
    assert 0.05 < share < 0.95


def test_the_map_is_the_attention_of_the_package_cell() -> None:
    q, k, igate, fgate = cell_inputs(20, torch.float64)
    values = torch.randn(2, 3, 20, 4, dtype=torch.float64)
    cell = parallel_stabilized_simple(q, k, values, igate[..., None], fgate[..., None], eps=0.0)
    torch.testing.assert_close(dense_implicit_attention(q, k, igate, fgate) @ values, cell, atol=1e-10, rtol=1e-9)


def test_float32_stays_near_float64_over_long_rows_with_strong_decay() -> None:
    """Total decay near 10^4 nats: a float32 running sum alone would lose three digits of every difference."""
    inputs = cell_inputs(2048, torch.float64, forget_bias=-5.0)
    expected = pooled_implicit_attention(*inputs, 32)
    got = pooled_implicit_attention(*(x.detach().float() for x in inputs), 32)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, atol=2e-6, rtol=1e-4)


def test_bfloat16_inputs_are_computed_in_float32() -> None:
    inputs = [x.detach().bfloat16() for x in cell_inputs(24, torch.float32)]
    got = pooled_implicit_attention(*inputs, 8)
    torch.testing.assert_close(got, pooled_implicit_attention(*(x.float() for x in inputs), 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(pooled_implicit_attention(*inputs, 8), got)


@pytest.mark.parametrize(("length", "block"), [(10, 4), (8, 0), (3, 8)])
def test_a_length_that_is_no_multiple_is_refused(length: int, block: int) -> None:
    with pytest.raises(ValueError, match=f"T={length} .* block {block}"):
        pooled_implicit_attention(*cell_inputs(length, torch.float32), block)
