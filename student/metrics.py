"""Sums behind the evaluation's figures: cross-entropies, bits per byte, KL_{K+1}, agreement.

Every position with a finite `target_logit` is counted once, the row's last included; padding never. Bits per byte are
sum of nats over targets / (ln 2 * sum of the targets' bytes); special tokens stand for no bytes but their nats count.

Legend: N positions, V vocabulary, K top-k ids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from student.batch import Batch
from student.losses.sparse_kd import cross_entropy, kl_k1, log_tail_at

NAMES = ("student", "teacher", "unigram")


@dataclass
class Positions:
    """The N counted positions of a batch, flattened."""

    target_N: Tensor
    topk_ids_NK: Tensor
    topk_logits_NK: Tensor
    log_tail_N: Tensor  # at tau 1
    teacher_ce_N: Tensor
    index_N: Tensor  # into the batch's flattened positions

    @staticmethod
    def of(batch: Batch) -> Positions:
        """Those of a batch that have a target."""
        keep_BT = torch.isfinite(batch.target_logit_BT)
        return Positions(
            target_N=batch.target_BT[keep_BT],
            topk_ids_NK=batch.topk_ids_BTK[keep_BT].long(),
            topk_logits_NK=batch.topk_logits_BTK[keep_BT],
            log_tail_N=log_tail_at(batch.log_tail_BTR[keep_BT], batch.taus, 1.0),
            teacher_ce_N=(batch.lse_BT - batch.target_logit_BT)[keep_BT],
            index_N=keep_BT.flatten().nonzero().squeeze(1),
        )


@dataclass
class Sums:
    """Running sums in float64 nats; `result` turns them into figures.

    Args:
        unigram_logp_V: log-probabilities of the training shards' unigram, float64.
        bytes_V: bytes of every token id, int64.
    """

    unigram_logp_V: Tensor
    bytes_V: Tensor
    targets: int = 0
    target_bytes: int = 0
    nats: dict[str, float] = field(default_factory=lambda: dict.fromkeys(NAMES, 0.0))
    kl_k1: float = 0.0
    kl_full: float | None = None
    agree: int = 0

    def add_positions(self, positions: Positions) -> None:
        """What does not need the student."""
        target_N = positions.target_N.cpu()
        self.targets += int(target_N.numel())
        self.target_bytes += int(self.bytes_V[target_N].sum())
        self.nats["teacher"] += float(positions.teacher_ce_N.double().sum())
        self.nats["unigram"] -= float(self.unigram_logp_V[target_N].sum())

    def add_logits(self, logits_NV: Tensor, positions: Positions, rows: slice) -> None:
        """The student's logits at `rows` of `positions`."""
        target_N, ids_NK = positions.target_N[rows], positions.topk_ids_NK[rows]
        valid_N = torch.ones_like(target_N, dtype=torch.bool)
        kl_N = kl_k1(logits_NV, ids_NK, positions.topk_logits_NK[rows], positions.log_tail_N[rows], 1.0, valid_N)
        self.nats["student"] += float(cross_entropy(logits_NV, target_N).double().sum())
        self.kl_k1 += float(kl_N.double().sum())
        self.agree += int((logits_NV.argmax(-1) == ids_NK[:, 0]).sum())

    def add_full_kl(self, teacher_NV: Tensor, logits_NV: Tensor) -> None:
        """KL(p || q) over the whole vocabulary at tau 1."""
        log_p_NV, log_q_NV = teacher_NV.float().log_softmax(-1), logits_NV.float().log_softmax(-1)
        total = float((log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1).double().sum())
        self.kl_full = (self.kl_full or 0.0) + total

    def result(self) -> dict[str, float | int]:
        """Figures per target: cross-entropy in nats, perplexity, bits per byte, KLs in nats, agreement as a share."""
        figures: dict[str, float | int] = {"targets": self.targets, "target_bytes": self.target_bytes}
        for name in NAMES:
            mean = self.nats[name] / self.targets
            figures[f"{name}_cross_entropy"] = mean
            figures[f"{name}_perplexity"] = math.exp(min(mean, 700.0))
            figures[f"{name}_bits_per_byte"] = self.nats[name] / (math.log(2) * max(1, self.target_bytes))
        figures["kl_k1"] = self.kl_k1 / self.targets
        figures["top1_agreement"] = self.agree / self.targets
        if self.kl_full is not None:
            figures["kl_full"] = self.kl_full / self.targets
        return figures


def unigram_log_probabilities(count_V: Tensor) -> Tensor:
    """Add-one smoothed log-probabilities (V,) float64 of token counts: (count + 1) / (total + V)."""
    smoothed_V = count_V.double() + 1.0
    return (smoothed_V / smoothed_V.sum()).log()
