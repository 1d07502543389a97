"""Top-k, logsumexp and tails of the LM head's logits, in a bounded number of passes over the vocabulary.

The tail is the sum over the ids outside the top k themselves, never the whole minus the top k: where the tail's mass is
1e-6 the difference of two float32 logsumexps is rounding noise.

Temperatures whose inverses share a denominator q (1, 1.2, 1.5, 2 are 6/6, 5/6, 4/6, 3/6) need one exponential and
products of its powers; others fall back to one exponential each.

Legend: N rows (positions), V ids of this vocabulary shard, K top-k, R temperatures, S shards, M tail samples,
C candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import lru_cache
from math import isqrt, lcm
from typing import Any

import torch
from torch import Tensor

from teacher_dump.kernels.tail_sample import draw_uniforms, tail_sample

_LOW = 0x7FFFFFFF
_WORKING_BYTES = {"cpu": 2 << 20, "cuda": 512 << 20}
"""Size of the float32 working copy of the logits: on a CPU it stays in the second-level cache."""


@dataclass(frozen=True)
class VocabShard:
    """The part of the vocabulary that this rank's logits cover (vocabulary-parallel heads).

    Attributes:
        start: global id of the shard's first column.
        gather: stacks a tensor of every rank along a new first dimension: (...) -> (S, ...), ranks in order.
    """

    start: int
    gather: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class HeadRows:
    """What is kept of N positions; all on the device of the logits."""

    ids_NK: Tensor  # int32, logit descending, id ascending among equals
    logits_NK: Tensor  # float32
    target_logit_N: Tensor  # float32, NaN where the target is negative
    lse_N: Tensor  # float32
    log_tail_NR: Tensor  # float32, log of the sum of exp(z / tau) outside the top k; -inf where nothing is outside
    tail_ids_NM: Tensor | None = None  # int32
    tail_logits_NM: Tensor | None = None  # float32

    @staticmethod
    def joined(parts: list[HeadRows]) -> HeadRows:
        """The rows of all parts, in order."""
        joined: dict[str, Any] = {}
        for field in fields(HeadRows):
            column = [getattr(part, field.name) for part in parts]
            joined[field.name] = None if column[0] is None else torch.cat(column)
        return HeadRows(**joined)


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
    ids_NK, values_NK = _best_of(logits_NV.gather(1, candidate_ids_NC), candidate_ids_NC, k)
    doubtful_N = (best.values[:, taken] >= values_NK[:, -1]).nonzero().squeeze(1)
    if len(doubtful_N):
        ids_NK[doubtful_N], values_NK[doubtful_N] = _search_columns(logits_NV[doubtful_N], k)
    return ids_NK, values_NK


def _search_columns(logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return _best_of(logits_NV, torch.arange(logits_NV.shape[1], device=logits_NV.device).expand_as(logits_NV), k)


def _best_of(values_NC: Tensor, ids_NC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best (value descending, id ascending) as ids and values; each id occurs once a row."""
    bits = (values_NC + 0.0).view(torch.int32)  # + 0.0: -0.0 equals 0.0
    ordered = (bits ^ ((bits >> 31) & _LOW)).to(torch.int64)  # as signed integers in the order of the floats
    keys_NK = ((ordered << 32) | (_LOW - ids_NC)).topk(k, dim=-1).values
    ids_NK = _LOW - (keys_NK & _LOW)
    ordered_NK = (keys_NK >> 32).to(torch.int32)
    values_NK = (ordered_NK ^ ((ordered_NK >> 31) & _LOW)).view(torch.float32)
    return ids_NK, values_NK


@lru_cache
def _shared_base(taus: tuple[float, ...]) -> tuple[int, tuple[int, ...]] | None:
    """q and p_r with 1 / tau_r = p_r / q in small integers, None where there are none."""
    inverses = [1 / Fraction(tau).limit_denominator(1000) for tau in taus]
    q = lcm(*(x.denominator for x in inverses))
    powers = tuple(int(x * q) for x in inverses)
    exact = all(abs(p / q * tau - 1) < 1e-9 for p, tau in zip(powers, taus, strict=True))
    return (q, powers) if exact and max(powers) <= 12 and min(powers) >= 1 else None


def tail_sums(shifted_NV: Tensor, taus: tuple[float, ...], scratch_NV: Tensor) -> Tensor:
    """Sum over V of exp(x / tau) for every tau: (N, R) float32.

    Args:
        shifted_NV: float32 logits minus the row's largest tail logit; -inf where an id does not count. Overwritten.
        taus: temperatures, positive.
        scratch_NV: float32 working memory of the same shape. Overwritten.
    """
    shared = _shared_base(taus)
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


def head_topk(
    logits_NV: Tensor,
    targets_N: Tensor,
    k: int,
    taus: tuple[float, ...],
    *,
    shard: VocabShard | None = None,
    tail_samples: int = 0,
    seed: int = 0,
    sequence_ids_N: Tensor | None = None,
    positions_N: Tensor | None = None,
) -> HeadRows:
    """Everything a cache keeps of the head at N positions.

    Args:
        logits_NV: the head's logits after soft cap and scale, in the dtype the head emits; trimmed to real ids.
        targets_N: int64 global id of the token that came next, negative where there is none.
        k: ids kept, at most the whole vocabulary's size.
        taus: temperatures of the tails, positive.
        shard: under tensor parallelism, which ids the columns are; every rank returns the same rows.
        tail_samples: M ids drawn with replacement from the tail at tau 1, see `tail_sample`; the three arguments
            after it are needed only then: the seed and int64 (N,) identities of every position.

    Raises:
        ValueError: k is not in 1..V, or a temperature is not positive.
    """
    if k < 1 or (shard is None and k > logits_NV.shape[1]):
        raise ValueError(f"k={k} of {logits_NV.shape[1]} ids")
    if any(tau <= 0 for tau in taus):
        raise ValueError(f"temperatures must be positive: {taus}")
    uniforms_NM = None
    if tail_samples:
        assert sequence_ids_N is not None and positions_N is not None
        uniforms_NM = draw_uniforms(seed, sequence_ids_N, positions_N, tail_samples)
    rows, vocab = logits_NV.shape
    step = min(rows, max(1, _WORKING_BYTES.get(logits_NV.device.type, 64 << 20) // (4 * vocab)))
    # Allocated once: fresh pages for every slice would cost a CPU more than the arithmetic.
    # One column more than the vocabulary: a place for the top ids that belong to another shard.
    scratch_2NV = torch.empty((2, step, vocab + 1), dtype=torch.float32, device=logits_NV.device)
    parts = []
    for first in range(0, rows, step):
        at = slice(first, min(first + step, rows))
        drawn = None if uniforms_NM is None else uniforms_NM[at]
        scratch = scratch_2NV[:, : at.stop - first]
        parts.append(_slice_of_rows(logits_NV[at], targets_N[at], k, taus, shard, drawn, scratch))
    return HeadRows.joined(parts)


def _slice_of_rows(
    logits_NV: Tensor,
    targets_N: Tensor,
    k: int,
    taus: tuple[float, ...],
    shard: VocabShard | None,
    uniforms_NM: Tensor | None,
    scratch_2NV: Tensor,
) -> HeadRows:
    vocab = logits_NV.shape[1]
    start = shard.start if shard else 0
    z_NV = scratch_2NV[0]
    z_NV[:, :vocab] = logits_NV
    z_NV[:, vocab] = -torch.inf

    has_own_N = (targets_N >= start) & (targets_N < start + vocab)
    own_N = torch.where(has_own_N, targets_N - start, vocab)
    target_N = z_NV.gather(1, own_N[:, None]).squeeze(1)
    if shard:
        target_N = shard.gather(target_N).amax(0)
    target_N = target_N.masked_fill(targets_N < 0, torch.nan)

    # One more than k: the largest logit of the tail is the shift its sums need.
    ids_NC, values_NC = select_top_k(z_NV, min(k + 1, vocab + 1))
    if shard:
        ids_NC = ids_NC + start
        ids_NC[values_NC == -torch.inf] = _LOW - 1  # nothing of this shard: last in any order
        everyone_ids = shard.gather(_padded(ids_NC, k + 1, _LOW - 1)).movedim(0, 1).flatten(1)
        everyone_values = shard.gather(_padded(values_NC, k + 1, -torch.inf)).movedim(0, 1).flatten(1)
        ids_NC, values_NC = _best_of(everyone_values, everyone_ids, k + 1)
    ids_NK, values_NK, shift_N1 = ids_NC[:, :k], values_NC[:, :k], values_NC[:, k:]

    local_NK = ids_NK - start
    inside = (local_NK >= 0) & (local_NK < vocab)
    z_NV.scatter_(1, torch.where(inside, local_NK, vocab), -torch.inf)
    # Nothing outside the top k: any finite shift leaves exp(-inf) = 0.
    z_NV.sub_(shift_N1.nan_to_num(neginf=0.0))

    tail_ids_NM = tail_logits_NM = None
    if uniforms_NM is not None:
        tail_ids_NM, tail_logits_NM = tail_sample(z_NV, uniforms_NM, start, shard.gather if shard else None)
        tail_ids_NM, tail_logits_NM = tail_ids_NM.to(torch.int32), tail_logits_NM + shift_N1

    asked = taus if 1.0 in taus else (*taus, 1.0)
    sums_NR = tail_sums(z_NV, asked, scratch_2NV[1])
    if shard:
        sums_NR = shard.gather(sums_NR).sum(0)
    inverse_R = torch.tensor([1 / tau for tau in asked], device=z_NV.device)
    log_tail_NR = sums_NR.log() + shift_N1.nan_to_num(neginf=0.0) * inverse_R
    lse_N = torch.logaddexp(values_NK.logsumexp(-1), log_tail_NR[:, asked.index(1.0)])
    log_tail_NR = log_tail_NR[:, : len(taus)]
    return HeadRows(ids_NK.to(torch.int32), values_NK, target_N, lse_N, log_tail_NR, tail_ids_NM, tail_logits_NM)


def _padded(x_NC: Tensor, width: int, fill: float) -> Tensor:
    return torch.nn.functional.pad(x_NC, (0, width - x_NC.shape[1]), value=fill)
