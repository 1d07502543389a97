"""What a student's attention must beat to have learned any: maps that do not look at the text.

Each is the exact pooled form of an attention over single tokens, pooled as `attn_map` is: the mean over the queries of
block I of what they give to the keys of block J.

- uniform: A[t,s] = 1 / (t + 1), every token of the past alike.
- recency: A[t,s] proportional to 2^(−(t − s) / h), one half-life h (tokens) a depth group, fitted to training rows.
- own block, previous block: all of it within the query's block, or on the block before.
- the teacher's mean map: what its maps are on average over training rows, about the best without the text.

Legend: B rows of the cache, G depth groups, n = T/b blocks, H half-lives tried.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from student.evaluation.map_distances import DISTANCES, SINKS, compared_rows, distance, full_rows, teacher_shares
from student.losses.attention import Sinks, prepare_map

HALF_LIVES = 64
"""So many are tried, a constant factor apart, from half a token to LONGEST rows, which is all but uniform."""
LONGEST = 64


def uniform_map(blocks: int, block: int) -> Tensor:
    """(n, n)."""
    return _pooled(torch.ones(blocks * block, dtype=torch.float64).cumsum(0), blocks, block)


def recency_map(half_life: float, blocks: int, block: int) -> Tensor:
    """(n, n) of an attention that halves every `half_life` tokens."""
    decay = np.log(2) / half_life
    # Sums of the first k terms of a geometric series.
    k = torch.arange(1, blocks * block + 1, dtype=torch.float64)
    return _pooled(torch.expm1(-decay * k) / np.expm1(-decay), blocks, block)


def _pooled(nearest_T: Tensor, blocks: int, block: int) -> Tensor:
    """Pool an attention that depends on the distance only, from its unnormalised sums over the nearest 1..T keys."""
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), nearest_T])
    t_T1 = torch.arange(blocks * block)[:, None]
    first_n = torch.arange(blocks)[None, :] * block
    beyond_Tn = (t_T1 - first_n - block + 1).clamp_min(0)  # keys after the block, up to the query
    through_Tn = (t_T1 - first_n + 1).clamp_min(0)  # those and the block's
    shares_Tn = (sums[through_Tn] - sums[beyond_Tn]) / nearest_T[:, None]
    return shares_Tn.view(blocks, block, blocks).mean(1).float()


def own_block_map(blocks: int) -> Tensor:
    """(n, n)."""
    return torch.eye(blocks)


def previous_block_map(blocks: int) -> Tensor:
    """(n, n); the first block, which has none before it, attends to itself."""
    map_nn = torch.diag(torch.ones(blocks - 1), -1)
    map_nn[0, 0] = 1.0
    return map_nn


@dataclass(frozen=True)
class Fitted:
    """What was fitted on training rows.

    Attributes:
        rows: how many.
        half_life: (distance, sinks) -> tokens, one a depth group: the best for that distance.
        mean_map: sinks -> (G, n, n), the mean of the teacher's prepared maps over rows full of valid tokens.
    """

    rows: int
    half_life: dict[tuple[str, Sinks], list[float]]
    mean_map: dict[Sinks, Tensor]


def fit(rows: Iterable[tuple[Tensor, Tensor]], block: int) -> Fitted:
    """Fit the baselines that have something to fit.

    Args:
        rows: (attn_map (B, G, n, n), length (B,)) of training rows, a few at a time; at least one.
        block: b.
    """
    count, lives, recency = 0, np.zeros(0), torch.zeros(0)
    totals: dict[tuple[str, Sinks], Tensor] = {}
    maps: dict[Sinks, tuple[Tensor, Tensor]] = {}
    for attn_map_BGnn, length_B in rows:
        groups, n = attn_map_BGnn.shape[1], attn_map_BGnn.shape[-1]
        if not count:
            lives = np.geomspace(0.5, LONGEST * n * block, HALF_LIVES)
            recency = torch.stack([recency_map(float(h), n, block) for h in lives])
        count += len(length_B)
        for sinks in SINKS:
            teacher_BGnn = teacher_shares(attn_map_BGnn, sinks)
            compared_BGn = compared_rows(teacher_BGnn, length_B, block, sinks)
            sum_Gnn, rows_Gn = maps.get(sinks, (torch.zeros(groups, n, n).double(), torch.zeros(groups, n).double()))
            full_BGn = full_rows(length_B, n, block)[:, None, :] & (teacher_BGnn.sum(-1) > 0)
            kept_BGnn = teacher_BGnn.double() * full_BGn[..., None]
            maps[sinks] = sum_Gnn + kept_BGnn.sum(0), rows_Gn + full_BGn.sum(0)
            tried_Hnn = prepare_map(recency, "signed", sinks, normalise_rows=True)
            for name in DISTANCES:
                total_HG = totals.setdefault((name, sinks), torch.zeros(len(lives), groups).double())
                for h, tried_nn in enumerate(tried_Hnn):
                    away_BGn = distance(name, teacher_BGnn, tried_nn)
                    total_HG[h] += torch.where(compared_BGn, away_BGn, 0.0).double().sum((0, 2))
    half_life = {key: [float(lives[h]) for h in total_HG.argmin(0).tolist()] for key, total_HG in totals.items()}
    mean_map = {s: (sum_Gnn / rows_Gn.clamp_min(1)[..., None]).float() for s, (sum_Gnn, rows_Gn) in maps.items()}
    return Fitted(count, half_life, mean_map)
