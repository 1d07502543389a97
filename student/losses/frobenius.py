"""The paper's Frobenius term: the student's last hidden state against the teacher's layer-averaged one.

Legend: B rows, T tokens, w tokens per window, W = T/w windows, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.errors import UserError


def require_hidden(beta: float, has_hidden: bool) -> None:
    """Raise UserError if the Frobenius term is asked for on a cache that holds no hidden states."""
    if beta > 0 and not has_hidden:
        raise UserError(
            f"--model.loss.beta is {beta}, but the cache has no column `hidden`: set it to 0, or dump the cache again "
            "with a window of hidden states (window: 1 is the paper's own)"
        )


def pool_windows(h_BTD: Tensor, length_B: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Mean over windows of `window` tokens, valid tokens only.

    Returns:
        (B, W, D) in float32 or wider, and bool (B, W): windows that hold a valid token. Others are zero.
    """
    B, T, D = h_BTD.shape
    positions_T = torch.arange(T, device=h_BTD.device)
    valid_BT = positions_T[None, :] < length_B[:, None]
    valid_BWw = valid_BT.view(B, T // window, window)
    h_BWwD = h_BTD.to(torch.promote_types(h_BTD.dtype, torch.float32)).view(B, T // window, window, D)
    count_BW = valid_BWw.sum(-1)
    sum_BWD = torch.where(valid_BWw[..., None], h_BWwD, 0.0).sum(2)
    return sum_BWD / count_BW.clamp_min(1)[..., None], count_BW > 0


def frobenius(h_BTD: Tensor, hidden_BWD: Tensor, length_B: Tensor, window: int) -> Tensor:
    """L_F = (1/B) sum_b ||h_teacher - h_student||_F / sqrt(|h|) (arXiv 2503.18565; DESIGN.md section 4).

    Args:
        h_BTD: the student after its final norm.
        hidden_BWD: the cache's `hidden`: teacher outputs averaged over layers, then over windows of valid tokens.
        length_B: valid tokens a row. |h| is the number of elements of a row's valid windows; a row without any adds 0.
        window: w, a divisor of T.
    """
    student_BWD, valid_BW = pool_windows(h_BTD, length_B, window)
    difference_BWD = torch.where(valid_BW[..., None], student_BWD - torch.nan_to_num(hidden_BWD), 0.0)
    elements_B = valid_BW.sum(-1) * h_BTD.shape[-1]
    # vector_norm has the subgradient 0 at 0, where sqrt of a sum of squares would give NaN.
    norm_B = torch.linalg.vector_norm(difference_BWD, dim=(1, 2))
    return (norm_B / elements_B.clamp_min(1).sqrt()).mean()
