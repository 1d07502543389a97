"""The runner on toy caches: one trial, whole processes, time limits, what is written when."""

from __future__ import annotations

import csv
import gc
import json
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_cache import toy_logits, write_toy_cache
from helpers_run import write_run
from lightning import Callback
from torch import Tensor

from benchmarks.quality.__main__ import main, trials_of, write_answer
from benchmarks.quality.arms import BUDGETS, load_arms
from benchmarks.quality.lab import Lab, RememberedTeacher
from benchmarks.quality.pool import caches_of
from benchmarks.quality.results import RowFile, curves_of
from benchmarks.quality.tables import attention_table, zero_shot_table
from benchmarks.quality.trial import Trial, to_make
from pipeline.cache import Cache
from pipeline.commit import commit_json, read_json
from pipeline.errors import UserError
from student.__main__ import main as train
from student.data.loader import SplitLoader
from student.from_teacher import read_student
from student.model import StudentConfig
from student.runs.run_folder import ORIGIN, steps_done
from student.training.module import DistillModule

VOCAB, WIDTH, LENGTH = 61, 288, 32  # the 9 heads of the experiments' student divide the widths
STEPS, ROWS = 2, 2


def toy_teacher(folder: Path) -> Path:
    """A Transformer of the toy caches' vocabulary, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, max_position_embeddings=LENGTH, **shape)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scratch folder in which every dump of the budget `small` has been made."""
    folder = tmp_path_factory.mktemp("scratch")
    teacher = toy_teacher(folder / "teacher")
    for name in ("experiment", "experiment-hidden", "experiment-draws", "experiment-other", "experiment-long"):
        window, heldout = int(name.endswith("hidden")), int(not name.endswith(("hidden", "draws")))
        cache = write_toy_cache(
            folder / "caches" / "small" / name, units=BUDGETS["small"].shards, heldout_units=heldout, rows=ROWS,
            length=LENGTH * (2 if name == "experiment-long" else 1), k=16, block=8, width=WIDTH, window=window,
        )  # fmt: skip
        manifest = read_json(cache / "manifest.json")
        commit_json(cache / "manifest.json", {**manifest, "teacher_path": str(teacher)})
    return folder


class Table:
    """A teacher whose logits are looked up, and which counts how often it is asked."""

    vocab_size = VOCAB

    def __init__(self, *caches: Path) -> None:
        self.asked = 0
        self.given: dict[tuple[int, ...], Tensor] = {}
        for cache in caches:
            batch = next(iter(SplitLoader([Cache(cache)], "heldout", 100)))
            logits_BTV = torch.from_numpy(toy_logits(cache, "heldout", 0))
            self.given |= {tuple(row.tolist()): logits_BTV[i] for i, row in enumerate(batch.input_ids_BT)}

    def hidden(self, input_ids_BT: Tensor) -> Tensor:
        self.asked += 1
        return torch.stack([self.given[tuple(row.tolist())] for row in input_ids_BT])

    def logits(self, h_ND: Tensor) -> Tensor:
        return h_ND


def trial(scratch: Path, run: Path, arm: str, seed: int = 0, keep: bool = False) -> Trial:
    caches = scratch / "caches" / "small"
    found = load_arms()[arm]
    return Trial(
        found, seed, BUDGETS["small"], caches / found.cache, caches / "experiment", caches / "experiment-other",
        run / f"{arm}-{seed}", keep,
    )  # fmt: skip


def test_a_trial_becomes_a_row(scratch: Path, tmp_path: Path) -> None:
    caches = scratch / "caches" / "small"
    teacher = Table(caches / "experiment", caches / "experiment-other")
    lab = Lab(teacher)
    # The same text is held out in both toy caches, so what is found must be the same.
    first = lab.run(trial(scratch, tmp_path, "delta", keep=True))
    row = first["row"]
    assert (row["arm"], row["seed"], row["budget"], row["question"][0]) == ("delta", 0, "small", "signal")
    assert (row["steps"], row["tokens"]) == (STEPS, STEPS * ROWS * LENGTH)
    assert row["heldout"] == row["other"] and row["heldout"]["targets"] == ROWS * LENGTH
    written = read_json(tmp_path / "delta-0" / "evaluation-heldout.json")
    assert row["heldout"]["ce"] == written["student_cross_entropy"]
    assert row["heldout"]["kl_full"] == written["kl_full"] > 0
    assert row["trainable_parameters"] == written["trainable_parameters"]
    files = [path.stat().st_size for path in (caches / "experiment").rglob("shard-*.parquet")]
    assert len(files) == BUDGETS["small"].shards
    assert row["cache_bytes"] == pytest.approx(sum(files) / (len(files) * ROWS * LENGTH))
    assert first["teacher"]["heldout"]["ce"] == written["teacher_cross_entropy"] < row["heldout"]["ce"]
    assert [place for place, _ in row["by_position"]] == [0, 1, 2, 4, 8, 16]
    assert set(row["seconds"]) == {"prepare", "train", "save", "evaluate", "total"}
    parts = sum(seconds for name, seconds in row["seconds"].items() if name != "total")
    assert 0.5 * row["seconds"]["total"] < parts <= row["seconds"]["total"]
    assert first["curve"]["step"] == [1, 2] and all(value > 0 for value in first["curve"]["kl"])
    json.dumps(first, allow_nan=False)

    asked = teacher.asked
    again, other = (lab.run(trial(scratch, tmp_path, "delta", seed))["row"] for seed in (0, 1))
    assert teacher.asked == asked  # it has read these rows
    assert again["heldout"] == row["heldout"]  # nothing of a run is left in the process
    assert other["heldout"]["ce"] != row["heldout"]["ce"]
    assert not (tmp_path / "delta-1").exists()


def test_further_judges(scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention from the run's own maps; zero-shot tasks of the student, and of the teacher once a process."""
    asked: list[str] = []

    def zero_shot_figures(out: Path, documents: int, **model: str) -> dict[str, Any]:
        asked.extend(model)
        return {"documents": documents, "chance": {"sciq": 0.25}, "tasks": {"sciq": {"measure": "acc", "acc": 0.5}}}

    monkeypatch.setattr("benchmarks.quality.lab.zero_shot_figures", zero_shot_figures)
    lab = Lab(Table(scratch / "caches" / "small" / "experiment"))
    rows = []
    for seed in (0, 1):
        judged = replace(trial(scratch, tmp_path / "runs", "delta", seed), judges=("zero_shot", "attention"))
        rows.append(lab.run(judged)["row"])
    json.dumps(rows, allow_nan=False)
    assert asked == ["run", "teacher", "run"]
    assert (tmp_path / "pictures" / "attention-delta-0.png").stat().st_size > 0
    (line,) = attention_table(rows, "small")
    assert (line["arm"], line["seeds"]) == ("delta", 2)
    assert all(0 < float(line[name]) < 1 for name in ("student", "untrained", "recency", "uniform, no sink"))
    first, student, chance = zero_shot_table(rows, "small")
    assert (first["arm"], student["arm"], chance["sciq"]) == ("teacher", "delta", "25.0") and student["sciq"] == "50.0"


def test_a_judge_that_fails_costs_its_own_figures_only(
    scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise UserError("data/zero_shot cannot be fetched")

    monkeypatch.setattr("benchmarks.quality.lab.zero_shot_figures", refuse)
    judged = replace(trial(scratch, tmp_path / "runs", "ce"), judges=("zero_shot", "attention"))
    row = Lab(Table(scratch / "caches" / "small" / "experiment")).run(judged)["row"]
    assert row["unjudged"] == {"zero_shot": "data/zero_shot cannot be fetched"}
    assert "zero_shot" not in row and row["attention"]["rows"] > 0 and row["heldout"]["ce"] > 0


@pytest.mark.parametrize("arm", ["ce", "paper", "frobenius-w16", "renormalised-k8", "tail-k8", "attention-signed-drop"])
def test_arms_of_every_kind_train(scratch: Path, tmp_path: Path, arm: str) -> None:
    caches = scratch / "caches" / "small"
    found = Lab(Table(caches / "experiment")).run(trial(scratch, tmp_path, arm))
    assert (found["curve"]["kl"][0] is None) is (arm == "ce")
    assert found["row"]["heldout"]["kl_full"] > 0


def test_arms_of_one_seed_begin_alike_and_see_the_same_rows(scratch: Path, tmp_path: Path) -> None:
    lab = Lab(Table(scratch / "caches" / "small" / "experiment"))
    first = {arm: lab.run(trial(scratch, tmp_path, arm))["curve"]["ce"][0] for arm in ("ce", "tail-k8", "paper")}
    assert len(set(first.values())) == 1  # the cross-entropy of the first batch, whatever the loss and the cache


def test_an_arm_may_begin_from_a_run_made_of_the_teacher(
    scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its start is made once for each seed, by the options of the manifest."""
    asked: list[dict[str, str]] = []

    def main(words: list[str]) -> int:
        given = dict(word.removeprefix("--").split("=", 1) for word in words)
        asked.append(given)
        shape = StudentConfig(blocks=2, heads=9, final_norm="teacher")
        write_run(Path(given["run"]), Path(given["cache"]), shape, seed=7)
        commit_json(Path(given["run"]) / ORIGIN, {"align_tokens": 4096})
        return 0

    monkeypatch.setitem(sys.modules, "student.from_teacher", SimpleNamespace(main=main))
    lab = Lab(Table(scratch / "caches" / "small" / "experiment"))
    plain = trial(scratch, tmp_path, "ce")
    start = {"align_tokens": 4096}
    begun = [replace(plain, arm=replace(plain.arm, start=start), seed=seed) for seed in (0, 0, 1)]
    elsewhere = replace(begun[0], train=begun[0].train.with_name("experiment-hidden"))  # the same rows
    assert to_make(plain) == [] and to_make(elsewhere) == to_make(begun[0]) == to_make(begun[1]) != to_make(begun[2])
    found = [lab.run(each) for each in begun]
    assert not any(map(to_make, begun))
    assert [(given["align_tokens"], given["teacher"]) for given in asked] == 2 * [("4096", str(scratch / "teacher"))]
    first = [each["curve"]["ce"][0] for each in found]
    assert first[0] == first[1] != lab.run(plain)["curve"]["ce"][0]
    row = found[0]["row"]
    assert row["start"] == start and row["seconds"]["start"] > 0
    assert (row["tokens_before"], row["align_tokens"], row["share"]) == (0, 4096, 1.0)


def test_arms_in_phases(scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The phase that two arms begin from is trained once for each seed; what is not trained at all is evaluated too."""
    asked: list[int] = []

    def main(words: list[str]) -> int:
        given = dict(word.removeprefix("--").split("=", 1) for word in words)
        asked.append(int(given["align_tokens"]))
        shape = replace(read_student(Path("manifests/students/recommended.yaml")), blocks=2)
        write_run(Path(given["run"]), Path(given["cache"]), shape, seed=7)
        commit_json(Path(given["run"]) / ORIGIN, {"align_tokens": asked[-1]})
        return 0

    monkeypatch.setitem(sys.modules, "student.from_teacher", SimpleNamespace(main=main))
    caches = [scratch / "caches" / "small" / name for name in ("experiment", "experiment-long")]
    lab = Lab(Table(*caches))
    long_trial = trial(scratch, tmp_path, "start-aligned-long")
    assert caches_of(long_trial) == {"experiment", "experiment-other", "experiment-long"}
    waited_for = to_make(long_trial)
    long = lab.run(long_trial)
    phases = list(tmp_path.glob("phase-start-aligned-first-*"))
    assert [*phases, *(path.parent for path in tmp_path.glob("start-*/run.json"))] == waited_for
    trained = (phases[0] / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    short = lab.run(trial(scratch, tmp_path, "start-aligned-short"))
    assert list(tmp_path.glob("phase-*")) == phases and len(phases) == 1
    assert (phases[0] / "checkpoints" / "last.ckpt").stat().st_mtime_ns == trained

    # 0.75 and 0.25 of two steps; the rows of the last phase are twice as long in one arm.
    for found, length in ((long, 2 * LENGTH), (short, LENGTH)):
        row = found["row"]
        assert (row["steps"], row["tokens"], row["share"]) == (1, ROWS * length, 0.25)
        assert (row["tokens_before"], row["align_tokens"]) == (2 * ROWS * LENGTH, 4096)
        assert row["heldout"]["targets"] == ROWS * LENGTH and row["long"]["targets"] == ROWS * 2 * LENGTH
        assert [place[0] for place in row["long"]["by_position"]] == [0, 1, 2, 4, 8, 16, 32]
        assert all(len(place) == 4 and min(place[1:]) > 0 for place in row["long"]["by_position"])

    # The same first batch: the phase sees it as what is not cut in phases does, the last phase with what was learned.
    with open(phases[0] / "metrics.csv", newline="", encoding="utf-8") as file:
        before = [float(line["train/ce"]) for line in csv.DictReader(file)]
    whole = lab.run(trial(scratch, tmp_path, "start-aligned"))
    assert len(before) == 2 and whole["curve"]["ce"][0] == before[0] > short["curve"]["ce"][0]

    only_trial = trial(scratch, tmp_path, "start-only")
    only = lab.run(only_trial)
    row = only["row"]
    assert (row["steps"], row["tokens"], row["tokens_before"], row["align_tokens"]) == (0, 0, 0, 4096)
    assert row["heldout"]["kl_full"] > short["row"]["heldout"]["kl_full"] and "curve" not in only
    assert asked == [4096]  # one start for all of them
    start = next(tmp_path.glob("start-*/run.json")).parent
    assert read_json(start / "evaluation-heldout.json")["kl_full"] == row["heldout"]["kl_full"]
    assert (start / "checkpoints" / "last.ckpt").is_file() and not only_trial.run.exists()

    results = tmp_path / "results" / "quality.json"
    for begun, found in ((only_trial, only), (long_trial, long)):
        write_answer(begun, found, results=results, out=None, workers=1, logs=tmp_path)
    assert [row["arm"] for row in RowFile(results).read()] == ["teacher", "start-only", "start-aligned-long"]
    assert [curve["arm"] for curve in RowFile(curves_of(results)).read()] == ["start-aligned-long"]


def test_a_phase_that_was_interrupted_goes_on(scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its steps are taken once, and the arm says so when it cannot begin."""
    plain = trial(scratch, tmp_path, "ce")
    begun = replace(plain, arm=replace(plain.arm, start={"arm": "ce"}, before=plain.arm))
    lab = Lab(Table(scratch / "caches" / "small" / "experiment"))

    class Stopping(Callback):
        def on_train_batch_end(self, *_: object) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    def stopped(words: list[str], module: type[DistillModule], callbacks: list[Callback]) -> int:
        return train(words, module, [*callbacks, Stopping()])

    with monkeypatch.context() as patch:
        patch.setattr("benchmarks.quality.trial.train", stopped)
        with pytest.raises(UserError, match="ce, seed 0, small: training was interrupted"):
            lab.run(begun)
    phase = next(tmp_path.glob("phase-ce-*"))
    assert steps_done(phase / "checkpoints" / "last.ckpt") == 1
    found = lab.run(begun)
    assert steps_done(phase / "checkpoints" / "last.ckpt") == STEPS
    assert found["row"]["tokens_before"] == STEPS * ROWS * LENGTH == found["row"]["tokens"]


def test_runs_in_one_process_leave_nothing_behind(scratch: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), threading.active_count()
    last: list[list[str]] = []
    for number in range(3):
        run = trial(scratch, tmp_path / str(number), "ce")
        assert train(run.arguments()) == 0
        lines = (run.run / "metrics.csv").read_text().splitlines()
        last.append(lines[-1].split(",")[2:4])
    assert last[0] == last[1] == last[2]  # loss and cross-entropy of the last step
    gc.collect()  # trainer and module know each other: only this frees them, and stops their loaders' threads
    deadline = time.monotonic() + 10
    while threading.active_count() > before[2] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before[2]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before[:2]


def test_the_command_takes_up_what_is_missing(scratch: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Worker processes as a user has them: an arm that fails is recorded, the others go on, and a second call does the
    rest."""
    words = ["--small", "--scratch", str(scratch), "--results", str(tmp_path / "quality.json")]
    names = ["--arms", "ce", "sampled-k8", "delta", "online"]
    assert main([*words, *names, "--out", str(tmp_path / "out")]) == 0
    said = capfd.readouterr()
    rows = {row["arm"]: row for row in RowFile(tmp_path / "quality.json").read()}
    assert rows.keys() == {"teacher", "ce", "sampled-k8", "delta", "online"}
    assert "no column `tail_ids`" in rows["sampled-k8"]["error"] and "no column `tail_ids`" in said.err
    assert "heldout" not in rows["sampled-k8"]
    assert "What of the teacher helps? (signal, small)" in said.out and "4 without figures" in said.out
    assert (tmp_path / "out" / "quality.json").read_bytes() == (tmp_path / "quality.json").read_bytes()
    assert "no column `tail_ids`" in (tmp_path / "out" / "quality_logs.txt").read_text()
    curves = RowFile(tmp_path / "out" / "quality_curves.json").read()
    assert {curve["arm"] for curve in curves} == {"ce", "delta", "online"}
    assert not list((scratch / "runs").glob("small-*"))

    assert main([*words, *names, "--list"]) == 0
    assert capfd.readouterr().out.splitlines()[1:] == ["sampled-k8, seed 0, small"]
    assert main([*words, "--arms", "ce", "--seeds", "0", "1", "--minutes", "0"]) == 0
    assert "left: ce, seed 1, small" in capfd.readouterr().out
    assert len(RowFile(tmp_path / "quality.json").read()) == 5


def test_figures_of_other_settings_are_missing(tmp_path: Path) -> None:
    arms, budget = [load_arms()["ce"]], BUDGETS["screen"]
    row = {"arm": "ce", "seed": 0, "budget": "screen", "settings": arms[0].settings(budget)}

    def missing(row: dict[str, object]) -> list[tuple[str, int, str]]:
        return [trial.key for trial in trials_of(arms, [0], budget, [row], tmp_path)]

    assert missing(row) == []
    for change in ({"settings": "0"}, {"seed": 1}, {"budget": "headline"}, {"error": "it failed"}):
        assert missing({**row, **change}) == [("ce", 0, "screen")]


def test_seeds_come_before_arms(tmp_path: Path) -> None:
    arms = [load_arms()[name] for name in ("ce", "delta")]
    found = [trial.key[:2] for trial in trials_of(arms, [0, 1], BUDGETS["screen"], [], tmp_path)]
    assert found == [("ce", 0), ("delta", 0), ("ce", 1), ("delta", 1)]


def test_a_remembered_teacher_tells_batches_apart() -> None:
    class Counting:
        vocab_size = 5

        def hidden(self, input_ids_BT: Tensor) -> Tensor:
            return input_ids_BT[..., None].float()

        def logits(self, h_ND: Tensor) -> Tensor:
            return h_ND

    teacher = RememberedTeacher(Counting())
    a, b = torch.tensor([[1, 2]]), torch.tensor([[2, 1]])
    assert teacher.hidden(a) is teacher.hidden(a.clone()) and not torch.equal(teacher.hidden(a), teacher.hidden(b))
