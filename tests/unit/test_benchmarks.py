"""The benchmarks' own arithmetic at toy sizes: what they derive, what they count, what they write."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import measured, train_case, train_step, train_throughput
from benchmarks.measured import merged_with, table, write_results
from benchmarks.processes import in_own_process
from benchmarks.random_cache import benchmark_spec, random_columns, random_facts, write_random_cache
from benchmarks.storage import by_k
from benchmarks.train_baselines import BaselineStep
from benchmarks.train_clock import StepClock, timed_waits
from benchmarks.train_parts import attention_inputs, step_parts
from benchmarks.train_profile import gaps, profile_table
from pipeline.cache import Cache
from pipeline.row_checks import GroupCheck
from pipeline.schema import CacheSpec
from student.data.loader import CacheDataModule
from student.losses.fused import Head, TeacherTopK, fused_kd_sums
from student.losses.sparse_kd import log_tail_at
from student.model import DistilXLSTM

REPOSITORY = Path(__file__).resolve().parents[2]


def test_table_and_results(tmp_path: Path) -> None:
    rows = [{"name": "a", "speed": 1234.6}, {"name": "long", "speed": None}]
    lines = table(rows).splitlines()
    assert lines == ["name  speed", "-----------", "a     1,235", "long      -"]
    assert table(rows, ["speed"]).splitlines()[0] == "speed"
    written = write_results("x", [{"a": 0.123456}, {"a": 2}], device="here", folder=tmp_path, note="n")
    record = json.loads(written.read_text())
    assert list(record) == ["device", "versions", "date", "note", "rows"] and record["rows"] == [
        {"a": 0.1235},
        {"a": 2},
    ]
    with pytest.raises(ValueError):
        write_results("x", [{"a": float("nan")}], device="here", folder=tmp_path)


def test_readme_shows_the_committed_results() -> None:
    record = json.loads((REPOSITORY / "benchmarks/results/storage.json").read_text(encoding="utf-8"))
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert f"{record['tokens']:,} tokens" in readme
    for row in by_k(record["rows"]):
        rest = row["rest"] + row["attn_map"]
        sizes = [row["B/token"], row["topk_ids"], row["topk_logits"], row["log_tail"], rest]
        speeds = [row["write"], row["commit"], row["read"]]
        cells = [f"{row['tail mass']:.3f}", *(f"{size:.1f}" for size in sizes), *(f"{speed:,.0f}" for speed in speeds)]
        assert f"| {row['K']} | {' | '.join(cells)} |" in readme


# Benchmarks of stage two.

SMALL = {**train_throughput.SMALL, "batch": 4, "length": 64, "steps": 2, "warmup": 1}


def small(case: str, **changes: Any) -> train_step.Case:
    return train_step.Case(**{"case": case, **SMALL, **changes})


@pytest.mark.parametrize(
    "spec",
    [benchmark_spec(64, 160, 32, 8, 16, 2), benchmark_spec(96, 151_936, 64, 64, 32), benchmark_spec(8, 9, 4, 8, 8, 1)],
    ids=["small", "real vocabulary", "one id in the tail"],
)
def test_random_rows_are_what_a_dump_may_write(spec: CacheSpec) -> None:
    columns = random_columns(spec, 3, 5, 4, torch.Generator().manual_seed(0))
    assert columns.keys() == {"sequence_id", "length", "next_id", "doc_ids", *spec.shapes()}
    totals = GroupCheck(columns, spec, 3, 5).run()
    assert totals.findings == [] and 0 < totals.tail_mass / totals.tokens < 0.5
    again = random_columns(spec, 3, 5, 4, torch.Generator().manual_seed(0))
    assert all(np.array_equal(again[name], values) for name, values in columns.items())


def test_a_random_cache_trains_and_verifies(tmp_path: Path) -> None:
    spec = benchmark_spec(64, 160, 32, 8, 16, 2)
    assert write_random_cache(tmp_path / "c", spec, 1000, shard_tokens=512) == 1024
    cache = Cache(tmp_path / "c")
    assert [record.rows for record in cache.shards()] == [8, 8]
    for record in cache.shards():
        with cache.open(record) as shard:
            assert GroupCheck(shard.read_group(0), spec, record.unit, 0).run().findings == []
    data = CacheDataModule(str(tmp_path / "c"), batch_rows=4)
    batch = next(iter(data.train_dataloader()))
    assert data.steps_per_epoch == 4 and batch.tokens == 256 and int((batch.target_BT >= 0).sum()) == 256
    assert data.teacher.tensors()["head_VD"].shape == (160, 32)


def test_our_step_is_the_trainings_own() -> None:
    """The benchmark's loss equals what `DistillModule.training_step` computes, and its step lowers it."""
    step = train_step.OurStep(small("synthetic"), torch.device("cpu"))
    step.config = replace(step.config, tau_start=1.5, tau_end=1.5, alpha_end=step.config.alpha_start, delta=None)
    step.module.loss = step.config
    group = SimpleNamespace(param_groups=[{"lr": 1e-4}])
    step.module._trainer = SimpleNamespace(world_size=1, global_step=0, optimizers=[group], strategy=None)  # type: ignore[assignment]
    step.module.log = step.module.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
    with train_step.autocast(step.device):
        expected = step.module.training_step(step.batch, 0)
    assert torch.equal(step.loss(), expected) and step.config.gamma > 0
    first, *_, last = (float(step()) for _ in range(8))
    assert last < first == float(expected.detach())


def test_the_packages_step_has_the_same_loss_and_gradient_as_ours() -> None:
    """Of the terms both have; gathered over two forward passes or in one."""
    case, device = small("package"), torch.device("cpu")
    whole, halves = (BaselineStep(case, device, rows) for rows in (4, 2))
    batch, h_BTD = whole.parts[0], torch.randn(4, 64, 64).requires_grad_()
    with train_step.autocast(device):
        sums = fused_kd_sums(
            h_BTD.flatten(0, 1), Head(whole.embedding_VD), batch.target_BT.flatten(),
            TeacherTopK(
                batch.topk_ids_BTK.flatten(0, 1).long(), batch.topk_logits_BTK.flatten(0, 1),
                log_tail_at(batch.log_tail_BTR, batch.taus, 1.5).flatten(),
            ), 0.2, 0.8 * 1.5**2, 1.5,
        )  # fmt: skip
    (expected,) = torch.autograd.grad(sums.total / 256, h_BTD)
    found = whole.sparse_loss(h_BTD, batch)
    torch.testing.assert_close(found, sums.total.detach(), rtol=1e-3, atol=0)
    assert h_BTD.grad is not None and (h_BTD.grad - expected).norm() < 0.02 * expected.norm()
    assert len(halves.parts) == 2 and torch.allclose(whole(), halves(), rtol=1e-3)


def test_the_authors_way_takes_the_whole_vocabulary() -> None:
    """With the teacher's logits equal to the student's the divergence is zero, and the cross-entropy is left."""
    step = BaselineStep(small("online"), torch.device("cpu"), 4)
    batch, h_BTD = step.parts[0], torch.randn(4, 64, 64)
    with train_step.autocast(step.device):
        logits_NV = torch.nn.functional.linear(h_BTD.flatten(0, 1), step.embedding_VD)
    step.teacher = lambda input_ids: SimpleNamespace(logits=logits_NV.view(4, 64, 160))
    ce = torch.nn.functional.cross_entropy(logits_NV.float(), batch.target_BT.flatten(), reduction="sum")
    torch.testing.assert_close(step.full_loss(h_BTD, batch), 0.2 * ce, rtol=1e-5, atol=1e-3)
    assert float(BaselineStep(small("online"), torch.device("cpu"), 2)()) > 0


def test_a_case_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    class Large(BaselineStep):
        def __init__(self, case: train_step.Case, device: torch.device, rows: int) -> None:
            tried.append(rows)
            if rows > 1:
                raise torch.OutOfMemoryError("too large")
            super().__init__(case, device, rows)

    monkeypatch.setattr("benchmarks.train_case.BaselineStep", Large)
    assert train_case.baseline(small("package"))["micro_rows"] == 1 and tried == [4, 2, 1]


def test_flops_of_the_fast_student_on_qwens_shape() -> None:
    shape = train_step.Case("synthetic", 64, 512)
    with torch.device("meta"):
        tensors = {name: torch.empty(8, 1536) for name in ("embedding_VD", "head_VD")}
        model = DistilXLSTM(shape.student(), random_facts(8, 1536), {**tensors, "norm_D": torch.empty(1536)}, 512)
    flops = train_step.flops_per_token(train_step.trained_matrices(model), shape.vocab, shape.width)
    assert flops["blocks"] == pytest.approx(0.50e9, rel=0.01) and flops["head"] == pytest.approx(0.933e9, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "tokens", "steps"),
    [("synthetic", 4096, 2), ("shards", 4096, 16), ("shards_ddp2", 4096, 8), ("shards", 1, 2)],
)
def test_shards_are_read_for_as_many_tokens_as_asked(kind: str, tokens: int, steps: int, tmp_path: Path) -> None:
    arguments = train_throughput.parser().parse_args(["--small", "--steps", "2", "--shard_tokens", str(tokens)])
    assert train_throughput.case_of(arguments, kind, "fast", 4, 64, tmp_path).steps == steps


def test_which_cases_are_measured_unless_named(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = train_throughput.parser().parse_args(["--presets", "fast", "paper"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert train_throughput.cases_of(arguments, "fast", (64, 512)) == train_throughput.CASES
    for preset, shape in (("paper", (64, 512)), ("fast", (16, 2048)), ("paper", (16, 2048))):
        assert train_throughput.cases_of(arguments, preset, shape) == ("synthetic", "shards")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    found = train_throughput.cases_of(arguments, "fast", (64, 512))
    assert set(train_throughput.CASES) - set(found) == {"shards_ddp2"}


@pytest.mark.parametrize(("kind", "share"), [("shards", 0.5), ("shards_ddp2", 0.25)])
def test_a_rows_share_is_of_each_gpus_floor(kind: str, share: float) -> None:
    found = {"tokens_per_s": 250_000.0, "floor_us": 2.0, "tokens": 7, "seconds": 3.0}
    row = train_throughput.to_row(small(kind), found)
    assert row["us_per_token"] == 4.0 and row["share"] == share and "tokens" not in row


def test_two_gpus_are_set_beside_one_of_the_same_run() -> None:
    """Of the same preset and shape, by `shards` alone."""
    found = {"tokens_per_s": 200_000.0, "floor_us": 2.0, "seconds": 3.0}
    one = train_throughput.to_row(small("shards"), found)
    others = [train_throughput.to_row(small("synthetic"), found), {**one, "length": 7, "tokens_per_s": 1.0}]
    two = {**found, "tokens_per_s": 390_000.0}
    assert "scaling" not in one and "scaling" not in train_throughput.to_row(small("shards_ddp2"), two, others)
    assert train_throughput.to_row(small("shards_ddp2"), two, [*others, one])["scaling"] == 1.95


@pytest.mark.parametrize("shape", [{}, {"preset": "recommended", "width": 96, "heads": 3}])
def test_parts_add_up_to_the_step(shape: dict[str, Any]) -> None:
    step = train_step.OurStep(small("synthetic", **shape), torch.device("cpu"))
    maps = step.module._forward(step.batch, with_maps=True)[1]
    inputs = attention_inputs(step)
    assert len(inputs) == len(maps) == len(step.model.mlstm_blocks)
    parts = step_parts(step, 100.0)
    assert sum(parts.values()) == pytest.approx(100.0) and all(
        (v > 0) == (k != "slstm_blocks" or not shape) for k, v in parts.items() if k != "rest"
    )
    assert "aten::mm" in profile_table(step, step.device, 0, steps=1)


def test_the_clock_counts_the_waits_of_the_timed_steps_only() -> None:
    class Loader:
        def __iter__(self) -> Iterator[int]:
            yield from range(3)

    waits: list[float] = []
    before = Loader.__iter__
    with timed_waits(Loader, waits):
        assert list(Loader()) == [0, 1, 2]
    assert len(waits) == 3 and Loader.__iter__ is before
    clock = StepClock(1, 2)
    module: Any = SimpleNamespace(device=torch.device("cpu"))
    for step in (1, 2, 3):
        clock.waits.append(0.5)
        trainer: Any = SimpleNamespace(global_step=step)
        clock.on_train_batch_end(trainer, module, {"loss": torch.tensor(float(step))}, None, step)
        assert (clock.seconds is not None) == (step == 3)
    assert clock.waits == [0.5, 0.5] and clock.loss == 3.0


def test_rows_are_merged(tmp_path: Path) -> None:
    def put(rows: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
        kept = merged_with("x", rows, ("a", "b"), device=device, folder=tmp_path)
        write_results("x", kept, device=device, folder=tmp_path)
        return kept

    put([{"a": 1, "b": 1, "v": 1}, {"a": 1, "b": 2, "v": 1}], "here")
    assert put([{"a": 2, "b": 1, "v": 2}, {"a": 1, "b": 1, "v": 2}], "here") == [
        {"a": 1, "b": 1, "v": 2},
        {"a": 1, "b": 2, "v": 1},
        {"a": 2, "b": 1, "v": 2},
    ]


def test_a_row_that_is_kept_says_what_measured_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def put(day: str, device: str, torch_version: str, *rows: dict[str, Any]) -> list[dict[str, Any]]:
        monkeypatch.setattr(measured, "today", lambda: day)
        monkeypatch.setattr(measured, "versions", lambda: {"torch": torch_version})
        kept = merged_with("x", rows, ("a",), device=device, folder=tmp_path)
        path = write_results("x", kept, device=device, folder=tmp_path)
        head = json.loads(path.read_text())
        assert (head["device"], head["versions"], head["date"]) == (device, {"torch": torch_version}, day)
        assert measured.read_rows(path) == kept
        return kept

    put("day 1", "here", "1", *({"a": a, "v": 1, "share": 0.5} for a in range(4)))
    old = {"v": 1, "share": 0.5}
    of_here = {"device": "here", "date": "day 1"}
    of_day_2 = put("day 2", "there", "1", {"a": 1, "v": 2}, {"a": 4, "v": 2})
    assert of_day_2 == [
        {"a": 0, **old, **of_here}, {"a": 1, "v": 2}, {"a": 2, **old, **of_here}, {"a": 3, **old, **of_here},
        {"a": 4, "v": 2},
    ]  # fmt: skip
    there = {"v": 2, "versions": {"torch": "1"}, "date": "day 2"}
    of_here |= {"versions": {"torch": "1"}}
    assert put("day 3", "there", "2", {"a": 0, "v": 3}) == [
        {"a": 0, "v": 3}, {"a": 1, **there}, {"a": 2, **old, **of_here}, {"a": 3, **old, **of_here}, {"a": 4, **there},
    ]  # fmt: skip
    assert put("day 3", "here", "2", {"a": 1, "v": 4}, {"a": 2, "v": 4}) == [
        {"a": 0, "v": 3, "device": "there"}, {"a": 1, "v": 4}, {"a": 2, "v": 4}, {"a": 3, **old, **of_here},
        {"a": 4, **there, "device": "there"},
    ]  # fmt: skip


def test_a_table_shows_the_device_of_rows_that_say_one() -> None:
    rows = [{"a": 1}, {"a": 2, "device": "there", "date": "day 1"}]
    assert [line.split() for line in table(rows, ["a"]).splitlines()[::2]] == [["a", "device"], ["1", "-"]]
    assert table(rows[:1], ["a"]).splitlines()[0] == "a"


def test_a_failed_or_slow_process_is_told_by_its_words() -> None:
    with pytest.raises(RuntimeError, match=r"json\.tool .* failed:\n(.|\n)*No such file"):
        in_own_process("json.tool", {"case": 1})
    with pytest.raises(RuntimeError, match=r"took more than 0\.001 s"):
        in_own_process("json.tool", {"case": 1}, timeout=0.001)


@pytest.mark.parametrize("words", [["--shapes", "64"], ["--shapes", "0x5"], ["--cases", "none"], []])
def test_wrong_options_of_the_training_benchmark(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        train_throughput.main(words)
    assert stopped.value.code == 2


def test_training_is_measured_case_by_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real processes at a tiny size: the loader, trainer and callbacks of training are in the second."""
    options = ["--small", "--results", str(tmp_path), "--scratch", str(tmp_path), "--shapes", "4x64"]
    options += ["--steps", "2", "--warmup", "1", "--shard_tokens", "512"]
    assert train_throughput.main([*options, "--cases", "synthetic"]) == 0
    assert train_throughput.main([*options, "--cases", "shards"]) == 0
    record = json.loads((tmp_path / "train_throughput.json").read_text())
    ours, shards = record["rows"]
    assert (ours["case"], shards["case"]) == ("synthetic", "shards") and record["settings"]["width"] == 64
    for row in (ours, shards):
        assert row["us_per_token"] == pytest.approx(1e6 / row["tokens_per_s"], rel=2e-3)
        assert row["tokens_per_s"] == pytest.approx(2 * 4 * 64 / row["seconds"], rel=2e-3)
        assert row["share"] == pytest.approx(row["floor_us"] / row["us_per_token"], rel=2e-3)
        floor = (row["gflop_blocks"] + row["gflop_head"]) / row["matmul_tflop_per_s"] * 1000
        assert row["floor_us"] == pytest.approx(floor, rel=2e-3)
    assert shards["loader_wait_us"] > 0 and shards["longest_wait_s"] > 0
    assert sum(ours["parts_us"].values()) == pytest.approx(ours["us_per_token"], 1e-2)
    assert [p.name for p in tmp_path.iterdir()] == ["train_throughput.json"]
    assert "head_and_loss" in capsys.readouterr().out


def test_a_steady_rate_leaves_out_start_and_end() -> None:
    from benchmarks.gpu_scaling import steady_rate

    slow_start = [(0.0, 5), (10.0, 5)]
    even = [(10.0 + 0.1 * step, 10) for step in range(1, 81)]
    slow_end = [(30.0, 5), (60.0, 5)]
    assert steady_rate(slow_start + even + slow_end) == pytest.approx(100.0)


def test_gaps_of_a_profile() -> None:
    """What runs beside a collective is no gap; what waits for one is."""
    work = [
        {"name": "a", "ts": 0.0, "dur": 2000.0},
        {"name": "ncclAllReduce", "ts": 1000.0, "dur": 3000.0},
        {"name": "b", "ts": 1500.0, "dur": 1000.0},
        {"name": "c", "ts": 4500.0, "dur": 500.0},
    ]
    first, gap, collective = gaps(work, 1).splitlines()
    assert first == (
        "1 steps of 5.0 ms: in each 2.0 ms without work of this rank's own, and 3.0 ms of collectives (1 in all)"
    )
    assert gap.split() == "2.00 ms at 2.5 ms, before c".split()
    assert collective.split() == "3.00 ms at 1.0 ms, ncclAllReduce".split()
