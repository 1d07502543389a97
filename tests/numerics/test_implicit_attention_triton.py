"""The GPU's pooled implicit attention against the plain form in float64: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from student.blocks.implicit_attention import dense_implicit_attention, pool_dense, pooled_implicit_attention
from student.blocks.implicit_attention_triton import pooled_by_kernels, takes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16  # the interpreter cannot multiply bfloat16


def inputs_of(length: int, width: int, forget_bias: float, dtype: torch.dtype) -> list[Tensor]:
    """q and k (2, 3, T, d) laid out by head, as a block gives them, and the gates; values that `dtype` can hold."""
    generator = torch.Generator().manual_seed(length + width)
    q, k = (torch.randn(3, 2, length, width, generator=generator).to(dtype).double() for _ in range(2))
    igate = 2 * torch.randn(2, 3, length, generator=generator)
    fgate = forget_bias + torch.randn(2, 3, length, generator=generator)
    return [q.transpose(0, 1), k.transpose(0, 1), igate.double(), fgate.double()]


def gradients(pooled: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weight = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1)).to(pooled)
    return [g.cpu().double() for g in torch.autograd.grad((pooled * weight).sum(), inputs)]


# Forget biases: fast decay, where exp(-m) is the normaliser, and long memory, where the sum is.
@pytest.mark.parametrize("forget_bias", [-3.0, 2.0, 6.0])
@pytest.mark.parametrize(
    ("length", "block", "width"), [(24, 8, 16), (21, 7, 20), (6, 1, 16), (48, 16, 40), (33, 33, 24)]
)
def test_value_and_gradients(length: int, block: int, width: int, forget_bias: float) -> None:
    exact = [x.requires_grad_() for x in inputs_of(length, width, forget_bias, torch.float32)]
    single = [x.detach().to(DEVICE, torch.float32).requires_grad_() for x in exact]
    want, got = pooled_implicit_attention(*exact, block), pooled_by_kernels(*single, block)
    torch.testing.assert_close(got.detach().cpu().double(), want.detach(), rtol=1e-4, atol=1e-5)
    for name, ours, theirs in zip("qkif", gradients(got, single), gradients(want, exact), strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm(), name


@pytest.mark.parametrize("forget_bias", [-3.0, 4.0])
def test_half_precision_is_summed_in_float32(forget_bias: float) -> None:
    exact = [x.requires_grad_() for x in inputs_of(64, 32, forget_bias, HALF)]
    kinds = (HALF, HALF, torch.float32, torch.float32)
    half = [x.detach().to(DEVICE, dtype).requires_grad_() for x, dtype in zip(exact, kinds, strict=True)]
    want = pooled_implicit_attention(*exact, 16)
    expected = gradients(want, exact)
    got = pooled_by_kernels(*half, 16)
    assert got.dtype == torch.float32
    # The inputs are the same numbers and sums are in float32: values are no worse than in float32.
    torch.testing.assert_close(got.detach().cpu().double(), want.detach(), rtol=1e-4, atol=1e-5)
    for name, ours, theirs in zip("qkif", gradients(got, half), expected, strict=True):
        assert (ours - theirs).norm() <= 5e-3 * theirs.norm(), name


def test_it_is_the_dense_form_without_gradients() -> None:
    inputs = inputs_of(32, 16, 2.0, torch.float32)
    with torch.no_grad():
        got = pooled_by_kernels(*(x.to(DEVICE, torch.float32) for x in inputs), 8)
    want = pool_dense(dense_implicit_attention(*inputs), 8)
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-4, atol=1e-5)


def test_what_the_kernels_take() -> None:
    def zeros(width: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(1, 1, 512, width, dtype=dtype)

    half, single, double = zeros(128, torch.bfloat16), zeros(128, torch.float32), zeros(128, torch.float64)
    assert takes(half, half, 128) and takes(single, single, 64)
    assert not takes(half, half, 256) and not takes(single, single, 128) and not takes(half, single, 64)
    assert not takes(double, double, 16) and not takes(zeros(512, torch.bfloat16), zeros(512, torch.bfloat16), 16)
