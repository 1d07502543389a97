"""The pooled implicit attention on a GPU: a program a block of tokens, which reads q and k as they are.

`implicit_attention.pooled_implicit_attention` is the plain form of the same, with its formulas; the names are its own.
What lies between blocks (K̄_J, Q̄_I, their decays) is n vectors a head and left to ordinary products. Nothing of size
b×b or in float32 of the size of q is written; the backward computes a block's products once more.

Legend: B rows, H heads, T tokens, d head width, b tokens a block, n = T/b blocks; b2 and d2 powers of two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from student.blocks.mlstm import log_decay

WIDEST_BLOCK = 128
WIDEST_HEAD = 256


def takes(q_BHTd: Tensor, k_BHTd: Tensor, block: int) -> bool:
    """Whether the kernels take q and k of this kind: a block's products fit into an SM's shared memory."""
    fits = block <= (WIDEST_BLOCK if q_BHTd.element_size() == 2 else WIDEST_BLOCK // 2)
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    return fits and q_BHTd.shape[-1] <= WIDEST_HEAD and q_BHTd.dtype == k_BHTd.dtype and q_BHTd.dtype in kinds


@triton.jit
def _rows(x_ptr, x_b, x_h, x_t, row, first, t, e, heads, L: tl.constexpr, W: tl.constexpr):
    """Addresses (b2, d2) of a block's vectors."""
    at = (row // heads).to(tl.int64) * x_b + (row % heads).to(tl.int64) * x_h
    return x_ptr + at + (first + t).to(tl.int64)[:, None] * x_t + e[None, :]


@triton.jit
def _inside(q, k, local, local_max, t, L: tl.constexpr, PRECISION: tl.constexpr):
    """q·k and the decays D within a block, D zero above the diagonal and outside."""
    products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    causal = (t[:, None] >= t[None, :]) & (t < L)[:, None]
    decay = tl.where(causal, tl.exp(tl.where(causal, local[None, :] - local_max[:, None], 0.0)), 0.0)
    return products, decay


@triton.jit(do_not_specialize=["heads", "blocks"])
def _key_sums(
    k_ptr, k_b, k_h, k_t, source_ptr, keys_ptr, scale, heads, blocks,
    L: tl.constexpr, W: tl.constexpr, L2: tl.constexpr, W2: tl.constexpr,
):  # fmt: skip
    """keys (B·H, n, d) float32."""
    row, at = tl.program_id(0), tl.program_id(1)
    t, e = tl.arange(0, L2), tl.arange(0, W2)
    inside = (t < L)[:, None] & (e < W)[None, :]
    block = row.to(tl.int64) * blocks + at
    k = tl.load(_rows(k_ptr, k_b, k_h, k_t, row, at * L, t, e, heads, L, W), mask=inside, other=0.0).to(tl.float32)
    source = tl.load(source_ptr + block * L + t, mask=t < L, other=0.0)
    tl.store(keys_ptr + block * W + e, scale * tl.sum(k * source[:, None], 0), mask=e < W)


@triton.jit(do_not_specialize=["heads", "blocks"])
def _pool(
    q_ptr, q_b, q_h, q_t, k_ptr, k_b, k_h, k_t, local_ptr, local_max_ptr, carry_ptr, log_floor_ptr, before_ptr,
    queries_ptr, diagonal_ptr, scale, heads, blocks,
    L: tl.constexpr, W: tl.constexpr, L2: tl.constexpr, W2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """queries (B·H, n, d) and diagonal (B·H, n), float32."""
    row, at = tl.program_id(0), tl.program_id(1)
    t, e = tl.arange(0, L2), tl.arange(0, W2)
    inside = (t < L)[:, None] & (e < W)[None, :]
    block = row.to(tl.int64) * blocks + at
    q = tl.load(_rows(q_ptr, q_b, q_h, q_t, row, at * L, t, e, heads, L, W), mask=inside, other=0.0)
    k = tl.load(_rows(k_ptr, k_b, k_h, k_t, row, at * L, t, e, heads, L, W), mask=inside, other=0.0)
    local = tl.load(local_ptr + block * L + t, mask=t < L, other=0.0)
    local_max = tl.load(local_max_ptr + block * L + t, mask=t < L, other=0.0)
    carry = tl.load(carry_ptr + block * L + t, mask=t < L, other=0.0)
    floor = tl.exp(tl.load(log_floor_ptr + block * L + t, mask=t < L, other=0.0))
    before = tl.load(before_ptr + block * W + e, mask=e < W, other=0.0)
    products, decay = _inside(q, k, local, local_max, t, L, PRECISION)
    within = scale * tl.sum(products * decay, 1)
    q = q.to(tl.float32)
    total = within + carry * tl.sum(q * before[None, :], 1)
    weight = 1.0 / (L * tl.maximum(tl.abs(total), floor))
    tl.store(queries_ptr + block * W + e, tl.sum(q * (carry * weight)[:, None], 0), mask=e < W)
    tl.store(diagonal_ptr + block, tl.sum(within * weight, 0))


@triton.jit(do_not_specialize=["heads", "blocks"])
def _pool_backward(
    q_ptr, q_b, q_h, q_t, k_ptr, k_b, k_h, k_t, local_ptr, local_max_ptr, carry_ptr, log_floor_ptr, before_ptr,
    dqueries_ptr, ddiagonal_ptr, dq_ptr, dq_b, dq_h, dq_t, dwithin_ptr, dlocal_ptr, dlog_floor_ptr, dbefore_ptr,
    scale, heads, blocks,
    L: tl.constexpr, W: tl.constexpr, L2: tl.constexpr, W2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq in q's dtype; dwithin, dlocal, dlog_floor (B·H, T) and dbefore (B·H, n, d) in float32."""
    row, at = tl.program_id(0), tl.program_id(1)
    t, e = tl.arange(0, L2), tl.arange(0, W2)
    inside = (t < L)[:, None] & (e < W)[None, :]
    block = row.to(tl.int64) * blocks + at
    q = tl.load(_rows(q_ptr, q_b, q_h, q_t, row, at * L, t, e, heads, L, W), mask=inside, other=0.0)
    k = tl.load(_rows(k_ptr, k_b, k_h, k_t, row, at * L, t, e, heads, L, W), mask=inside, other=0.0)
    local = tl.load(local_ptr + block * L + t, mask=t < L, other=0.0)
    local_max = tl.load(local_max_ptr + block * L + t, mask=t < L, other=0.0)
    carry = tl.load(carry_ptr + block * L + t, mask=t < L, other=0.0)
    floor = tl.exp(tl.load(log_floor_ptr + block * L + t, mask=t < L, other=0.0))
    before = tl.load(before_ptr + block * W + e, mask=e < W, other=0.0)
    dqueries = tl.load(dqueries_ptr + block * W + e, mask=e < W, other=0.0)
    ddiagonal = tl.load(ddiagonal_ptr + block)
    products, decay = _inside(q, k, local, local_max, t, L, PRECISION)
    decayed = products * decay
    within = scale * tl.sum(decayed, 1)
    wide_q = q.to(tl.float32)
    total = within + carry * tl.sum(wide_q * before[None, :], 1)
    size = tl.abs(total)
    weight = 1.0 / (L * tl.maximum(size, floor))

    # To the logarithm of whichever is the normaliser; to both alike where they are the same.
    dlog = -weight * (carry * tl.sum(wide_q * dqueries[None, :], 1) + within * ddiagonal)
    of_total = tl.where(size > floor, 1.0, tl.where(size == floor, 0.5, 0.0))
    dtotal = tl.where(of_total > 0.0, dlog * of_total / tl.where(total == 0.0, 1.0, total), 0.0)
    dwithin = weight * ddiagonal + dtotal
    dwithin = tl.where(t < L, dwithin, 0.0)
    at_k = (scale * dwithin)[:, None] * decay
    dq = tl.dot(at_k.to(k.dtype), k, input_precision=PRECISION)
    dq += (carry * weight)[:, None] * dqueries[None, :] + (carry * dtotal)[:, None] * before[None, :]
    to = _rows(dq_ptr, dq_b, dq_h, dq_t, row, at * L, t, e, heads, L, W)
    tl.store(to, dq.to(dq_ptr.dtype.element_ty), mask=inside)
    tl.store(dwithin_ptr + block * L + t, dwithin, mask=t < L)
    tl.store(dlocal_ptr + block * L + t, tl.sum(at_k * products, 0), mask=t < L)
    tl.store(dlog_floor_ptr + block * L + t, dlog * (1.0 - of_total), mask=t < L)
    tl.store(dbefore_ptr + block * W + e, tl.sum(wide_q * (carry * dtotal)[:, None], 0), mask=e < W)


@triton.jit(do_not_specialize=["heads", "blocks"])
def _keys_backward(
    q_ptr, q_b, q_h, q_t, k_ptr, k_b, k_h, k_t, local_ptr, local_max_ptr, source_ptr, dwithin_ptr, dkeys_ptr,
    dk_ptr, dk_b, dk_h, dk_t, dsource_ptr, scale, heads, blocks,
    L: tl.constexpr, W: tl.constexpr, L2: tl.constexpr, W2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk in k's dtype, dsource (B·H, T) float32."""
    row, at = tl.program_id(0), tl.program_id(1)
    t, e = tl.arange(0, L2), tl.arange(0, W2)
    inside = (t < L)[:, None] & (e < W)[None, :]
    block = row.to(tl.int64) * blocks + at
    q = tl.load(_rows(q_ptr, q_b, q_h, q_t, row, at * L, t, e, heads, L, W), mask=inside, other=0.0)
    k = tl.load(_rows(k_ptr, k_b, k_h, k_t, row, at * L, t, e, heads, L, W), mask=inside, other=0.0)
    local = tl.load(local_ptr + block * L + t, mask=t < L, other=0.0)
    local_max = tl.load(local_max_ptr + block * L + t, mask=t < L, other=0.0)
    source = tl.load(source_ptr + block * L + t, mask=t < L, other=0.0)
    dwithin = tl.load(dwithin_ptr + block * L + t, mask=t < L, other=0.0)
    dkeys = tl.load(dkeys_ptr + block * W + e, mask=e < W, other=0.0)
    causal = (t[:, None] <= t[None, :]) & (t < L)[None, :]  # (s, t)
    decay = tl.where(causal, tl.exp(tl.where(causal, local[:, None] - local_max[None, :], 0.0)), 0.0)
    dk = tl.dot((decay * dwithin[None, :]).to(q.dtype), q, input_precision=PRECISION)
    dk = scale * (dk + source[:, None] * dkeys[None, :])
    to = _rows(dk_ptr, dk_b, dk_h, dk_t, row, at * L, t, e, heads, L, W)
    tl.store(to, dk.to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dsource_ptr + block * L + t, scale * tl.sum(k.to(tl.float32) * dkeys[None, :], 1), mask=t < L)


class _Pooled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BHTd: Tensor, k_BHTd: Tensor, igate_BHT: Tensor, fgate_BHT: Tensor, block: int) -> Tensor:
        gates = log_decay(igate_BHT, fgate_BHT, block)
        # Contiguous: the kernels take the gates as they take nothing else.
        parts = (gates.local_BHnL, gates.local_max_BHnL, gates.carry_BHnL, gates.log_floor_BHnL, gates.source_BHnL)
        local, local_max, carry, log_floor, source = (x.contiguous() for x in parts)
        heads, length, width = q_BHTd.shape[1:]
        shape = (*q_BHTd.shape[:2], length // block, width)
        grid, sizes = _grid(q_BHTd, block), _sizes(block, width)
        scalars = (width**-0.5, heads, length // block)
        keys_BHnd = torch.empty(shape, dtype=torch.float32, device=q_BHTd.device)
        queries_BHnd, diagonal_BHn = torch.empty_like(keys_BHnd), keys_BHnd.new_empty(shape[:-1])
        _key_sums[grid](k_BHTd, *k_BHTd.stride()[:3], source, keys_BHnd, *scalars, **sizes)
        before_BHnd = gates.decay_BHnn @ keys_BHnd
        _pool[grid](
            q_BHTd, *q_BHTd.stride()[:3], k_BHTd, *k_BHTd.stride()[:3], local, local_max, carry, log_floor, before_BHnd,
            queries_BHnd, diagonal_BHn, *scalars, **sizes, PRECISION="ieee",
        )  # fmt: skip
        small = (gates.decay_BHnn, keys_BHnd, queries_BHnd, before_BHnd)
        ctx.save_for_backward(q_BHTd, k_BHTd, igate_BHT, fgate_BHT, local, local_max, carry, log_floor, source, *small)
        ctx.block = block
        return gates.decay_BHnn * (queries_BHnd @ keys_BHnd.transpose(-1, -2)) + torch.diag_embed(diagonal_BHn)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dP_BHnn: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        q_BHTd, k_BHTd, igate_BHT, fgate_BHT, local, local_max, carry, log_floor, source, *small = ctx.saved_tensors
        decay_BHnn, keys_BHnd, queries_BHnd, before_BHnd = small
        block, (heads, length, width) = ctx.block, q_BHTd.shape[1:]
        grid, sizes = _grid(q_BHTd, block), _sizes(block, width)
        scalars = (width**-0.5, heads, length // block)
        products_BHnn = dP_BHnn * decay_BHnn
        dqueries_BHnd = products_BHnn @ keys_BHnd
        ddiagonal_BHn = dP_BHnn.diagonal(dim1=-2, dim2=-1).contiguous()
        dq_BHTd, dk_BHTd, dbefore_BHnd = (torch.empty_like(x) for x in (q_BHTd, k_BHTd, before_BHnd))
        dwithin, dlocal, dlog_floor, dsource = (torch.empty_like(local) for _ in range(4))
        inputs = q_BHTd, *q_BHTd.stride()[:3], k_BHTd, *k_BHTd.stride()[:3], local, local_max
        _pool_backward[grid](
            *inputs, carry, log_floor, before_BHnd, dqueries_BHnd, ddiagonal_BHn, dq_BHTd, *dq_BHTd.stride()[:3],
            dwithin, dlocal, dlog_floor, dbefore_BHnd, *scalars, **sizes, PRECISION="ieee",
        )  # fmt: skip
        dkeys_BHnd = products_BHnn.transpose(-1, -2) @ queries_BHnd + decay_BHnn.transpose(-1, -2) @ dbefore_BHnd
        _keys_backward[grid](
            *inputs, source, dwithin, dkeys_BHnd, dk_BHTd, *dk_BHTd.stride()[:3], dsource, *scalars, **sizes,
            PRECISION="ieee",
        )  # fmt: skip
        # With g_s = i_s − F_s: source and local are of g, the floor of F, F the running sum of log σ(f).
        dg_BHT = (dlocal + dsource * source).view(igate_BHT.shape)
        dF_BHT = -(dg_BHT + dlog_floor.view(igate_BHT.shape)).double()
        dlog_BHT = dF_BHT.flip(-1).cumsum(-1).flip(-1).float()
        df_BHT = dlog_BHT * torch.sigmoid(-fgate_BHT.float())
        return dq_BHTd, dk_BHTd, dg_BHT.to(igate_BHT.dtype), df_BHT.to(fgate_BHT.dtype), None


def _grid(q_BHTd: Tensor, block: int) -> tuple[int, int]:
    return q_BHTd.shape[0] * q_BHTd.shape[1], q_BHTd.shape[2] // block


def _sizes(block: int, width: int) -> dict[str, int]:
    b2, d2 = (max(16, triton.next_power_of_2(x)) for x in (block, width))
    # A thread's part of a few (b2, d2) float32 tensors has to stay in its registers.
    return {"L": block, "W": width, "L2": b2, "W2": d2, "num_warps": 8 if b2 * d2 > 64 * 128 else 4}


def pooled_by_kernels(q_BHTd: Tensor, k_BHTd: Tensor, igate_BHT: Tensor, fgate_BHT: Tensor, block: int) -> Tensor:
    """P (B, H, n, n) float32, as `implicit_attention.pooled_implicit_attention`, for inputs that `takes` takes."""
    q_BHTd, k_BHTd = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_BHTd, k_BHTd))
    pooled: Tensor = _Pooled.apply(q_BHTd, k_BHTd, igate_BHT, fgate_BHT, block)  # type: ignore[no-untyped-call]
    return pooled
