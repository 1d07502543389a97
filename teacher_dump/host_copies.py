"""Captured tensors on their way to the host: a ring of pinned buffers, filled on a stream of its own."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

SLOTS = 3
"""Steps whose copies can be under way: one being handed over, one finished, one running."""


@dataclass
class _Slot:
    buffers: dict[str, Tensor] = field(default_factory=dict)  # flat, pinned, as large as was ever needed
    event: torch.cuda.Event | None = None


@dataclass(frozen=True)
class Copy:
    """Tensors being copied; `HostCopies.take` waits for them."""

    slot: _Slot | None
    arrays: dict[str, Tensor]


class HostCopies:
    """Copies a step's tensors to the host beside the next step's computation; at most `SLOTS` steps at a time."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._free = [_Slot() for _ in range(SLOTS)]

    def start(self, tensors: dict[str, Tensor]) -> Copy:
        """Begin to copy; the tensors may be forgotten at once.

        Raises:
            RuntimeError: every buffer holds a step that was not taken.
        """
        if self._stream is None:
            return Copy(None, tensors)
        if not self._free:
            raise RuntimeError(f"{SLOTS} captured steps were not taken")
        slot = self._free.pop()
        arrays = {}
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for name, x in tensors.items():
                buffer = slot.buffers.get(name)
                if buffer is None or buffer.numel() < x.numel() or buffer.dtype != x.dtype:
                    buffer = slot.buffers[name] = torch.empty(x.numel(), dtype=x.dtype, pin_memory=True)
                arrays[name] = buffer[: x.numel()].view(x.shape).copy_(x, non_blocking=True)
                x.record_stream(self._stream)
            slot.event = torch.cuda.Event()
            slot.event.record()
        return Copy(slot, arrays)

    def take(self, copy: Copy) -> dict[str, np.ndarray]:
        """The arrays, once they are there; on a GPU they leave the pinned buffers, which are free again."""
        if copy.slot is None:
            return {name: x.numpy() for name, x in copy.arrays.items()}
        assert copy.slot.event is not None
        copy.slot.event.synchronize()
        arrays = {name: x.numpy().copy() for name, x in copy.arrays.items()}
        self._free.append(copy.slot)
        return arrays

    def forget(self, copy: Copy) -> None:
        """Free the buffers of a copy that nobody wants."""
        if copy.slot is not None:
            assert copy.slot.event is not None
            copy.slot.event.synchronize()
            self._free.append(copy.slot)
