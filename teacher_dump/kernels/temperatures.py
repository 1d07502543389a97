"""Temperatures whose inverses share a small denominator: one exponential serves them all."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from math import lcm


@lru_cache
def shared_base(taus: tuple[float, ...]) -> tuple[int, tuple[int, ...]] | None:
    """q and p_r with 1 / tau_r = p_r / q in small integers, None where there are none.

    1, 1.2, 1.5 and 2 give q = 6 and (6, 5, 4, 3): exp(z / tau) is a power of exp(z / 6).
    """
    inverses = [1 / Fraction(tau).limit_denominator(1000) for tau in taus]
    q = lcm(*(x.denominator for x in inverses))
    powers = tuple(int(x * q) for x in inverses)
    exact = all(abs(p / q * tau - 1) < 1e-9 for p, tau in zip(powers, taus, strict=True))
    return (q, powers) if exact and max(powers) <= 12 and min(powers) >= 1 else None
