"""Transformer-shaped students: shapes that are refused, recurrent form, run folders, text, what is decayed."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_cache import write_toy_cache
from helpers_export import shake
from helpers_run import write_run
from helpers_student import toy_teacher
from helpers_transformer import shape_of, student_of
from torch import Tensor

from pipeline.cache import Cache
from pipeline.commit import commit_json, read_json
from pipeline.errors import UserError
from student.blocks.transformer_block import kept_rotary
from student.evaluate import EvaluateOptions, evaluate
from student.generate import generate
from student.model import DistilXLSTM, StudentConfig, check_shape
from student.runs.checkpoint import RunRecord, load_student
from student.training.optimizer import decays

SHAPES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax, no positions": {"rope_theta": 0.0, "kv_heads": 0, "head_width": 6},
    "none": {"feature_map": "none", "qkv_bias": True},
}


@pytest.fixture(params=SHAPES)
def model(request: pytest.FixtureRequest) -> DistilXLSTM:
    torch.manual_seed(0)
    facts, tensors = toy_teacher()
    return shake(DistilXLSTM(student_of(**SHAPES[request.param]), facts, tensors, max_length=64))


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_every_parameter_receives_a_gradient(model: DistilXLSTM) -> None:
    out = model(tokens(2, 16), map_block=4)
    (out.h_BTD.square().sum() + sum(m.square().sum() for m in out.maps.values())).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert model.mlstm_blocks == (0, 1) and model.config.slstm_blocks() == ()


def test_what_a_validation_kept_is_of_use_in_training(model: DistilXLSTM) -> None:
    """The table of rotary positions may first be asked for in inference mode."""
    kept_rotary.cache_clear()
    with torch.inference_mode():
        model(tokens(2, 16))
    model(tokens(2, 16)).h_BTD.sum().backward()


def test_a_fresh_block_attends_and_gates_nothing_away() -> None:
    """Output gates are 1, forget and input gates alike for all tokens, feature maps scaled identities."""
    facts, tensors = toy_teacher()
    block = DistilXLSTM(student_of(), facts, tensors, max_length=64).stack.blocks[0]
    x_BTD = torch.randn(2, 8, 64)
    inputs, gate_BTE = block.cell_inputs(x_BTD, 0)
    assert not gate_BTE.any() and inputs.igate_BHT.unique().tolist() == [30.0]
    assert inputs.fgate_BHT.unique().tolist() == [6.0]
    torch.testing.assert_close(inputs.q_BHTd.sum(-1), torch.ones(2, 4, 8))
    torch.testing.assert_close(block.q_map @ block.q_map * 4, torch.eye(16).expand(4, 16, 16))
    assert torch.equal(inputs.v_BHTd[..., 16:], torch.eye(16)[0].expand(2, 4, 8, 16))


@torch.no_grad()
def test_later_tokens_change_nothing_before_them(model: DistilXLSTM) -> None:
    ids, changed = tokens(2, 70), tokens(2, 70)
    changed[:, 40:] = tokens(2, 30, seed=1)
    torch.testing.assert_close(model(ids).h_BTD[:, :40], model(changed).h_BTD[:, :40], atol=1e-5, rtol=0)
    assert not torch.allclose(model(ids).h_BTD[:, 40:], model(changed).h_BTD[:, 40:], atol=1e-2)


# What is left in float64 without feature maps is the cell's epsilon, which its two forms add at different scales.
@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-6)])
def test_step_and_parallel_form_agree(model: DistilXLSTM, dtype: torch.dtype, tolerance: float) -> None:
    model.to(dtype)
    ids = tokens(2, 70)  # more than one chunk of the mLSTM
    parallel = model(ids).h_BTD
    state = model.initial_state(2)
    size = state.bytes()
    for t in range(ids.shape[1]):
        h_BD, state = model.step(ids[:, t], state)
        torch.testing.assert_close(h_BD, parallel[:, t], atol=tolerance, rtol=tolerance)
        assert state.bytes() == size


@torch.no_grad()
@pytest.mark.parametrize("prompt", [1, 2, 40, 64])
def test_prefill_hands_over_to_step(model: DistilXLSTM, prompt: int) -> None:
    ids = tokens(2, 70)
    parallel = model(ids).h_BTD
    h_BD, state = model.prefill(ids[:, :prompt])
    assert state.bytes() == model.initial_state(2).bytes()
    torch.testing.assert_close(h_BD, parallel[:, prompt - 1], atol=1e-4, rtol=1e-4)
    first, _ = model.step(ids[:, prompt], state)
    for t in range(prompt, 70):
        h_BD, state = model.step(ids[:, t], state)
        assert t > prompt or torch.equal(h_BD, first), "a step changed the state it was given"
        torch.testing.assert_close(h_BD, parallel[:, t], atol=1e-4, rtol=1e-4)


def test_greedy_text_is_the_argmax_of_the_parallel_form(model: DistilXLSTM) -> None:
    text = [5, 6, 7]
    for token in generate(model, [5, 6, 7], max_new_tokens=12, temperature=0):
        with torch.no_grad():
            assert token == int(model.logits(model(torch.tensor([text])).h_BTD[0, -1:])[0].argmax())
        text.append(token)
    assert len(text) == 15


def test_bfloat16_autocast_trains_near_float32(model: DistilXLSTM) -> None:
    ids = tokens(2, 64)
    exact = model(ids, map_block=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(ids, map_block=8)
    assert all(m.dtype == torch.float32 for m in rounded.maps.values())
    error = (rounded.h_BTD.float() - exact.h_BTD).norm() / exact.h_BTD.norm()
    assert 1e-5 < error < 0.05
    rounded.h_BTD.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_features_that_do_not_meet_give_zero_and_no_nan() -> None:
    """φ(q)·φ(k) of opposite, long q and k is 0 in float32: the first token then has a sum of 0."""
    facts, tensors = toy_teacher()
    block = DistilXLSTM(student_of(blocks=1, rope_theta=0.0, kv_heads=0), facts, tensors, max_length=64).stack.blocks[0]
    with torch.no_grad():
        block.k_proj.weight.copy_(-block.q_proj.weight)
        block.q_map.mul_(1e4)
        block.k_map.mul_(1e4)
    x_BTD = torch.randn(2, 3, 64)
    y_BTD = block.mix(x_BTD)
    torch.testing.assert_close(y_BTD[:, 0], x_BTD[:, 0])
    y_BTD.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in block.parameters() if p.grad is not None)


def test_matrices_are_decayed_and_feature_maps_are_not(model: DistilXLSTM) -> None:
    decayed = {name.rpartition("blocks.0.")[2] for name, p in model.named_parameters() if decays(name, p)}
    named = {name.partition("blocks.0.")[2] for name, _ in model.named_parameters() if "blocks.0." in name}
    kept = {"q_map", "k_map", "head_norm", "mixer_norm.weight", "ffn_norm.weight", "igate.bias", "fgate.bias"}
    kept |= {f"{name}_proj.bias" for name in "qkv"}
    assert named - decayed == kept & named and {"q_proj.weight", "igate.weight", "down_proj.weight"} <= decayed


# Shapes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feedforward": 0}, "transformer.feedforward >= 1, found blocks=2, heads=4, feedforward=0"),
        ({"kv_heads": 3}, "transformer.kv_heads=3 does not divide student.heads=4"),
        ({"kv_heads": 8}, "transformer.kv_heads=8 does not divide student.heads=4"),
        ({"heads": 5}, "heads=5 does not divide the teacher's width 64: give student.transformer.head_width"),
        ({"heads": 64, "kv_heads": 0}, "head_width: heads of 1 channels; an even number"),
        ({"head_width": 15}, "head_width: heads of 15 channels; an even number"),
        ({"head_width": 4096}, "head_width=4096: 4 heads of it are more than 64 times the teacher's width 64"),
        ({"rope_theta": 1.0}, "rope_theta=1.0: must be 0, or a number above 1"),
        ({"feature_map": "relu"}, "feature_map='relu': must be softmax or none"),
        ({"blocks": 0}, "blocks=0"),
    ],
)
def test_a_shape_that_cannot_be_built_is_named(changes: dict[str, Any], message: str) -> None:
    facts, tensors = toy_teacher()
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        DistilXLSTM(student_of(**changes), facts, tensors, max_length=64)


def test_options_of_the_other_blocks_have_no_effect() -> None:
    check_shape(replace(student_of(heads=3, head_width=10, kv_heads=1), slstm_at=(9,), conv_kernel=1), 64)


# Run folders


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_cache(tmp_path_factory.mktemp("transformer") / "cache", rows=4)


@pytest.mark.parametrize("name", SHAPES)
def test_a_run_folder_gives_the_student_back(name: str, cache: Path, tmp_path: Path) -> None:
    config = student_of(**SHAPES[name])
    run = write_run(tmp_path / "run", cache, config)
    assert RunRecord.read(run).student == config
    student, teacher = load_student(run)
    torch.manual_seed(1)
    written = DistilXLSTM(config, teacher.facts, Cache(cache).teacher.tensors(), 64)
    ids = tokens(1, 20) % 61
    assert torch.equal(student(ids).h_BTD, written(ids).h_BTD)
    figures = evaluate(EvaluateOptions(str(run), str(cache), maps=1))
    assert figures["trainable_parameters"] == sum(p.numel() for p in written.parameters())


def test_a_student_of_another_shape_than_the_checkpoints_is_refused(cache: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", cache, student_of())
    for changes in ({"kv_heads": 1}, {"feature_map": "none"}, {"qkv_bias": True}, {"feedforward": 64}):
        record = read_json(run / "run.json")
        record["student"]["transformer"] = asdict(shape_of(**changes))
        commit_json(run / "run.json", record)
        with pytest.raises(UserError, match=r"does not hold the student that .*run\.json describes"):
            load_student(run)
    record["student"]["transformer"] = None
    commit_json(run / "run.json", record)
    with pytest.raises(UserError, match="does not hold the student"):
        load_student(run)


WRONG: list[Any] = [None, "x", [], {}, True, -1, 1.5, 1e300, 10**400, -(10**400)]
RIGHT: dict[str, list[Any]] = {
    "feedforward": [],
    "kv_heads": [],
    "head_width": [],
    "rope_theta": [1.5],
    "qkv_bias": [True],
    "feature_map": [],
}


@pytest.mark.parametrize("field", RIGHT)
def test_a_strangers_values_are_refused_by_name(field: str, cache: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", cache, student_of())
    good = (run / "run.json").read_bytes()
    for wrong in WRONG:
        record = json.loads(good)
        del record["digest"]
        record["student"]["transformer"][field] = wrong
        commit_json(run / "run.json", record)
        if any((type(wrong), wrong) == (type(right), right) for right in RIGHT[field]):
            check_shape(RunRecord.read(run).student, 64)
            continue
        with pytest.raises(UserError) as raised:
            load_student(run)
        assert f"student.transformer.{field}" in str(raised.value), wrong
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


@pytest.mark.parametrize("wrong", ["x", [], 3, {}, {"feedforward": 96, "layers": 2}, [["feedforward", 1]], True])
def test_what_is_no_shape_at_all_is_refused(wrong: Any, cache: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", cache, student_of())
    record = read_json(run / "run.json")
    for values in ({**record["student"], "transformer": wrong}, wrong or [wrong]):
        commit_json(run / "run.json", {**record, "student": values})
        with pytest.raises(UserError, match=r"run\.json was written by another version"):
            load_student(run)


def test_plain_values_make_the_configuration() -> None:
    config = replace(student_of(), slstm_at=(1, 2))
    plain = json.loads(json.dumps(asdict(config)))
    kept = copy.deepcopy(plain)
    assert StudentConfig.of(plain) == config and plain == kept
