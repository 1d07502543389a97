"""Head, cross-entropy, KL_{K+1} and the gradient to the hidden state in one pass over chunks of tokens.

The frozen head needs no weight gradient, so each chunk's logits die as soon as their gradient has been multiplied back:
N x V never exists. `sparse_kd.py` is the same in plain PyTorch; on a GPU `fused_triton.py` does the work of `_chunk`.

Legend: N positions, V vocabulary, D width, K top-k ids; C rows of one chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from student.batch import IGNORE

_CPU_BLOCK_ROWS = 8


@dataclass(frozen=True)
class Head:
    """The frozen LM head and what follows it: logits = cap(scale * h @ weight^T), cap(z) = c tanh(z / c)."""

    weight_VD: Tensor
    logit_scale: float = 1.0
    soft_cap: float | None = None


@dataclass(frozen=True)
class TeacherTopK:
    """The teacher at N positions: K ids, their logits at tau 1, and log_tail at the temperature of the loss."""

    ids_NK: Tensor
    logits_NK: Tensor
    log_tail_N: Tensor


@dataclass(frozen=True)
class KDSums:
    """Sums over positions that have a target, in nats. Only `total` carries a gradient.

    `kl_k1` is the plain divergence, without tau^2; it is NaN where the call computed none (weight 0).
    """

    total: Tensor
    ce: Tensor
    kl_k1: Tensor


def fused_kd_sums(
    h_ND: Tensor,
    head: Head,
    target_N: Tensor,
    teacher: TeacherTopK,
    weight_ce: float,
    weight_kl: float,
    tau: float,
    chunk_rows: int = 1024,
    matmul_dtype: torch.dtype | None = None,
) -> KDSums:
    """total = sum_N [weight_ce * CE + weight_kl * KL_{K+1}(p_tau || q_tau)] and its gradient to `h_ND`.

    Positions whose target is IGNORE count in nothing and may hold NaN in the teacher's tensors.

    Args:
        weight_ce: coefficient of the cross-entropy; CE is reported even at 0.
        weight_kl: coefficient of KL_{K+1}, the factor tau^2 included; at 0 the teacher is not touched.
        chunk_rows: C; one C x V buffer of `matmul_dtype` lives at a time.
        matmul_dtype: of the two head products; None takes autocast's where it is on, else `h_ND`'s. Everything after
            the first product is float32 (float64 for float64 input).
    """
    valid_N = target_N != IGNORE
    # The GPU's kernel passes over such rows by itself, so the host need not wait to learn whether there are any.
    if not h_ND.is_cuda and not bool(valid_N.all()):
        h_ND, target_N = h_ND[valid_N], target_N[valid_N]
        teacher = TeacherTopK(teacher.ids_NK[valid_N], teacher.logits_NK[valid_N], teacher.log_tail_N[valid_N])
    if matmul_dtype is None:
        device = h_ND.device.type
        matmul_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h_ND.dtype
    total, ce, kl = _FusedKD.apply(  # type: ignore[no-untyped-call]
        h_ND, head, target_N, teacher, weight_ce, weight_kl, tau, chunk_rows, matmul_dtype
    )
    return KDSums(total, ce, kl)


class _FusedKD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_ND: Tensor,
        head: Head,
        target_N: Tensor,
        teacher: TeacherTopK,
        weight_ce: float,
        weight_kl: float,
        tau: float,
        chunk_rows: int,
        matmul_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_gradient = ctx.needs_input_grad[0]
        out_dtype = torch.float64 if h_ND.dtype == torch.float64 else torch.float32
        # A CPU is fastest when the element-wise passes stay in its cache; elsewhere (float64 on a GPU) one launch each.
        step = _CPU_BLOCK_ROWS if h_ND.device.type == "cpu" else chunk_rows
        head_VD = head.weight_VD.to(matmul_dtype)
        grad_ND = torch.empty_like(h_ND) if wants_gradient else None
        ce = torch.zeros((), dtype=out_dtype, device=h_ND.device)
        kl = torch.full_like(ce, 0.0 if weight_kl else math.nan)
        rows = min(chunk_rows, h_ND.shape[0])
        buffer_CV = torch.empty(rows, head_VD.shape[0], dtype=matmul_dtype, device=h_ND.device)
        with torch.autocast(h_ND.device.type, enabled=False):
            for start in range(0, h_ND.shape[0], chunk_rows):
                h_CD = h_ND[start : start + chunk_rows].to(matmul_dtype)
                z_CV = torch.mm(h_CD, head_VD.T, out=buffer_CV[: h_CD.shape[0]])
                if h_ND.is_cuda and out_dtype == torch.float32:
                    at = slice(start, start + z_CV.shape[0])
                    ce_C, kl_C = _gpu_rows(z_CV, head, target_N, teacher, at, weight_ce, weight_kl, tau, wants_gradient)
                    ce += ce_C.sum()
                    if kl_C is not None:
                        kl += kl_C.sum()
                    if grad_ND is not None:
                        grad_ND[at] = z_CV @ head_VD
                    continue
                for first in range(0, z_CV.shape[0], step):
                    at = slice(start + first, start + min(first + step, z_CV.shape[0]))
                    some = TeacherTopK(teacher.ids_NK[at], teacher.logits_NK[at], teacher.log_tail_N[at])
                    raw_CV = z_CV[first : first + step]
                    logits_CV = _after_head(raw_CV.to(out_dtype, copy=True), head)
                    ce_C, kl_C, grad_CV = _chunk(
                        logits_CV, target_N[at], some, weight_ce, weight_kl, tau, wants_gradient
                    )
                    ce += ce_C.sum()
                    if kl_C is not None:
                        kl += kl_C.sum()
                    if grad_CV is not None:  # the logits become their own gradient
                        raw_CV.copy_(_before_head(grad_CV, logits_CV, head))
                if grad_ND is not None:
                    grad_ND[start : start + chunk_rows] = z_CV @ head_VD
        if grad_ND is not None:
            ctx.save_for_backward(grad_ND)
        total = weight_ce * ce + weight_kl * kl if weight_kl else weight_ce * ce
        ctx.mark_non_differentiable(ce, kl)
        return total, ce, kl

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Any, ...]:
        (grad_ND,) = ctx.saved_tensors
        return (grad_ND * grad_total.to(grad_ND.dtype), *([None] * 8))


def _gpu_rows(
    z_CV: Tensor,
    head: Head,
    target_N: Tensor,
    teacher: TeacherTopK,
    at: slice,
    weight_ce: float,
    weight_kl: float,
    tau: float,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    from student.losses.fused_triton import kd_rows_  # Triton is not everywhere

    parts = teacher.ids_NK[at], teacher.logits_NK[at], teacher.log_tail_N[at]
    return kd_rows_(
        z_CV, target_N[at], *parts, weight_ce, weight_kl, tau, wants_gradient, head.logit_scale, head.soft_cap
    )


def _after_head(raw_CV: Tensor, head: Head) -> Tensor:
    """Scale and soft cap, in place."""
    if head.logit_scale != 1.0:
        raw_CV.mul_(head.logit_scale)
    if head.soft_cap is not None:
        raw_CV.div_(head.soft_cap).tanh_().mul_(head.soft_cap)
    return raw_CV


def _before_head(grad_CV: Tensor, logits_CV: Tensor, head: Head) -> Tensor:
    """The gradient to `h @ weight^T` of a gradient to the logits; both arguments are used up."""
    if head.soft_cap is not None:
        grad_CV.addcmul_(grad_CV, logits_CV.div_(head.soft_cap).square_(), value=-1.0)
    if head.logit_scale != 1.0:
        grad_CV.mul_(head.logit_scale)
    return grad_CV


def _chunk(
    logits_CV: Tensor,
    target_C: Tensor,
    teacher: TeacherTopK,
    weight_ce: float,
    weight_kl: float,
    tau: float,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """CE (C,), KL_{K+1} (C,) or None at weight 0, and the gradient of the weighted sum to the logits (C, V)."""
    peak_C = logits_CV.amax(-1)
    work_CV = (logits_CV - peak_C[:, None]).exp_()
    sum_C = work_CV.sum(-1)
    ce_C = peak_C + sum_C.log() - logits_CV.gather(1, target_C[:, None]).squeeze(1)
    grad_CV = None
    if wants_gradient:
        grad_CV = work_CV.mul_((weight_ce / sum_C)[:, None])
        grad_CV.scatter_add_(1, target_C[:, None], torch.full_like(ce_C, -weight_ce)[:, None])
    if not weight_kl:
        return ce_C, None, grad_CV

    up_CK = teacher.logits_NK.to(logits_CV.dtype) / tau
    log_tail_C = teacher.log_tail_N.to(logits_CV.dtype)
    log_zp_C = torch.logaddexp(up_CK.logsumexp(-1), log_tail_C)
    log_p_CK = up_CK - log_zp_C[:, None]
    p_CK, log_rp_C = log_p_CK.exp(), log_tail_C - log_zp_C
    rp_C = log_rp_C.exp()

    # The student's tail is summed by itself, around its own largest logit: total minus top-k would cancel where small.
    uq_CK = logits_CV.gather(1, teacher.ids_NK) / tau
    tail_CV = (logits_CV / tau).scatter_(1, teacher.ids_NK, -math.inf)
    peak_C = tail_CV.amax(-1).clamp_min(torch.finfo(logits_CV.dtype).min)  # K = V leaves -inf everywhere
    tail_CV.sub_(peak_C[:, None]).exp_()
    tail_sum_C = tail_CV.sum(-1)
    log_tail_q_C = peak_C + tail_sum_C.log()
    log_zq_C = torch.logaddexp(uq_CK.logsumexp(-1), log_tail_q_C)
    log_q_CK = uq_CK - log_zq_C[:, None]
    kl_C = (p_CK * (log_p_CK - log_q_CK)).sum(-1)
    has_tail_C = rp_C > 0
    kl_C = kl_C + torch.where(has_tail_C, rp_C * (log_rp_C - (log_tail_q_C - log_zq_C)), 0.0)

    if grad_CV is not None:
        # d KL / d u is q - p on the K ids and q (1 - r_p / r_q) elsewhere; u = z / tau.
        scale = weight_kl / tau
        share_C = torch.where(has_tail_C, rp_C / tail_sum_C, 0.0)
        factor_C = ((peak_C - log_zq_C).exp() - share_C) * scale
        grad_CV.addcmul_(tail_CV, factor_C[:, None])
        grad_CV.scatter_add_(1, teacher.ids_NK, (log_q_CK.exp() - p_CK).mul_(scale))
    return ce_C, kl_C, grad_CV
