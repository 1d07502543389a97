"""How far two pooled attention maps are apart, row by row, and which rows are compared.

A row of a map, prepared by `losses.attention.prepare_map`, is a distribution over key blocks: magnitudes that sum to
one. Between the teacher's p and another's q

    total variation   (1/2) Σ_J |p_J − q_J|                        0 to 1
    Jensen-Shannon    (1/2) KL(p ‖ m) + (1/2) KL(q ‖ m) in bits,   0 to 1, with m = (p + q) / 2

(Lin, IEEE Trans. Inf. Theory 37(1), 1991). A row q of zeros, which says nothing, is as far as can be: 1.

Legend: B rows of the cache, G depth groups, n = T/b blocks, I query block, J key block.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from student.losses.attention import Sinks, depth_overlap, prepare_map

DISTANCES = ("total_variation", "jensen_shannon")
SINKS: tuple[Sinks, ...] = ("keep", "drop")


def total_variation(p_Bnn: Tensor, q_Bnn: Tensor) -> Tensor:
    """(B, n)."""
    return torch.where(q_Bnn.sum(-1) > 0, (p_Bnn - q_Bnn).abs().sum(-1) / 2, 1.0)


def jensen_shannon(p_Bnn: Tensor, q_Bnn: Tensor) -> Tensor:
    """(B, n) bits."""
    m_Bnn = (p_Bnn + q_Bnn) / 2
    of_m_Bn = torch.xlogy(m_Bnn, m_Bnn).sum(-1)
    nats_Bn = (torch.xlogy(p_Bnn, p_Bnn) + torch.xlogy(q_Bnn, q_Bnn)).sum(-1) / 2 - of_m_Bn
    return torch.where(q_Bnn.sum(-1) > 0, (nats_Bn / math.log(2)).clamp(0.0, 1.0), 1.0)


def distance(name: str, p_Bnn: Tensor, q_Bnn: Tensor) -> Tensor:
    """One of `DISTANCES`."""
    return {"total_variation": total_variation, "jensen_shannon": jensen_shannon}[name](p_Bnn, q_Bnn)


def compared_rows(teacher_BGnn: Tensor, length_B: Tensor, block: int, sinks: Sinks) -> Tensor:
    """bool (B, G, n): query blocks full of valid tokens that have at least two key blocks to choose between.

    Args:
        teacher_BGnn: prepared maps; a row of zeros (nothing left beside the sink) is not compared.
    """
    n = teacher_BGnn.shape[-1]
    choice_n = torch.arange(n, device=length_B.device) >= (1 if sinks == "keep" else 2)
    return (full_rows(length_B, n, block) & choice_n)[:, None, :] & (teacher_BGnn.sum(-1) > 0)


def full_rows(length_B: Tensor, n: int, block: int) -> Tensor:
    """bool (B, n): query blocks full of valid tokens."""
    return (torch.arange(n, device=length_B.device)[None, :] + 1) * block <= length_B[:, None]


def teacher_shares(attn_map_BGnn: Tensor, sinks: Sinks) -> Tensor:
    """The teacher's maps as distributions, (B, G, n, n)."""
    return prepare_map(attn_map_BGnn, "signed", sinks, normalise_rows=True)


def group_weights(mlstm_blocks: tuple[int, ...], blocks: int, groups: int) -> list[dict[int, float]]:
    """For every depth group the student's mLSTM blocks at its depth, and their weights, which sum to one.

    A weight is the part of the group's depth that the block shares with it; empty where only sLSTM blocks are there.
    """
    shared = {block: depth_overlap(block, blocks, groups) for block in mlstm_blocks}
    weights = []
    for group in range(groups):
        at = {block: parts[group] for block, parts in shared.items() if parts[group] > 1e-9}
        total = sum(at.values())
        weights.append({block: value / total for block, value in at.items()})
    return weights


def student_shares(maps: dict[int, Tensor], weights: dict[int, float], sinks: Sinks) -> Tensor:
    """The student's map at one depth as distributions (B, n, n): magnitudes, rows normalised, then the blocks mixed."""
    parts = [
        weight * prepare_map(maps[block], "absolute", sinks, normalise_rows=True) for block, weight in weights.items()
    ]
    return torch.stack(parts).sum(0)
