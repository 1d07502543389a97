"""Evaluation against figures computed from the toy teacher's full logits.

Legend: R rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_cache import toy_logits, write_toy_cache
from helpers_run import write_run
from torch import Tensor

from pipeline.cache import Cache
from pipeline.commit import read_json
from pipeline.errors import UserError, run_command
from student import evaluate as command
from student.data.batch import IGNORE, Batch
from student.data.loader import SplitLoader
from student.evaluation.metrics import Positions, position_bins, unigram_log_probabilities
from student.runs.checkpoint import load_student


@pytest.fixture(scope="module", params=["stream", "document"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run and its cache, packed either way; the last batch of held-out rows is a smaller one."""
    folder = tmp_path_factory.mktemp(request.param)
    length = 32 if request.param == "stream" else 96  # longer than some documents
    cache = write_toy_cache(folder / "cache", units=2, rows=7, length=length, block=8, packing=request.param)
    return write_run(folder / "run", cache), cache


def whole(cache: Path) -> Batch:
    """All held-out rows as one batch."""
    return next(iter(SplitLoader([Cache(cache)], "heldout", 100)))


def student_logits(run: Path, batch: Batch) -> Tensor:
    model, _ = load_student(run)
    with torch.no_grad():
        return model.logits(model(batch.input_ids_BT).h_BTD.flatten(0, 1)).view(*batch.input_ids_BT.shape, -1)


def test_figures_follow_from_full_logits(folders: tuple[Path, Path]) -> None:
    run, cache = folders
    found = command.evaluate(command.EvaluateOptions(str(run), str(cache), batch_rows=3))
    batch = whole(cache)
    counted_BT = batch.target_BT != IGNORE
    target_N = batch.target_BT[counted_BT]
    if Cache(cache).spec.packing == "stream":
        assert counted_BT.all()  # the last position's target is the token after the row
    else:
        assert not counted_BT.all()
    log_q_NV = student_logits(run, batch)[counted_BT].log_softmax(-1).double()
    log_p_NV = torch.from_numpy(toy_logits(cache, "heldout", 0))[counted_BT].log_softmax(-1).double()
    unigram_V = unigram(cache)
    _, teacher = load_student(run)
    target_bytes = sum(len(teacher.token_bytes()[i]) for i in target_N.tolist())
    assert (found["targets"], found["target_bytes"]) == (len(target_N), target_bytes)
    for name, log_NV in (("student", log_q_NV), ("teacher", log_p_NV), ("unigram", unigram_V.expand(log_q_NV.shape))):
        nats = -log_NV.gather(1, target_N[:, None]).sum().item()
        assert found[f"{name}_cross_entropy"] == pytest.approx(nats / len(target_N), rel=1e-5)
        assert found[f"{name}_perplexity"] == pytest.approx(math.exp(nats / len(target_N)), rel=1e-4)
        assert found[f"{name}_bits_per_byte"] == pytest.approx(nats / math.log(2) / target_bytes, rel=1e-5)
    agree = (log_q_NV.argmax(-1) == log_p_NV.argmax(-1)).double().mean().item()
    assert found["top1_agreement"] == pytest.approx(agree)
    top_NK = log_p_NV.topk(Cache(cache).spec.k).indices
    kept_p, kept_q = log_p_NV.gather(1, top_NK).exp(), log_q_NV.gather(1, top_NK).exp()
    rest_p, rest_q = 1 - kept_p.sum(-1), 1 - kept_q.sum(-1)
    kl_N = (kept_p * (kept_p / kept_q).log()).sum(-1) + rest_p * (rest_p / rest_q).log()
    assert found["kl_k1"] == pytest.approx(kl_N.mean().item(), rel=1e-4)
    assert "kl_full" not in found


def unigram(cache: Path) -> Tensor:
    """Add-one smoothed log-probabilities of the training rows' tokens, counted one by one."""
    count = [1.0] * Cache(cache).spec.vocab_size
    for batch in SplitLoader([Cache(cache)], "train", 1):
        for token in batch.input_ids_BT[0, : int(batch.length_B[0])].tolist():
            count[token] += 1
    return torch.tensor(count, dtype=torch.float64).div(sum(count)).log()


class Table:
    """A teacher whose logits are looked up: its hidden states are the logits themselves."""

    vocab_size = 61

    def __init__(self, batch: Batch, logits_BTV: Tensor) -> None:
        self.given = {tuple(row.tolist()): logits_BTV[i] for i, row in enumerate(batch.input_ids_BT)}

    def hidden(self, input_ids_BT: Tensor) -> Tensor:
        return torch.stack([self.given[tuple(row.tolist())] for row in input_ids_BT])

    def logits(self, h_ND: Tensor) -> Tensor:
        return h_ND


def test_full_kl_is_over_the_whole_vocabulary(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run, cache = folders
    monkeypatch.setattr("student.evaluation.device.CPU_ROWS", 10)  # several chunks of a batch
    batch = whole(cache)
    logits_BTV = torch.from_numpy(toy_logits(cache, "heldout", 0))
    options = command.EvaluateOptions(str(run), str(cache), batch_rows=3, full_kl=True, out="full")
    result = command.evaluate(options, Table(batch, logits_BTV))
    counted_BT = batch.target_BT != IGNORE
    log_q_NV = student_logits(run, batch)[counted_BT].log_softmax(-1)
    log_p_NV = logits_BTV[counted_BT].log_softmax(-1)
    kl_N = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)
    assert result["kl_full"] == pytest.approx(kl_N.mean().item(), rel=1e-5)
    assert result["kl_k1"] < result["kl_full"]
    at_N = torch.arange(batch.input_ids_BT.shape[1]).expand(counted_BT.shape)[counted_BT]
    for row in result["by_position"]:
        inside_N = (at_N >= row["first"]) & (at_N <= row["last"])
        assert row["kl_full"] == pytest.approx(kl_N[inside_N].mean().item(), rel=1e-5)
        assert row["kl_k1"] <= row["kl_full"]


def test_positions_are_binned_by_doubling() -> None:
    assert position_bins(1) == [(0, 0)]
    assert position_bins(2) == [(0, 0), (1, 1)]
    assert position_bins(16) == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15)]
    assert position_bins(18)[-1] == (16, 17)
    for length in range(1, 70):
        covered = [t for first, last in position_bins(length) for t in range(first, last + 1)]
        assert covered == list(range(length))


def test_figures_by_position_are_means_over_their_targets(folders: tuple[Path, Path]) -> None:
    run, cache = folders
    found = command.evaluate(command.EvaluateOptions(str(run), str(cache), batch_rows=3))
    batch = whole(cache)
    counted_BT = batch.target_BT != IGNORE
    target_BT = batch.target_BT.clamp_min(0)
    student_BT = -student_logits(run, batch).log_softmax(-1).gather(2, target_BT[..., None]).squeeze(2)
    teacher_BT = batch.lse_BT - batch.target_logit_BT
    rows = found["by_position"]
    assert sum(row["targets"] for row in rows) == found["targets"]
    for row in rows:
        at = (slice(None), slice(row["first"], row["last"] + 1))
        assert row["targets"] == int(counted_BT[at].sum())
        for name, nats_BT in (("student", student_BT), ("teacher", teacher_BT)):
            mean = nats_BT[at][counted_BT[at]].double().mean().item()
            assert row[f"{name}_cross_entropy"] == pytest.approx(mean, rel=1e-5)
    for name in ("student_cross_entropy", "teacher_cross_entropy", "kl_k1"):
        mean = sum(row[name] * row["targets"] for row in rows) / found["targets"]
        assert found[name] == pytest.approx(mean, rel=1e-9)


def test_another_cache_of_the_teacher_gets_files_of_its_own(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, cache = folders
    other = write_toy_cache(tmp_path / "other", units=1, rows=3, length=16, block=8, k=4)  # other text, T and K
    first = command.evaluate(command.EvaluateOptions(str(run), str(cache)))
    arguments = ["--run", str(run), "--cache", str(other), "--out", "other.text"]
    assert command.main(arguments) == 0
    assert f"targets/s; written to {run / 'evaluation-other.text.json'}" in capsys.readouterr().out
    assert read_json(run / "evaluation.json") == first
    second = read_json(run / "evaluation-other.text.json")
    assert (second["rows"], second["cache"]) == (3, str(other))
    with np.load(run / "attention_maps-other.text.npz") as maps:
        assert maps["teacher"].shape[-1] == 2
    for name in ("../evaluation", "a/b", "", ".hidden", "x" * 65):
        with pytest.raises(UserError, match="letters, digits"):
            command.evaluate(command.EvaluateOptions(str(run), str(other), out=name))


def test_bf16_mixed_is_near_float32_and_leaves_no_setting_behind(folders: tuple[Path, Path]) -> None:
    run, cache = folders
    before = torch.get_float32_matmul_precision()
    exact = command.evaluate(command.EvaluateOptions(str(run), str(cache), maps=0))
    mixed = command.evaluate(command.EvaluateOptions(str(run), str(cache), maps=0, precision="bf16-mixed"))
    assert mixed["student_cross_entropy"] == pytest.approx(exact["student_cross_entropy"], abs=0.02)
    assert mixed["student_cross_entropy"] != exact["student_cross_entropy"]
    assert mixed["teacher_cross_entropy"] == exact["teacher_cross_entropy"]
    assert torch.get_float32_matmul_precision() == before and not torch.is_autocast_enabled("cpu")


def test_files_hold_what_the_table_shows(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run, cache = folders
    assert command.main(["--run", str(run), "--cache", str(cache), "--batch_rows", "2", "--maps", "3"]) == 0
    shown = capsys.readouterr().out
    figures = read_json(run / "evaluation.json")
    assert figures["rows"] == 7 and f"{figures['student_cross_entropy']:.4f}" in shown
    assert "KL_(K+1)" in shown and "add-one smoothed" in shown
    for row in figures["by_position"]:
        assert f"{row['student_cross_entropy']:.4f}" in shown and f"{row['teacher_cross_entropy']:.4f}" in shown
    batch = whole(cache)
    with np.load(run / "attention_maps.npz", allow_pickle=False) as maps:
        assert set(maps) == {
            "sequence_id", "length", "pool_block", "student_blocks", "teacher", "student_block_1",
        }  # fmt: skip
        assert maps["sequence_id"].tolist() == batch.sequence_id_B[:3].tolist()
        assert (int(maps["pool_block"]), int(maps["student_blocks"])) == (8, 2)
        assert batch.attn_map_BGnn is not None
        np.testing.assert_array_equal(maps["teacher"], batch.attn_map_BGnn[:3].numpy())
        model, _ = load_student(run)
        with torch.no_grad():
            expected = model(batch.input_ids_BT[:3], map_block=8).maps[1].numpy()
        np.testing.assert_allclose(maps["student_block_1"], expected, atol=1e-6)


def test_max_rows_evaluates_the_first_rows(folders: tuple[Path, Path]) -> None:
    run, cache = folders
    found = command.evaluate(command.EvaluateOptions(str(run), str(cache), batch_rows=4, max_rows=5, maps=0))
    batch = command.first_rows(whole(cache), 5)
    assert (found["rows"], found["targets"]) == (5, int((batch.target_BT != IGNORE).sum()))
    assert not (run / "attention_maps.npz").exists()


def test_a_position_without_a_target_counts_in_nothing(folders: tuple[Path, Path]) -> None:
    batch = whole(folders[1])
    batch.target_logit_BT[0, 3] = math.nan
    positions = Positions.of(batch)
    assert 3 not in positions.index_N.tolist()
    assert torch.isfinite(positions.teacher_ce_N).all() and torch.isfinite(positions.log_tail_N).all()
    assert (positions.target_N != IGNORE).all()


def test_unigram_is_add_one_smoothed() -> None:
    found = unigram_log_probabilities(torch.tensor([3, 0, 1])).exp()
    assert found.tolist() == pytest.approx([4 / 7, 1 / 7, 2 / 7])


def test_unigram_counting_stops_at_its_limit(folders: tuple[Path, Path]) -> None:
    cache = Cache(folders[1])
    first = int(cache.shards("train")[0].tokens)
    counts_V, counted = command.count_tokens(cache, 1)
    assert counted == int(counts_V.sum()) == first


def test_mistakes_are_told_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = {"rows": 2, "length": 16, "block": 8}
    cache = write_toy_cache(tmp_path / "cache", **small)  # type: ignore[arg-type]
    other = write_toy_cache(tmp_path / "other", seed=1, **small)  # type: ignore[arg-type]
    empty = write_toy_cache(tmp_path / "empty", heldout_units=0, **small)  # type: ignore[arg-type]
    run = write_run(tmp_path / "run", cache)
    cases = [
        (["--cache", str(other)], "different teachers"),
        (["--cache", str(empty)], "no held-out shards"),
        (["--cache", str(tmp_path / "none")], "is no cache"),
        (["--cache", str(cache), "--checkpoint", "third"], "no checkpoint 'third'"),
        (["--cache", str(cache), "--full_kl", "true", "--teacher", str(tmp_path)], "name its folder with --teacher"),
        (["--cache", str(cache), "--rows", "3"], "--help"),
    ]
    for arguments, message in cases:
        given = ["--run", str(run), *arguments]
        assert run_command(lambda given=given: command.main(given)) == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1, error
    assert not (run / "evaluation.json").exists()
    with pytest.raises(UserError, match="--batch_rows must be 1 or more, found 0"):
        command.evaluate(command.EvaluateOptions(str(run), str(cache), batch_rows=0))


def test_evaluation_json_is_plain_json(folders: tuple[Path, Path]) -> None:
    run, cache = folders
    command.evaluate(command.EvaluateOptions(str(run), str(cache)))
    assert json.loads((run / "evaluation.json").read_text())["checkpoint"] == "last"
