"""The divergences of the loss: fused against dense autograd, the sampled one against the whole vocabulary.

Legend: N positions, V vocabulary, D width, K top-k ids, M draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from student.data.batch import IGNORE
from student.losses.fused import Head, TailDraws, TeacherTopK, fused_kd_sums
from student.losses.sparse_kd import Divergence, cross_entropy, kl_renormalised, kl_sampled


@dataclass
class Problem:
    """A student's hidden states, and a teacher over the whole vocabulary with its tail."""

    h_ND: Tensor
    head_VD: Tensor
    teacher_NV: Tensor
    target_N: Tensor
    ids_NK: Tensor

    @staticmethod
    def of(n: int, vocab: int = 211, width: int = 16, k: int = 9) -> Problem:
        generator = torch.Generator().manual_seed(n + vocab + k)
        teacher_NV = 2 * torch.randn(n, vocab, generator=generator, dtype=torch.float64)
        return Problem(
            h_ND=torch.randn(n, width, generator=generator, dtype=torch.float64),
            head_VD=0.5 * torch.randn(vocab, width, generator=generator, dtype=torch.float64),
            teacher_NV=teacher_NV,
            target_N=torch.randint(vocab, (n,), generator=generator),
            ids_NK=teacher_NV.topk(k).indices,
        )

    @property
    def tail_NV(self) -> Tensor:
        return self.teacher_NV.scatter(1, self.ids_NK, -math.inf)

    def teacher(self, tau: float, draws: int, seed: int = 0) -> TeacherTopK:
        """What a cache with `draws` tail samples would hold."""
        tail_NV = self.tail_NV
        generator = torch.Generator().manual_seed(seed)
        ids_NM = tail_NV.softmax(-1).multinomial(draws, replacement=True, generator=generator)
        drawn = TailDraws(ids_NM, self.teacher_NV.gather(1, ids_NM), tail_NV.logsumexp(-1))
        topk_NK = self.teacher_NV.gather(1, self.ids_NK)
        return TeacherTopK(self.ids_NK, topk_NK, (tail_NV / tau).logsumexp(-1), drawn)


def dense_divergence(
    logits_NV: Tensor, teacher: TeacherTopK, tau: float, valid_N: Tensor, divergence: Divergence
) -> Tensor:
    if divergence == "renormalised":
        return kl_renormalised(logits_NV, teacher.ids_NK, teacher.logits_NK, tau, valid_N)
    draws = teacher.draws
    assert draws is not None
    top = teacher.ids_NK, teacher.logits_NK, teacher.log_tail_N
    return kl_sampled(logits_NV, *top, draws.log_tail_1_N, draws.ids_NM, draws.logits_NM, tau, valid_N)


@pytest.mark.parametrize("divergence", ["renormalised", "sampled"])
@pytest.mark.parametrize("tau", [1.0, 1.37, 2.0])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.7, 5.0)])
@pytest.mark.parametrize("padded", [[], [0, 5, 36]])
def test_fused_equals_dense_autograd(
    divergence: Divergence, tau: float, scale: float, cap: float | None, padded: list[int]
) -> None:
    case = Problem.of(37, vocab=41, k=9)
    teacher = case.teacher(tau, draws=24)  # of 32 ids: many are drawn twice
    case.target_N[padded] = IGNORE
    assert teacher.draws is not None
    for values in (teacher.logits_NK, teacher.log_tail_N, teacher.draws.logits_NM, teacher.draws.log_tail_1_N):
        values[padded] = math.nan
    found_h, dense_h = (case.h_ND.clone().requires_grad_() for _ in range(2))

    logits_NV = scale * (dense_h @ case.head_VD.T)
    logits_NV = logits_NV if cap is None else cap * torch.tanh(logits_NV / cap)
    kl = dense_divergence(logits_NV, teacher, tau, case.target_N != IGNORE, divergence).sum()
    ce = cross_entropy(logits_NV, case.target_N).sum()
    (0.3 * ce + 0.6 * kl).backward()
    head = Head(case.head_VD, scale, cap)
    sums = fused_kd_sums(found_h, head, case.target_N, teacher, 0.3, 0.6, tau, chunk_rows=16, kl=divergence)
    sums.total.backward()
    for ours, theirs in ((sums.total, 0.3 * ce + 0.6 * kl), (sums.ce, ce), (sums.kl, kl), (found_h.grad, dense_h.grad)):
        assert ours is not None and theirs is not None and torch.isfinite(ours).all()
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def logit_gradient(logits_NV: Tensor, teacher: TeacherTopK, tau: float, divergence: Divergence) -> Tensor:
    """Of the fused sum, in u = z / tau: the head is the identity, so that h is the logits."""
    u_NV = (logits_NV / tau).requires_grad_()
    target_N = torch.zeros(len(logits_NV), dtype=torch.int64)
    head = Head(tau * torch.eye(logits_NV.shape[1], dtype=logits_NV.dtype))
    fused_kd_sums(u_NV, head, target_N, teacher, 0.0, 1.0, tau, kl=divergence).total.backward()
    assert u_NV.grad is not None
    return u_NV.grad


def test_renormalised_moves_the_k_ids_only() -> None:
    case = Problem.of(5)
    tau = 1.6
    logits_NV = case.h_ND @ case.head_VD.T
    found_NV = logit_gradient(logits_NV, case.teacher(tau, 2), tau, "renormalised")
    p_NK, q_NK = ((x.gather(1, case.ids_NK) / tau).softmax(-1) for x in (case.teacher_NV, logits_NV))
    expected_NV = torch.zeros_like(found_NV).scatter(1, case.ids_NK, q_NK - p_NK)
    torch.testing.assert_close(found_NV, expected_NV, rtol=1e-11, atol=1e-12)


def test_sampled_is_all_weights_times_q_less_the_weights() -> None:
    case = Problem.of(5, vocab=40)
    tau = 1.6
    teacher = case.teacher(tau, 30)
    assert teacher.draws is not None
    logits_NV = case.h_ND @ case.head_VD.T
    found_NV = logit_gradient(logits_NV, teacher, tau, "sampled")
    z_NV = torch.exp(case.teacher_NV / tau).sum(-1, keepdim=True)
    drawn_NM = teacher.draws.logits_NM
    w_NM = (drawn_NM / tau - drawn_NM).exp() * case.tail_NV.exp().sum(-1, keepdim=True) / 30 / z_NV
    p_NK = (teacher.logits_NK / tau).exp() / z_NV
    expected_NV = (p_NK.sum(-1) + w_NM.sum(-1))[:, None] * (logits_NV / tau).softmax(-1)
    expected_NV = expected_NV.scatter_add(1, case.ids_NK, -p_NK).scatter_add(1, teacher.draws.ids_NM, -w_NM)
    torch.testing.assert_close(found_NV, expected_NV, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tau", [1.0, 1.3, 1.5])
def test_the_mean_gradient_over_draws_is_that_of_the_whole_vocabulary(tau: float) -> None:
    """Within its standard error; KL_{K+1}'s, the renormalised one's and self-normalised weights' are not."""
    case, repeats, draws = Problem.of(3, vocab=60, width=8, k=5), 20_000, 4
    n, width = case.h_ND.shape
    h_ND = case.h_ND.clone().requires_grad_()
    log_p_NV, log_q_NV = ((x / tau).log_softmax(-1) for x in (case.teacher_NV, h_ND @ case.head_VD.T))
    full_N = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)
    (truth_ND,) = torch.autograd.grad(full_N.sum(), h_ND)

    one, at_X = case.teacher(tau, draws * repeats), torch.arange(n).repeat_interleave(repeats)
    assert one.draws is not None
    ids_XM, logits_XM = (x.view(n * repeats, draws) for x in (one.draws.ids_NM, one.draws.logits_NM))
    top = one.ids_NK[at_X], one.logits_NK[at_X], one.log_tail_N[at_X]
    many = TeacherTopK(*top, TailDraws(ids_XM, logits_XM, one.draws.log_tail_1_N[at_X]))

    def apart(teacher: TeacherTopK, divergence: Divergence) -> tuple[Tensor, float]:
        """The mean gradient's deviation in standard errors (N, D), and the mean divergence."""
        h_XD = case.h_ND.repeat_interleave(repeats, 0).requires_grad_()
        target_X = torch.zeros(len(h_XD), dtype=torch.int64)
        sums = fused_kd_sums(h_XD, Head(case.head_VD), target_X, teacher, 0.0, 1.0, tau, kl=divergence)
        (gradient_XD,) = torch.autograd.grad(sums.total, h_XD)
        each_NSD = gradient_XD.view(n, repeats, width)
        error_ND = each_NSD.std(1) / math.sqrt(repeats)
        return (each_NSD.mean(1) - truth_ND) / error_ND.clamp_min(1e-9), float(sums.kl) / repeats

    found_ND, found_kl = apart(many, "sampled")
    assert found_ND.abs().max() < 4.5 and 0.3 < found_ND.square().mean() < 2.5
    assert found_kl == pytest.approx(float(full_N.detach().sum()), rel=0.02)
    for biased in ("tail", "renormalised"):
        assert apart(many, biased)[0].abs().max() > 100
    if tau > 1:  # weights that sum to the tail's mass: another log_tail at tau 1 for each position makes them
        mean_X = (logits_XM / tau - logits_XM).exp().mean(1)
        normalised = TeacherTopK(*top, TailDraws(ids_XM, logits_XM, top[2] - mean_X.log()))
        assert apart(normalised, "sampled")[0].abs().max() > 10


def test_sampled_without_a_tail_is_the_full_divergence() -> None:
    case = Problem.of(4, vocab=23, k=23)
    tau = 1.7
    nothing = TailDraws(torch.zeros(4, 3, dtype=torch.int64), torch.full((4, 3), math.nan), torch.full((4,), -math.inf))
    topk_NK = case.teacher_NV.gather(1, case.ids_NK)
    teacher = TeacherTopK(case.ids_NK, topk_NK, torch.full((4,), -math.inf), nothing)
    logits_NV = case.h_ND @ case.head_VD.T
    log_p, log_q = ((x / tau).log_softmax(-1) for x in (case.teacher_NV, logits_NV))
    full_N = (log_p.exp() * (log_p - log_q)).sum(-1)
    valid_N = torch.ones(4, dtype=torch.bool)
    torch.testing.assert_close(dense_divergence(logits_NV, teacher, tau, valid_N, "sampled"), full_N)
    torch.testing.assert_close(dense_divergence(logits_NV, teacher, tau, valid_N, "renormalised"), full_N)
    found_NV = logit_gradient(logits_NV, teacher, tau, "sampled")
    torch.testing.assert_close(found_NV, log_q.exp() - log_p.exp())


@pytest.mark.parametrize("divergence", ["tail", "renormalised", "sampled"])
def test_a_perfect_student_gets_no_gradient_but_the_draws_noise(divergence: Divergence) -> None:
    case = Problem.of(6)
    found_NV = logit_gradient(case.teacher_NV, case.teacher(1.4, 8), 1.4, divergence)
    noise_NV = logit_gradient(case.teacher_NV, case.teacher(1.4, 4000), 1.4, divergence)
    if divergence == "sampled":
        assert noise_NV.norm() < 0.15 * found_NV.norm() and found_NV.norm() > 0.01
    else:
        assert found_NV.abs().max() < 1e-12
