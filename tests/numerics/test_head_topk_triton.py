"""The GPU's search of the head's logits, against dense float64 references: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from teacher_dump.kernels import head_topk_reference, head_topk_triton
from teacher_dump.kernels.head_topk_triton import local_top_k, tile_steps
from teacher_dump.kernels.logits_triton import shaped_logits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TAUS = (1.0, 1.2, 1.5, 2.0)


def check(logits_NV: Tensor, k: int, taus: tuple[float, ...] = TAUS, tolerance: float = 2e-5) -> None:
    """Ids and logits to the bit, tails to float32's rounding."""
    ids_NK, values_NK, log_tail_NR = (x.cpu() for x in local_top_k(logits_NV.to(DEVICE), k, taus))
    z_NV = logits_NV.double()
    expected_NK = z_NV.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    rest_NV = z_NV.scatter(1, expected_NK, -torch.inf)
    expected_NR = torch.stack([(rest_NV / tau).logsumexp(-1) for tau in taus], dim=-1)
    assert torch.equal(ids_NK.long(), expected_NK)
    assert torch.equal(values_NK, logits_NV.float().gather(1, expected_NK))
    torch.testing.assert_close(log_tail_NR.double(), expected_NR, rtol=1e-6, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("vocab", "k"), [(517, 64), (4099, 1), (5003, 8), (9001, 64), (30011, 256), (49152, 64), (70, 70)]
)
def test_matches_dense_reference(vocab: int, k: int, dtype: torch.dtype) -> None:
    torch.manual_seed(vocab + k)
    check((torch.randn(5, vocab) * 3).to(dtype), k)


def test_rows_with_a_stride() -> None:
    """The head's output is padded to a multiple of 64 columns; the padding is not part of the vocabulary."""
    torch.manual_seed(0)
    padded_NV = torch.randn(4, 5056).to(DEVICE)
    padded_NV[:, 5003:] = 100.0
    for whole, part in zip(
        local_top_k(padded_NV[:, :5003].contiguous(), 8, TAUS), local_top_k(padded_NV[:, :5003], 8, TAUS), strict=True
    ):
        assert torch.equal(whole, part)


@given(st.integers(1, 3), st.integers(1000, 9000), st.integers(1, 8), st.integers(1, 6), st.integers(0, 2**31))
@settings(max_examples=12)
def test_ties(rows: int, vocab: int, k: int, levels: int, seed: int) -> None:
    """A handful of distinct values: more candidates than the buffers hold, and every boundary is a tie."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.cat([torch.arange(levels).float() - 2, torch.tensor([-0.0])])
    check(values[torch.randint(len(values), (rows, vocab), generator=generator)], k)


def test_ties_in_bfloat16_at_the_boundary() -> None:
    torch.manual_seed(4)
    check((torch.randn(8, 20000) * 0.7).bfloat16(), 64)


@pytest.mark.parametrize("gap", [14.0, 40.0, 300.0])
def test_small_tails_keep_their_digits(gap: float) -> None:
    """A tail of mass 1e-6, 1e-17, or far below float32's smallest exponential."""
    torch.manual_seed(0)
    logits_NV = torch.randn(4, 6000)
    logits_NV[:, 100:108] += gap + 8
    check(logits_NV, 8, tolerance=1e-5)


def test_a_tail_far_below_the_last_of_the_top_k() -> None:
    """The shift by the K-th logit would underflow: the row must be searched anew."""
    logits_NV = torch.full((2, 6000), -200.0)
    logits_NV[:, torch.arange(4) * 1000] = torch.tensor([3.0, 2.0, 1.0, 0.0])
    check(logits_NV, 4)


def test_one_block_holds_the_top_k() -> None:
    logits_NV = torch.randn(2, 9000)
    logits_NV[:, 0:8] += 30.0
    logits_NV[:, 1024:1032] += 40.0
    check(logits_NV, 16)


def test_minus_infinity_and_no_tail() -> None:
    logits_NV = torch.full((2, 5000), -math.inf)
    logits_NV[:, 77:90] = torch.arange(13.0)
    ids_NK, values_NK, log_tail_NR = (x.cpu() for x in local_top_k(logits_NV.to(DEVICE), 16, TAUS))
    assert ids_NK[0].tolist() == [*range(89, 76, -1), 0, 1, 2]
    assert (values_NK[:, 13:] == -math.inf).all() and (log_tail_NR == -math.inf).all()
    *_, log_tail_NR = local_top_k(torch.randn(2, 40).to(DEVICE), 40, TAUS)
    assert (log_tail_NR == -math.inf).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [7, 4990])
def test_bad_logits_are_seen(bad: float, at: int) -> None:
    """lse, as `head_topk` forms it, is not finite in the row and in no other."""
    logits_NV = torch.randn(2, 5000)
    logits_NV[1, at] = bad
    _, values_NK, log_tail_NR = local_top_k(logits_NV.to(DEVICE), 8, TAUS)
    lse_N = torch.logaddexp(values_NK.logsumexp(-1), log_tail_NR[:, 0])
    assert lse_N.isfinite().tolist() == [True, False]


@pytest.mark.parametrize("taus", [(0.7, 1.0, 1.37), (1.0,), (0.5, 1.0, 2.0, 3.0, 4.0), (2.0, 1.0)])
def test_other_temperatures(taus: tuple[float, ...]) -> None:
    torch.manual_seed(1)
    check(torch.randn(3, 5000) * 4, 16, taus=taus)


@pytest.mark.parametrize(("soft_cap", "scale"), [(30.0, 1.0), (None, 0.25), (5.0, 0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soft_cap_and_scale(soft_cap: float | None, scale: float, dtype: torch.dtype) -> None:
    """Within one rounding of the head's dtype of the float64 value; the ranks are those of the rounded values."""
    torch.manual_seed(6)
    raw_NV = (torch.randn(3, 5000) * 6).to(dtype)
    ids_NK, values_NK, log_tail_NR = (x.cpu() for x in local_top_k(raw_NV.to(DEVICE), 8, TAUS, soft_cap, scale))
    exact_NV = raw_NV.double() if soft_cap is None else soft_cap * (raw_NV.double() / soft_cap).tanh()
    exact_NV *= scale
    tolerance = 2e-6 if dtype == torch.float32 else 2**-8 if DEVICE == "cuda" else 2**-7  # the interpreter cuts off
    torch.testing.assert_close(values_NK.double(), exact_NV.gather(1, ids_NK.long()), rtol=tolerance, atol=1e-5)
    shaped_NV = shaped_logits(raw_NV.to(DEVICE), soft_cap, scale).cpu()
    assert torch.equal(shaped_NV, shaped_NV.to(dtype).float())
    check_ids, check_values, check_tail = head_topk_reference.local_top_k(shaped_NV, 8, TAUS)
    assert torch.equal(ids_NK, check_ids) and torch.equal(values_NK, check_values)
    torch.testing.assert_close(log_tail_NR, check_tail, rtol=1e-6, atol=2e-5)


def test_likely_ids_that_are_neighbours_are_not_searched_bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that fall with the id, as a tokeniser's numbering makes them: the search of last resort has no rows."""
    asked: list[Tensor] = []

    class Spy:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*arguments: Any, **constants: Any) -> None:
                asked.append(arguments[-1].cpu().clone())
                search[grid](*arguments, **constants)

            return launch

    search = head_topk_triton._search
    monkeypatch.setattr(head_topk_triton, "_search", Spy())
    falling_V = -1.5 * torch.arange(1, 151_937).float().log()
    noise_NV = 2 * torch.randn(2, len(falling_V), generator=torch.Generator().manual_seed(0))
    check((noise_NV + falling_V).bfloat16(), 256)
    assert asked[0].tolist() == [0, 0]


def test_tiles_leave_enough_blocks() -> None:
    """At least 4 K blocks, so that the K-th largest block maximum is a close bound; none for a small vocabulary."""
    assert [tile_steps(v, 64) for v in (151936, 128256, 49152, 300)] == [16, 16, 16, 0]
    assert tile_steps(49152, 256) == 4 and tile_steps(151936, 256) == 16
