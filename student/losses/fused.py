"""Head, cross-entropy, a divergence and the gradient to the hidden state in one pass over chunks of tokens.

Each chunk's logits die as soon as their gradient has been multiplied back, to the hidden states and, where the head is
trained, to its weight: N x V never exists. A frozen head costs nothing more. `sparse_kd.py` is the same in plain
PyTorch; on a GPU `fused_triton.py` does the work of `_chunk`.

Legend: N positions, V vocabulary, D width, K top-k ids, M draws from the tail; C rows of one chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from student.data.batch import IGNORE
from student.losses.sparse_kd import Divergence, draw_weights

_CPU_BLOCK_ROWS = 8


@dataclass(frozen=True)
class Head:
    """The LM head, trained or not, and what follows it: logits = cap(scale * h @ weight^T), cap(z) = c tanh(z / c)."""

    weight_VD: Tensor
    logit_scale: float = 1.0
    soft_cap: float | None = None


@dataclass(frozen=True)
class TailDraws:
    """M ids drawn from the teacher's tail at tau 1, with replacement; their logits and log_tail at tau 1."""

    ids_NM: Tensor
    logits_NM: Tensor
    log_tail_1_N: Tensor


@dataclass(frozen=True)
class TeacherTopK:
    """The teacher at N positions: K ids, their logits at tau 1, and log_tail at the temperature of the loss.

    `draws` are needed by the divergence `sampled`; `renormalised` does not read `log_tail_N`.
    """

    ids_NK: Tensor
    logits_NK: Tensor
    log_tail_N: Tensor
    draws: TailDraws | None = None

    def at(self, index: Tensor | slice) -> TeacherTopK:
        """Some of the positions."""
        draws = self.draws
        if draws is not None:
            draws = TailDraws(draws.ids_NM[index], draws.logits_NM[index], draws.log_tail_1_N[index])
        return TeacherTopK(self.ids_NK[index], self.logits_NK[index], self.log_tail_N[index], draws)


@dataclass(frozen=True)
class KDSums:
    """Sums over positions that have a target, in nats. Only `total` carries a gradient.

    `kl` is the plain divergence, without tau^2; it is NaN where the call computed none (weight 0).
    """

    total: Tensor
    ce: Tensor
    kl: Tensor


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
    kl: Divergence = "tail",
) -> KDSums:
    """total = sum_N [weight_ce * CE + weight_kl * KL(p_tau || q_tau)] and its gradient to `h_ND` and, where it
    requires one, to the head's weight.

    Positions whose target is IGNORE count in nothing and may hold NaN in the teacher's tensors.

    Args:
        weight_ce: coefficient of the cross-entropy; CE is reported even at 0.
        weight_kl: coefficient of the divergence, the factor tau^2 included; at 0 the teacher is not touched.
        chunk_rows: C; one C x V buffer of `matmul_dtype` lives at a time.
        matmul_dtype: of the two head products; None takes autocast's where it is on, else `h_ND`'s. Everything after
            the first product is float32 (float64 for float64 input).
        kl: which divergence, see `sparse_kd.Divergence`.
    """
    assert kl != "sampled" or teacher.draws is not None or not weight_kl
    valid_N = target_N != IGNORE
    # The GPU's kernel passes over such rows by itself, so the host need not wait to learn whether there are any.
    if not h_ND.is_cuda and not bool(valid_N.all()):
        h_ND, target_N = h_ND[valid_N], target_N[valid_N]
        teacher = teacher.at(valid_N)
    if matmul_dtype is None:
        device = h_ND.device.type
        matmul_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h_ND.dtype
    # Inside of an autograd function a parameter wants a gradient even where none is recorded, as in validation.
    weight_VD = head.weight_VD if torch.is_grad_enabled() else head.weight_VD.detach()
    sums = _FusedKD.apply(  # type: ignore[no-untyped-call]
        h_ND, weight_VD, head, target_N, teacher, weight_ce, weight_kl, tau, chunk_rows, matmul_dtype, kl
    )
    return KDSums(*sums)


class _FusedKD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_ND: Tensor,
        weight_VD: Tensor,
        head: Head,
        target_N: Tensor,
        teacher: TeacherTopK,
        weight_ce: float,
        weight_kl: float,
        tau: float,
        chunk_rows: int,
        matmul_dtype: torch.dtype,
        divergence: Divergence,
    ) -> tuple[Tensor, Tensor, Tensor]:
        to_h, to_weight = ctx.needs_input_grad[:2]
        wants_gradient = to_h or to_weight
        out_dtype = torch.float64 if h_ND.dtype == torch.float64 else torch.float32
        # A CPU is fastest when the element-wise passes stay in its cache; elsewhere (float64 on a GPU) one launch each.
        step = _CPU_BLOCK_ROWS if h_ND.device.type == "cpu" else chunk_rows
        head_VD = weight_VD.to(matmul_dtype)
        grad_ND = torch.empty_like(h_ND) if to_h else None
        # Not in bfloat16, in which the sum over chunks would lose what each adds.
        grad_VD = torch.zeros(head_VD.shape, dtype=out_dtype, device=h_ND.device) if to_weight else None
        ce = torch.zeros((), dtype=out_dtype, device=h_ND.device)
        kl = torch.full_like(ce, 0.0 if weight_kl else math.nan)
        rows = min(chunk_rows, h_ND.shape[0])
        buffer_CV = torch.empty(rows, head_VD.shape[0], dtype=matmul_dtype, device=h_ND.device)
        with torch.autocast(h_ND.device.type, enabled=False):
            for start in range(0, h_ND.shape[0], chunk_rows):
                h_CD = h_ND[start : start + chunk_rows].to(matmul_dtype)
                z_CV = torch.mm(h_CD, head_VD.T, out=buffer_CV[: h_CD.shape[0]])
                at = slice(start, start + z_CV.shape[0])
                if _has_kernel(h_ND, out_dtype):
                    ce_C, kl_C = _gpu_rows(
                        z_CV, head, target_N[at], teacher.at(at), weight_ce, weight_kl, tau, wants_gradient, divergence
                    )
                    ce += ce_C.sum()
                    if kl_C is not None:
                        kl += kl_C.sum()
                else:
                    for first in range(0, z_CV.shape[0], step):
                        part = slice(start + first, start + min(first + step, z_CV.shape[0]))
                        raw_CV = z_CV[first : first + step]
                        logits_CV = _after_head(raw_CV.to(out_dtype, copy=True), head)
                        rows_of = target_N[part], teacher.at(part)
                        ce_C, kl_C, grad_CV = _chunk(
                            logits_CV, *rows_of, weight_ce, weight_kl, tau, wants_gradient, divergence
                        )
                        ce += ce_C.sum()
                        if kl_C is not None:
                            kl += kl_C.sum()
                        if grad_CV is not None:  # the logits become their own gradient
                            raw_CV.copy_(_before_head(grad_CV, logits_CV, head))
                if grad_ND is not None:
                    grad_ND[at] = z_CV @ head_VD
                if grad_VD is not None:
                    _add_product(grad_VD, z_CV, h_CD)
        ctx.save_for_backward(grad_ND, grad_VD)
        ctx.weight_dtype = weight_VD.dtype
        total = weight_ce * ce + weight_kl * kl if weight_kl else weight_ce * ce
        ctx.mark_non_differentiable(ce, kl)
        return total, ce, kl

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Any, ...]:
        grad_ND, grad_VD = ctx.saved_tensors
        to_h = None if grad_ND is None else grad_ND * grad_total.to(grad_ND.dtype)
        to_weight = None if grad_VD is None else (grad_VD * grad_total).to(ctx.weight_dtype)
        return (to_h, to_weight, *([None] * 9))


def _has_kernel(h_ND: Tensor, out_dtype: torch.dtype) -> bool:
    return h_ND.is_cuda and out_dtype == torch.float32


def _add_product(grad_VD: Tensor, grad_CV: Tensor, h_CD: Tensor) -> None:
    """Add a chunk's grad^T @ h, of which a lower precision is rounded once."""
    if grad_VD.dtype == h_CD.dtype:
        grad_VD.addmm_(grad_CV.T, h_CD)
    else:
        grad_VD.add_(grad_CV.T @ h_CD)


def _gpu_rows(
    z_CV: Tensor,
    head: Head,
    target_C: Tensor,
    teacher: TeacherTopK,
    weight_ce: float,
    weight_kl: float,
    tau: float,
    wants_gradient: bool,
    divergence: Divergence,
) -> tuple[Tensor, Tensor | None]:
    from student.losses.fused_triton import kd_rows_  # Triton is not everywhere

    parts = teacher.ids_NK, teacher.logits_NK, teacher.log_tail_N
    draws = None
    if divergence == "sampled" and teacher.draws is not None:
        draws = teacher.draws.ids_NM, teacher.draws.logits_NM, teacher.draws.log_tail_1_N
    shape = head.logit_scale, head.soft_cap
    return kd_rows_(z_CV, target_C, *parts, weight_ce, weight_kl, tau, wants_gradient, *shape, divergence, draws)


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
    divergence: Divergence = "tail",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """CE (C,), divergence (C,) or None at weight 0, and the gradient of the weighted sum to the logits (C, V)."""
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
    rows = {"tail": _tail_rows, "renormalised": _renormalised_rows, "sampled": _sampled_rows}[divergence]
    return ce_C, rows(logits_CV, teacher, tau, grad_CV, weight_kl / tau), grad_CV


# Each of the three returns the divergence (C,) and adds `scale` times its gradient in u = z / tau to grad_CV.


def _tail_rows(logits_CV: Tensor, teacher: TeacherTopK, tau: float, grad_CV: Tensor | None, scale: float) -> Tensor:
    """KL_{K+1}: q - p on the K ids and q (1 - r_p / r_q) elsewhere."""
    up_CK, log_tail_C, log_zp_C = _teacher_rows(teacher, tau, logits_CV.dtype)
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
        share_C = torch.where(has_tail_C, rp_C / tail_sum_C, 0.0)
        factor_C = ((peak_C - log_zq_C).exp() - share_C) * scale
        grad_CV.addcmul_(tail_CV, factor_C[:, None])
        grad_CV.scatter_add_(1, teacher.ids_NK, (log_q_CK.exp() - p_CK).mul_(scale))
    return kl_C


def _renormalised_rows(
    logits_CV: Tensor, teacher: TeacherTopK, tau: float, grad_CV: Tensor | None, scale: float
) -> Tensor:
    """q~ - p~ on the K ids and 0 elsewhere."""
    log_p_CK = (teacher.logits_NK.to(logits_CV.dtype) / tau).log_softmax(-1)
    log_q_CK = (logits_CV.gather(1, teacher.ids_NK) / tau).log_softmax(-1)
    p_CK = log_p_CK.exp()
    if grad_CV is not None:
        grad_CV.scatter_add_(1, teacher.ids_NK, (log_q_CK.exp() - p_CK).mul_(scale))
    return (p_CK * (log_p_CK - log_q_CK)).sum(-1)


def _sampled_rows(logits_CV: Tensor, teacher: TeacherTopK, tau: float, grad_CV: Tensor | None, scale: float) -> Tensor:
    """(sum of all weights) q, less the weight of each of the K ids and of each draw; draws of one id add up."""
    assert teacher.draws is not None
    up_CK, _, log_zp_C = _teacher_rows(teacher, tau, logits_CV.dtype)
    log_tail_1_C = teacher.draws.log_tail_1_N.to(logits_CV.dtype)
    z_CM = teacher.draws.logits_NM.to(logits_CV.dtype)
    z_CM = torch.where(torch.isneginf(log_tail_1_C)[:, None], 0.0, z_CM)  # nothing to draw from: NaN
    log_p_CS = torch.cat((up_CK, z_CM / tau), 1) - log_zp_C[:, None]
    w_CM = draw_weights(z_CM, log_tail_1_C, log_zp_C, tau)
    weight_CS = torch.cat((log_p_CS[:, : up_CK.shape[1]].exp(), w_CM), 1)
    ids_CS = torch.cat((teacher.ids_NK, teacher.draws.ids_NM), 1)

    u_CV = logits_CV / tau
    uq_CS = u_CV.gather(1, ids_CS)
    peak_C = u_CV.amax(-1)
    work_CV = u_CV.sub_(peak_C[:, None]).exp_()
    sum_C = work_CV.sum(-1)
    if grad_CV is not None:
        grad_CV.addcmul_(work_CV, (weight_CS.sum(-1) / sum_C * scale)[:, None])
        grad_CV.scatter_add_(1, ids_CS, weight_CS * -scale)
    return (weight_CS * (log_p_CS - uq_CS + (peak_C + sum_C.log())[:, None])).sum(-1)


def _teacher_rows(teacher: TeacherTopK, tau: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """z / tau (C, K), log_tail (C,) and log Z_tau (C,)."""
    up_CK, log_tail_C = teacher.logits_NK.to(dtype) / tau, teacher.log_tail_N.to(dtype)
    return up_CK, log_tail_C, torch.logaddexp(up_CK.logsumexp(-1), log_tail_C)
