"""Other views of the cache a run trains from, so that the arms of an ablation share one: a smaller K, wider windows.

What a dump with the smaller K or the wider window would have stored is made from a batch that is already where the
student is. Held-out rows are read as they are stored: all arms are judged by the cache's own K.

Legend: B rows, T tokens a row, K ids kept before and k after, R temperatures, w tokens a window before and W windows of
it, D teacher width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.schema import CacheSpec
from student.data.batch import Batch


@dataclass(frozen=True)
class CacheView:
    """What of a cache is trained on.

    Attributes:
        k: so many of the stored ids of every position; None: all.
        hidden_window: tokens of a window of `hidden`; None: as stored.
    """

    k: int | None = None
    hidden_window: int | None = None

    def check(self, spec: CacheSpec, where: object) -> None:
        """Raise UserError, naming the option, if a cache of this shape has no such view; `where` names the cache."""
        if self.k is not None and not 1 <= self.k <= spec.k:
            raise UserError(
                f"--data.k {self.k}: must be from 1 to {spec.k}, the ids a position that {where} holds; for more, dump "
                "the cache again with a larger k"
            )
        window = self.hidden_window
        if window is None:
            return
        if not spec.window:
            raise UserError(
                f"--data.hidden_window {window}: {where} has no column `hidden`; leave the option out, or dump the "
                "cache again with a window of hidden states"
            )
        if window < 1 or window % spec.window or spec.length % window:
            raise UserError(
                f"--data.hidden_window {window}: must be a multiple of the {spec.window} tokens of a stored window and "
                f"divide the {spec.length} tokens of a row ({where})"
            )

    def of(self, batch: Batch) -> Batch:
        """The view of a batch; the batch itself where nothing changes."""
        if self.k is not None and self.k < batch.topk_ids_BTK.shape[-1]:
            batch = with_first_ids(batch, self.k)
        if self.hidden_window is not None and batch.hidden_BWD is not None:
            stored = batch.input_ids_BT.shape[1] // batch.hidden_BWD.shape[1]
            if stored < self.hidden_window:
                wider_BWD = wider_windows(batch.hidden_BWD, batch.length_B, stored, self.hidden_window)
                batch = replace(batch, hidden_BWD=wider_BWD)
        return batch


def with_first_ids(batch: Batch, k: int) -> Batch:
    """The first k ids of every position, the others' mass in `log_tail` at every temperature.

    Draws are left out: those from the tail of K ids are no draws from the larger tail of k.
    """
    logits_BTK = batch.topk_logits_BTK
    return replace(
        batch,
        topk_ids_BTK=batch.topk_ids_BTK[..., :k].contiguous(),
        topk_logits_BTK=logits_BTK[..., :k].contiguous(),
        log_tail_BTR=tail_with(logits_BTK[..., k:], batch.log_tail_BTR, batch.taus),
        tail_ids_BTM=None,
        tail_logits_BTM=None,
    )


def tail_with(dropped_BTD: Tensor, log_tail_BTR: Tensor, taus: Sequence[float]) -> Tensor:
    """log(exp(log_tail) + sum over D of exp(z / tau)): exact, summed in float64 and rounded once.

    Args:
        dropped_BTD: logits at tau 1 that join the tail, one or more of each position; NaN on padding, which stays NaN.
        log_tail_BTR: the tail's so far, -inf where it was empty.
        taus: R temperatures.
    """
    dropped_BTD = dropped_BTD.double()
    tails_R = [
        torch.logaddexp(tail_BT.double(), (dropped_BTD / tau).logsumexp(-1))
        for tail_BT, tau in zip(log_tail_BTR.unbind(-1), taus, strict=True)
    ]
    return torch.stack(tails_R, -1).to(log_tail_BTR.dtype)


def wider_windows(hidden_BWD: Tensor, length_B: Tensor, stored: int, wanted: int) -> Tensor:
    """Means over windows of `wanted` tokens from the means over `stored` ones, valid tokens only; empty ones are zero.

    A dump with the wider window rounds to bfloat16 after it averages; what is averaged here was rounded before.

    Args:
        length_B: valid tokens a row.
        wanted: a multiple of `stored`, and a divisor of T.
    """
    B, W, D = hidden_BWD.shape
    first_W = torch.arange(W, device=hidden_BWD.device) * stored
    tokens_BW = (length_B[:, None] - first_W[None, :]).clamp(0, stored)
    sum_BWD = torch.where(tokens_BW[..., None] > 0, hidden_BWD * tokens_BW[..., None], 0.0)
    merged = wanted // stored
    sum_BWD = sum_BWD.view(B, W // merged, merged, D).sum(2)
    return sum_BWD / tokens_BW.view(B, W // merged, merged).sum(-1).clamp_min(1)[..., None]
