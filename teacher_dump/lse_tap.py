"""The logsumexp of every row of attention scores, as vLLM's FlashAttention computes it and drops it.

FlashAttention writes it in any case; asking for it costs nothing and spares the pooled maps a second product of q
and k.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

_NAME = "flash_attn_varlen_func"


class LseTap:
    """Stands before one backend module's FlashAttention; one for each module, however many layers or engines."""

    def __init__(self, flash_attention: Any) -> None:
        self._flash_attention = flash_attention
        self._open = False
        self.lse_HN: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._open or kwargs.get("return_softmax_lse"):
            return self._flash_attention(*args, **kwargs)
        output, self.lse_HN, *_ = self._flash_attention(*args, return_softmax_lse=True, **kwargs)
        return output

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Within, the last call's logsumexp is kept in `lse_HN`: float32 (H, N), nats."""
        self._open, self.lse_HN = True, None
        try:
            yield
        finally:
            self._open = False


def tap_of(impl: Any) -> LseTap | None:
    """The tap before the FlashAttention that an attention implementation calls; None where it calls none."""
    module = sys.modules[type(impl).__module__]
    function = getattr(module, _NAME, None)
    if function is None or getattr(impl, "sinks", None) is not None:  # whether the sink is counted differs by version
        return None
    if not isinstance(function, LseTap):
        function = LseTap(function)
        setattr(module, _NAME, function)
    return function
