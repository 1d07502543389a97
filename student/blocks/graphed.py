"""The blocks of a training step as CUDA graphs: one launch forward, one backward, in the place of a thousand.

A step of small batches, or of many narrow blocks, costs the host more time to launch than the GPU to compute. A graph
holds the launches of one shape of batch, with the memory they used: everything else (other shapes, evaluation) goes the
ordinary way. Graphs are made before training starts, by `torch.cuda.make_graphed_callables`.

Legend: B rows, T tokens, D width, n = T/b pooling blocks.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from student.blocks.implicit_attention import pooled_implicit_attention
from student.blocks.mlstm import capturing

WARM_UPS = 3
"""Passes before a graph is recorded: what is compiled or chosen at a first call must be so by then."""


class Blocks(nn.Module):
    """All blocks and the norm after them; holds modules of a student, whose parameters these are.

    Args:
        blocks, final_norm: the student's.
        with_maps: indices of the blocks whose implicit attention is wanted.
        map_block: pooling block b of those maps.
    """

    def __init__(
        self, blocks: nn.ModuleList, final_norm: nn.Module, with_maps: tuple[int, ...] = (), map_block: int = 0
    ) -> None:
        super().__init__()
        self.blocks, self.final_norm = blocks, final_norm
        self.with_maps, self.map_block = with_maps, map_block

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, ...]:
        """h_BTD after the final norm, then a map (B, n, n) for each of `with_maps`."""
        maps = []
        for index, block in enumerate(self.blocks):
            if index in self.with_maps:
                with capturing(block) as captured:
                    x_BTD = block(x_BTD)
                inputs = captured[0].attention_inputs()
                maps.append(pooled_implicit_attention(*inputs, self.map_block).mean(dim=1))
            else:
                x_BTD = block(x_BTD)
        return self.final_norm(x_BTD), *maps


class GraphedBlocks:
    """`Blocks` recorded for batches of one shape.

    A parameter's gradient may lie in the graph's own memory, which the next backward pass overwrites: gradients must
    not be accumulated over several batches.

    Args:
        blocks: in training mode, on the GPU that the graphs are for.
        shape: B, T and D.
        dtype: what autocast multiplies in; None: no autocast.
        input_gradient: whether x_BTD gets a gradient, as the output of a trained embedding does.

    Raises:
        RuntimeError: something in the blocks cannot be recorded.
    """

    def __init__(
        self, blocks: Blocks, shape: tuple[int, int, int], dtype: torch.dtype | None, input_gradient: bool = False
    ) -> None:
        device = next(blocks.parameters()).device
        self.shape, self.map_block, self.input_gradient = shape, blocks.map_block, input_gradient
        # Different everywhere: nothing divides by a variance of zero.
        x_BTD = torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device)
        x_BTD.requires_grad_(input_gradient)
        # Casts that autocast remembers would be of another recording.
        with torch.autocast("cuda", dtype=dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False):
            self._run: Any = torch.cuda.make_graphed_callables(
                blocks, (x_BTD,), num_warmup_iters=WARM_UPS, allow_unused_input=True
            )

    def fits(self, x_BTD: Tensor, map_block: int) -> bool:
        """Whether this batch is of the recorded kind."""
        same = x_BTD.shape == self.shape and map_block == self.map_block
        return same and torch.is_grad_enabled() and x_BTD.requires_grad == self.input_gradient

    def __call__(self, x_BTD: Tensor) -> tuple[Tensor, ...]:
        """As `Blocks`; valid until the next call."""
        outputs: tuple[Tensor, ...] = self._run(x_BTD)
        return outputs


def record(
    blocks: Blocks, shape: tuple[int, int, int], dtype: torch.dtype | None, input_gradient: bool = False
) -> GraphedBlocks | None:
    """Graphs of a student's blocks; None, with a warning, where they cannot be recorded."""
    try:
        return GraphedBlocks(blocks.train(), shape, dtype, input_gradient)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        warnings.warn(
            f"--model.graphs: the blocks cannot be recorded as CUDA graphs ({reason}); training goes on without",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
