"""A toy teacher for tests of the student: facts and random tensors, no folder."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.teacher_folder import TeacherFacts
from student.runs.seal import seal


def save_checkpoint(content: dict[str, Any], path: Path) -> None:
    """A checkpoint as training writes it, with its seal."""
    torch.save(content, path)
    seal(path)


def toy_teacher(
    vocab_size: int = 97, width: int = 64, *, tied: bool = True, seed: int = 0, **changes: Any
) -> tuple[TeacherFacts, dict[str, Tensor]]:
    """Facts of a teacher that does not exist, and tensors as `TeacherFolder.tensors()` would give them (float32)."""
    facts = TeacherFacts(
        name="toy",
        teacher_sha256="0" * 64,
        tokenizer_sha256="1" * 64,
        vocab_size=vocab_size,
        width=width,
        layers=4,
        heads=4,
        tied=tied,
        norm_eps=1e-5,
        norm_offset=0.0,
        embedding_scale=1.0,
        logit_scale=1.0,
        soft_cap=None,
        dtype="float32",
        separator_id=0,
        eos_id=2,
        bos_id=None,
        pad_id=2,
    )
    generator = torch.Generator().manual_seed(seed)
    embedding_VD = torch.randn(vocab_size, width, generator=generator)
    head_VD = embedding_VD if tied else torch.randn(vocab_size, width, generator=generator) / math.sqrt(width)
    norm_D = 1 + 0.1 * torch.randn(width, generator=generator)
    return replace(facts, **changes), {"embedding_VD": embedding_VD, "head_VD": head_VD, "norm_D": norm_D}
