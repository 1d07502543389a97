"""What travels through stage one: a packed row goes into the engine, a captured row comes out.

Legend: T sequence length of the cache, L valid tokens of one row (L <= T), K top-k ids, R temperatures,
G depth groups, n = T/b pooling blocks, W = T/w windows of hidden states, D width, M tail samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PackedRow:
    """One sequence as the teacher will read it.

    Attributes:
        row: index within the unit; `sequence_id` is (unit << 32) + row.
        input_ids_L: int32, the valid tokens only.
        next_id: the token that follows the row in the packed stream, -1 if there is none.
        segment_ids_L: int32, 0, 1, 2, ...: which document each token belongs to.
        doc_ids: the documents the row was cut from, in order.
    """

    row: int
    input_ids_L: np.ndarray
    next_id: int
    segment_ids_L: np.ndarray
    doc_ids: tuple[str, ...]

    @property
    def length(self) -> int:
        return int(self.input_ids_L.shape[0])


@dataclass(frozen=True)
class CaptureSpec:
    """What the worker captures of every row.

    Attributes:
        k: ids kept per position (0 < k <= V).
        taus: temperatures of `log_tail`.
        block: pooling block b of the attention map; 0 leaves `attn_map` out.
        groups: depth groups G: the layers are split into G contiguous groups as equal as can be, deeper ones first
            getting the extra layer when L does not divide.
        window: tokens w per pooled hidden state; 0 leaves `hidden` out.
        tail_samples: M ids drawn from the tail at tau 1; 0 leaves them out.
        seed: of the tail draws; a draw depends on (seed, sequence_id, position) only.
    """

    k: int
    taus: tuple[float, ...]
    block: int
    groups: int
    window: int = 0
    tail_samples: int = 0
    seed: int = 0


@dataclass
class CapturedRow:
    """What the teacher said about one row; arrays are on the CPU and cover the L valid positions only.

    `attn_map_Gnn` covers the T/b blocks of the cache's full length: blocks beyond L are zero. `hidden_WD` likewise.
    """

    packed: PackedRow
    topk_ids_LK: np.ndarray  # int32, logit descending, id ascending among equals
    topk_logits_LK: np.ndarray  # float32
    target_logit_L: np.ndarray  # float32, NaN where no token follows
    lse_L: np.ndarray  # float32
    log_tail_LR: np.ndarray  # float32
    attn_map_Gnn: np.ndarray | None = None  # float32 here, float16 on disk
    hidden_WD: np.ndarray | None = None  # float32, values rounded to bfloat16
    tail_ids_LM: np.ndarray | None = None  # int32
    tail_logits_LM: np.ndarray | None = None  # float32
