"""Kernels are compiled before training starts, by one rank of a machine: the others find them on its disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning import Trainer

from student.blocks.graphed import Blocks


@contextmanager
def first_rank_first(trainer: Trainer) -> Iterator[None]:
    """What is inside is done by the first rank of each machine, then by all others together."""
    is_first = trainer.local_rank == 0
    if not is_first:
        trainer.strategy.barrier()
    yield
    if is_first:
        trainer.strategy.barrier()


def build_kernels(
    blocks: Blocks, shape: tuple[int, int, int], dtype: torch.dtype | None, input_gradient: bool = False
) -> None:
    """A forward and a backward pass on random numbers. No gradient is left, and no random number taken from training.

    Args:
        blocks: in training mode.
        shape: B, T and D of a rank's batches.
        dtype: what autocast multiplies in; None: no autocast.
        input_gradient: whether the blocks' input gets a gradient, as the output of a trained embedding does.
    """
    trained = [parameter for parameter in blocks.parameters() if parameter.requires_grad]
    device = trained[0].device
    x_BTD = torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device)
    x_BTD.requires_grad_(input_gradient)
    with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        outputs = blocks(x_BTD)
    total = torch.stack([output.float().sum() for output in outputs]).sum()
    # Not `backward`, which would leave gradients and wake what adds them up over ranks.
    torch.autograd.grad(total, [*trained, *([x_BTD] if input_gradient else [])], allow_unused=True)
