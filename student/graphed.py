"""The blocks of a training step as CUDA graphs: one launch forward, one backward, in the place of a thousand.

A step of small batches, or of many narrow blocks, costs the host more time to launch than the GPU to compute. A graph
holds the launches of one shape of batch, with the memory they used: everything else (other shapes, evaluation, maps)
goes the ordinary way. Graphs are made before training starts, by `torch.cuda.make_graphed_callables`.

Legend: B rows, T tokens, D width.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

WARM_UPS = 3
"""Passes before a graph is recorded: what is compiled or chosen at a first call must be so by then."""


class _Blocks(nn.Module):
    """All blocks and the norm after them: modules of the student, whose parameters these are."""

    def __init__(self, blocks: nn.ModuleList, final_norm: nn.Module) -> None:
        super().__init__()
        self.blocks, self.final_norm = blocks, final_norm

    def forward(self, x_BTD: Tensor) -> Tensor:
        for block in self.blocks:
            x_BTD = block(x_BTD)
        h_BTD: Tensor = self.final_norm(x_BTD)
        return h_BTD


class GraphedBlocks:
    """Blocks and final norm of a student, recorded for batches of one shape.

    A parameter's gradient may lie in the graph's own memory, which the next backward pass overwrites: gradients must
    not be accumulated over several batches.

    Args:
        student: in training mode, on the GPU that the graphs are for.
        rows, length: B and T.
        dtype: what autocast multiplies in; None: no autocast.

    Raises:
        RuntimeError: something in the blocks cannot be recorded.
    """

    def __init__(self, student: Any, rows: int, length: int, dtype: torch.dtype | None) -> None:
        device = student.embedding_VD.device
        self.shape = (rows, length, student.facts.width)
        blocks = _Blocks(student.stack.blocks, student.final_norm).train()
        # Small, and different everywhere: no pass divides by a variance of zero.
        x_BTD = torch.randn(self.shape, generator=torch.Generator(device).manual_seed(0), device=device)
        # Casts that autocast remembers would be of another recording.
        with torch.autocast("cuda", dtype=dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False):
            self._run: Any = torch.cuda.make_graphed_callables(blocks, (x_BTD,), num_warmup_iters=WARM_UPS)

    def fits(self, x_BTD: Tensor) -> bool:
        """Whether this batch is of the recorded kind."""
        return x_BTD.shape == self.shape and torch.is_grad_enabled() and not x_BTD.requires_grad

    def __call__(self, x_BTD: Tensor) -> Tensor:
        """h_BTD after the final norm; valid until the next call."""
        h_BTD: Tensor = self._run(x_BTD)
        return h_BTD


def record(student: Any, rows: int, length: int, dtype: torch.dtype | None) -> GraphedBlocks | None:
    """Graphs of a student's blocks; None, with a warning, where they cannot be recorded."""
    try:
        return GraphedBlocks(student, rows, length, dtype)
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
