"""The GPU's sLSTM recurrence against the plain scan in float64: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from student.blocks.slstm import slstm_scan
from student.blocks.slstm_triton import slstm_recurrence

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def plain(x_BTG: Tensor, R_Hgd: Tensor, bias_G: Tensor, state_4BW: Tensor) -> tuple[Tensor, Tensor]:
    batch, length = x_BTG.shape[:2]
    heads, width = R_Hgd.shape[0], R_Hgd.shape[2]
    gates = (x_BTG + bias_G).view(batch, length, 4, heads, width).permute(1, 0, 3, 2, 4).flatten(-2)
    y_TBHd, last = slstm_scan(gates, R_Hgd.transpose(1, 2), state_4BW.view(4, batch, heads, width))
    return y_TBHd.transpose(0, 1), last.flatten(-2)


def inputs(batch: int, length: int, heads: int, width: int, empty: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length + width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    state_4BW = normal(4, batch, heads * width)
    state_4BW[2] = state_4BW[2].abs() + 0.5
    if empty:
        state_4BW.zero_()
    x_BTG, R_Hgd = normal(batch, length, 4 * heads * width), normal(heads, 4 * width, width) / width**0.5
    return [x_BTG, R_Hgd, normal(4 * heads * width), state_4BW]


@pytest.mark.parametrize("empty", [True, False])
@pytest.mark.parametrize(
    ("batch", "length", "heads", "width"), [(1, 1, 1, 16), (3, 9, 2, 16), (17, 4, 1, 24), (2, 21, 2, 64), (2, 5, 1, 48)]
)
def test_outputs_state_and_gradients(batch: int, length: int, heads: int, width: int, empty: bool) -> None:
    exact = inputs(batch, length, heads, width, empty)
    single = [x.float().to(DEVICE) for x in exact]
    weight_BTHd = torch.randn(batch, length, heads, width, generator=torch.Generator().manual_seed(1))
    for x in (*exact[:3], *single[:3]):
        x.requires_grad_()
    want_y, want_last = plain(*exact)
    got_y, got_last = slstm_recurrence(*single)
    torch.testing.assert_close(got_y.detach().cpu().double(), want_y.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got_last.cpu().double(), want_last, rtol=1e-4, atol=1e-5)
    (want_y * weight_BTHd).sum().backward()
    (got_y * weight_BTHd.to(DEVICE)).sum().backward()
    for name, got, want in zip(("x", "R", "bias"), single, exact, strict=False):
        assert got.grad is not None and want.grad is not None
        scale = want.grad.abs().max()
        torch.testing.assert_close(got.grad.cpu().double(), want.grad, rtol=1e-3, atol=float(1e-5 * scale), msg=name)


def test_two_halves_make_the_whole() -> None:
    x_BTG, *parts, state_4BW = (x.float().to(DEVICE) for x in inputs(2, 8, 2, 16, True))
    whole, last = slstm_recurrence(x_BTG, *parts, state_4BW)
    first, between = slstm_recurrence(x_BTG[:, :3], *parts, state_4BW)
    second, end = slstm_recurrence(x_BTG[:, 3:], *parts, between)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(end, last)


def test_wide_heads_in_half_precision() -> None:
    exact = inputs(2, 5, 1, 96, True)
    x_BTG, *parts = (x.float().to(DEVICE) for x in exact)
    got_y, _ = slstm_recurrence(x_BTG.half(), *parts)
    torch.testing.assert_close(got_y.cpu().double(), plain(*exact)[0], rtol=1e-2, atol=1e-2)


GPU = pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter has no bfloat16 products")


@pytest.mark.parametrize("empty", [True, False])
@pytest.mark.parametrize(
    ("length", "width", "dtype", "bound"),
    [
        (64, 16, torch.float16, 5e-3),
        (24, 64, torch.float16, 5e-3),  # of preset `fast`
        (24, 96, torch.float16, 5e-3),  # of preset `paper`
        pytest.param(512, 64, torch.bfloat16, 4e-2, marks=GPU),
        pytest.param(512, 96, torch.bfloat16, 4e-2, marks=GPU),
    ],
)
def test_half_precision_gradients(length: int, width: int, dtype: torch.dtype, bound: float, empty: bool) -> None:
    """What is kept for the backward is in half precision: its rounding must not add up over a row."""
    exact = inputs(2, length, 2, width, empty)
    single = [x.float().to(DEVICE) for x in exact]
    single[0] = single[0].to(dtype)
    for x in (*exact[:3], *single[:3]):
        x.requires_grad_()
    plain(*exact)[0].sum().backward()
    slstm_recurrence(*single)[0].float().sum().backward()
    for name, got, want in zip(("x", "R", "bias"), single, exact, strict=False):
        assert got.grad is not None and want.grad is not None
        assert (got.grad.cpu().double() - want.grad).norm() <= bound * want.grad.norm(), name


@pytest.mark.parametrize(("width", "dtype"), [(256, torch.float16), (96, torch.float32)])
def test_heads_that_are_too_wide_are_refused(width: int, dtype: torch.dtype) -> None:
    x_BTG, bias_G = torch.zeros(1, 1, 4 * width, dtype=dtype), torch.zeros(4 * width)
    with pytest.raises(ValueError, match=f"width {width}"):
        slstm_recurrence(x_BTG, torch.zeros(1, 4 * width, width), bias_G, torch.zeros(4, 1, width))
