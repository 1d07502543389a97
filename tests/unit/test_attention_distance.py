"""Distances of attention maps, and the maps that a student is compared with, against dense definitions.

Legend: T tokens, b tokens a block, n blocks, G depth groups.
"""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_cache import write_toy_cache
from helpers_run import write_run
from PIL import Image
from torch import Tensor

from pipeline.commit import read_json
from pipeline.errors import run_command
from student import attention_distance as command
from student.blocks.implicit_attention import pool_dense
from student.evaluation.attention_baselines import fit, own_block_map, previous_block_map, recency_map, uniform_map
from student.evaluation.map_distances import (
    compared_rows,
    group_weights,
    jensen_shannon,
    student_shares,
    teacher_shares,
    total_variation,
)
from student.model import StudentConfig
from student.runs.checkpoint import load_student


def pooled(A_TT: Tensor, block: int) -> Tensor:
    return pool_dense(A_TT[None, None], block)[0, 0].float()


def distances_by_hand(p: list[float], q: list[float]) -> tuple[float, float]:
    def kl(a: list[float], b: list[float]) -> float:
        return sum(x * math.log2(x / y) for x, y in zip(a, b, strict=True) if x > 0)

    m = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    return sum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2, kl(p, m) / 2 + kl(q, m) / 2


@pytest.mark.parametrize(
    ("p", "q"),
    [([0.5, 0.5, 0], [0.2, 0.3, 0.5]), ([1, 0, 0], [0, 0, 1]), ([0.1, 0.2, 0.7], [0.1, 0.2, 0.7])],
)
def test_distances_are_their_definitions(p: list[float], q: list[float]) -> None:
    tv, js = distances_by_hand(p, q)
    p_11n, q_11n = torch.tensor(p)[None, None], torch.tensor(q)[None, None]
    assert float(total_variation(p_11n, q_11n)) == pytest.approx(tv, abs=1e-6)
    assert float(jensen_shannon(p_11n, q_11n)) == pytest.approx(js, abs=1e-6)
    assert float(jensen_shannon(q_11n, p_11n)) == pytest.approx(js, abs=1e-6)


def test_a_row_that_says_nothing_is_as_far_as_can_be() -> None:
    p, zero = torch.tensor([[[0.5, 0.5]]]), torch.zeros(1, 1, 2)
    assert float(total_variation(p, zero)) == float(jensen_shannon(p, zero)) == 1.0


@pytest.mark.parametrize(("n", "block"), [(4, 5), (3, 1), (1, 7)])
def test_baselines_are_pooled_exactly(n: int, block: int) -> None:
    T = n * block
    causal_TT = torch.ones(T, T, dtype=torch.float64).tril()
    uniform_TT = causal_TT / causal_TT.sum(-1, keepdim=True)
    torch.testing.assert_close(uniform_map(n, block), pooled(uniform_TT, block))
    away_TT = (torch.arange(T)[:, None] - torch.arange(T)[None, :]).double()
    for half_life in (0.7, 3.0, 1e5):
        decayed_TT = causal_TT * torch.exp2(-away_TT.clamp_min(0) / half_life)
        expected_nn = pooled(decayed_TT / decayed_TT.sum(-1, keepdim=True), block)
        torch.testing.assert_close(recency_map(half_life, n, block), expected_nn, atol=1e-6, rtol=1e-5)
    assert own_block_map(3).tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert previous_block_map(3).tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 0]]


def test_rows_with_one_key_block_are_not_compared() -> None:
    maps_BGnn = torch.rand(2, 1, 4, 4).tril() + 0.1 * torch.eye(4)
    length_B = torch.tensor([8, 7])  # the last block of the second row is not full
    kept = compared_rows(teacher_shares(maps_BGnn, "keep"), length_B, 2, "keep")
    assert kept[:, 0].tolist() == [[False, True, True, True], [False, True, True, False]]
    dropped = compared_rows(teacher_shares(maps_BGnn, "drop"), length_B, 2, "drop")
    assert dropped[:, 0].tolist() == [[False, False, True, True], [False, False, True, False]]
    maps_BGnn[0, 0, 2, 1:] = 0.0  # all of it on the first block
    again = compared_rows(teacher_shares(maps_BGnn, "drop"), length_B, 2, "drop")
    assert again[0, 0].tolist() == [False, False, False, True]


def test_blocks_answer_for_the_groups_at_their_depth() -> None:
    assert group_weights((1, 3), 4, 4) == [{}, {1: 1.0}, {}, {3: 1.0}]
    assert group_weights((1,), 2, 6) == [{}, {}, {}, {1: 1.0}, {1: 1.0}, {1: 1.0}]
    weights = group_weights((0, 1, 2), 3, 2)
    assert weights[0] == pytest.approx({0: 2 / 3, 1: 1 / 3}) and weights[1] == pytest.approx({1: 1 / 3, 2: 2 / 3})


def test_students_are_compared_by_magnitude() -> None:
    first_nn = torch.tensor([[2.0, 9.0], [-1.0, 3.0]])
    second_nn = torch.tensor([[-1.0, 0.0], [0.5, 0.5]])
    found = student_shares({0: first_nn[None], 2: second_nn[None]}, {0: 0.75, 2: 0.25}, "keep")[0]
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0], [0.3125, 0.6875]]))


def test_the_fit_finds_what_the_maps_were_made_of() -> None:
    n, block = 6, 8
    makers = [recency_map(4.0, n, block), recency_map(60.0, n, block)]
    noisy = torch.stack(makers)[None] * (1 + 0.05 * torch.rand(12, 2, n, n, generator=torch.Generator().manual_seed(0)))
    lengths = torch.tensor([48] * 10 + [24] * 2)
    noisy[10:, :, 3:] = 0.0  # padded blocks
    fitted = fit([(noisy[:5], lengths[:5]), (noisy[5:], lengths[5:])], block)
    assert fitted.rows == 12
    for name in ("total_variation", "jensen_shannon"):
        for sinks in ("keep", "drop"):
            assert fitted.half_life[name, sinks] == pytest.approx([4.0, 60.0], rel=0.25)  # type: ignore[index]
    expected = teacher_shares(noisy, "keep")
    torch.testing.assert_close(fitted.mean_map["keep"][:, :3], expected[:, :, :3].mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fitted.mean_map["keep"][:, 3:], expected[:10, :, 3:].mean(0), atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    return write_toy_cache(folder / "c", units=2, rows=5, length=32, block=8, groups=4)


def test_command_measures_what_the_definitions_say(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", cache)
    arguments = ["--run", str(run), "--cache", str(cache), "--batch_rows", "2", "--max_rows", "3", "--untrained", "2"]
    assert command.main(arguments) == 0
    shown = capsys.readouterr().out
    content = read_json(run / "attention_distance.json")
    assert (content["rows"], content["fitted_rows"], content["untrained_seeds"]) == (3, 10, 2)
    assert [entry["mlstm_blocks"] for entry in content["depth"]] == [{}, {}, {"1": 1.0}, {"1": 1.0}]
    assert "student" not in content["depth"][0]["keep"]["jensen_shannon"]
    student, _ = load_student(run)
    rows = next(command.read(opened(cache), "heldout", 3, 3))
    with torch.no_grad():
        map_Bnn = student(rows.input_ids_BT, map_block=8).maps[1].abs().tril()
    student_Bnn = map_Bnn / map_Bnn.sum(-1, keepdim=True)
    teacher_Bnn = rows.attn_map_BGnn[:, 3]
    expected = [
        distances_by_hand((p / p.sum()).tolist(), q.tolist())
        for p, q in zip(teacher_Bnn[:, 1:].flatten(0, 1), student_Bnn[:, 1:].flatten(0, 1), strict=True)
    ]
    found = content["depth"][3]["keep"]
    assert found["compared"] == 9
    assert found["total_variation"]["student"] == pytest.approx(np.mean([tv for tv, _ in expected]), abs=1e-5)
    assert found["jensen_shannon"]["student"] == pytest.approx(np.mean([js for _, js in expected]), abs=1e-5)
    both = [content["depth"][g]["drop"]["jensen_shannon"]["student"] for g in (2, 3)]
    assert content["mean"]["drop"]["jensen_shannon"]["student"] == pytest.approx(np.mean(both))
    assert found["jensen_shannon"]["untrained_deviation"] > 0
    assert f"{found['jensen_shannon']['student']:.4f}" in shown and "–: no mLSTM block at this depth" in shown
    assert min(Image.open(io.BytesIO((run / "attention_distance.png").read_bytes())).size) > 600


def opened(path: Path) -> command.Cache:
    return command.Cache(path)


def test_a_student_that_attends_as_the_teacher_is_at_no_distance(cache: Path, tmp_path: Path) -> None:
    rows = next(command.read(opened(cache), "heldout", 4, 4))
    fitted = fit([(rows.attn_map_BGnn, rows.length_B)], 8)
    comparison = command.Comparison(fitted, group_weights((0, 1, 2, 3), 4, 4), 8, 4)
    own = {group: rows.attn_map_BGnn[:, group] for group in range(4)}
    comparison.add(rows, {"student": {g: -0.3 * map_Bnn for g, map_Bnn in own.items()}, "untrained 0": own})
    mean = comparison.result()["mean"]
    for sinks in ("keep", "drop"):
        for name in ("total_variation", "jensen_shannon"):
            of = mean[sinks][name]
            assert of["student"] == pytest.approx(0.0, abs=1e-5)
            assert of["mean_teacher_map"] < min(of["recency"], of["uniform"], of["own_block"], of["previous_block"])
            assert of["recency"] <= of["uniform"] + 1e-3


def test_mistakes_are_told_in_one_sentence(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slstm = write_run(tmp_path / "slstm", cache, StudentConfig(blocks=1, heads=4))
    run = write_run(tmp_path / "run", cache)
    small = {"units": 1, "rows": 2}
    bare = write_toy_cache(tmp_path / "bare", block=0, length=32, **small)  # type: ignore[arg-type]
    coarse = write_toy_cache(tmp_path / "coarse", block=16, length=32, **small)  # type: ignore[arg-type]
    no_train = write_toy_cache(tmp_path / "held", units=0, rows=2, length=32, block=8)
    other = write_toy_cache(tmp_path / "other", seed=1, block=8, length=32, **small)  # type: ignore[arg-type]
    cases = [
        (slstm, cache, [], "none of the student's 1 blocks is an mLSTM"),
        (run, bare, [], "has no attention maps: dump one"),
        (run, coarse, [], "has maps of 2 blocks: dump one whose rows have 3 blocks or more"),
        (run, no_train, [], "no training shards to fit on"),
        (run, other, [], "different teachers"),
        (run, cache, ["--untrained", "0"], "--untrained must be 1 or more, found 0"),
        (run, cache, ["--max_rows", "0"], "--max_rows must be 1 or more"),
    ]
    for folder, of, more, message in cases:
        given = ["--run", str(folder), "--cache", str(of), *more]
        assert run_command(lambda given=given: command.main(given)) == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1, error
        assert not (folder / "attention_distance.json").exists()
