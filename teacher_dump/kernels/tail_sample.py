"""Draws from the tail of a distribution that depend on nothing but the position drawn for.

Every uniform is a hash of (seed, sequence_id, position, draw), so a row's samples are the same whatever shared its
batch, however often the unit is run, and however many samples are drawn beside it.

Legend: N positions, M draws a position, V ids of this vocabulary shard, S shards.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def _shifted(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014) on int64, wrapping as unsigned 64-bit integers do."""
    x = x + _GOLDEN
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def draw_uniforms(seed: int, sequence_ids_N: Tensor, positions_N: Tensor, draws: int) -> Tensor:
    """(N, M) float64 in [0, 1): a function of (seed, sequence id, position, draw) alone.

    Args:
        seed: any integer.
        sequence_ids_N: int64 identity of the sequence each position belongs to.
        positions_N: int64 index of the position in its sequence.
        draws: M.
    """
    device = sequence_ids_N.device
    key_N = splitmix64(torch.full_like(sequence_ids_N, _signed(seed % (1 << 64))))
    key_N = splitmix64(key_N ^ sequence_ids_N)
    key_N = splitmix64(key_N ^ positions_N)
    counters_NM = splitmix64(key_N[:, None] ^ torch.arange(draws, device=device))
    return _shifted(counters_NM, 11).double() * 2.0**-53


def tail_sample(
    shifted_NV: Tensor, uniforms_NM: Tensor, start: int = 0, gather: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Ids drawn with replacement in proportion to exp(x), by inverting the cumulative sum in float64.

    Args:
        shifted_NV: float32 logits less the row's largest, -inf where an id must not be drawn.
        uniforms_NM: float64 in [0, 1).
        start: global id of the first column.
        gather: under tensor parallelism, stacks every rank's tensor: (...) -> (S, ...).

    Returns:
        `ids_NM` int64 global ids and `logits_NM` float32 entries of `shifted_NV`; -1 and NaN where a row has no tail.
    """
    cumulative_NV = shifted_NV.double().exp_().cumsum_(-1)
    mass_N = cumulative_NV[:, -1]
    before_N, total_N = torch.zeros_like(mass_N), mass_N
    if gather is not None:
        masses_SN = gather(mass_N)
        ends_SN = masses_SN.cumsum(0)
        # This rank is where the shards' starts equal its own: found by gathering them too.
        starts_S = gather(torch.tensor(start, device=mass_N.device))
        rank = int((starts_S < start).sum())
        before_N, total_N = ends_SN[rank] - masses_SN[rank], ends_SN[-1]
    wanted_NM = uniforms_NM * total_N[:, None] - before_N[:, None]
    index_NM = torch.searchsorted(cumulative_NV, wanted_NM, right=True)
    own_NM = (wanted_NM >= 0) & (wanted_NM < mass_N[:, None])
    index_NM = index_NM.clamp_(max=shifted_NV.shape[1] - 1)
    ids_NM = torch.where(own_NM, index_NM + start, -1)
    logits_NM = torch.where(own_NM, shifted_NV.gather(1, index_NM), -torch.inf)
    if gather is not None:
        ids_NM, logits_NM = gather(ids_NM).amax(0), gather(logits_NM).amax(0)
    return ids_NM, logits_NM.masked_fill(ids_NM < 0, torch.nan)
