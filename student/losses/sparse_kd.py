"""Cross-entropy and the divergences from a cached top-k teacher, in plain PyTorch: what `fused.py` must equal.

The cache holds, per position, the teacher's K largest logits and `log_tail`: the log of the sum of exp(z / tau) over
every other id, at a few stored temperatures. Three divergences can be had from that (`Divergence`):

`tail`: teacher and student are compared over K+1 outcomes, the K ids and "any other":

    KL_{K+1} = sum_K p log(p / q) + r_p log(r_p / r_q)

r_p and r_q are the true tail masses of teacher and student. KL_{K+1} is a lower bound of the full-vocabulary KL and
equals it at K = V; it is called KL_{K+1} (`kl_k1`) wherever it is reported.

`renormalised`: both distributions are divided by their mass on the K ids, as most packages do. The student's other
logits get no gradient, and the target is another one than the teacher's: it is there to be compared with.

`sampled`: M ids drawn from the tail stand for it (`tail_ids`, `tail_logits` of a cache). Its gradient's mean over
draws is that of the KL over the whole vocabulary; as in sparse logit sampling (arXiv 2503.16870), but with K exact ids.

Legend: N positions, V vocabulary, K top-k ids, M draws, R stored temperatures.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from student.data.batch import IGNORE

Divergence = Literal["tail", "renormalised", "sampled"]
"""What stands for the KL from teacher to student; see the module."""

_SLACK = 1e-6  # relative: a schedule's rounding may step this far over an end of the stored range


def interpolation_weights(taus: Sequence[float], tau: float) -> list[float]:
    """Weights w_R with log_tail(tau) ~ sum_R w_R log_tail_R: cubic Lagrange interpolation in 1/tau.

    log_tail is the log of a sum of exponentials of 1/tau, hence smooth and convex in 1/tau: a cubic through the two
    stored temperatures on either side (all where there are four or fewer) is exact to a few 1e-4 nats at the default
    {1, 1.2, 1.5, 2}. A local cubic, not one polynomial through all, keeps many stored temperatures from oscillating.

    Args:
        taus: the stored temperatures, in any order, all different and positive.
        tau: the wanted one.

    Raises:
        ValueError: `tau` is outside the stored range; extrapolated tails are not to be trusted.
    """
    order = sorted(range(len(taus)), key=lambda i: 1.0 / taus[i])
    nodes = [1.0 / taus[i] for i in order]
    x = 1.0 / tau
    if not nodes[0] * (1 - _SLACK) <= x <= nodes[-1] * (1 + _SLACK):
        raise ValueError(f"tau {tau} is outside the stored range {min(taus)} to {max(taus)}")
    x = min(max(x, nodes[0]), nodes[-1])
    upper = min(max(bisect.bisect_left(nodes, x), 1), max(len(nodes) - 1, 1))
    first = min(max(upper - 2, 0), max(len(nodes) - 4, 0))
    window = range(first, min(first + 4, len(nodes)))
    weights = [0.0] * len(taus)
    for i in window:
        weights[order[i]] = math.prod((x - nodes[j]) / (nodes[i] - nodes[j]) for j in window if j != i)
    return weights


def log_tail_at(log_tail_NR: Tensor, taus: Sequence[float], tau: float) -> Tensor:
    """log_tail at any temperature of the stored range, (..., R) -> (...).

    -inf (no tail: K = V) stays -inf; NaN (padding) stays NaN.

    Raises:
        ValueError: `tau` is outside the stored range, or the number of `taus` is not R.
    """
    if log_tail_NR.shape[-1] != len(taus):
        raise ValueError(f"log_tail has {log_tail_NR.shape[-1]} columns for {len(taus)} temperatures")
    empty_N = torch.isneginf(log_tail_NR).any(-1)
    # 0 * inf would be NaN where a weight is zero or two have opposite signs.
    finite_NR = log_tail_NR.masked_fill(torch.isneginf(log_tail_NR), 0.0)
    weighted = [finite_NR[..., r] * weight for r, weight in enumerate(interpolation_weights(taus, tau)) if weight]
    tail_N = torch.stack(weighted).sum(0)  # weights as numbers: a tensor of them would have to be copied to a GPU
    return tail_N.masked_fill(empty_N, -math.inf)


def cross_entropy(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """-log q(target) in nats per position (N,), zero where the target is IGNORE."""
    valid_N = target_N != IGNORE
    target_logit_N = logits_NV.gather(1, target_N.clamp_min(0)[:, None]).squeeze(1)
    return torch.where(valid_N, logits_NV.logsumexp(-1) - target_logit_N, 0.0)


def kl_k1(
    logits_NV: Tensor, topk_ids_NK: Tensor, topk_logits_NK: Tensor, log_tail_N: Tensor, tau: float, valid_N: Tensor
) -> Tensor:
    """KL_{K+1}(p_tau || q_tau) in nats per position (N,), zero where `valid_N` is False.

    Args:
        logits_NV: the student's logits at tau 1.
        topk_ids_NK: the teacher's ids, all different within a position.
        topk_logits_NK: their logits at tau 1; may be NaN where not valid.
        log_tail_N: the teacher's log_tail at `tau` (see `log_tail_at`), -inf where there is no tail.
        tau: temperature of both distributions. The factor tau^2 of the loss is the caller's.
        valid_N: bool, positions that count.
    """
    # Masked before any arithmetic: the gradient of a NaN behind a `where` is still NaN.
    up_NK = topk_logits_NK.masked_fill(~valid_N[:, None], 0.0) / tau
    log_tail_N = log_tail_N.masked_fill(~valid_N, 0.0)
    log_zp_N = torch.logaddexp(up_NK.logsumexp(-1), log_tail_N)
    log_p_NK = up_NK - log_zp_N[:, None]
    log_rp_N = log_tail_N - log_zp_N

    u_NV = logits_NV / tau
    log_zq_N = u_NV.logsumexp(-1)
    log_q_NK = u_NV.gather(1, topk_ids_NK) - log_zq_N[:, None]
    kl_N = (log_p_NK.exp() * (log_p_NK - log_q_NK)).sum(-1)
    if topk_ids_NK.shape[1] < logits_NV.shape[1]:
        log_rq_N = u_NV.scatter(1, topk_ids_NK, -math.inf).logsumexp(-1) - log_zq_N
        has_tail_N = ~torch.isneginf(log_tail_N)
        log_rp_N = log_rp_N.masked_fill(~has_tail_N, 0.0)
        kl_N = kl_N + torch.where(has_tail_N, log_rp_N.exp() * (log_rp_N - log_rq_N), 0.0)
    return torch.where(valid_N, kl_N, 0.0)


def kl_renormalised(
    logits_NV: Tensor, topk_ids_NK: Tensor, topk_logits_NK: Tensor, tau: float, valid_N: Tensor
) -> Tensor:
    """KL(p~_tau || q~_tau) of the distributions renormalised over the K ids, in nats per position (N,).

    Arguments as for `kl_k1`; no tail enters.
    """
    log_p_NK = (topk_logits_NK.masked_fill(~valid_N[:, None], 0.0) / tau).log_softmax(-1)
    log_q_NK = (logits_NV.gather(1, topk_ids_NK) / tau).log_softmax(-1)
    return torch.where(valid_N, (log_p_NK.exp() * (log_p_NK - log_q_NK)).sum(-1), 0.0)


def draw_weights(draw_logits_NM: Tensor, log_tail_1_N: Tensor, log_zp_N: Tensor, tau: float) -> Tensor:
    """w_m = exp(log_tail_1) exp(z_m / tau - z_m) / (M Z_tau): the teacher's tail probability that a draw stands for.

    Draws come in proportion to exp(z), so that the sum of w_m f(m) has the mean sum over the tail of p_tau(v) f(v),
    whatever f. The weights do not sum to the tail's mass but for tau 1; dividing them by their sum would lower the
    variance and bias the gradient, which a batch's many positions do not average away (docs/losses.md has figures).

    Args:
        draw_logits_NM: the teacher's logits z_m of the draws, at tau 1.
        log_tail_1_N: its log_tail at tau 1. Where it is -inf there was nothing to draw from: weights are 0.
        log_zp_N: log Z_tau, its logsumexp over the vocabulary at tau.
    """
    has_tail_N1 = ~torch.isneginf(log_tail_1_N)[:, None]
    z_NM = torch.where(has_tail_N1, draw_logits_NM, 0.0)
    log_w_NM = (log_tail_1_N - log_zp_N)[:, None] + z_NM / tau - z_NM - math.log(draw_logits_NM.shape[1])
    return log_w_NM.exp()


def kl_sampled(
    logits_NV: Tensor,
    topk_ids_NK: Tensor,
    topk_logits_NK: Tensor,
    log_tail_N: Tensor,
    log_tail_1_N: Tensor,
    draw_ids_NM: Tensor,
    draw_logits_NM: Tensor,
    tau: float,
    valid_N: Tensor,
) -> Tensor:
    """sum_K p log(p / q) + sum_M w log(p / q), q the student's softmax over the vocabulary at tau; (N,) nats.

    Its mean over draws is KL(p_tau || q_tau) over the whole vocabulary, and so is its gradient's. A single one can be
    negative.

    Args:
        log_tail_N, log_tail_1_N: the teacher's log_tail at `tau` and at 1.
        draw_ids_NM: M ids of each position's tail, drawn with replacement in proportion to exp(z).
        draw_logits_NM: the teacher's logits of those, at tau 1.
        others: as for `kl_k1`.
    """
    up_NK = topk_logits_NK.masked_fill(~valid_N[:, None], 0.0) / tau
    log_tail_N, log_tail_1_N = (tail_N.masked_fill(~valid_N, 0.0) for tail_N in (log_tail_N, log_tail_1_N))
    draw_logits_NM = draw_logits_NM.masked_fill(~valid_N[:, None] | torch.isneginf(log_tail_1_N)[:, None], 0.0)
    log_zp_N = torch.logaddexp(up_NK.logsumexp(-1), log_tail_N)
    log_p_NS = torch.cat((up_NK, draw_logits_NM / tau), 1) - log_zp_N[:, None]
    w_NM = draw_weights(draw_logits_NM, log_tail_1_N, log_zp_N, tau)
    weight_NS = torch.cat((log_p_NS[:, : up_NK.shape[1]].exp(), w_NM), 1)
    log_q_NV = (logits_NV / tau).log_softmax(-1)
    log_q_NS = log_q_NV.gather(1, torch.cat((topk_ids_NK, draw_ids_NM), 1))
    return torch.where(valid_N, (weight_NS * (log_p_NS - log_q_NS)).sum(-1), 0.0)
