"""Small students of both kinds of block, to decode with."""

from __future__ import annotations

import torch
from helpers_export import shake
from helpers_student import toy_teacher
from helpers_transformer import student_of

from student.model import DistilXLSTM, StudentConfig


def decoding_student(kind: str) -> DistilXLSTM:
    """`package`: an mLSTM and an sLSTM block; `transformer`: two blocks with rotary positions. 97 token ids."""
    torch.manual_seed(0)
    shape = StudentConfig(blocks=2, heads=4) if kind == "package" else student_of()
    return shake(DistilXLSTM(shape, *toy_teacher(), max_length=64))
