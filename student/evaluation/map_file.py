"""attention_maps.npz: the attention maps of a few held-out rows, the teacher's and the student's.

The arrays of the file, for the first few held-out rows S (numbers only, no pickle):

    sequence_id      (S,) int64
    length           (S,) int64, valid tokens
    pool_block       () int64, tokens b of a block
    student_blocks   () int64, blocks N of the student, sLSTM included
    teacher          (S, G, n, n) float32, the cache's `attn_map`
    student_block_i  (S, n, n) float32, implicit attention of mLSTM block i, signed, pooled the same way

Legend: G depth groups, n = T/b blocks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pipeline.commit import commit_file
from student.data.batch import Batch


class MapCollector:
    """Gathers the maps of the first rows and writes them.

    Args:
        block: b; 0 where the cache has no maps.
        rows: how many rows to keep.
    """

    def __init__(self, block: int, rows: int) -> None:
        self.block, self.left = block, rows if block else 0
        self.parts: dict[str, list[np.ndarray]] = {}

    def add(self, batch: Batch, maps: dict[int, Tensor]) -> None:
        """The rows of a batch that are still wanted, and the student's maps of them."""
        if not self.left or batch.attn_map_BGnn is None:
            return
        arrays = {"sequence_id": batch.sequence_id_B, "length": batch.length_B, "teacher": batch.attn_map_BGnn}
        arrays |= {f"student_block_{i}": value.float() for i, value in maps.items()}
        for name, value in arrays.items():
            self.parts.setdefault(name, []).append(value[: self.left].cpu().numpy())
        self.left -= min(self.left, len(batch.length_B))

    def write(self, path: Path, blocks: int) -> None:
        """Commit the file; an older one goes where there is nothing to write, for it shows another student."""
        if not self.parts:
            path.unlink(missing_ok=True)
            return
        arrays: dict[str, Any] = {name: np.concatenate(parts) for name, parts in self.parts.items()}
        arrays |= {"pool_block": np.int64(self.block), "student_blocks": np.int64(blocks)}

        def save(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                np.savez_compressed(file, **arrays)

        commit_file(path, save)
