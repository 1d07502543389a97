"""Where a student is evaluated, in which precision, and how many positions' logits exist at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from pipeline.errors import UserError

Precision = Literal["32-true", "bf16-mixed"]

CPU_ROWS = 256
CPU_BATCH_ROWS = 8
GPU_BATCH_TOKENS = 32_768
GPU_LOGITS = 1 << 28
"""Logits of one chunk on a GPU: 1 GB in float32, a few times that with what is computed of them."""


def pick_device(name: str) -> torch.device:
    """The device of an option; `auto` is a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is no device: use auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: there is no usable GPU here; use cpu")
    return device


def chunk_rows(device: torch.device, vocab_size: int) -> int:
    """Positions whose logits over the whole vocabulary are held at a time: few on a CPU, products that fill a GPU."""
    return CPU_ROWS if device.type == "cpu" else max(CPU_ROWS, GPU_LOGITS // vocab_size)


def batch_rows(given: int | None, device: torch.device, length: int) -> int:
    """Rows of a batch: as the option says, else few on a CPU, and on a GPU as many as keep it busy.

    Raises:
        UserError: the option is below 1.
    """
    if given is None:
        return CPU_BATCH_ROWS if device.type == "cpu" else max(1, GPU_BATCH_TOKENS // length)
    if given < 1:
        raise UserError(f"--batch_rows must be 1 or more, found {given}")
    return given


@contextmanager
def in_precision(precision: Precision, device: torch.device) -> Iterator[None]:
    """Run models as `--precision` says: 32-true changes nothing.

    Under bf16-mixed products are in bfloat16, as in training, and those that stay float32 (the head's, whose logits
    bfloat16 would round to 1/16) use TF32 on a GPU: 10 bits of mantissa, sums in float32.
    """
    if precision == "32-true":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
