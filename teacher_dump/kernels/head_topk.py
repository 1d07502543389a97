"""Everything a cache keeps of the LM head: top-k, logsumexp, tails, the next token's logit, draws from the tail.

The search is `head_topk_triton` on a GPU and `head_topk_reference` elsewhere. Under tensor parallelism each rank
searches its own columns; what the ranks then exchange is K ids and logits and one tail each, O(K) numbers a position.

Legend: N rows (positions), V ids of this vocabulary shard, K top-k, R temperatures, S shards, M tail samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from teacher_dump.kernels import head_topk_reference
from teacher_dump.kernels.head_topk_reference import LARGEST_ID, best_of, shaped_logits
from teacher_dump.kernels.tail_sample import draw_uniforms, tail_sample

_TRITON_K = 1024
"""The largest K the GPU's search ranks in registers."""
_DRAW_ROWS = 128
"""Rows whose float32 and float64 copies exist at once; the same on every rank, since each slice is a meeting."""


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
        if len(parts) == 1:
            return parts[0]
        joined: dict[str, Any] = {}
        for field in fields(HeadRows):
            column = [getattr(part, field.name) for part in parts]
            joined[field.name] = None if column[0] is None else torch.cat(column)
        return HeadRows(**joined)


def head_topk(
    logits_NV: Tensor,
    targets_N: Tensor,
    k: int,
    taus: tuple[float, ...],
    *,
    soft_cap: float | None = None,
    scale: float = 1.0,
    shard: VocabShard | None = None,
    tail_samples: int = 0,
    seed: int = 0,
    sequence_ids_N: Tensor | None = None,
    positions_N: Tensor | None = None,
) -> HeadRows:
    """Everything a cache keeps of the head at N positions.

    Args:
        logits_NV: the head's output, in the dtype the head emits; trimmed to real ids.
        targets_N: int64 global id of the token that came next, negative where there is none.
        k: ids kept, at most the whole vocabulary's size.
        taus: temperatures of the tails, positive.
        soft_cap, scale: z becomes soft_cap tanh(z / soft_cap), then z scale, in float32, rounded once to the head's
            dtype: where `logits_NV` has them already, leave them out.
        shard: under tensor parallelism, which ids the columns are; every rank returns the same rows.
        tail_samples: M ids drawn with replacement from the tail at tau 1, see `tail_sample`; the three arguments
            after it are needed only then: the seed and int64 (N,) identities of every position.

    Raises:
        ValueError: k is not in 1..V, or a temperature is not positive.
    """
    vocab = logits_NV.shape[1]
    if k < 1 or (shard is None and k > vocab):
        raise ValueError(f"k={k} of {vocab} ids")
    if any(tau <= 0 for tau in taus):
        raise ValueError(f"temperatures must be positive: {taus}")
    asked = taus if 1.0 in taus else (*taus, 1.0)
    ids_NK, values_NK, log_tail_NR = _local_top_k(logits_NV, min(k, vocab), asked, soft_cap, scale)
    target_N = _target_logit(logits_NV, targets_N, shard.start if shard else 0, soft_cap, scale)
    if shard:
        ids_NK, values_NK, log_tail_NR = _merged(shard, ids_NK, values_NK, log_tail_NR, k, asked)
        target_N = shard.gather(target_N).amax(0)
    lse_N = torch.logaddexp(values_NK.logsumexp(-1), log_tail_NR[:, asked.index(1.0)])
    drawn: tuple[Tensor | None, Tensor | None] = (None, None)
    if tail_samples:
        assert sequence_ids_N is not None and positions_N is not None
        uniforms_NM = draw_uniforms(seed, sequence_ids_N, positions_N, tail_samples)
        drawn = _draws(logits_NV, ids_NK, uniforms_NM, shard, soft_cap, scale)
    target_N = target_N.masked_fill(targets_N < 0, torch.nan)
    return HeadRows(ids_NK, values_NK, target_N, lse_N, log_tail_NR[:, : len(taus)], *drawn)


def _local_top_k(
    logits_NV: Tensor, k: int, taus: tuple[float, ...], soft_cap: float | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    if logits_NV.is_cuda and k <= _TRITON_K:
        from teacher_dump.kernels import head_topk_triton

        return head_topk_triton.local_top_k(logits_NV, k, taus, soft_cap, scale)
    return head_topk_reference.local_top_k(logits_NV, k, taus, soft_cap, scale)


def _target_logit(logits_NV: Tensor, targets_N: Tensor, start: int, soft_cap: float | None, scale: float) -> Tensor:
    """float32; -inf where the target is not one of these columns."""
    vocab = logits_NV.shape[1]
    own_N = (targets_N >= start) & (targets_N < start + vocab)
    raw_N1 = logits_NV.gather(1, (targets_N - start).clamp(0, vocab - 1)[:, None])
    if raw_N1.is_cuda and not (soft_cap is None and scale == 1.0):
        from teacher_dump.kernels import logits_triton  # its tanh rounds as that of the top k does

        shaped_N1 = logits_triton.shaped_logits(raw_N1, soft_cap, scale)
    else:
        shaped_N1 = shaped_logits(raw_N1, soft_cap, scale).float()
    return shaped_N1.squeeze(1).masked_fill(~own_N, -torch.inf)


def _merged(
    shard: VocabShard, ids_NK: Tensor, values_NK: Tensor, log_tail_NR: Tensor, k: int, taus: tuple[float, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """The top k and tails of the whole vocabulary from those of its shards; the same on every rank.

    A rank's tail leaves out its own top k; those of them that are not in the whole's top k go back into the tail.
    """
    missing = k - ids_NK.shape[1]
    if missing:  # this shard has fewer than k ids
        ids_NK = torch.nn.functional.pad(ids_NK, (0, missing), value=LARGEST_ID - 1 - shard.start)
        values_NK = torch.nn.functional.pad(values_NK, (0, missing), value=-torch.inf)
    ids_NC = shard.gather(ids_NK.long() + shard.start).movedim(0, 1).flatten(1)
    values_NC = shard.gather(values_NK).movedim(0, 1).flatten(1)
    tails_SNR = shard.gather(log_tail_NR)
    ids_NK, values_NK = best_of(values_NC, ids_NC, k)
    last_N1, last_id_N1 = values_NK[:, -1:], ids_NK[:, -1:]
    left_NC = (values_NC < last_N1) | ((values_NC == last_N1) & (ids_NC > last_id_N1))
    rest_NC = values_NC.masked_fill(~left_NC, -torch.inf)
    inverse_R = torch.tensor([1 / tau for tau in taus], dtype=torch.float32, device=rest_NC.device)
    tails_NCR = torch.cat([tails_SNR.movedim(0, 1), rest_NC[:, :, None] * inverse_R], dim=1)
    return ids_NK.to(torch.int32), values_NK, tails_NCR.logsumexp(1)


def _draws(
    logits_NV: Tensor,
    ids_NK: Tensor,
    uniforms_NM: Tensor,
    shard: VocabShard | None,
    soft_cap: float | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`tail_sample` on float32 copies of a few rows at a time."""
    rows, vocab = logits_NV.shape
    start = shard.start if shard else 0
    parts = []
    for first in range(0, rows, _DRAW_ROWS):
        at = slice(first, first + _DRAW_ROWS)
        z_NV = torch.nn.functional.pad(shaped_logits(logits_NV[at], soft_cap, scale).float(), (0, 1), value=-torch.inf)
        local_NK = ids_NK[at].long() - start
        inside = (local_NK >= 0) & (local_NK < vocab)
        z_NV.scatter_(1, torch.where(inside, local_NK, vocab), -torch.inf)
        shift_N1 = z_NV.amax(1, keepdim=True)
        if shard:
            shift_N1 = shard.gather(shift_N1).amax(0)
        shift_N1 = shift_N1.nan_to_num(neginf=0.0)
        ids, values = tail_sample(z_NV.sub_(shift_N1), uniforms_NM[at], start, shard.gather if shard else None)
        parts.append((ids.to(torch.int32), values + shift_N1))
    ids_NM, logits_NM = (torch.cat(column) for column in zip(*parts, strict=True))
    return ids_NM, logits_NM
