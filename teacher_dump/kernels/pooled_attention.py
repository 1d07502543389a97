"""The attention maps of one engine step, summed over layers as these run.

The plain computation is `pooled_attention_reference`, the GPU's `pooled_attention_triton`.

Legend: N tokens of all rows one after another, B rows, H heads, Hkv key heads, E head width, G depth groups,
n blocks of the cache's full length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from teacher_dump.kernels.pooled_attention_reference import AttentionShape, pooled_attention


class StepMaps:
    """Maps of the rows of one step.

    Args:
        rows: B.
        longest: tokens of the longest row.
        groups: G.
        block: pooling block b in tokens.
        blocks: n; blocks beyond a row's length stay zero.
        device: where q and k are.
    """

    def __init__(self, rows: int, longest: int, groups: int, block: int, blocks: int, device: torch.device) -> None:
        self.longest, self.block = longest, block
        self.units = 1  # a block is kept in as many parts until the step ends
        if device.type == "cuda":
            from teacher_dump.kernels.pooled_attention_triton import unit_of

            self.units = block // unit_of(block)
        side = blocks * self.units
        self.sums_BGnn = torch.zeros((rows, groups, side, side), dtype=torch.float32, device=device)

    def add(
        self,
        group: int,
        q_NHE: Tensor,
        k_NHkvE: Tensor,
        starts_B1: Tensor,
        lse_HN: Tensor | None,
        shape: AttentionShape,
        weight: float,
    ) -> None:
        """Add `weight` times the head-averaged map of one layer to a depth group's.

        Args:
            group: which depth group.
            q_NHE, k_NHkvE: queries and keys of whole rows after RoPE.
            starts_B1: int32 on the device, B + 1 offsets of the rows in N.
            lse_HN: float32 logsumexp of every query's scores in nats, sinks counted, where the attention kernel
                gives it; a GPU then needs one product of q and k and not two.
            shape: how the layer treats its scores.
            weight: 1 / layers of the group.
        """
        out_Bnn = self.sums_BGnn[:, group]
        if q_NHE.is_cuda:
            from teacher_dump.kernels.pooled_attention_triton import add_pooled_attention

            add_pooled_attention(out_Bnn, q_NHE, k_NHkvE, starts_B1, self.longest, lse_HN, shape, self.block, weight)
        else:
            pooled_Bnn = pooled_attention(q_NHE, k_NHkvE, starts_B1.tolist(), shape, self.block, out_Bnn.shape[-1])
            out_Bnn.add_(pooled_Bnn, alpha=weight)

    def finish(self) -> Tensor:
        """(B, G, n, n) float32."""
        if self.units == 1:
            return self.sums_BGnn
        blocks = self.sums_BGnn.shape[-1] // self.units
        return self.sums_BGnn.unflatten(3, (blocks, self.units)).sum(4).unflatten(2, (blocks, self.units)).sum(3)
