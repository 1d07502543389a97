"""Top-k and tails of the LM head's logits in plain torch, in a bounded number of passes over the vocabulary.

The tail is the sum over the ids outside the top k themselves, never the whole minus the top k: where the tail's mass is
1e-6 the difference of two float32 logsumexps is rounding noise.

Legend: N rows (positions), V ids, K top-k, R temperatures, C candidates.
"""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor

from teacher_dump.kernels.temperatures import shared_base

LARGEST_ID = 0x7FFFFFFF
_WORKING_BYTES = {"cpu": 2 << 20, "cuda": 512 << 20}
"""Size of the float32 working copy of the logits: on a CPU it stays in the second-level cache."""


def local_top_k(
    logits_NV: Tensor, k: int, taus: tuple[float, ...], soft_cap: float | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Top k of every row and the mass outside it.

    Args:
        logits_NV: the head's output, any float dtype.
        k: 1 to V.
        taus: positive temperatures.
        soft_cap, scale: z becomes soft_cap tanh(z / soft_cap) and is then multiplied by scale, rounded once.

    Returns:
        `ids_NK` int32, logit descending, id ascending among equals; `logits_NK` float32; `log_tail_NR` float32, the
        log of the sum of exp(z / tau) over the other ids, -inf where there are none.
    """
    rows, vocab = logits_NV.shape
    step = min(rows, max(1, _WORKING_BYTES.get(logits_NV.device.type, 64 << 20) // (4 * vocab)))
    # Allocated once: fresh pages for every slice would cost a CPU more than the arithmetic. One column more than the
    # vocabulary: with k = V, the largest logit outside the top k is its -inf.
    scratch_2NV = torch.empty((2, step, vocab + 1), dtype=torch.float32, device=logits_NV.device)
    parts = []
    for first in range(0, rows, step):
        raw_NV = logits_NV[first : first + step]
        scratch = scratch_2NV[:, : len(raw_NV)]
        scratch[0, :, :vocab] = shaped_logits(raw_NV, soft_cap, scale)
        scratch[0, :, vocab] = -torch.inf
        parts.append(_slice_of_rows(scratch, k, taus))
    ids, values, tails = (torch.cat(column) for column in zip(*parts, strict=True))
    return ids, values, tails


def shaped_logits(raw: Tensor, soft_cap: float | None, scale: float) -> Tensor:
    """The head's raw output after soft cap and scale, in float32 arithmetic, rounded once to the dtype it came in."""
    if soft_cap is None and scale == 1.0:
        return raw
    x = raw.float()
    if soft_cap is not None:
        x = soft_cap * torch.tanh(x / soft_cap)
    return (x * scale).to(raw.dtype)


def _slice_of_rows(scratch_2NV: Tensor, k: int, taus: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    z_NV = scratch_2NV[0]
    # One more than k: the largest logit of the tail is the shift its sums need.
    ids_NC, values_NC = select_top_k(z_NV, k + 1)
    ids_NK, values_NK, shift_N1 = ids_NC[:, :k], values_NC[:, :k], values_NC[:, k:].nan_to_num(neginf=0.0)
    z_NV.scatter_(1, ids_NK, -torch.inf)
    # Nothing outside the top k: any finite shift leaves exp(-inf) = 0.
    sums_NR = tail_sums(z_NV.sub_(shift_N1), taus, scratch_2NV[1])
    inverse_R = torch.tensor([1 / tau for tau in taus], device=z_NV.device)
    return ids_NK.to(torch.int32), values_NK, sums_NR.log() + shift_N1 * inverse_R


def select_top_k(logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, ties broken towards the smaller id, at the boundary too.

    Args:
        logits_NV: float32, contiguous rows; V may end in columns of -inf.
        k: 0 < k <= V.

    Returns:
        `ids_NK` int64 and `logits_NK` float32, logit descending, id ascending among equals.

    A column block's maximum bounds its members, so all of the top k lie in the blocks with the largest maxima: a few
    more than k blocks are searched, and a row where a block left out could still hold one of its top k (a tie) is
    searched whole.
    """
    rows, vocab = logits_NV.shape
    size = isqrt(vocab // k)  # the fewest block maxima and candidates together
    taken = k + k // 4 + 8
    if size < 4 or taken * size >= vocab - size:  # too few columns for blocks to spare any
        return _search_columns(logits_NV, k)
    blocks = vocab // size
    covered = blocks * size
    # Block j holds the columns j, j + blocks, j + 2 blocks, ...: the reduction then runs along contiguous memory.
    maxima_NB = logits_NV[:, :covered].view(rows, size, blocks).amax(1)
    best = maxima_NB.topk(taken + 1, dim=-1)
    offsets = torch.arange(size, device=logits_NV.device) * blocks
    rest = torch.arange(covered, vocab, device=logits_NV.device).expand(rows, -1)
    candidate_ids_NC = (best.indices[:, :taken, None] + offsets).flatten(1)
    candidate_ids_NC = torch.cat([candidate_ids_NC, rest], dim=1)
    ids_NK, values_NK = best_of(logits_NV.gather(1, candidate_ids_NC), candidate_ids_NC, k)
    doubtful_N = (best.values[:, taken] >= values_NK[:, -1]).nonzero().squeeze(1)
    if len(doubtful_N):
        ids_NK[doubtful_N], values_NK[doubtful_N] = _search_columns(logits_NV[doubtful_N], k)
    return ids_NK, values_NK


def _search_columns(logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return best_of(logits_NV, torch.arange(logits_NV.shape[1], device=logits_NV.device).expand_as(logits_NV), k)


def best_of(values_NC: Tensor, ids_NC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best (value descending, id ascending) as ids and values; each id occurs once a row."""
    bits = (values_NC + 0.0).view(torch.int32)  # + 0.0: -0.0 equals 0.0
    ordered = (bits ^ ((bits >> 31) & LARGEST_ID)).to(torch.int64)  # as signed integers in the order of the floats
    keys_NK = ((ordered << 32) | (LARGEST_ID - ids_NC)).topk(k, dim=-1).values
    ids_NK = LARGEST_ID - (keys_NK & LARGEST_ID)
    ordered_NK = (keys_NK >> 32).to(torch.int32)
    values_NK = (ordered_NK ^ ((ordered_NK >> 31) & LARGEST_ID)).view(torch.float32)
    return ids_NK, values_NK


def tail_sums(shifted_NV: Tensor, taus: tuple[float, ...], scratch_NV: Tensor) -> Tensor:
    """Sum over V of exp(x / tau) for every tau: (N, R) float32.

    Args:
        shifted_NV: float32 logits minus the row's largest tail logit; -inf where an id does not count. Overwritten.
        taus: temperatures, positive.
        scratch_NV: float32 working memory of the same shape. Overwritten.
    """
    shared = shared_base(taus)
    if shared is None:
        return torch.stack([torch.mul(shifted_NV, 1 / tau, out=scratch_NV).exp_().sum(-1) for tau in taus], dim=-1)
    q, wanted = shared
    # exp(x / q) to the powers p, one product at a time: no memory beyond the two buffers.
    first_NV = shifted_NV.mul_(1.0 / q).exp_()
    sums, current, at = {}, first_NV, 1
    for p in sorted(set(wanted)):
        while at < p:
            current = torch.mul(current, first_NV, out=scratch_NV)
            at += 1
        sums[p] = current.sum(-1)
    return torch.stack([sums[p] for p in wanted], dim=-1)
