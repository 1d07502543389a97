"""Pooled attention by its definition, in float64, and layers that treat their scores in every way there is."""

from __future__ import annotations

import torch
from torch import Tensor

from teacher_dump.kernels.pooled_attention_reference import AttentionShape

HEADS, KV_HEADS, WIDTH = 6, 2, 32


def dense(q_THE: Tensor, k_THkvE: Tensor, shape: AttentionShape, block: int, blocks: int) -> Tensor:
    """The definition of P[I, J], one element of A at a time."""
    length = q_THE.shape[0]
    k_THE = k_THkvE.double().repeat_interleave(HEADS // KV_HEADS, dim=1)
    scores = torch.einsum("the,she->hts", q_THE.double(), k_THE) * shape.scale
    if shape.soft_cap:
        scores = shape.soft_cap * torch.tanh(scores / shape.soft_cap)
    t, s = torch.arange(length)[:, None], torch.arange(length)[None, :]
    if shape.alibi_H is not None:
        scores = scores + shape.alibi_H.double()[:, None, None] * (s - t)
    hidden = s > t
    if shape.window:
        hidden = hidden | (t - s >= shape.window)
    scores = scores.masked_fill(hidden, -torch.inf)
    if shape.sinks_H is not None:
        sinks = shape.sinks_H.double()[:, None, None].expand(HEADS, length, 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    pooled = torch.zeros(blocks, blocks, dtype=torch.float64)
    for i in range(-(-length // block)):
        queries = weights[:, i * block : (i + 1) * block]
        for j in range(-(-length // block)):
            pooled[i, j] = queries[..., j * block : (j + 1) * block].sum() / (HEADS * queries.shape[1])
    return pooled


SHAPES = {
    "plain": AttentionShape(0.2),
    "soft cap": AttentionShape(0.2, soft_cap=1.5),
    "window": AttentionShape(0.2, window=37),
    "window of one": AttentionShape(0.2, window=1),
    "alibi": AttentionShape(0.2, alibi_H=torch.logspace(-2, 0, HEADS)),
    "sinks": AttentionShape(0.2, sinks_H=torch.linspace(-2, 2, HEADS)),
    "all": AttentionShape(0.2, 50, 2.0, torch.logspace(-2, 0, HEADS), torch.linspace(-2, 2, HEADS)),
}
