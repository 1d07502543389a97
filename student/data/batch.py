"""A training batch: what the loader hands to the student and its losses.

Legend: B rows, T tokens a row, K top-k ids, R temperatures, G depth groups, n = T/b blocks, W = T/w windows,
D teacher width, M tail samples. Padding only in `packing: document` caches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

IGNORE = -100
"""Target of a position that has none: padding, or the last position of a row nothing follows."""


@dataclass
class Batch:
    """Tensors of B rows. Optional ones are None where the cache does not hold the column, or nobody asked for it."""

    sequence_id_B: Tensor  # int64; stays on the CPU, where messages name it
    length_B: Tensor  # int64, valid tokens
    input_ids_BT: Tensor  # int64
    segment_ids_BT: Tensor  # int32
    target_BT: Tensor  # int64, IGNORE where there is none; position t's target is token t+1, the last one next_id
    topk_ids_BTK: Tensor  # int32: half of what int64 would be to copy
    topk_logits_BTK: Tensor  # float32, NaN on padding
    target_logit_BT: Tensor  # float32, NaN where there is no target
    lse_BT: Tensor  # float32
    log_tail_BTR: Tensor  # float32, one column per temperature of `taus`
    attn_map_BGnn: Tensor | None = None  # float32
    hidden_BWD: Tensor | None = None  # float32
    tail_ids_BTM: Tensor | None = None  # int32, drawn from the tail with replacement
    tail_logits_BTM: Tensor | None = None  # float32, NaN on padding
    taus: tuple[float, ...] = (1.0,)
    tokens: int = 0  # valid ones of all rows

    @property
    def valid_BT(self) -> Tensor:
        """bool: positions that hold a token the teacher read (not padding)."""
        positions_T = torch.arange(self.input_ids_BT.shape[1], device=self.input_ids_BT.device)
        return positions_T[None, :] < self.length_B[:, None]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return self._each(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """In pinned memory, from where a copy to a GPU runs beside its work."""
        return self._each(lambda x: x.pin_memory())

    def without_targets(self) -> Batch:
        """The same rows, of which nothing is to be counted."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{**values, "target_BT": torch.full_like(self.target_BT, IGNORE), "tokens": 0})

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: change(v) for k, v in values.items() if isinstance(v, Tensor) and k != "sequence_id_B"}
        return Batch(**{**values, **moved})
