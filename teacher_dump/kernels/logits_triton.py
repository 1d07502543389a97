"""Logits inside Triton programs: out of the head's raw output, as integers in their order, and as sums of exponentials.

Legend: R temperatures, S tile rows, G blocks side by side in a tile, E columns of a block's row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def logit_of(z, soft_cap, scale, ROUND: tl.constexpr, CAPPED: tl.constexpr, SCALED: tl.constexpr):
    """The head's raw output as float32 logit: soft cap, then scale, rounded to the head's dtype; -0.0 becomes 0.0."""
    x = z.to(tl.float32)
    if CAPPED:
        x = soft_cap * (2.0 * tl.sigmoid(2.0 * x / soft_cap) - 1.0)
    if SCALED:
        x = x * scale
    if CAPPED or SCALED:
        x = x.to(ROUND).to(tl.float32)
    return x + 0.0


@triton.jit
def ordered_bits(x):
    """Unsigned integers in the order of the floats; NaN comes last."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF) ^ (-2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def key_of(x, ids):
    """int64 that orders by logit, then by smaller id."""
    bits = x.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)


@triton.jit
def logit_of_key(key):
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def id_of_key(key):
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def exp_sums(x_SGE, coefficients, R: tl.constexpr, R2: tl.constexpr, POWERS: tl.constexpr, TOP: tl.constexpr):
    """Sum of exp(x / tau) over axes 0 and 2 for every tau: (R2, G); R2 is R rounded up to a power of two.

    POWERS has bit p set where some 1 / tau is p / q: then one exponential and products of its powers do.
    """
    slots = tl.arange(0, R2)[:, None]
    sums = tl.zeros([R2, x_SGE.shape[1]], tl.float32)
    if POWERS:
        base = tl.exp2(x_SGE * tl.load(coefficients + R))
        power = base
        slot = 0
        for p in tl.static_range(1, TOP + 1):
            if (POWERS >> p) & 1:
                sums += tl.where(slots == slot, tl.sum(tl.sum(power, 2), 0)[None, :], 0.0)
                slot += 1
            if p < TOP:
                power *= base
    else:
        for slot in tl.static_range(R):
            part = tl.exp2(x_SGE * tl.load(coefficients + slot))
            sums += tl.where(slots == slot, tl.sum(tl.sum(part, 2), 0)[None, :], 0.0)
    return sums


@triton.jit(do_not_specialize=["size"])
def _shape(z_ptr, x_ptr, size, soft_cap, scale, CAPPED: tl.constexpr, SCALED: tl.constexpr, C: tl.constexpr):
    at = tl.program_id(0) * C + tl.arange(0, C)
    z = tl.load(z_ptr + at, mask=at < size, other=0.0)
    tl.store(x_ptr + at, logit_of(z, soft_cap, scale, z_ptr.dtype.element_ty, CAPPED, SCALED), mask=at < size)


def shaped_logits(raw: Tensor, soft_cap: float | None, scale: float) -> Tensor:
    """Contiguous raw outputs of the head as the float32 logits that `local_top_k` sees."""
    shaped = torch.empty(raw.shape, dtype=torch.float32, device=raw.device)
    grid = (-(-raw.numel() // 1024),)
    _shape[grid](raw, shaped, raw.numel(), soft_cap or 1.0, scale, soft_cap is not None, scale != 1.0, 1024)
    return shaped
