"""On a GPU: rows of head outputs become rows of gradients in place, their cross-entropy and KL_{K+1} on the way.

One program a row, two passes over it. The student's logits at the teacher's K ids are taken out first (their places
hold -inf from then on), so that the first pass sums the tail alone: total minus top-k would cancel where the tail is
small. The second pass writes the gradient; the K ids get theirs last. The arithmetic is that of `fused._chunk`, in
float32.

Legend: C rows of one chunk, V vocabulary, K top-k ids.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from student.batch import IGNORE


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
    weight_ce, weight_kl, tau, scale, soft_cap, IGNORED: tl.constexpr, K: tl.constexpr, K2: tl.constexpr,
    V_BLOCK: tl.constexpr, KL: tl.constexpr, GRADIENT: tl.constexpr, CAPPED: tl.constexpr, SCALED: tl.constexpr,
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
    z_target = _shaped(tl.load(z_ptr + target), scale, soft_cap, CAPPED, SCALED)
    k = tl.arange(0, K2)
    real = k < K
    if KL:
        ids = tl.load(ids_ptr + row * K + k, mask=real, other=0)
        z_K = _shaped(tl.load(z_ptr + ids, mask=real, other=0.0), scale, soft_cap, CAPPED, SCALED)
        z_K = tl.where(real, z_K, float("-inf"))
        tl.debug_barrier()  # every thread has read its own before any place is overwritten
        tl.store(z_ptr + ids, tl.full([K2], float("-inf"), tl.float32).to(z_ptr.dtype.element_ty), mask=real)
        tl.debug_barrier()

    # First pass: the sums of what is left, at tau 1 and at tau, relative to its largest.
    peak = tl.full([], low, tl.float32)
    rest = tl.full([], 0.0, tl.float32)
    rest_tau = tl.full([], 0.0, tl.float32)
    for first in range(0, vocab, V_BLOCK):
        raw = tl.load(z_ptr + first + v, mask=first + v < vocab, other=float("-inf"))
        x = tl.where(raw == float("-inf"), float("-inf"), _shaped(raw, scale, soft_cap, CAPPED, SCALED))
        new = tl.maximum(peak, tl.max(x))
        rest = rest * tl.exp(peak - new) + tl.sum(tl.exp(x - new))
        if KL:
            rest_tau = rest_tau * tl.exp((peak - new) / tau) + tl.sum(tl.exp((x - new) / tau))
        peak = new

    top = peak
    total = rest
    if KL:
        top = tl.maximum(peak, tl.max(z_K))
        total = rest * tl.exp(peak - top) + tl.sum(tl.exp(z_K - top))
    lse = top + tl.log(total)
    tl.store(ce_ptr + row, lse - z_target)

    factor = 0.0
    if KL:
        up_K = tl.where(
            real, tl.load(teacher_ptr + row * K + k, mask=real, other=0.0).to(tl.float32) / tau, float("-inf")
        )
        log_tail = tl.load(log_tail_ptr + row).to(tl.float32)
        up_top = tl.maximum(tl.max(up_K), tl.maximum(log_tail, low))
        log_zp = up_top + tl.log(tl.sum(tl.exp(up_K - up_top)) + tl.exp(log_tail - up_top))
        log_p = up_K - log_zp
        p = tl.exp(log_p)
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

    if GRADIENT:
        for first in range(0, vocab, V_BLOCK):
            raw = tl.load(z_ptr + first + v, mask=first + v < vocab, other=float("-inf"))
            x = tl.where(raw == float("-inf"), float("-inf"), _shaped(raw, scale, soft_cap, CAPPED, SCALED))
            grad = weight_ce * tl.exp(x - lse)
            if KL:
                grad += factor * tl.exp((x - peak) / tau)
            grad -= tl.where(first + v == target, weight_ce, 0.0)
            grad = _unshaped(grad, x, scale, soft_cap, CAPPED, SCALED)
            tl.store(z_ptr + first + v, grad.to(z_ptr.dtype.element_ty), mask=first + v < vocab)
        if KL:
            tl.debug_barrier()  # the K ids' places were written as if nothing stood there
            grad_K = weight_ce * tl.exp(z_K - lse) + (tl.exp(log_q) - p) * (weight_kl / tau)
            grad_K -= tl.where(ids == target, weight_ce, 0.0)
            grad_K = _unshaped(grad_K, z_K, scale, soft_cap, CAPPED, SCALED)
            tl.store(z_ptr + ids, grad_K.to(z_ptr.dtype.element_ty), mask=real)


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
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy (C,) and KL_{K+1} (C,) in nats, float32; zero where the target is IGNORE.

    `raw_CV` is used up: with `gradient` it then holds the gradient of the sum of weight_ce CE + weight_kl KL_{K+1}.

    Args:
        raw_CV: h @ weight^T, contiguous rows of a float dtype.
        target_C: int64.
        ids_CK, logits_CK, log_tail_C: the teacher's, see `fused.TeacherTopK`; not read at `weight_kl` 0.
    """
    rows, vocab = raw_CV.shape
    assert raw_CV.stride(1) == 1
    ce_C = torch.empty(rows, dtype=torch.float32, device=raw_CV.device)
    kl_C = torch.empty_like(ce_C) if weight_kl else None
    k = ids_CK.shape[1]
    _kd_rows[(rows,)](
        raw_CV, raw_CV.stride(0), vocab, target_C, ids_CK.contiguous(), logits_CK.contiguous(), log_tail_C.contiguous(),
        ce_C, ce_C if kl_C is None else kl_C, weight_ce, weight_kl, tau, logit_scale, soft_cap or 1.0,
        IGNORED=IGNORE, K=k, K2=triton.next_power_of_2(max(k, 2)), V_BLOCK=min(8192, triton.next_power_of_2(vocab)),
        KL=kl_C is not None, GRADIENT=gradient, CAPPED=soft_cap is not None, SCALED=logit_scale != 1.0, num_warps=16,
    )  # fmt: skip
    return ce_C, kl_C
