"""Top-k and tails of the LM head's logits on a GPU, in little more than one pass over them.

1. `_sum_blocks` reads every logit once. Columns are dealt into blocks of some 128; of each block its maximum and, at
   every temperature, its sum of exponentials relative to that maximum are kept.
2. `_select` takes one row a program. The K-th largest block maximum bounds the K-th logit from below, so only the
   blocks that reach it (K of them, and ties) are read again: what reaches the bound are the candidates, ranked by
   counting; everything else in those blocks is summed afresh. The tail is the sum over the other blocks, over the rest
   of those read again and over the candidates not chosen: never a difference, so a small tail keeps its digits.
3. `_search` finds the K-th largest logit of a row bit by bit. It does the rows that `_select` has marked (too many
   candidates, a tail too small for the shift), and all rows of a vocabulary too small for blocks. The host never waits
   to learn whether there are any.

Legend: N rows (positions), V ids, K top-k, R temperatures, B blocks of columns, G blocks side by side in a tile,
S tile rows, C candidates.

N differs from step to step: no kernel is compiled for its divisors.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from teacher_dump.kernels.logits_triton import exp_sums, id_of_key, key_of, logit_of, logit_of_key, ordered_bits
from teacher_dump.kernels.temperatures import shared_base

_GROUPS = 128
"""G: a tile's row is 8 G contiguous columns, 8 of each block; its rows are dealt over the whole vocabulary, for likely
ids are neighbours: tokenisers number them by how often they come."""
_LOG2_E = math.log2(math.e)
_UNUSED_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}
"""Low bits of a float32 that a logit of the dtype never sets: the search for the K-th largest skips them."""


@triton.jit(do_not_specialize=["rows"])
def _sum_blocks(
    z_ptr, stride_n, vocab, maxima_ptr, sums_ptr, blocks, rows, coefficients, soft_cap, scale,
    CAPPED: tl.constexpr, SCALED: tl.constexpr, G: tl.constexpr, S: tl.constexpr, STEPS: tl.constexpr,
    R: tl.constexpr, R2: tl.constexpr, POWERS: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """Maximum and sums of every block of one tile: block b holds columns 8 b to 8 b + 7 of each stretch of 8 B."""
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    s = tl.arange(0, S)[:, None, None]
    g = tl.arange(0, G)
    e = tl.arange(0, 8)[None, None, :]
    slots = tl.arange(0, R2)
    c_R = tl.load(coefficients + slots, mask=slots < R, other=0.0)
    maximum_G = tl.full([G], float("-inf"), tl.float32)
    sums_RG = tl.zeros([R2, G], tl.float32)
    first = tile * (G * 8)
    for _ in range(STEPS):
        column = first + s * (blocks * 8) + g[None, :, None] * 8 + e
        inside = column < vocab
        z = tl.load(z_ptr + row * stride_n + column, mask=inside, other=float("-inf"))
        x = tl.where(inside, logit_of(z, soft_cap, scale, z_ptr.dtype.element_ty, CAPPED, SCALED), float("-inf"))
        new_G = tl.maximum(maximum_G, tl.max(tl.max(x, 2), 0))
        shift_G = tl.where(new_G == float("-inf"), 0.0, new_G)
        fade_RG = tl.exp2((maximum_G - shift_G)[None, :] * c_R[:, None])
        sums_RG = sums_RG * fade_RG + exp_sums(x - shift_G[None, :, None], coefficients, R, R2, POWERS, TOP)
        maximum_G = new_G
        first += S * blocks * 8
    block = tile * G + g
    tl.store(maxima_ptr + row * blocks + block, maximum_G)
    at = (slots[:, None].to(tl.int64) * rows + row) * blocks + block[None, :]
    tl.store(sums_ptr + at, sums_RG, mask=slots[:, None] < R)


@triton.jit
def _kth_largest(key, k, SKIP: tl.constexpr):
    """The k-th largest of uint32 keys, its low SKIP bits zero: the largest bound that at least k of them reach."""
    bound = tl.full([], 0, tl.uint32)
    bit = tl.full([], 0x80000000, tl.uint32)
    for _ in range(32 - SKIP):
        trial = bound | bit
        bit = bit >> 1
        bound = tl.where(tl.sum((key >= trial).to(tl.int32)) >= k, trial, bound)
    return bound


@triton.jit
def _store_ranked(keys_ptr, count, ids_ptr, values_ptr, K, PART: tl.constexpr, OTHERS: tl.constexpr):
    """Rank `count` different keys by counting, PART of them against OTHERS at a time; store the K largest in order and
    return the smallest of those."""
    lowest = tl.full([], 9223372036854775807, tl.int64)
    for first in range(0, count, PART):
        i = first + tl.arange(0, PART)
        key = tl.load(keys_ptr + i, mask=i < count, other=-9223372036854775808)
        rank = tl.zeros([PART], tl.int32)
        for second in range(0, count, OTHERS):
            j = second + tl.arange(0, OTHERS)
            other = tl.load(keys_ptr + j, mask=j < count, other=-9223372036854775808)
            rank += tl.sum((other[None, :] > key[:, None]).to(tl.int32), 1)
        chosen = (i < count) & (rank < K)
        tl.store(ids_ptr + rank, id_of_key(key), mask=chosen)
        tl.store(values_ptr + rank, logit_of_key(key), mask=chosen)
        lowest = tl.minimum(lowest, tl.min(tl.where(chosen, key, 9223372036854775807)))
    return lowest


@triton.jit(do_not_specialize=["rows"])
def _select(
    z_ptr, stride_n, vocab, maxima_ptr, sums_ptr, blocks, rows, coefficients, soft_cap, scale, k,
    hits_ptr, keys_ptr, ids_ptr, values_ptr, tail_ptr, marked_ptr,
    CAPPED: tl.constexpr, SCALED: tl.constexpr, G: tl.constexpr, S: tl.constexpr, B2: tl.constexpr,
    HITS: tl.constexpr, H: tl.constexpr, C: tl.constexpr, PART: tl.constexpr, OTHERS: tl.constexpr, SKIP: tl.constexpr,
    R: tl.constexpr, R2: tl.constexpr, POWERS: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """The K best of one row, and its tails."""
    row = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, R2)
    c_R = tl.load(coefficients + slots, mask=slots < R, other=0.0)
    hits_ptr += row * HITS
    keys_ptr += row * C

    b = tl.arange(0, B2)
    maxima = tl.load(maxima_ptr + row * blocks + b, mask=b < blocks, other=float("-inf"))
    ordered = tl.where(b < blocks, ordered_bits(maxima), 0)
    bound = _kth_largest(ordered, k, SKIP)
    hit = (ordered >= bound) & (b < blocks)
    hits = tl.sum(hit.to(tl.int32))
    place = tl.cumsum(hit.to(tl.int32), 0) - 1
    tl.store(hits_ptr + place, b, mask=hit & (place < HITS))
    lowest = tl.min(tl.where(hit, maxima, float("inf")))  # the bound as a float

    missed = (b < blocks) & (ordered < bound)
    missed_max = tl.max(tl.where(missed, maxima, float("-inf")))
    missed_max = tl.where(missed_max == float("-inf"), lowest, missed_max)
    total_R = tl.zeros([R2], tl.float32)
    for slot in tl.static_range(R):
        part = tl.load(sums_ptr + (slot * rows + row) * blocks + b, mask=missed, other=0.0)
        fade = tl.exp2((maxima - missed_max) * tl.load(coefficients + slot))
        total_R += tl.where(slots == slot, tl.sum(tl.where(missed, part * fade, 0.0)), 0.0)
    tl.debug_barrier()  # the hits are read by other threads than wrote them

    s = tl.arange(0, S)[:, None, None]
    e = tl.arange(0, 8)[None, None, :]
    count = 0
    below_RH = tl.zeros([R2, H], tl.float32)
    listed = tl.minimum(hits, HITS)
    h = tl.arange(0, H)
    block = tl.load(hits_ptr + h, mask=h < listed, other=0)
    next_column = (block * 8)[None, :, None] + s * (blocks * 8) + e
    next_inside = (next_column < vocab) & (h < listed)[None, :, None]
    next_z = tl.load(z_ptr + row * stride_n + next_column, mask=next_inside, other=float("-inf"))
    for first in range(0, listed, H):
        z, column, inside = next_z, next_column, next_inside
        h = first + H + tl.arange(0, H)  # the next blocks are under way while these are looked at
        block = tl.load(hits_ptr + h, mask=h < listed, other=0)
        next_column = (block * 8)[None, :, None] + s * (blocks * 8) + e
        next_inside = (next_column < vocab) & (h < listed)[None, :, None]
        next_z = tl.load(z_ptr + row * stride_n + next_column, mask=next_inside, other=float("-inf"))
        x = logit_of(z, soft_cap, scale, z_ptr.dtype.element_ty, CAPPED, SCALED)
        candidate = inside & (x >= lowest)
        ones = tl.reshape(candidate.to(tl.int32), [S * H * 8])
        at = tl.reshape(count + tl.cumsum(ones, 0) - 1, [S, H, 8])
        tl.store(keys_ptr + at, key_of(x, column), mask=candidate & (at < C))
        count += tl.sum(ones)
        below = tl.where(inside & (candidate == 0), x - lowest, float("-inf"))
        below_RH += exp_sums(below, coefficients, R, R2, POWERS, TOP)
    tl.debug_barrier()

    kept = tl.minimum(count, C)
    last_key = _store_ranked(keys_ptr, kept, ids_ptr + row * k, values_ptr + row * k, k, PART, OTHERS)
    last = logit_of_key(last_key)  # the K-th logit: no tail logit is above it
    over_R = tl.zeros([R2], tl.float32)
    for first in range(0, kept, PART):
        i = first + tl.arange(0, PART)
        key = tl.load(keys_ptr + i, mask=i < kept, other=9223372036854775807)
        over = tl.reshape(tl.where(key < last_key, logit_of_key(key) - last, float("-inf")), [1, PART // 8, 8])
        over_R += tl.sum(exp_sums(over, coefficients, R, R2, POWERS, TOP), 1)
    total_R = total_R * tl.exp2((missed_max - last) * c_R)
    total_R += tl.sum(below_RH, 1) * tl.exp2((lowest - last) * c_R) + over_R
    tl.store(tail_ptr + row * R + slots, last * c_R / 1.4426950408889634 + tl.log(total_R), mask=slots < R)

    # Not comparable: true for NaN too.
    small = tl.sum(tl.where((slots < R) & ((total_R > 1e-30) == 0), 1, 0)) > 0
    marked = (hits > HITS) | (count > C) | (count < k) | small | ((last > -1e38) == 0)
    tl.store(marked_ptr + row, marked.to(tl.int32))


@triton.jit
def _search(
    z_ptr, stride_n, vocab, coefficients, soft_cap, scale, k,
    keys_ptr, ids_ptr, values_ptr, tail_ptr, marked_ptr,
    CAPPED: tl.constexpr, SCALED: tl.constexpr, ALL: tl.constexpr, COLUMNS: tl.constexpr, C: tl.constexpr,
    PART: tl.constexpr, OTHERS: tl.constexpr, SKIP: tl.constexpr,
    R: tl.constexpr, R2: tl.constexpr, POWERS: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """The same for one row without any bound on ties or tails: a pass for every bit of the K-th logit, and two."""
    row = tl.program_id(0).to(tl.int64)
    wanted = 1
    if not ALL:
        wanted = tl.load(marked_ptr + row)
    if wanted != 0:
        z_ptr += row * stride_n
        keys_ptr += row * C
        c = tl.arange(0, COLUMNS)
        bound = tl.full([], 0, tl.uint32)
        bit = tl.full([], 0x80000000, tl.uint32)
        for _ in range(32 - SKIP):
            trial = bound | bit
            bit = bit >> 1
            reach = tl.zeros([COLUMNS], tl.int32)
            for first in range(0, vocab, COLUMNS):
                inside = first + c < vocab
                z = tl.load(z_ptr + first + c, mask=inside, other=0.0)
                key = ordered_bits(logit_of(z, soft_cap, scale, z_ptr.dtype.element_ty, CAPPED, SCALED))
                reach += (inside & (key >= trial)).to(tl.int32)
            bound = tl.where(tl.sum(reach) >= k, trial, bound)
        above = tl.zeros([COLUMNS], tl.int32)
        top = tl.full([], 1, tl.uint32) << SKIP  # keys in [bound, bound + top) are the K-th logit
        for first in range(0, vocab, COLUMNS):
            inside = first + c < vocab
            z = tl.load(z_ptr + first + c, mask=inside, other=0.0)
            key = ordered_bits(logit_of(z, soft_cap, scale, z_ptr.dtype.element_ty, CAPPED, SCALED))
            above += (inside & (key >= bound) & (key - bound >= top)).to(tl.int32)
        ties = k - tl.sum(above)  # as many of the equals, the smallest ids first
        seen, kept = 0, 0
        tail_max = tl.full([], float("-inf"), tl.float32)
        for first in range(0, vocab, COLUMNS):
            inside = first + c < vocab
            z = tl.load(z_ptr + first + c, mask=inside, other=0.0)
            x = logit_of(z, soft_cap, scale, z_ptr.dtype.element_ty, CAPPED, SCALED)
            key = ordered_bits(x)
            equal = inside & (key >= bound) & (key - bound < top)
            order = seen + tl.cumsum(equal.to(tl.int32), 0)
            seen += tl.sum(equal.to(tl.int32))
            chosen = inside & (key >= bound) & ((equal == 0) | (order <= ties))
            at = kept + tl.cumsum(chosen.to(tl.int32), 0) - 1
            kept += tl.sum(chosen.to(tl.int32))
            tl.store(keys_ptr + at, key_of(x, first + c), mask=chosen & (at < C))
            tail_max = tl.maximum(tail_max, tl.max(tl.where(inside & (chosen == 0), x, float("-inf"))))
        shift = tl.where(tail_max == float("-inf"), 0.0, tail_max)
        seen = 0
        total_RG = tl.zeros([R2, COLUMNS // 8], tl.float32)
        for first in range(0, vocab, COLUMNS):
            inside = first + c < vocab
            z = tl.load(z_ptr + first + c, mask=inside, other=0.0)
            x = logit_of(z, soft_cap, scale, z_ptr.dtype.element_ty, CAPPED, SCALED)
            key = ordered_bits(x)
            equal = inside & (key >= bound) & (key - bound < top)
            order = seen + tl.cumsum(equal.to(tl.int32), 0)
            seen += tl.sum(equal.to(tl.int32))
            rest = inside & ((key < bound) | (equal & (order > ties)))
            x = tl.reshape(tl.where(rest, x - shift, float("-inf")), [1, COLUMNS // 8, 8])
            total_RG += exp_sums(x, coefficients, R, R2, POWERS, TOP)
        slots = tl.arange(0, R2)
        c_R = tl.load(coefficients + slots, mask=slots < R, other=0.0)
        tail_R = shift * c_R / 1.4426950408889634 + tl.log(tl.sum(total_RG, 1))
        tl.store(tail_ptr + row * R + slots, tail_R, mask=slots < R)
        tl.debug_barrier()
        _store_ranked(keys_ptr, k, ids_ptr + row * k, values_ptr + row * k, k, PART, OTHERS)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 1 else 1


def tile_steps(vocab: int, k: int) -> int:
    """Rows of a tile: the most that leave 4 k blocks, 0 where the vocabulary is too small for blocks."""
    for rows in (16, 8, 4, 2, 1):
        blocks = -(-vocab // (rows * _GROUPS * 8)) * _GROUPS
        if min(blocks, -(-vocab // 8)) >= 4 * k:
            return rows
    return 0


def local_top_k(
    logits_NV: Tensor, k: int, taus: tuple[float, ...], soft_cap: float | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Top k of every row and the log of the sum of exp(z / tau) outside it; see `head_topk_reference.local_top_k`.

    Args:
        logits_NV: the head's raw output, bfloat16, float16 or float32, rows contiguous.
        k: 1 to min(V, 2048).
        taus: positive temperatures.
        soft_cap, scale: z becomes soft_cap tanh(z / soft_cap) and is then multiplied by scale, rounded once.
    """
    rows, vocab = logits_NV.shape
    assert logits_NV.stride(1) == 1
    device = logits_NV.device
    order = sorted(range(len(taus)), key=lambda r: -taus[r])
    shared = shared_base(tuple(taus[r] for r in order))
    coefficients = [_LOG2_E / taus[r] for r in order] + [_LOG2_E / shared[0] if shared else 0.0]
    common: dict[str, Any] = {
        "CAPPED": soft_cap is not None,
        "SCALED": scale != 1.0,
        "R": len(taus),
        "R2": _power_of_two(len(taus)),
        "POWERS": sum(1 << p for p in shared[1]) if shared else 0,
        "TOP": max(shared[1]) if shared else 0,
    }
    c = _constants(tuple(coefficients), device)
    cap = soft_cap or 1.0
    ids_NK = torch.empty((rows, k), dtype=torch.int32, device=device)
    values_NK = torch.empty((rows, k), dtype=torch.float32, device=device)
    tail_NR = torch.empty((rows, len(taus)), dtype=torch.float32, device=device)
    marked_N = torch.empty(rows, dtype=torch.int32, device=device)
    candidates = max(128, _power_of_two(8 * k))
    keys_NC = torch.empty((rows, candidates), dtype=torch.int64, device=device)
    skip = _UNUSED_BITS[logits_NV.dtype]
    head = (logits_NV, logits_NV.stride(0), vocab)
    tile_rows = tile_steps(vocab, k)
    if tile_rows:
        tiles = -(-vocab // (tile_rows * _GROUPS * 8))
        blocks = tiles * _GROUPS
        maxima_NB = torch.empty((rows, blocks), dtype=torch.float32, device=device)
        sums_RNB = torch.empty((len(taus), rows, blocks), dtype=torch.float32, device=device)
        at_once = min(4, tile_rows)
        _sum_blocks[(tiles, rows)](
            *head, maxima_NB, sums_RNB, blocks, rows, c, cap, scale,
            G=_GROUPS, S=at_once, STEPS=tile_rows // at_once, num_warps=4, **common,
        )  # fmt: skip
        hits = _power_of_two(4 * k)
        hits_NH = torch.empty((rows, hits), dtype=torch.int32, device=device)
        _select[(rows,)](
            *head, maxima_NB, sums_RNB, blocks, rows, c, cap, scale, k,
            hits_NH, keys_NC, ids_NK, values_NK, tail_NR, marked_N,
            G=_GROUPS, S=tile_rows, B2=_power_of_two(blocks), HITS=hits, H=8, C=candidates, PART=128, OTHERS=16,
            SKIP=skip, num_warps=4, **common,
        )  # fmt: skip
    _search[(rows,)](
        *head, c, cap, scale, k, keys_NC, ids_NK, values_NK, tail_NR, marked_N,
        ALL=not tile_rows, COLUMNS=2048, C=candidates, PART=256, OTHERS=16, SKIP=skip, num_warps=8, **common,
    )  # fmt: skip
    # Column by column: an index tensor would have to be copied to the device, and the host would wait for that.
    columns = [tail_NR[:, order.index(r)] for r in range(len(taus))]
    return ids_NK, values_NK, torch.stack(columns, dim=1)


_CONSTANTS: dict[tuple[tuple[float, ...], torch.device], Tensor] = {}


def _constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A small tensor on the device, copied there once: a copy at every call would make the host wait."""
    key = (values, device)
    if key not in _CONSTANTS:
        _CONSTANTS[key] = torch.tensor(values, dtype=torch.float32, device=device)
    return _CONSTANTS[key]
