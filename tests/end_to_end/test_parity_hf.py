"""What vLLM's worker captures against Hugging Face in eager float32, through real engines."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_teacher import VOCAB, assert_parity, hugging_face, make_gemma, make_teacher, packed_rows

from pipeline.errors import UserError
from teacher_dump.engine import EngineOptions, TeacherEngine
from teacher_dump.rows import CapturedRow, CaptureSpec

LENGTH = 64
LENGTHS = [64, 64, 1, 33, 64, 7, 50]  # of one unit; three rows a step, so the last step is short
SPEC = CaptureSpec(k=16, taus=(1.0, 1.2, 1.5, 2.0), block=8, groups=2, window=16, tail_samples=5, seed=3)
OPTIONS = EngineOptions(dtype="float32", rows_per_step=3)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def engine(plain: Path) -> Iterator[TeacherEngine]:
    with TeacherEngine(plain, length=LENGTH, capture=SPEC, options=OPTIONS) as engine:
        yield engine


@pytest.fixture(scope="module")
def captured(engine: TeacherEngine) -> list[CapturedRow]:
    return list(engine.stream(4, packed_rows(LENGTHS, VOCAB)))


def test_engine_says_what_it_is(engine: TeacherEngine) -> None:
    assert (engine.vocab_size, engine.width, engine.layers) == (VOCAB, 96, 3)
    assert (engine.head_dtype, engine.rows_per_step) == ("float32", 3)


def test_rows_match_hugging_face(plain: Path, captured: list[CapturedRow]) -> None:
    rows = packed_rows(LENGTHS, VOCAB)
    assert [got.packed.row for got in captured] == [row.row for row in rows]
    for got, want in zip(captured, hugging_face(plain, rows, LENGTH, SPEC.block, SPEC.groups), strict=True):
        assert_parity(got, want, SPEC)


def test_tail_draws_lie_outside_the_top_k(plain: Path, captured: list[CapturedRow]) -> None:
    references = hugging_face(plain, packed_rows(LENGTHS, VOCAB), LENGTH, 0, 1)
    for got, want in zip(captured, references, strict=True):
        assert got.tail_ids_LM is not None and got.tail_logits_LM is not None
        assert not (got.tail_ids_LM[:, :, None] == got.topk_ids_LK[:, None, :]).any()
        logits_LM = want.logits_LV.gather(1, torch.from_numpy(got.tail_ids_LM).long()).numpy()
        np.testing.assert_allclose(got.tail_logits_LM, logits_LM, rtol=1e-5, atol=3e-4)


def test_same_unit_gives_the_same_bits(engine: TeacherEngine, captured: list[CapturedRow]) -> None:
    for first, second in zip(captured, engine.stream(4, packed_rows(LENGTHS, VOCAB)), strict=True):
        for name, value in vars(first).items():
            if isinstance(value, np.ndarray):
                np.testing.assert_array_equal(value, getattr(second, name), err_msg=name)


def test_batch_mates_change_a_row_by_little(engine: TeacherEngine, captured: list[CapturedRow]) -> None:
    """Each row alone in its unit: within the 4e-5 the design states; the draws do not move with the batch."""
    for row, beside in zip(packed_rows(LENGTHS, VOCAB), captured, strict=True):
        (alone,) = engine.stream(4, [row])
        for name in ("topk_logits_LK", "lse_L", "log_tail_LR", "target_logit_L", "attn_map_Gnn"):
            np.testing.assert_allclose(getattr(alone, name), getattr(beside, name), atol=4e-5, err_msg=name)
        assert (alone.tail_ids_LM == beside.tail_ids_LM).mean() > 0.98


def test_stream_reads_two_steps_ahead_at_most(engine: TeacherEngine) -> None:
    rows, read = packed_rows([5] * 20, VOCAB), []

    def counted() -> Iterator:
        for row in rows:
            read.append(row.row)
            yield row

    stream = engine.stream(0, counted())
    assert next(stream).packed.row == 0
    assert len(read) == 6
    stream.close()
    assert [got.packed.row for got in engine.stream(0, rows[:4])] == [0, 1, 2, 3]  # nothing of the cut stream is left


def test_too_long_a_row_is_refused(engine: TeacherEngine) -> None:
    with pytest.raises(ValueError, match="65 tokens, T is 64"):
        list(engine.stream(0, packed_rows([65], VOCAB)))


@pytest.mark.parametrize(("spec", "said"), [
    ({"k": VOCAB + 1}, "k: 518 is more than"),
    ({"groups": 4}, "groups: 4 depth groups of 3"),
    ({"block": 7}, "block: 7 does not divide"),
])  # fmt: skip
def test_specs_that_do_not_fit_are_refused(plain: Path, spec: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        TeacherEngine(plain, length=LENGTH, capture=replace(SPEC, **spec), options=OPTIONS)


def test_heads_that_cannot_be_divided_are_refused(plain: Path) -> None:
    options = replace(OPTIONS, tensor_parallel=4)
    with pytest.raises(UserError, match=r"engine.tensor_parallel: 4 does not divide the 6 .*one of \[1, 2, 3, 6\]"):
        TeacherEngine(plain, length=LENGTH, capture=SPEC, options=options)


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="config.json is missing"):
        TeacherEngine(tmp_path, length=LENGTH, capture=SPEC, options=OPTIONS)


def test_peaked_logits_keep_their_tails(tmp_path: Path) -> None:
    """A head scaled until the mass outside the top k falls below 1e-5; hidden states unpooled."""
    spec = replace(SPEC, k=4, window=1, block=16, groups=3, tail_samples=0)
    teacher = make_teacher(tmp_path, head_scale=25.0)
    rows = packed_rows([64, 21], VOCAB, seed=5)
    with TeacherEngine(teacher, length=LENGTH, capture=spec, options=OPTIONS) as engine:
        captured = list(engine.stream(0, rows))
    masses = np.concatenate([np.exp(got.log_tail_LR[:, 0] - got.lse_L) for got in captured])
    assert np.quantile(masses, 0.1) < 1e-5 < np.max(masses)
    for got, want in zip(captured, hugging_face(teacher, rows, LENGTH, spec.block, spec.groups), strict=True):
        assert_parity(got, want, spec)


def test_windows_and_soft_caps_match_hugging_face(tmp_path: Path) -> None:
    """Gemma 2: windowed layers beside others, one of each in its own depth group; the cap of the logits is ours."""
    spec = replace(SPEC, groups=3, tail_samples=0)
    teacher, rows = make_gemma(tmp_path), packed_rows(LENGTHS, VOCAB)
    with TeacherEngine(teacher, length=LENGTH, capture=spec, options=OPTIONS) as engine:
        assert engine.soft_cap == 5.0
        captured = list(engine.stream(4, rows))
    assert captured[0].attn_map_Gnn is not None
    assert (captured[0].attn_map_Gnn[:, -1, 0] == 0).tolist() == [True, False, True]  # beyond the window
    for got, want in zip(captured, hugging_face(teacher, rows, LENGTH, spec.block, spec.groups), strict=True):
        assert_parity(got, want, spec)


OTHER_RUNNER = """
import sys, types
from pathlib import Path
import triton.backends
triton.backends.backends["cpu"] = types.SimpleNamespace(driver=object())
from helpers_teacher import assert_parity, hugging_face, packed_rows
from test_parity_hf import LENGTH, LENGTHS, OPTIONS, SPEC
from teacher_dump.engine import TeacherEngine
teacher, rows = Path(sys.argv[1]), packed_rows(LENGTHS, 517)
with TeacherEngine(teacher, length=LENGTH, capture=SPEC, options=OPTIONS) as engine:
    captured = list(engine.stream(0, rows))
assert any(name.endswith("gpu.model_runner") for name in sys.modules), "the V2 runner did not run"
for got, want in zip(captured, hugging_face(teacher, rows, LENGTH, SPEC.block, SPEC.groups), strict=True):
    assert_parity(got, want, SPEC)
print("rows in parity:", len(captured))
"""


def test_the_model_runner_of_gpus_gives_the_same_rows(plain: Path) -> None:
    """vLLM's V2 runner, its Triton kernels interpreted: the environment must be set before vllm is imported."""
    tests = Path(__file__).parents[1]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests), str(tests / "end_to_end")]),
    }
    done = subprocess.run(
        [sys.executable, "-c", OTHER_RUNNER, str(plain)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert f"rows in parity: {len(LENGTHS)}" in done.stdout, done.stdout + done.stderr


def test_smollm2_matches_hugging_face(embedded_teacher: Path) -> None:
    """The embedded teacher in float32, with a row that ends inside a block."""
    spec = CaptureSpec(k=64, taus=(1.0, 1.2, 1.5, 2.0), block=32, groups=6, window=16)
    rows = packed_rows([128, 77], 49152, seed=1)
    with TeacherEngine(embedded_teacher, length=128, capture=spec, options=OPTIONS) as engine:
        captured = list(engine.stream(0, rows))
    for got, want in zip(captured, hugging_face(embedded_teacher, rows, 128, spec.block, spec.groups), strict=True):
        assert_parity(got, want, spec)


@pytest.fixture(scope="module")
def embedded_teacher() -> Path:
    from teacher_dump.embedded.teacher import prepare_teacher

    data = Path(__file__).parents[2] / "data"
    if not (data / "smollm2-135m").is_dir():
        pytest.skip("data/smollm2-135m is made by `make setup`")
    return Path(prepare_teacher(data))
