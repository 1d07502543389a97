"""The arm with its teacher in the loop: the KL over the whole vocabulary, from logits that the teacher computes at
every step, where the others read a cache. Student, batches, targets, schedules and optimiser are those of the others.

The teacher is the one that the cache was dumped from, in the dump's bfloat16.

Legend: B rows, T tokens a row, N positions, D width of the student and E of the teacher, V vocabulary; C rows of a
chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

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

    Logits of a chunk are computed again for the backward, so that N x V never exists.

    Args:
        teacher: gives the logits of `h_NE`, its hidden states at the N positions.
        weight_kl: coefficient of the divergence, the factor tau^2 included.
        chunk_rows: C.
    """
    ce = h_ND.new_zeros((), dtype=torch.float32)
    kl = torch.zeros_like(ce)
    for start in range(0, h_ND.shape[0], chunk_rows):
        at = slice(start, start + chunk_rows)
        sums: tuple[Tensor, Tensor] = checkpoint(
            _chunk_sums, h_ND[at], head, target_N[at], teacher, h_NE[at], tau, use_reentrant=False
        )
        ce, kl = ce + sums[0], kl + sums[1]
    return KDSums(weight_ce * ce + weight_kl * kl, ce.detach(), kl.detach())


def _chunk_sums(
    h_CD: Tensor, head: Head, target_C: Tensor, teacher: CausalLM, h_CE: Tensor, tau: float
) -> tuple[Tensor, Tensor]:
    device = h_CD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h_CD.dtype
    with torch.autocast(device, enabled=False):
        logits_CV = head.logit_scale * (h_CD.to(dtype) @ head.weight_VD.to(dtype).T).float()
        if head.soft_cap is not None:
            logits_CV = head.soft_cap * torch.tanh(logits_CV / head.soft_cap)
        ce = F.cross_entropy(logits_CV, target_C, ignore_index=IGNORE, reduction="sum")
        with torch.no_grad():
            log_p_CV = (teacher.logits(h_CE)[:, : logits_CV.shape[1]] / tau).log_softmax(-1)
        log_q_CV = (logits_CV / tau).log_softmax(-1)
        kl_C = F.kl_div(log_q_CV, log_p_CV, log_target=True, reduction="none").sum(-1)
    return ce, kl_C[target_C != IGNORE].sum()
