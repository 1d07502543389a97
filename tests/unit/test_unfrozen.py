"""Students whose embedding or head is trained: what is a parameter, what is tied, stored, taken over and refused."""

from __future__ import annotations

import itertools
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers_cache import write_toy_cache
from helpers_export import shake, write_toy_run
from helpers_student import toy_teacher
from helpers_transformer import student_of
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

import student.__main__ as command
from pipeline.commit import commit_json, read_json
from pipeline.errors import UserError
from student.evaluate import EvaluateOptions, evaluate
from student.export import ExportOptions, export
from student.exporting.weights import deviations, exported_config, exported_model, exported_tensors
from student.generate import main as generate
from student.losses.fused import Head, TeacherTopK, fused_kd_sums
from student.model import DistilXLSTM, StudentConfig
from student.runs.checkpoint import RunRecord, load_student
from student.training.optimizer import decays

SMALL = StudentConfig(blocks=2, heads=4)
EMBEDDING, HEAD = {"train_embedding": True}, {"train_head": True}
BOTH = EMBEDDING | HEAD
WAYS = [{}, EMBEDDING, HEAD, BOTH]
V, D = 97, 64


def build(tied: bool, trained: dict[str, bool], **facts: Any) -> DistilXLSTM:
    torch.manual_seed(0)
    return DistilXLSTM(replace(SMALL, **trained), *toy_teacher(V, D, tied=tied, **facts), max_length=64)


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("trained", WAYS, ids=["none", "embedding", "head", "both"])
def test_what_is_trained_is_a_parameter_and_begins_as_the_teachers(tied: bool, trained: dict[str, bool]) -> None:
    model, frozen = build(tied, trained), build(tied, {})
    stored = {name for name in model.state_dict() if name.endswith("_VD")}
    wanted = {"embedding_VD"} if trained.get("train_embedding") else set()
    one = tied and len(trained) != 1
    if trained.get("train_head") and not one:
        wanted.add("untied_head_VD")
    assert stored == wanted == {name for name, _ in model.named_parameters() if name.endswith("_VD")}
    assert model.tied == one and (model.head_VD is model.embedding_VD) == one
    assert model.trainable_parameters() == frozen.trainable_parameters() + len(wanted) * V * D
    h_BTD = model(tokens(2, 12)).h_BTD
    assert torch.equal(h_BTD, frozen(tokens(2, 12)).h_BTD)
    assert torch.equal(model.logits(h_BTD), frozen.logits(h_BTD))


def test_a_trained_one_is_float32_and_shares_nothing_with_the_teachers_tensor() -> None:
    facts, tensors = toy_teacher(V, D)
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    model = DistilXLSTM(replace(SMALL, **HEAD), facts, tensors, max_length=64)
    assert (model.head_VD.dtype, model.embedding_VD.dtype) == (torch.float32, torch.bfloat16)
    single = DistilXLSTM(replace(SMALL, **HEAD), *toy_teacher(V, D), max_length=64)
    before = single.embedding_VD.clone()
    shake(single)
    assert torch.equal(single.embedding_VD, before) and not torch.equal(single.head_VD, before)


def gradients(model: DistilXLSTM, ids_BT: Tensor) -> dict[str, Tensor]:
    """Of the cross-entropy by the fused loss, over the next tokens."""
    h_ND = model(ids_BT[:, :-1]).h_BTD.flatten(0, 1)
    n = len(h_ND)
    nothing = TeacherTopK(torch.zeros(n, 1, dtype=torch.long), torch.zeros(n, 1), torch.zeros(n))
    target_N = ids_BT[:, 1:].flatten()
    fused_kd_sums(h_ND, Head(model.head_VD), target_N, nothing, 1.0, 0.0, 1.0, chunk_rows=5).total.backward()
    return {name: p.grad for name, p in model.named_parameters() if name.endswith("_VD") and p.grad is not None}


def test_one_tied_parameter_gets_the_sum_of_both_gradients() -> None:
    """Against two parameters of the same values; and the embedding's alone, which comes through all blocks."""
    ids = tokens(2, 14)
    _, tensors = toy_teacher(V, D)
    facts, _ = toy_teacher(V, D, tied=False)
    torch.manual_seed(0)
    two = DistilXLSTM(replace(SMALL, **BOTH), facts, tensors, max_length=64)
    apart = gradients(two, ids)
    assert set(apart) == {"embedding_VD", "untied_head_VD"} and all(grad.any() for grad in apart.values())
    one = gradients(build(True, BOTH), ids)
    assert set(one) == {"embedding_VD"}
    torch.testing.assert_close(one["embedding_VD"], apart["embedding_VD"] + apart["untied_head_VD"])
    for trained, name in ((EMBEDDING, "embedding_VD"), (HEAD, "untied_head_VD")):
        found = gradients(build(True, trained), ids)
        assert set(found) == {name}
        torch.testing.assert_close(found[name], apart[name])
    two.zero_grad()
    logits_NV = two.logits(two(ids[:, :-1]).h_BTD.flatten(0, 1))
    F.cross_entropy(logits_NV, ids[:, 1:].flatten(), reduction="sum").backward()
    torch.testing.assert_close(two.embedding_VD.grad, apart["embedding_VD"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(two.head_VD.grad, apart["untied_head_VD"], rtol=1e-4, atol=1e-5)


def test_no_decay_pulls_them_to_zero() -> None:
    model = build(False, BOTH)
    decayed = {name for name, p in model.named_parameters() if decays(f"model.{name}", p)}
    assert decayed and not {"embedding_VD", "untied_head_VD"} & decayed


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("trained", WAYS[1:], ids=["embedding", "head", "both"])
def test_the_exported_model_computes_the_same(tied: bool, trained: dict[str, bool]) -> None:
    student = shake(build(tied, trained, soft_cap=20.0))
    config = exported_config(student)
    model = exported_model(config, exported_tensors(student, torch.float32))
    assert config.tie_word_embeddings == (tied and trained == BOTH)
    assert deviations(student, model).max() < 1e-5


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_cache(tmp_path_factory.mktemp("unfrozen") / "cache", units=2, rows=8, length=32, block=0, window=0)


def train(cache: Path, run: Path, *extra: str) -> int:
    settings = {
        "cache": cache, "run": run, "data.batch_rows": 4, "model.student.blocks": 2, "model.student.heads": 4,
        "model.loss.beta": 0, "trainer.accelerator": "cpu", "trainer.max_steps": 2, "trainer.max_epochs": -1,
    }  # fmt: skip
    return command.main([*(f"--{name}={value}" for name, value in settings.items()), *extra])


def options(trained: dict[str, bool]) -> list[str]:
    return [f"--model.student.{name}={str(value).lower()}" for name, value in trained.items()]


def weights(run: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return found


@pytest.fixture(scope="module")
def runs(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """frozen: nothing trained but the blocks; head and both: runs that begin with it."""
    folder = tmp_path_factory.mktemp("runs")
    assert train(cache, folder / "frozen") == 0
    for name, trained in (("head", HEAD), ("both", BOTH)):
        assert train(cache, folder / name, f"--init_from={folder / 'frozen'}", *options(trained)) == 0
    return folder


def test_a_second_run_trains_what_the_first_had_frozen(cache: Path, runs: Path) -> None:
    before, after = weights(runs / "frozen"), weights(runs / "head")
    teacher_VD = load_student(runs / "frozen")[0].head_VD
    assert after.keys() - before.keys() == {"model.untied_head_VD"}
    assert weights(runs / "both").keys() - before.keys() == {"model.embedding_VD"}
    moved_VD = after["model.untied_head_VD"] - teacher_VD
    assert 1e-5 < float(moved_VD.abs().max()) < 0.01, "the head did not begin as the teacher's"
    still = "--model.optimizer.lr=1e-12", "--trainer.max_steps=1"
    begun = runs / "begun"
    assert train(cache, begun, f"--init_from={runs / 'head'}", *options(HEAD), *still) == 0
    for name, value in weights(begun).items():
        torch.testing.assert_close(value, after[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", ["head", "both"])
def test_what_reads_a_run_takes_the_trained_ones(
    name: str, cache: Path, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, teacher = load_student(runs / name)
    stored = weights(runs / name)
    assert torch.equal(student.head_VD, stored[f"model.{'untied_head_VD' if name == 'head' else 'embedding_VD'}"])
    assert torch.equal(student.embedding_VD, teacher.tensors()["embedding_VD"]) == (name == "head")
    figures = evaluate(EvaluateOptions(str(runs / name), str(cache), device="cpu"))
    assert figures["trainable_parameters"] == student.trainable_parameters()
    generate([f"--run={runs / name}", "--prompt=the", "--max_new_tokens=5", "--device=cpu"])
    assert "5 tokens" in capsys.readouterr().err
    done = export(ExportOptions(runs / name, tmp_path / "out"))
    assert done.deviation < 1e-5
    with safe_open(done.folder / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) == (name == "head")  # noqa: SIM118 - no dictionary
        assert torch.equal(file.get_tensor("model.embed_tokens.weight"), student.embedding_VD.float())
    text = (done.folder / "README.md").read_text()
    told = {"head": "of which the head was trained further", "both": "trained further, around"}
    assert told[name] in text and "unchanged" not in text and "the teacher's weights, and from its outputs" in text


@pytest.mark.parametrize(
    ("begun_with", "trained", "message"),
    [
        ("head", {}, r"--model\.student\.train_head is False, in .*/head it is True: a frozen one is the teacher's"),
        ("both", HEAD, r"--model\.student\.train_embedding is False, in .*/both it is True"),
        ("head", BOTH, r"embedding and head of .*/head are two, since only one of them was trained"),
        ("frozen", HEAD | {"blocks": 3}, r"another student: --model\.student\.blocks is 3, in .*/frozen it is 2"),
    ],
)
def test_what_a_run_cannot_take_over_is_refused(
    begun_with: str, trained: dict[str, Any], message: str, cache: Path, runs: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        train(cache, tmp_path / "run", f"--init_from={runs / begun_with}", *options(trained))
    assert not (tmp_path / "run" / "run.json").exists()


def test_of_an_untied_teacher_the_other_one_may_follow(tmp_path: Path) -> None:
    cache = write_toy_cache(tmp_path / "cache", units=1, rows=8, length=32, block=0, window=0, tied=False)
    assert train(cache, tmp_path / "head", *options(HEAD)) == 0
    one = "--model.optimizer.lr=1e-12", "--trainer.max_steps=1"
    assert train(cache, tmp_path / "both", f"--init_from={tmp_path / 'head'}", *options(BOTH), *one) == 0
    head, both = weights(tmp_path / "head"), weights(tmp_path / "both")
    torch.testing.assert_close(both["model.untied_head_VD"], head["model.untied_head_VD"], rtol=0, atol=1e-6)
    _, teacher = load_student(tmp_path / "head")
    torch.testing.assert_close(both["model.embedding_VD"], teacher.tensors()["embedding_VD"], rtol=0, atol=1e-6)


def test_a_run_of_a_version_without_the_options_goes_on(cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(cache, run) == 0
    settings = yaml.safe_load((run / "config.yaml").read_text())
    record = read_json(run / "run.json")
    for name in BOTH:
        del settings["model"]["student"][name], record["student"][name]
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    commit_json(run / "run.json", record)
    assert train(cache, run) == 0
    with pytest.raises(UserError, match=r"--model\.student\.train_head was False, is True"):
        train(cache, run, *options(HEAD))


def test_a_checkpoint_without_what_run_json_promises_is_refused(tmp_path: Path) -> None:
    run = write_toy_run(tmp_path, SMALL)
    record = RunRecord.read(run)
    replace(record, student=replace(record.student, **HEAD)).write(run)
    with pytest.raises(UserError, match="does not hold the student that .* the first is untied_head_VD"):
        load_student(run)


def test_a_shape_from_elsewhere_says_true_or_false() -> None:
    facts, tensors = toy_teacher(V, D)
    for name, wrong in itertools.product(BOTH, ("yes", 1, None)):
        with pytest.raises(UserError, match=f"student.{name}="):
            DistilXLSTM(StudentConfig.of(asdict(SMALL) | {name: wrong}), facts, tensors, max_length=64)


def test_transformer_shaped_blocks_train_them_too(tmp_path: Path) -> None:
    run = write_toy_run(tmp_path, replace(student_of(), **BOTH))
    assert export(ExportOptions(run, tmp_path / "out")).deviation < 1e-5
