"""The recurrent state that generation keeps between tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class StudentState:
    """The recurrent state of every block: what generation keeps instead of the text. Its size never grows."""

    blocks: tuple[dict[str, Any], ...]

    def bytes(self) -> int:
        """Memory of all tensors of the state."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def tensors(self) -> list[Tensor]:
        """All tensors, in an order that is that of every state of the model."""
        return [t for block in self.blocks for _, value in sorted(block.items()) for t in _tensors(value)]

    def changed(self, change: Callable[[str, Tensor], Tensor]) -> StudentState:
        """A state of other tensors, each made by `change` from its name in its block and what it was."""
        return StudentState(tuple({key: _changed(key, value, change) for key, value in b.items()} for b in self.blocks))

    def repeated(self, rows: int) -> StudentState:
        """The state of one row as that of many."""

        def repeat(name: str, t: Tensor) -> Tensor:
            if name == "position":  # of all rows
                return t
            # The sLSTM's tensor has its row second, all others first.
            return t.repeat(1, rows, 1) if name == "slstm_state" else t.repeat(rows, *[1] * (t.ndim - 1))

        return self.changed(repeat)


def _changed(name: str, value: Any, change: Callable[[str, Tensor], Tensor]) -> Any:
    return change(name, value) if isinstance(value, Tensor) else tuple(_changed(name, item, change) for item in value)


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for item in value for t in _tensors(item)]
