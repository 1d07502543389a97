"""The arm with its teacher in the loop: the KL over the whole vocabulary, from logits that the teacher computes at
every step, where the others read a cache. Student, batches, targets, schedules and optimiser are those of the others.

The teacher is the one that the cache was dumped from, in the dump's bfloat16.

Legend: B rows, T tokens a row, N positions, D width of the student and E of the teacher, V vocabulary; C rows of a
chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.errors import UserError
from student.data.batch import IGNORE, Batch
from student.evaluation.hugging_face import CausalLM, load_causal_lm
from student.losses.fused import Head, KDSums
from student.losses.sparse_kd import Divergence
from student.training.module import DistillModule


class OnlineModule(DistillModule):
    """`DistillModule` whose divergence is KL(p || q) over all ids, logged under the name of the configured one."""

    teacher: CausalLM | None = None

    def configure_model(self) -> None:
        super().configure_model()
        if self.teacher is None:
            source = self._data.caches[0].manifest.teacher_path
            self.teacher = load_causal_lm(source, "bfloat16", str(self.trainer.strategy.root_device))

    def _kd(
        self,
        batch: Batch,
        h_BTD: Tensor,
        weight_ce: float,
        weight_kl: float,
        tau: float,
        kl: Divergence = "tail",
    ) -> KDSums:
        if not (weight_kl and self.trainer.training):
            return super()._kd(batch, h_BTD, weight_ce, weight_kl, tau, kl)
        assert self.model is not None and self.teacher is not None
        facts = self.model.facts
        head = Head(self.model.head_VD, facts.logit_scale, facts.soft_cap)
        with torch.autocast(h_BTD.device.type, enabled=False):
            h_NE = self.teacher.hidden(batch.input_ids_BT).flatten(0, 1)
        return full_kd_sums(
            h_BTD.flatten(0, 1), head, batch.target_BT.flatten(), self.teacher, h_NE, weight_ce, weight_kl, tau,
            self.loss.chunk_rows,
        )  # fmt: skip


def full_kd_sums(
    h_ND: Tensor,
    head: Head,
    target_N: Tensor,
    teacher: CausalLM,
    h_NE: Tensor,
    weight_ce: float,
    weight_kl: float,
    tau: float,
    chunk_rows: int,
) -> KDSums:
    """`fused_kd_sums` with KL(p_tau || q_tau) over the whole vocabulary.

    The gradient is computed with the loss, a chunk at a time, so that N x V never exists and no logits are computed
    twice.

    Args:
        head: frozen.
        teacher: gives the logits of `h_NE`, its hidden states at the N positions.
        weight_kl: coefficient of the divergence, the factor tau^2 included.
        chunk_rows: C.

    Raises:
        UserError: the head is trained.
    """
    if head.weight_VD.requires_grad:
        raise UserError(
            "teacher_in_loop: its loss has no gradient for a trained head: set model.student.train_head to false, "
            "or take a cache"
        )
    total, ce, kl = _FullKD.apply(h_ND, head, target_N, teacher, h_NE, weight_ce, weight_kl, tau, chunk_rows)
    return KDSums(total, ce, kl)


class _FullKD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_ND: Tensor, head: Head, target_N: Tensor, teacher: CausalLM, h_NE: Tensor, weight_ce: float,
        weight_kl: float, tau: float, chunk_rows: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        device = h_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h_ND.dtype
        head_VD, grad_ND = head.weight_VD.to(dtype), torch.empty_like(h_ND)
        ce = h_ND.new_zeros((), dtype=torch.float32)
        kl = torch.zeros_like(ce)
        with torch.autocast(device, enabled=False):
            for start in range(0, h_ND.shape[0], chunk_rows):
                at = slice(start, start + chunk_rows)
                z_CV = head.logit_scale * (h_ND[at].to(dtype) @ head_VD.T).float()
                slope_CV = None
                if head.soft_cap is not None:
                    bent_CV = torch.tanh(z_CV / head.soft_cap)
                    z_CV, slope_CV = head.soft_cap * bent_CV, 1 - bent_CV.square()
                log_p_CV = teacher.logits(h_NE[at])[:, : z_CV.shape[1]].div_(tau).log_softmax(-1)
                ce_C, kl_C, grad_CV = _rows(z_CV, target_N[at], log_p_CV, weight_ce, weight_kl, tau)
                ce, kl = ce + ce_C.sum(), kl + kl_C.sum()
                if slope_CV is not None:
                    grad_CV.mul_(slope_CV)
                grad_ND[at] = head.logit_scale * (grad_CV.to(dtype) @ head_VD)
        ctx.save_for_backward(grad_ND)
        ctx.mark_non_differentiable(ce, kl)
        return weight_ce * ce + weight_kl * kl, ce, kl

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (grad_ND,) = ctx.saved_tensors
        return (grad * grad_ND, *[None] * 8)


def _rows(
    z_CV: Tensor, target_C: Tensor, log_p_CV: Tensor, weight_ce: float, weight_kl: float, tau: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy and KL of every row, and the gradient of their weighted sum to the logits; 0 where there is no
    target. With q_tau = softmax(z / tau): weight_ce (q_1 - e_target) + weight_kl / tau (q_tau - p_tau)."""
    kept_C1 = (target_C != IGNORE)[:, None]
    at_C1 = torch.where(kept_C1[:, 0], target_C, 0)[:, None]
    log_q_CV = z_CV.log_softmax(-1)
    ce_C1 = -log_q_CV.gather(1, at_C1) * kept_C1
    log_q_tau_CV = log_q_CV if tau == 1 else (z_CV / tau).log_softmax(-1)
    p_CV = log_p_CV.exp()
    kl_C1 = (p_CV * (log_p_CV - log_q_tau_CV)).sum(-1, keepdim=True) * kept_C1
    grad_CV = (log_q_tau_CV.exp() - p_CV).mul_(weight_kl / tau)
    grad_CV.add_(log_q_CV.exp(), alpha=weight_ce).scatter_add_(1, at_C1, torch.full_like(ce_C1, -weight_ce))
    return ce_C1[:, 0], kl_C1[:, 0], grad_CV.mul_(kept_C1)
