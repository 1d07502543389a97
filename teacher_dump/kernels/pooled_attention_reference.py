"""Block-pooled attention of one layer from post-RoPE q and k, without ever holding T x T.

P[I, J] = (1 / (|I| H)) sum_h sum_{t in I} sum_{s in J, s <= t} A^h[t, s], |I| counting valid queries only; the keys of
a row are the row's own tokens. Query blocks are taken a few at a time, against the keys they can see.

Legend: N tokens of all rows one after another, B rows, H heads, Hkv key heads, E head width, b pooling block,
n blocks of the cache's full length, Q queries of a step, S keys of a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

_QUERIES = 128
"""Queries of a step: enough for the matrix product, few enough for the scores to stay in cache."""


@dataclass(frozen=True)
class AttentionShape:
    """What a layer does to its scores besides q.k.

    Attributes:
        scale: factor of q.k.
        window: a query sees itself and the window - 1 tokens before it; 0: all before it.
        soft_cap: scores become cap * tanh(score / cap); 0: as they are.
        alibi_H: slopes added as slope * (s - t), None without.
        sinks_H: logits of a column that takes attention and is not stored, None without.
    """

    scale: float
    window: int = 0
    soft_cap: float = 0.0
    alibi_H: Tensor | None = None
    sinks_H: Tensor | None = None


def pooled_attention(
    q_NHE: Tensor, k_NHkvE: Tensor, starts: list[int], shape: AttentionShape, block: int, blocks: int
) -> Tensor:
    """Mean over the heads of one layer: (B, n, n) float32; blocks beyond a row's length are zero.

    Args:
        q_NHE, k_NHkvE: queries and keys of whole rows after RoPE, any float dtype; H is a multiple of Hkv.
        starts: B + 1 offsets of the rows in N.
        shape: how the layer treats its scores.
        block: pooling block b.
        blocks: n of the cache's full length.
    """
    pooled_Bnn = torch.zeros((len(starts) - 1, blocks, blocks), dtype=torch.float32, device=q_NHE.device)
    for row, (start, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        _one_row(q_NHE[start:end], k_NHkvE[start:end], shape, block, pooled_Bnn[row])
    return pooled_Bnn


def _one_row(q_THE: Tensor, k_THkvE: Tensor, shape: AttentionShape, block: int, pooled_nn: Tensor) -> None:
    length, heads, _ = q_THE.shape
    q_HTE = (q_THE.float() * shape.scale).transpose(0, 1)
    k_HET = k_THkvE.float().permute(1, 2, 0).repeat_interleave(heads // k_THkvE.shape[1], dim=0)
    step = max(1, _QUERIES // block) * block
    for first in range(0, length, step):
        last = min(first + step, length)
        low = max(0, first + 1 - shape.window) // block * block if shape.window else 0
        weights_HQS = _weights(torch.bmm(q_HTE[:, first:last], k_HET[:, :, low:last]), first - low, shape)
        # A query block's sum over heads and queries, then over each block of keys.
        pooled = _sum_blocks(_sum_blocks(weights_HQS.sum(0), block, dim=0), block, dim=1).div_(heads * block)
        if (last - first) % block:  # the row ends inside its last query block
            pooled[-1] *= block / ((last - first) % block)
        at, key_at = first // block, low // block
        pooled_nn[at : at + pooled.shape[0], key_at : key_at + pooled.shape[1]] = pooled


def _weights(scores_HQS: Tensor, offset: int, shape: AttentionShape) -> Tensor:
    """Attention weights from q.k, which is overwritten; query 0 stands at key `offset`, keys end with the queries."""
    heads, queries, keys = scores_HQS.shape
    device = scores_HQS.device
    if shape.soft_cap:
        scores_HQS.div_(shape.soft_cap).tanh_().mul_(shape.soft_cap)
    if shape.alibi_H is not None:
        scores_HQS.sub_(shape.alibi_H.to(device).float()[:, None, None] * _distance(queries, keys, offset, device))
    # An addition and not a masked fill, which a CPU does one element at a time; the future is in the last keys.
    scores_HQS[:, :, offset:].add_(_future(queries, str(device)))
    if shape.window:
        scores_HQS.masked_fill_(_distance(queries, keys, offset, device) >= shape.window, -torch.inf)
    if shape.sinks_H is not None:
        sinks = shape.sinks_H.to(device).float()[:, None, None].expand(heads, queries, 1)
        return torch.cat([scores_HQS, sinks], dim=-1).softmax(-1)[..., :keys]
    return scores_HQS.softmax(-1)


def _distance(queries: int, keys: int, offset: int, device: torch.device) -> Tensor:
    """How many tokens each key lies before each query: (Q, S)."""
    return torch.arange(offset, offset + queries, device=device)[:, None] - torch.arange(keys, device=device)[None, :]


@lru_cache(maxsize=8)
def _future(queries: int, device: str) -> Tensor:
    """0 where the key is not later than the query, -inf where it is: (Q, Q)."""
    return torch.full((queries, queries), -torch.inf, device=device).triu_(1)


def _sum_blocks(x: Tensor, block: int, dim: int) -> Tensor:
    """Sums over runs of `block` along a dimension, the last run shorter where it does not divide."""
    whole = x.shape[dim] // block
    sums = x.narrow(dim, 0, whole * block).unflatten(dim, (whole, block)).sum(dim + 1)
    if whole * block == x.shape[dim]:
        return sums
    return torch.cat([sums, x.narrow(dim, whole * block, x.shape[dim] - whole * block).sum(dim, keepdim=True)], dim)
