"""On a GPU: rows of head outputs become rows of gradients in place, their cross-entropy and divergence on the way.

One program a row, two passes over it. For KL_{K+1} the student's logits at the teacher's K ids are taken out first
(their places hold -inf from then on), so that the first pass sums the tail alone: total minus top-k would cancel where
the tail is small. The second pass writes the gradient; the K ids, and the draws of the divergence `sampled`, get theirs
last. The arithmetic is that of `fused._chunk`, in float32; each divergence is compiled by itself.

Legend: C rows of one chunk, V vocabulary, K top-k ids, M draws from the tail.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from student.data.batch import IGNORE
from student.losses.sparse_kd import Divergence


@triton.jit
def _shaped(raw, scale, soft_cap, CAPPED: tl.constexpr, SCALED: tl.constexpr):
    x = raw.to(tl.float32)
    if SCALED:
        x = x * scale
    if CAPPED:
        x = soft_cap * (2.0 * tl.sigmoid(2.0 * x / soft_cap) - 1.0)
    return x


@triton.jit
def _unshaped(grad, x, scale, soft_cap, CAPPED: tl.constexpr, SCALED: tl.constexpr):
    """The gradient to the raw output of a gradient to the logit x."""
    if CAPPED:
        ratio = x / soft_cap
        grad = tl.where(ratio > -1.0, grad * (1.0 - ratio * ratio), 0.0)  # a place that was taken out is -inf
    if SCALED:
        grad = grad * scale
    return grad


@triton.jit
def _kd_rows(
    z_ptr, stride_c, vocab, target_ptr, ids_ptr, teacher_ptr, log_tail_ptr, ce_ptr, kl_ptr,
    draw_ids_ptr, draw_logits_ptr, log_tail_1_ptr,
    weight_ce, weight_kl, tau, scale, soft_cap, IGNORED: tl.constexpr, K: tl.constexpr, K2: tl.constexpr,
    M: tl.constexpr, M2: tl.constexpr, V_BLOCK: tl.constexpr, V_ROWS: tl.constexpr,
    UNIT: tl.constexpr, KL: tl.constexpr, TAIL: tl.constexpr,
    RENORMALISED: tl.constexpr, SAMPLED: tl.constexpr, GRADIENT: tl.constexpr, CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride_c
    target = tl.load(target_ptr + row)
    v = tl.arange(0, V_BLOCK)
    if target == IGNORED:
        if GRADIENT:
            for first in range(0, vocab, V_BLOCK):
                zeros = tl.zeros([V_BLOCK], tl.float32).to(z_ptr.dtype.element_ty)
                tl.store(z_ptr + first + v, zeros, mask=first + v < vocab)
        tl.store(ce_ptr + row, 0.0)
        if KL:
            tl.store(kl_ptr + row, 0.0)
        return

    low = -3.0e38
    inverse_tau = 1.0 / tau
    z_target = _shaped(tl.load(z_ptr + target), scale, soft_cap, CAPPED, SCALED)
    k = tl.arange(0, K2)
    real = k < K
    if KL:
        ids = tl.load(ids_ptr + row * K + k, mask=real, other=0)
        z_K = _shaped(tl.load(z_ptr + ids, mask=real, other=0.0), scale, soft_cap, CAPPED, SCALED)
        z_K = tl.where(real, z_K, float("-inf"))
    if SAMPLED:
        m = tl.arange(0, M2)
        log_tail_1 = tl.load(log_tail_1_ptr + row).to(tl.float32)
        drawn = m < tl.where(log_tail_1 > low, M, 0)  # without a tail there was nothing to draw from
        draw_ids = tl.load(draw_ids_ptr + row * M + m, mask=drawn, other=0)
        z_M = _shaped(tl.load(z_ptr + draw_ids, mask=drawn, other=0.0), scale, soft_cap, CAPPED, SCALED)
    if TAIL:
        tl.debug_barrier()  # every thread has read its own before any place is overwritten
        tl.store(z_ptr + ids, tl.full([K2], float("-inf"), tl.float32).to(z_ptr.dtype.element_ty), mask=real)
        tl.debug_barrier()

    # First pass: the sums of what is left, at tau 1 and at tau, relative to its largest. Columns of a tile have sums of
    # their own until the end, so that threads need not wait for one another.
    peaks = tl.full([V_BLOCK], low, tl.float32)
    rests = tl.full([V_BLOCK], 0.0, tl.float32)
    rests_tau = tl.full([V_BLOCK], 0.0, tl.float32)
    tile = tl.arange(0, V_ROWS)[:, None] * V_BLOCK + v[None, :]
    for first in range(0, vocab, V_ROWS * V_BLOCK):
        raw = tl.load(z_ptr + first + tile, mask=first + tile < vocab, other=float("-inf"))
        x = tl.where(raw == float("-inf"), float("-inf"), _shaped(raw, scale, soft_cap, CAPPED, SCALED))
        news = tl.maximum(peaks, tl.max(x, axis=0))
        rests = rests * tl.exp(peaks - news) + tl.sum(tl.exp(x - news[None, :]), axis=0)
        if (TAIL or SAMPLED) and not UNIT:
            moved = tl.exp((peaks - news) * inverse_tau)
            rests_tau = rests_tau * moved + tl.sum(tl.exp((x - news[None, :]) * inverse_tau), axis=0)
        peaks = news
    peak = tl.max(peaks)
    rest = tl.sum(rests * tl.exp(peaks - peak))
    rest_tau = rest
    if (TAIL or SAMPLED) and not UNIT:
        rest_tau = tl.sum(rests_tau * tl.exp((peaks - peak) * inverse_tau))

    top = peak
    total = rest
    if TAIL:
        top = tl.maximum(peak, tl.max(z_K))
        total = rest * tl.exp(peak - top) + tl.sum(tl.exp(z_K - top))
    lse = top + tl.log(total)
    tl.store(ce_ptr + row, lse - z_target)

    factor = 0.0
    if KL:
        up_K = tl.where(
            real, tl.load(teacher_ptr + row * K + k, mask=real, other=0.0).to(tl.float32) / tau, float("-inf")
        )
    if TAIL or SAMPLED:
        log_tail = tl.load(log_tail_ptr + row).to(tl.float32)
        up_top = tl.maximum(tl.max(up_K), tl.maximum(log_tail, low))
        log_zp = up_top + tl.log(tl.sum(tl.exp(up_K - up_top)) + tl.exp(log_tail - up_top))
        log_p = up_K - log_zp
        p = tl.exp(log_p)
    if TAIL:
        log_rp = log_tail - log_zp
        rp = tl.exp(log_rp)
        sum_q = rest_tau * tl.exp((peak - top) / tau) + tl.sum(tl.exp((z_K - top) / tau))
        log_zq = top / tau + tl.log(sum_q)
        log_q = z_K / tau - log_zq
        kl = tl.sum(tl.where(real, p * (log_p - log_q), 0.0))
        has_tail = rp > 0.0
        log_tail_q = peak / tau + tl.log(rest_tau)
        kl += tl.where(has_tail, rp * (log_rp - (log_tail_q - log_zq)), 0.0)
        tl.store(kl_ptr + row, kl)
        # d KL / d u is q - p on the K ids and q (1 - r_p / r_q) elsewhere; u = z / tau.
        share = tl.where(has_tail, rp / rest_tau, 0.0)
        factor = (tl.exp(peak / tau - log_zq) - share) * (weight_kl / tau)
        toward_K = tl.exp(log_q) - p
    if RENORMALISED:
        up_top = tl.max(up_K)
        log_p = up_K - (up_top + tl.log(tl.sum(tl.exp(up_K - up_top))))
        p = tl.exp(log_p)
        top_K = tl.max(z_K)
        log_q = (z_K - top_K) / tau - tl.log(tl.sum(tl.exp((z_K - top_K) / tau)))
        tl.store(kl_ptr + row, tl.sum(tl.where(real, p * (log_p - log_q), 0.0)))
        toward_K = tl.exp(log_q) - p
    if SAMPLED:
        log_zq = peak / tau + tl.log(rest_tau)
        log_q = z_K / tau - log_zq
        kl = tl.sum(tl.where(real, p * (log_p - log_q), 0.0))
        teacher_M = tl.load(draw_logits_ptr + row * M + m, mask=drawn, other=0.0).to(tl.float32)
        w = tl.exp(log_tail_1 - log_zp + (teacher_M / tau - teacher_M)) / M
        w = tl.where(drawn, w, 0.0)
        kl += tl.sum(tl.where(drawn, w * (teacher_M / tau - log_zp - (z_M / tau - log_zq)), 0.0))
        tl.store(kl_ptr + row, kl)
        # d KL / d u is (sum of all weights) q, less p on the K ids and less its weight for every draw.
        total_weight = tl.sum(p) + tl.sum(w)
        factor = total_weight / rest_tau * (weight_kl / tau)
        toward_K = total_weight * tl.exp(log_q) - p

    if GRADIENT:
        for first in range(0, vocab, V_BLOCK):
            raw = tl.load(z_ptr + first + v, mask=first + v < vocab, other=float("-inf"))
            x = tl.where(raw == float("-inf"), float("-inf"), _shaped(raw, scale, soft_cap, CAPPED, SCALED))
            if (TAIL or SAMPLED) and UNIT:  # both are the same exponential
                grad = (weight_ce * tl.exp(peak - lse) + factor) * tl.exp(x - peak)
            else:
                grad = weight_ce * tl.exp(x - lse)
                if TAIL or SAMPLED:
                    grad += factor * tl.exp((x - peak) * inverse_tau)
            grad -= tl.where(first + v == target, weight_ce, 0.0)
            grad = _unshaped(grad, x, scale, soft_cap, CAPPED, SCALED)
            tl.store(z_ptr + first + v, grad.to(z_ptr.dtype.element_ty), mask=first + v < vocab)
        if KL:
            tl.debug_barrier()  # the K ids' places were written as if nothing stood there
            grad_K = weight_ce * tl.exp(z_K - lse) + toward_K * (weight_kl / tau)
            grad_K -= tl.where(ids == target, weight_ce, 0.0)
            grad_K = _unshaped(grad_K, z_K, scale, soft_cap, CAPPED, SCALED)
            tl.store(z_ptr + ids, grad_K.to(z_ptr.dtype.element_ty), mask=real)
        if SAMPLED:
            times = tl.zeros([M2], tl.float32)  # how often an id was drawn: each of its places stores the same number
            for first in range(0, M, 16):
                other = first + tl.arange(0, 16)
                other_ids = tl.load(draw_ids_ptr + row * M + other, mask=other < M, other=-1)
                times += tl.sum((draw_ids[:, None] == other_ids[None, :]).to(tl.float32), axis=1)
            toward_M = total_weight * tl.exp(z_M / tau - log_zq) - times * w
            grad_M = weight_ce * tl.exp(z_M - lse) + toward_M * (weight_kl / tau)
            grad_M -= tl.where(draw_ids == target, weight_ce, 0.0)
            grad_M = _unshaped(grad_M, z_M, scale, soft_cap, CAPPED, SCALED)
            tl.store(z_ptr + draw_ids, grad_M.to(z_ptr.dtype.element_ty), mask=drawn)


def kd_rows_(
    raw_CV: Tensor,
    target_C: Tensor,
    ids_CK: Tensor,
    logits_CK: Tensor,
    log_tail_C: Tensor,
    weight_ce: float,
    weight_kl: float,
    tau: float,
    gradient: bool,
    logit_scale: float = 1.0,
    soft_cap: float | None = None,
    divergence: Divergence = "tail",
    draws: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy (C,) and divergence (C,) in nats, float32; zero where the target is IGNORE.

    `raw_CV` is used up: with `gradient` it then holds the gradient of the sum of weight_ce CE + weight_kl KL.

    Args:
        raw_CV: h @ weight^T, contiguous rows of a float dtype.
        target_C: int64.
        ids_CK, logits_CK, log_tail_C: the teacher's, see `fused.TeacherTopK`; not read at `weight_kl` 0.
        divergence: which one.
        draws: ids_CM, logits_CM and log_tail_1_C of `fused.TailDraws`, for `sampled`. No draw is one of the K ids.
    """
    rows, vocab = raw_CV.shape
    block = min(4096, triton.next_power_of_2(vocab))
    assert raw_CV.stride(1) == 1
    ce_C = torch.empty(rows, dtype=torch.float32, device=raw_CV.device)
    kl_C = torch.empty_like(ce_C) if weight_kl else None
    kl = divergence if weight_kl else None
    assert kl != "sampled" or draws is not None
    ids_CM, draw_logits_CM, log_tail_1_C = draws if kl == "sampled" and draws else (ids_CK, logits_CK, log_tail_C)
    k, m = ids_CK.shape[1], ids_CM.shape[1]
    _kd_rows[(rows,)](
        raw_CV, raw_CV.stride(0), vocab, target_C, ids_CK.contiguous(), logits_CK.contiguous(), log_tail_C.contiguous(),
        ce_C, ce_C if kl_C is None else kl_C, ids_CM.contiguous(), draw_logits_CM.contiguous(),
        log_tail_1_C.contiguous(), weight_ce, weight_kl, tau, logit_scale, soft_cap or 1.0,
        IGNORED=IGNORE, K=k, K2=triton.next_power_of_2(max(k, 2)), M=m, M2=triton.next_power_of_2(max(m, 2)),
        V_BLOCK=block, V_ROWS=4 if vocab > block else 1, UNIT=tau == 1.0, KL=kl is not None, TAIL=kl == "tail",
        RENORMALISED=kl == "renormalised", SAMPLED=kl == "sampled",
        GRADIENT=gradient, CAPPED=soft_cap is not None, SCALED=logit_scale != 1.0, num_warps=16,
    )  # fmt: skip
    return ce_C, kl_C
