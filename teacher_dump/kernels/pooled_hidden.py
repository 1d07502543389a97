"""Hidden states of one engine step: summed over layers as these run, averaged over windows of w tokens.

The plain computation is `pooled_hidden_reference`, the GPU's `pooled_hidden_triton`.

Legend: N tokens of all rows one after another, B rows, W windows of the cache's full length, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from teacher_dump.kernels.pooled_hidden_reference import window_sums


class StepHidden:
    """Layer-averaged hidden states of the rows of one step.

    Args:
        rows: B.
        window: tokens w per window.
        windows: W; windows beyond a row's length stay zero.
        width: D.
        device: where the hidden states are.
    """

    def __init__(self, rows: int, window: int, windows: int, width: int, device: torch.device) -> None:
        self.window = window
        self.sums_BWD = torch.zeros((rows, windows, width), dtype=torch.float32, device=device)

    def add(self, parts_ND: list[Tensor], starts_B1: Tensor) -> None:
        """Add one layer's output.

        Args:
            parts_ND: what sums to it, one tensor or two, over whole rows one after another.
            starts_B1: int32 on the device, B + 1 offsets of the rows in N.
        """
        if parts_ND[0].is_cuda:
            from teacher_dump.kernels.pooled_hidden_triton import add_window_sums

            add_window_sums(self.sums_BWD, parts_ND, starts_B1, self.window)
        else:
            for part_ND in parts_ND:
                self.sums_BWD += window_sums(part_ND, starts_B1.tolist(), self.window, self.sums_BWD.shape[1])

    def finish(self, lengths: list[int], layers: int) -> Tensor:
        """The mean over valid tokens and layers: (B, W, D) float32 holding bfloat16 values.

        Args:
            lengths: tokens of each row.
            layers: how many were added.
        """
        lengths_B = torch.tensor(lengths)
        first_W = torch.arange(self.sums_BWD.shape[1]) * self.window
        tokens_BW = (lengths_B[:, None] - first_W[None, :]).clamp(0, self.window)
        scale_BW = 1.0 / (tokens_BW.clamp(min=1) * layers)
        scaled_BWD = self.sums_BWD * scale_BW.to(self.sums_BWD.device, non_blocking=True)[:, :, None]
        return scaled_BWD.to(torch.bfloat16).float()
