"""Sums behind the evaluation's figures: cross-entropies, bits per byte, KL_{K+1}, agreement; by position, too.

Every position with a finite `target_logit` is counted once, the row's last included; padding never. Bits per byte are
sum of nats over targets / (ln 2 * sum of the targets' bytes); special tokens stand for no bytes but their nats count.
Position t has read t + 1 tokens of its row.

Legend: B rows, T tokens, N positions, V vocabulary, K top-k ids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from student.data.batch import Batch
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
    shape: tuple[int, int]  # B, T

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
            shape=(keep_BT.shape[0], keep_BT.shape[1]),
        )


@dataclass
class Sums:
    """Running sums in float64, one for each position of the context; `result` and `by_position` turn them into figures.

    They stay on the device of what is added, so that a GPU need not be waited for; sums do not depend on the order in
    which a device finishes.

    Args:
        unigram_logp_V: log-probabilities of the training shards' unigram, float64.
        bytes_V: bytes of every token id, int64.
    """

    unigram_logp_V: Tensor
    bytes_V: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, positions: Positions, value_N: dict[str, Tensor]) -> None:
        """Add one value a position to each of the named sums."""
        batch, length = positions.shape
        for name, values_N in value_N.items():
            dense_N = torch.zeros(batch * length, dtype=torch.float64, device=values_N.device)
            dense_N[positions.index_N] = values_N.double()
            sum_T = dense_N.view(batch, length).sum(0)
            self.sums[name] = self.sums[name] + sum_T if name in self.sums else sum_T

    def add_positions(self, positions: Positions) -> None:
        """What does not need the student."""
        target_N = positions.target_N
        if self.bytes_V.device != target_N.device:
            self.bytes_V = self.bytes_V.to(target_N.device)
            self.unigram_logp_V = self.unigram_logp_V.to(target_N.device)
        self.add(
            positions,
            {
                "targets": torch.ones_like(target_N),
                "bytes": self.bytes_V[target_N],
                "teacher": positions.teacher_ce_N,
                "unigram": -self.unigram_logp_V[target_N],
            },
        )

    @property
    def targets(self) -> int:
        """Positions counted so far."""
        return int(self.sums["targets"].sum()) if "targets" in self.sums else 0

    def result(self) -> dict[str, float | int]:
        """Figures per target: cross-entropy in nats, perplexity, bits per byte, KLs in nats, agreement as a share."""
        total = {name: float(sum_T.sum()) for name, sum_T in self.sums.items()}
        targets, target_bytes = int(total["targets"]), int(total["bytes"])
        figures: dict[str, float | int] = {"targets": targets, "target_bytes": target_bytes}
        for name in NAMES:
            mean = total[name] / targets
            figures[f"{name}_cross_entropy"] = mean
            figures[f"{name}_perplexity"] = math.exp(min(mean, 700.0))
            figures[f"{name}_bits_per_byte"] = total[name] / (math.log(2) * max(1, target_bytes))
        figures["kl_k1"] = total["kl_k1"] / targets
        figures["top1_agreement"] = total["agree"] / targets
        if "kl_full" in total:
            figures["kl_full"] = total["kl_full"] / targets
        return figures

    def by_position(self) -> list[dict[str, Any]]:
        """Figures per target in bins of positions that double in width, those without targets left out.

        A row has `first` and `last` position of the bin, `targets`, and in nats per target `student_cross_entropy`,
        `teacher_cross_entropy`, `kl_k1` and, where it was measured, `kl_full`.
        """
        sum_T = {name: values_T.cpu() for name, values_T in self.sums.items()}
        measures = {f"{name}_cross_entropy": name for name in ("student", "teacher")}
        measures |= {name: name for name in ("kl_k1", "kl_full") if name in sum_T}
        rows = []
        for first, last in position_bins(len(sum_T["targets"])):
            targets = int(sum_T["targets"][first : last + 1].sum())
            if targets:
                means = {k: float(sum_T[name][first : last + 1].sum()) / targets for k, name in measures.items()}
                rows.append({"first": first, "last": last, "targets": targets, **means})
        return rows


def position_bins(length: int) -> list[tuple[int, int]]:
    """First and last position of each bin: 0, 1, 2-3, 4-7, 8-15, ..., the last one cut at `length` - 1."""
    starts = [0, *(1 << i for i in range(max(0, length - 1).bit_length()))]
    return [(start, min(max(0, 2 * start - 1), length - 1)) for start in starts]


def of_student(logits_NV: Tensor, positions: Positions, rows: slice) -> dict[str, Tensor]:
    """`student` (cross-entropy), `kl_k1` and `agree` of the student's logits at `rows` of `positions`."""
    target_N, ids_NK = positions.target_N[rows], positions.topk_ids_NK[rows]
    valid_N = torch.ones_like(target_N, dtype=torch.bool)
    kl_N = kl_k1(logits_NV, ids_NK, positions.topk_logits_NK[rows], positions.log_tail_N[rows], 1.0, valid_N)
    return {
        "student": cross_entropy(logits_NV, target_N),
        "kl_k1": kl_N,
        "agree": logits_NV.argmax(-1) == ids_NK[:, 0],
    }


def full_kl(teacher_NV: Tensor, logits_NV: Tensor) -> Tensor:
    """KL(p || q) over the whole vocabulary at tau 1, (N,) nats."""
    log_p_NV, log_q_NV = teacher_NV.float().log_softmax(-1), logits_NV.float().log_softmax(-1)
    return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)


def unigram_log_probabilities(count_V: Tensor) -> Tensor:
    """Add-one smoothed log-probabilities (V,) float64 of token counts: (count + 1) / (total + V)."""
    smoothed_V = count_V.double() + 1.0
    return (smoothed_V / smoothed_V.sum()).log()
