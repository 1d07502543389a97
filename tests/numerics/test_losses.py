"""The fused loss against dense autograd, the K+1 divergence against the full one, and the two alignment terms.

Legend: N positions, V vocabulary, D width, K top-k ids, R temperatures.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from pipeline.errors import UserError
from student.data.batch import IGNORE
from student.losses.attention import attention_alignment, depth_overlap, prepare_map
from student.losses.frobenius import frobenius, require_hidden
from student.losses.fused import Head, TeacherTopK, fused_kd_sums
from student.losses.sparse_kd import cross_entropy, interpolation_weights, kl_k1, log_tail_at

TAUS = (1.0, 1.2, 1.5, 2.0)


@dataclass
class Problem:
    """A student's hidden states and a teacher over the whole vocabulary."""

    h_ND: Tensor
    head_VD: Tensor
    teacher_NV: Tensor
    target_N: Tensor
    ids_NK: Tensor
    topk_NK: Tensor

    def log_tail(self, tau: float) -> Tensor:
        return (self.teacher_NV / tau).scatter(1, self.ids_NK, -math.inf).logsumexp(-1)


def problem(n: int = 37, vocab: int = 211, width: int = 16, k: int = 9, dtype: torch.dtype = torch.float64) -> Problem:
    generator = torch.Generator().manual_seed(n + vocab + k)
    teacher_NV = 3 * torch.randn(n, vocab, generator=generator, dtype=dtype)
    topk = teacher_NV.topk(k, dim=-1)
    return Problem(
        h_ND=torch.randn(n, width, generator=generator, dtype=dtype),
        head_VD=torch.randn(vocab, width, generator=generator, dtype=dtype),
        teacher_NV=teacher_NV,
        target_N=torch.randint(vocab, (n,), generator=generator),
        ids_NK=topk.indices,
        topk_NK=topk.values,
    )


def pad(case: Problem, positions: list[int]) -> Problem:
    """The same problem with padding: no target, NaN in the teacher's tensors."""
    target_N, topk_NK, teacher_NV = case.target_N.clone(), case.topk_NK.clone(), case.teacher_NV.clone()
    target_N[positions], topk_NK[positions], teacher_NV[positions] = IGNORE, math.nan, math.nan
    return replace(case, target_N=target_N, topk_NK=topk_NK, teacher_NV=teacher_NV)


def dense(
    case: Problem, weight_ce: float, weight_kl: float, tau: float, scale: float, cap: float | None
) -> list[Tensor]:
    """Total, CE sum, KL sum and gradient by plain autograd over the whole vocabulary."""
    h_ND = case.h_ND.clone().requires_grad_()
    logits_NV = scale * (h_ND @ case.head_VD.T)
    if cap is not None:
        logits_NV = cap * torch.tanh(logits_NV / cap)
    valid_N = case.target_N != IGNORE
    ce = cross_entropy(logits_NV, case.target_N).sum()
    kl = kl_k1(logits_NV, case.ids_NK, case.topk_NK, case.log_tail(tau), tau, valid_N).sum()
    total = weight_ce * ce + weight_kl * kl
    (gradient,) = torch.autograd.grad(total, h_ND)
    return [total.detach(), ce.detach(), kl.detach(), gradient]


def fused(
    case: Problem, weight_ce: float, weight_kl: float, tau: float, scale: float, cap: float | None, chunk: int
) -> list[Tensor]:
    h_ND = case.h_ND.clone().requires_grad_()
    teacher = TeacherTopK(case.ids_NK, case.topk_NK, case.log_tail(tau))
    sums = fused_kd_sums(
        h_ND, Head(case.head_VD, scale, cap), case.target_N, teacher, weight_ce, weight_kl, tau, chunk_rows=chunk
    )
    (gradient,) = torch.autograd.grad(sums.total, h_ND)
    return [sums.total.detach(), sums.ce, sums.kl, gradient]


@pytest.mark.parametrize("tau", [1.0, 1.37, 2.0])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.5, None), (0.7, 5.0)])
@pytest.mark.parametrize("padded", [[], [0, 5, 36]])
def test_fused_equals_dense_autograd(tau: float, scale: float, cap: float | None, padded: list[int]) -> None:
    case = pad(problem(), padded)
    expected = dense(case, 0.3, 0.6 * tau**2, tau, scale, cap)
    found = fused(case, 0.3, 0.6 * tau**2, tau, scale, cap, chunk=8)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_fused_in_float32_is_as_close_as_dense_in_float32() -> None:
    case = problem(n=64, vocab=5003, width=48, k=64)
    single = replace(
        case,
        h_ND=case.h_ND.float(),
        head_VD=case.head_VD.float(),
        teacher_NV=case.teacher_NV.float(),
        topk_NK=case.topk_NK.float(),
    )
    truth = dense(case, 0.4, 0.5, 1.5, 1.0, None)
    eager = dense(single, 0.4, 0.5, 1.5, 1.0, None)
    ours = fused(single, 0.4, 0.5, 1.5, 1.0, None, chunk=24)
    error = (ours[3].double() - truth[3]).abs().max()
    assert error <= (eager[3].double() - truth[3]).abs().max() + 1e-6
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("weight_ce", "weight_kl"), [(1.0, 0.0), (0.0, 1.0)])
def test_a_weight_of_zero_switches_a_term_off(weight_ce: float, weight_kl: float) -> None:
    case = problem()
    expected = dense(case, weight_ce, weight_kl, 1.2, 1.0, None)
    found = fused(case, weight_ce, weight_kl, 1.2, 1.0, None, chunk=16)
    torch.testing.assert_close(found[3], expected[3])
    torch.testing.assert_close(found[1], expected[1])
    assert math.isnan(found[2]) == (weight_kl == 0.0)


def test_at_k_equal_v_it_is_the_full_divergence() -> None:
    case = problem(vocab=23, k=23)
    tau = 1.7
    h_ND = case.h_ND.clone().requires_grad_()
    log_p, log_q = ((x / tau).log_softmax(-1) for x in (case.teacher_NV, h_ND @ case.head_VD.T))
    full = (log_p.exp() * (log_p - log_q)).sum()
    (gradient,) = torch.autograd.grad(full, h_ND)
    assert torch.isneginf(case.log_tail(tau)).all()
    for found in (fused(case, 0.0, 1.0, tau, 1.0, None, 5), dense(case, 0.0, 1.0, tau, 1.0, None)):
        torch.testing.assert_close(found[2], full.detach())
        torch.testing.assert_close(found[3], gradient)


def test_k1_is_a_lower_bound_and_vanishes_on_a_perfect_student() -> None:
    case = problem()
    log_p, log_q = (x.log_softmax(-1) for x in (case.teacher_NV, case.h_ND @ case.head_VD.T))
    full_N = (log_p.exp() * (log_p - log_q)).sum(-1)
    valid_N = torch.ones_like(case.target_N, dtype=torch.bool)
    arguments = (case.ids_NK, case.topk_NK, case.log_tail(1.0), 1.0, valid_N)
    found_N = kl_k1(case.h_ND @ case.head_VD.T, *arguments)
    assert (found_N <= full_N + 1e-12).all() and (found_N < full_N - 1e-3).any()
    torch.testing.assert_close(kl_k1(case.teacher_NV, *arguments), torch.zeros_like(full_N), rtol=0, atol=1e-12)


def test_gradients_stay_finite_when_the_students_tail_vanishes() -> None:
    case = problem(n=3, vocab=50, k=4, dtype=torch.float32)
    logits_NV = torch.full((3, 50), -200.0).scatter(1, case.ids_NK, 0.0)
    head_VD = torch.eye(50)
    found = fused(replace(case, h_ND=logits_NV, head_VD=head_VD), 0.0, 1.0, 1.0, 1.0, None, 2)
    expected = dense(replace(case, h_ND=logits_NV, head_VD=head_VD), 0.0, 1.0, 1.0, 1.0, None)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_bfloat16_head_products_stay_near_float32() -> None:
    case = problem(n=64, vocab=1009, width=48, k=16, dtype=torch.float32)
    case = replace(case, head_VD=case.head_VD * 0.2)
    full = fused(case, 0.5, 0.5, 1.0, 1.0, None, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = fused(case, 0.5, 0.5, 1.0, 1.0, None, 64)
    assert half[0].dtype == torch.float32
    torch.testing.assert_close(half[0], full[0], rtol=5e-3, atol=0)
    assert (half[3] - full[3]).norm() < 2e-2 * full[3].norm()
    assert not torch.equal(half[3], full[3])


def test_nothing_valid_gives_zero_and_a_zero_gradient() -> None:
    case = pad(problem(n=4), [0, 1, 2, 3])
    total, ce, kl, gradient = fused(case, 0.5, 0.5, 1.5, 1.0, None, 8)
    assert (float(total), float(ce), float(kl), float(gradient.abs().sum())) == (0.0, 0.0, 0.0, 0.0)


@functools.cache
def language_like_logits(n: int = 200, vocab: int = 20_000) -> Tensor:
    """Logits with the shape of a language model's: a log-normal-like body and a few confident ids per position."""
    generator = torch.Generator().manual_seed(5)
    body_NV = 1.8 * torch.randn(n, vocab, generator=generator, dtype=torch.float64)
    unigram_V = -1.1 * torch.arange(1, vocab + 1, dtype=torch.float64).log()
    peaks_NV = torch.zeros(n, vocab, dtype=torch.float64)
    strength_N8 = 12 * torch.rand(n, 8, generator=generator, dtype=torch.float64)
    peaks_NV.scatter_(1, torch.randint(vocab, (n, 8), generator=generator), strength_N8)
    return body_NV + unigram_V + peaks_NV


@pytest.mark.parametrize("tau", [1.0, 1.05, 1.1, 1.3, 1.4, 1.7, 1.85, 2.0])
def test_interpolated_tail_is_exact_to_a_few_ten_thousandths(tau: float) -> None:
    logits_NV = language_like_logits()
    outside_NV = logits_NV.scatter(1, logits_NV.topk(64).indices, -math.inf)
    stored_NR = torch.stack([(outside_NV / t).logsumexp(-1) for t in TAUS], -1)
    error_N = (log_tail_at(stored_NR, TAUS, tau) - (outside_NV / tau).logsumexp(-1)).abs()
    assert error_N.mean() < 3e-4 and error_N.max() < 3e-3
    if tau in TAUS:
        torch.testing.assert_close(log_tail_at(stored_NR, TAUS, tau), stored_NR[:, TAUS.index(tau)])


def test_interpolation_is_continuous_and_local_with_many_temperatures() -> None:
    taus = (2.0, 1.0, 1.1, 1.2, 1.35, 1.5, 1.75)
    values_R = torch.tensor([math.exp(1.5 / t) for t in taus], dtype=torch.float64)
    for tau in [1.0 + 0.01 * i for i in range(101)]:
        weights = interpolation_weights(taus, min(tau, 2.0))
        assert sum(weights) == pytest.approx(1.0) and sum(w != 0 for w in weights) <= 4
        assert float(log_tail_at(values_R, taus, min(tau, 2.0))) == pytest.approx(math.exp(1.5 / tau), abs=2e-4)
    below, above = (float(log_tail_at(values_R, taus, 1.35 + e)) for e in (-1e-9, 1e-9))
    assert below == pytest.approx(above, abs=1e-8)


def test_one_stored_temperature_serves_itself_only() -> None:
    tail_N1 = torch.tensor([[0.5], [-math.inf]])
    assert log_tail_at(tail_N1, (1.0,), 1.0).tolist() == [0.5, -math.inf]
    with pytest.raises(ValueError, match="outside the stored range"):
        log_tail_at(tail_N1, (1.0,), 1.1)


@pytest.mark.parametrize("tau", [0.9, 2.1])
def test_extrapolating_the_tail_is_refused(tau: float) -> None:
    with pytest.raises(ValueError, match="outside the stored range"):
        interpolation_weights(TAUS, tau)


def test_infinite_and_nan_tails_pass_through_interpolation() -> None:
    tail_NR = torch.tensor([[-math.inf] * 4, [math.nan] * 4, [1.0] * 4])
    found = log_tail_at(tail_NR, TAUS, 1.3)
    assert float(found[0]) == -math.inf and math.isnan(found[1]) and float(found[2]) == pytest.approx(1.0)


def test_frobenius_counts_valid_tokens_only() -> None:
    generator = torch.Generator().manual_seed(0)
    h_BTD = torch.randn(2, 12, 5, generator=generator, requires_grad=True)
    hidden_BWD = torch.randn(2, 4, 5, generator=generator)
    hidden_BWD[1, 2:] = math.nan
    length_B = torch.tensor([12, 4])
    found = frobenius(h_BTD, hidden_BWD, length_B, window=3)
    first = (h_BTD[0].view(4, 3, 5).mean(1) - hidden_BWD[0]).norm() / math.sqrt(20)
    pooled = torch.stack([h_BTD[1, :3].mean(0), h_BTD[1, 3]])
    second = (pooled - hidden_BWD[1, :2]).norm() / math.sqrt(10)
    torch.testing.assert_close(found, (first + second) / 2)
    (gradient,) = torch.autograd.grad(found, h_BTD)
    assert torch.isfinite(gradient).all() and not gradient[1, 4:].any() and gradient[1, :4].any()


def test_frobenius_is_zero_with_a_zero_gradient_on_a_perfect_match() -> None:
    h_BTD = torch.randn(1, 6, 4, requires_grad=True)
    found = frobenius(h_BTD, h_BTD.detach().view(1, 3, 2, 4).mean(2), torch.tensor([6]), window=2)
    (gradient,) = torch.autograd.grad(found, h_BTD)
    assert float(found.detach()) == 0.0 and torch.equal(gradient, torch.zeros_like(gradient))


def test_frobenius_on_a_cache_without_hidden_states_is_refused() -> None:
    require_hidden(0.0, has_hidden=False)
    with pytest.raises(UserError, match=r"loss\.beta is 0\.1.*`hidden`.*dump the cache again"):
        require_hidden(0.1, has_hidden=False)


def test_depth_overlap_shares_a_blocks_span_among_groups() -> None:
    assert depth_overlap(1, 2, 4) == pytest.approx([0, 0, 0.5, 0.5])
    assert depth_overlap(1, 3, 2) == pytest.approx([0.5, 0.5])
    for blocks, groups in [(6, 4), (5, 3), (2, 7)]:
        rows = [depth_overlap(i, blocks, groups) for i in range(blocks)]
        assert all(sum(row) == pytest.approx(1.0) for row in rows)
        assert [sum(column) for column in zip(*rows, strict=True)] == pytest.approx([blocks / groups] * groups)


def random_teacher_map(B: int, G: int, n: int) -> Tensor:
    scores = torch.randn(B, G, n, n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -math.inf).softmax(-1).float()


def test_alignment_vanishes_where_the_student_is_the_weighted_teacher() -> None:
    teacher_BGnn = random_teacher_map(2, 4, 5)
    length_B = torch.tensor([40, 24])
    perfect = {1: (teacher_BGnn[:, 2] + teacher_BGnn[:, 3]) / 2}
    assert float(attention_alignment(perfect, teacher_BGnn, length_B, 8, blocks=2)) < 1e-12
    flipped = {1: -3 * perfect[1]}
    assert float(attention_alignment(flipped, teacher_BGnn, length_B, 8, blocks=2, sign="absolute")) < 1e-12
    assert float(attention_alignment(flipped, teacher_BGnn, length_B, 8, blocks=2, sign="signed")) > 0.5


def test_alignment_ignores_padded_query_blocks_and_dropped_sinks() -> None:
    teacher_BGnn = random_teacher_map(2, 2, 4)
    student_Bnn = random_teacher_map(2, 1, 4)[:, 0].flip(0)
    length_B = torch.tensor([32, 20])  # the second row has two whole blocks of 8
    base = attention_alignment({0: student_Bnn}, teacher_BGnn, length_B, 8, blocks=2)
    changed = student_Bnn.clone()
    changed[1, 2:] = 17.0
    changed[:, 0, 3] = 5.0  # above the diagonal
    torch.testing.assert_close(attention_alignment({0: changed}, teacher_BGnn, length_B, 8, blocks=2), base)

    without = attention_alignment({0: student_Bnn}, teacher_BGnn, length_B, 8, blocks=2, sinks="drop")
    changed = student_Bnn.clone()
    changed[:, :, 0] = 9.0
    torch.testing.assert_close(
        attention_alignment({0: changed}, teacher_BGnn, length_B, 8, blocks=2, sinks="drop"), without
    )
    assert not torch.isclose(without, base)


@pytest.mark.parametrize("sinks", ["keep", "drop"])
def test_alignment_gradient_is_finite_at_empty_rows(sinks: str) -> None:
    teacher_BGnn = random_teacher_map(1, 2, 3)
    student_Bnn = torch.zeros(1, 3, 3, requires_grad=True)
    loss = attention_alignment({1: student_Bnn}, teacher_BGnn, torch.tensor([6]), 2, blocks=2, sinks=sinks)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(loss, student_Bnn)
    assert torch.isfinite(gradient).all()


def test_prepared_rows_have_unit_magnitude() -> None:
    map_Bnn = torch.tensor([[[2.0, 9.0], [-1.0, 3.0]]])
    assert prepare_map(map_Bnn, "signed", "keep", True).tolist() == [[[1.0, 0.0], [-0.25, 0.75]]]
    assert prepare_map(map_Bnn, "absolute", "drop", True).tolist() == [[[0.0, 0.0], [0.0, 1.0]]]
    assert prepare_map(map_Bnn, "signed", "keep", False).tolist() == [[[2.0, 0.0], [-1.0, 3.0]]]
