"""AdamW: its options, its learning rate over a run, and which parameters decay."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from student.blocks.transformer_block import FEATURE_MAPS
from student.model import VOCABULARY


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a linear warm-up and a cosine."""

    lr: float = 2e-4
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Decay of matrices; vectors (norms, biases, gates), feature maps, which begin as scaled identities, and a trained
    embedding or head are never decayed."""
    warmup_fraction: float = 0.1
    """Share of all steps in which the rate rises from 0 to its peak."""
    min_lr_fraction: float = 0.0
    """Share of the peak at which the cosine ends."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moments."""

    def factor(self, step: int, total: int) -> float:
        """Share of the peak rate for the step that follows `step` steps of `total`."""
        warmup = max(1, round(self.warmup_fraction * total))
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return self.min_lr_fraction + (1 - self.min_lr_fraction) * 0.5 * (1 + math.cos(math.pi * progress))


def decays(name: str, parameter: Tensor) -> bool:
    """Whether a parameter's neutral value is 0, towards which weight decay pulls.

    A feature map's is not: at 0 all keys are alike. Nor is an embedding's or head's: they begin as the teacher's.
    """
    return parameter.ndim >= 2 and name.rpartition(".")[2] not in (*FEATURE_MAPS, *VOCABULARY)
