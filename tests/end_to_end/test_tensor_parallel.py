"""A teacher spread over two devices gives the rows of the whole one, through real vLLM: here over two CPU ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers_teacher import VOCAB, assert_parity, hugging_face, make_teacher, packed_rows

from teacher_dump.engine import EngineOptions, TeacherEngine
from teacher_dump.rows import CaptureSpec
from teacher_dump.vllm_process import sockets_of

LENGTH = 64
SPEC = CaptureSpec(k=16, taus=(1.0, 1.2, 1.5, 2.0), block=8, groups=2, window=16, tail_samples=5, seed=3)
OPTIONS = EngineOptions(dtype="float32", rows_per_step=3, tensor_parallel=2)


@pytest.mark.timeout(300)
def test_rows_of_two_ranks(tmp_path: Path) -> None:
    """Ids, targets and draws as with one rank; numbers as close to Hugging Face's in float32 as with one rank."""
    teacher = make_teacher(tmp_path)
    rows = packed_rows([64, 64, 1, 33], VOCAB)
    with TeacherEngine(teacher, length=LENGTH, capture=SPEC, options=OPTIONS) as engine:
        split = list(engine.stream(4, rows))
        sockets = sockets_of(engine._engine)
    assert sockets and all(socket.closed for socket in sockets)
    with TeacherEngine(teacher, length=LENGTH, capture=SPEC, options=replace(OPTIONS, tensor_parallel=1)) as engine:
        whole = list(engine.stream(4, rows))
    references = hugging_face(teacher, rows, LENGTH, SPEC.block, SPEC.groups)
    for one, other, want in zip(split, whole, references, strict=True):
        assert_parity(one, want, SPEC)
        assert (one.topk_ids_LK == other.topk_ids_LK).mean() > 0.99  # neighbours closer than rounding may swap
        assert one.tail_ids_LM is not None and (one.tail_ids_LM == other.tail_ids_LM).mean() > 0.98
        for name in ("topk_logits_LK", "lse_L", "log_tail_LR", "target_logit_L", "attn_map_Gnn"):
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-4, err_msg=name)
