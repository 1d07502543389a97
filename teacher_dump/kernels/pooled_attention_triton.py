"""Block-pooled attention of one layer on a GPU, from packed q and k and the logsumexp of every row of scores.

With the logsumexp known (the attention kernel has it; `row_lse` computes it where it cannot be had) the weights of a
tile of queries and keys are one product and one exponential away. A program owns one tile, adds the weights of all
heads in registers and only then masks, sums over blocks and scales: nothing of size T x T is stored, and no two
programs write the same number, so the result does not depend on their order.

Legend: N tokens of all rows one after another, B rows, H heads, Hkv key heads, E head width, Q queries of a tile,
S keys of a tile, b pooling block, u the part of a block that divides a tile.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from teacher_dump.kernels.pooled_attention_reference import AttentionShape

_LOG2_E = math.log2(math.e)
_UNIT = 64
"""Tokens; divides every tile."""


@triton.jit
def _scores(q_QE, k_SE, q_at, k_at, scale, soft_cap, slope, CAPPED: tl.constexpr, SLOPED: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """Scores of one tile and head in units of log 2: (Q, S)."""
    x = tl.dot(q_QE, tl.trans(k_SE), input_precision=PRECISION)
    if CAPPED:
        x = x * scale
        x = soft_cap * (2.0 * tl.sigmoid(2.0 * x / soft_cap) - 1.0)
        x = x * 1.4426950408889634
    else:
        x = x * (scale * 1.4426950408889634)
    if SLOPED:
        x -= slope * 1.4426950408889634 * (q_at[:, None] - k_at[None, :]).to(tl.float32)
    return x


@triton.jit(do_not_specialize=["lse_h"])
def _pool(
    q_ptr, q_n, q_h, k_ptr, k_n, k_h, lse_ptr, lse_h, starts_ptr, out_ptr, out_b, out_i,
    scale, soft_cap, slopes_ptr, window, weight,
    H: tl.constexpr, GROUP: tl.constexpr, E: tl.constexpr, E2: tl.constexpr, TILE_Q: tl.constexpr,
    TILE_S: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr, CAPPED: tl.constexpr, SLOPED: tl.constexpr,
    WINDOWED: tl.constexpr, PRECISION: tl.constexpr, REUSE: tl.constexpr,
):  # fmt: skip
    """Adds weight / |I| times the weights of one tile, summed over heads and units, to out (B, T/u, T/u)."""
    i, j, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(starts_ptr + row)
    length = tl.load(starts_ptr + row + 1) - start
    if (i * TILE_Q >= length) | (j * TILE_S >= (i + 1) * TILE_Q):
        return
    beyond = i * TILE_Q - (j + 1) * TILE_S + 1 >= window  # every key lies before every query's window
    if WINDOWED and beyond:
        return
    q_at = i * TILE_Q + tl.arange(0, TILE_Q)
    k_at = j * TILE_S + tl.arange(0, TILE_S)
    e = tl.arange(0, E2)
    q_ptrs = q_ptr + (start + q_at).to(tl.int64)[:, None] * q_n + e[None, :]
    k_ptrs = k_ptr + (start + k_at).to(tl.int64)[:, None] * k_n + e[None, :]
    q_in = (q_at < length)[:, None]
    k_in = (k_at < length)[:, None]
    if E2 != E:
        q_in = q_in & (e < E)[None, :]
        k_in = k_in & (e < E)[None, :]
    lse_ptrs = lse_ptr + start + q_at
    weights_QS = tl.zeros([TILE_Q, TILE_S], tl.float32)
    if REUSE:
        for hk in range(H // GROUP):
            k_SE = tl.load(k_ptrs + hk * k_h, mask=k_in, other=0.0)
            for g in range(GROUP):
                h = hk * GROUP + g
                q_QE = tl.load(q_ptrs + h * q_h, mask=q_in, other=0.0)
                # Beyond the row +inf: a weight of 0.
                lse_Q = tl.load(lse_ptrs + h * lse_h, mask=q_at < length, other=float("inf")) * 1.4426950408889634
                slope = tl.load(slopes_ptr + h) if SLOPED else 0.0
                x = _scores(q_QE, k_SE, q_at, k_at, scale, soft_cap, slope, CAPPED, SLOPED, PRECISION)
                weights_QS += tl.exp2(x - lse_Q[:, None])
    else:
        for h in range(H):
            k_SE = tl.load(k_ptrs + h // GROUP * k_h, mask=k_in, other=0.0)
            q_QE = tl.load(q_ptrs + h * q_h, mask=q_in, other=0.0)
            lse_Q = tl.load(lse_ptrs + h * lse_h, mask=q_at < length, other=float("inf")) * 1.4426950408889634
            slope = tl.load(slopes_ptr + h) if SLOPED else 0.0
            x = _scores(q_QE, k_SE, q_at, k_at, scale, soft_cap, slope, CAPPED, SLOPED, PRECISION)
            weights_QS += tl.exp2(x - lse_Q[:, None])
    seen = q_at[:, None] >= k_at[None, :]  # the same for all heads; an inf beyond it goes with it
    if WINDOWED:
        seen = seen & (q_at[:, None] - k_at[None, :] < window)
    weights_QS = tl.where(seen, weights_QS, 0.0)
    UQ: tl.constexpr = TILE_Q // UNIT
    US: tl.constexpr = TILE_S // UNIT
    sums = tl.sum(tl.sum(tl.reshape(weights_QS, [UQ, UNIT, US, UNIT]), 3), 1)
    u = i * UQ + tl.arange(0, UQ)
    v = j * US + tl.arange(0, US)
    first = u // UNITS * (UNITS * UNIT)  # of the pooling block that the unit is part of
    queries = tl.minimum(length - first, UNITS * UNIT).to(tl.float32)
    at = out_ptr + row * out_b + u[:, None] * out_i + v[None, :]
    inside = (u * UNIT < length)[:, None] & (v * UNIT < length)[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0.0) + sums * (weight / queries)[:, None], mask=inside)


@triton.jit(do_not_specialize=["lse_h"])
def _row_lse(
    q_ptr, q_n, q_h, k_ptr, k_n, k_h, lse_ptr, lse_h, starts_ptr, scale, soft_cap, slopes_ptr, sinks_ptr, window,
    GROUP: tl.constexpr, E: tl.constexpr, E2: tl.constexpr, TILE_Q: tl.constexpr, TILE_S: tl.constexpr,
    CAPPED: tl.constexpr, SLOPED: tl.constexpr, WINDOWED: tl.constexpr, SUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """lse (H, N) of the scores of every query with the keys it sees, the sink among them, in nats."""
    i, h, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(starts_ptr + row)
    length = tl.load(starts_ptr + row + 1) - start
    if i * TILE_Q >= length:
        return
    q_at = i * TILE_Q + tl.arange(0, TILE_Q)
    e = tl.arange(0, E2)
    q_QE = tl.load(
        q_ptr + (start + q_at).to(tl.int64)[:, None] * q_n + h * q_h + e[None, :],
        mask=(q_at < length)[:, None] & (e < E)[None, :], other=0.0,
    )  # fmt: skip
    slope = tl.load(slopes_ptr + h) if SLOPED else 0.0
    maximum = tl.full([TILE_Q], -1e30, tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    if SUNK:
        maximum += 1e30
        maximum += tl.load(sinks_ptr + h).to(tl.float32) * 1.4426950408889634
        total += 1.0
    low = 0
    if WINDOWED:
        low = tl.maximum(0, i * TILE_Q + 1 - window) // TILE_S * TILE_S
    for first in range(low, tl.minimum(length, (i + 1) * TILE_Q), TILE_S):
        k_at = first + tl.arange(0, TILE_S)
        k_SE = tl.load(
            k_ptr + (start + k_at).to(tl.int64)[:, None] * k_n + h // GROUP * k_h + e[None, :],
            mask=(k_at < length)[:, None] & (e < E)[None, :], other=0.0,
        )  # fmt: skip
        x = _scores(q_QE, k_SE, q_at, k_at, scale, soft_cap, slope, CAPPED, SLOPED, PRECISION)
        seen = q_at[:, None] >= k_at[None, :]
        if WINDOWED:
            seen = seen & (q_at[:, None] - k_at[None, :] < window)
        x = tl.where(seen, x, float("-inf"))
        new = tl.maximum(maximum, tl.max(x, 1))
        total = total * tl.exp2(maximum - new) + tl.sum(tl.exp2(x - new[:, None]), 1)
        maximum = new
    lse = (maximum + tl.log2(total)) / 1.4426950408889634
    tl.store(lse_ptr + h * lse_h + start + q_at, lse, mask=q_at < length)


def unit_of(block: int) -> int:
    """u: the largest power of two that divides a pooling block, at most 64 tokens."""
    return min(block & -block, _UNIT)


def _tiles(width: int) -> tuple[int, int, int, int]:
    """TILE_Q, TILE_S, warps and stages for heads of a width, as measured on an H200."""
    return (64, 64, 4, 3) if width <= 128 else (64, 64, 4, 2)


def row_lse(q_NHE: Tensor, k_NHkvE: Tensor, starts_B1: Tensor, max_length: int, shape: AttentionShape) -> Tensor:
    """Logsumexp of every query's scores: (H, N) float32, in nats; arguments as in `add_pooled_attention`."""
    tokens, heads, width = q_NHE.shape
    lse_HN = torch.empty((heads, tokens), dtype=torch.float32, device=q_NHE.device)
    tile_q, tile_s, warps, stages = _tiles(width)
    unused = starts_B1
    _row_lse[(-(-max_length // tile_q), heads, len(starts_B1) - 1)](
        q_NHE, q_NHE.stride(0), q_NHE.stride(1), k_NHkvE, k_NHkvE.stride(0), k_NHkvE.stride(1), lse_HN,
        lse_HN.stride(0), starts_B1, shape.scale, shape.soft_cap,
        unused if shape.alibi_H is None else shape.alibi_H.to(q_NHE.device),
        unused if shape.sinks_H is None else shape.sinks_H.to(q_NHE.device), shape.window,
        GROUP=heads // k_NHkvE.shape[1], E=width, E2=max(16, triton.next_power_of_2(width)), TILE_Q=tile_q,
        TILE_S=tile_s, CAPPED=shape.soft_cap > 0, SLOPED=shape.alibi_H is not None, WINDOWED=shape.window > 0,
        SUNK=shape.sinks_H is not None, PRECISION=_precision(q_NHE), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return lse_HN


def add_pooled_attention(
    pooled_Buu: Tensor,
    q_NHE: Tensor,
    k_NHkvE: Tensor,
    starts_B1: Tensor,
    max_length: int,
    lse_HN: Tensor | None,
    shape: AttentionShape,
    block: int,
    weight: float,
) -> None:
    """Add `weight` times the mean over the heads to `pooled_Buu`, in units of `unit_of(block)` tokens.

    Args:
        pooled_Buu: float32 (B, T/u, T/u) with contiguous last dimension; the sum over the units of a pooling block is
            the block's value.
        q_NHE, k_NHkvE: queries and keys of whole rows after RoPE; contiguous head vectors.
        starts_B1: int32 on the device, B + 1 offsets of the rows in N.
        max_length: length of the longest row.
        lse_HN: logsumexp of every query's scores in nats, sinks counted; None: computed here.
        shape: how the layer treats its scores.
        block: pooling block b.
        weight: of this layer in the sum.
    """
    if lse_HN is None:
        lse_HN = row_lse(q_NHE, k_NHkvE, starts_B1, max_length, shape)
    heads, width = q_NHE.shape[1:]
    group = heads // k_NHkvE.shape[1]
    tile_q, tile_s, warps, stages = _tiles(width)
    unit = unit_of(block)
    _pool[(-(-max_length // tile_q), -(-max_length // tile_s), len(starts_B1) - 1)](
        q_NHE, q_NHE.stride(0), q_NHE.stride(1), k_NHkvE, k_NHkvE.stride(0), k_NHkvE.stride(1), lse_HN,
        lse_HN.stride(0), starts_B1, pooled_Buu, pooled_Buu.stride(0), pooled_Buu.stride(1), shape.scale,
        shape.soft_cap, starts_B1 if shape.alibi_H is None else shape.alibi_H.to(q_NHE.device), shape.window,
        weight / heads, H=heads, GROUP=group, E=width, E2=max(16, triton.next_power_of_2(width)), TILE_Q=tile_q,
        TILE_S=tile_s, UNIT=unit, UNITS=block // unit, CAPPED=shape.soft_cap > 0,
        SLOPED=shape.alibi_H is not None, WINDOWED=shape.window > 0, PRECISION=_precision(q_NHE),
        REUSE=group > 1 and width > 64,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"
