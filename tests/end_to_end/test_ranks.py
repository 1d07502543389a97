"""Stage two on several ranks: the same rows in the same order, the same weights, one run folder."""

from __future__ import annotations

import contextlib
import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from helpers_cache import write_toy_cache
from helpers_dump import REPOSITORY, environment
from helpers_ranks import Ranks, free_port

from pipeline import schema
from pipeline.cache import Cache
from student.runs.checkpoint import load_student

CLOSE = 2e-4
"""Largest difference of a weight after 10 steps: sums over ranks round otherwise, and AdamW divides small gradients by
small moments. Weights move by some 1e-3 meanwhile."""
ROWS, STEPS = 21, 10


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 training and 14 held-out rows of documents, so that ranks have different numbers of targets, in row groups of
    3, 3 and 1 rows: some batches of 4 ranks leave ranks without a row."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "ROW_GROUP_TOKENS", 3 * 64)
        path = tmp_path_factory.mktemp("ranks") / "cache"
        return write_toy_cache(
            path, units=3, heldout_units=2, rows=7, length=64, width=32, heads=2, window=16, packing="document"
        )


def arguments(cache: Path, run: Path, *more: str) -> list[str]:
    settings = {
        "cache": cache,
        "run": run,
        "checkpoint_every": 4,
        "seed_everything": 3,
        "data.batch_rows": 4,
        "data.window_groups": 4,
        "model.student.blocks": 2,
        "model.student.heads": 2,
        "model.loss.beta": 0.1,
        "model.loss.gamma": 0.1,
        "trainer.accelerator": "cpu",
        "trainer.max_epochs": 2,
        "trainer.log_every_n_steps": 1,
    }
    return [*(f"--{name}={value}" for name, value in settings.items()), *more]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(cache: Path, runs: Path) -> Ranks:
    """The run of one rank, in runs/alone."""
    sitting = Ranks(runs / "alone-output", arguments(cache, runs / "alone"))
    assert sitting.status == [0], sitting.said
    return sitting


@pytest.fixture(scope="module")
def stopped(cache: Path, runs: Path) -> Ranks:
    """Two ranks, stopped at step 3 by a signal to the second one, in runs/stopped."""
    sitting = Ranks(runs / "stopped-output", arguments(cache, runs / "stopped"), nodes=2, stop=3)
    assert sitting.status == [143, 0], sitting.said  # the first rank itself got no signal
    assert "stopped at step 3 of 10" in sitting.said[0]
    return sitting


def assert_same_weights(run: Path, other: Path) -> None:
    found, expected = (torch.load(r / "checkpoints" / "last.ckpt", weights_only=True) for r in (run, other))
    assert found["global_step"] == expected["global_step"] == STEPS
    assert found["state_dict"].keys() == expected["state_dict"].keys()
    for name, value in expected["state_dict"].items():
        torch.testing.assert_close(found["state_dict"][name], value, rtol=0, atol=CLOSE, msg=name)


def metrics(run: Path) -> list[dict[str, float]]:
    """The logged lines, without what depends on the clock."""
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    clock = ("seconds", "tokens_per_second")
    return [{name: float(value) for name, value in row.items() if value and name not in clock} for row in rows]


@pytest.mark.parametrize("per_node", [1, 2])
def test_two_nodes_train_as_one_rank_does(cache: Path, runs: Path, alone: Ranks, per_node: int) -> None:
    run = runs / f"nodes-{per_node}"
    sitting = Ranks(runs / f"nodes-{per_node}-output", arguments(cache, run), nodes=2, per_node=per_node)
    assert sitting.status == [0] * 2 * per_node, sitting.said
    assert sitting.rows == alone.rows and list(alone.rows) == list(range(STEPS))
    everything = sorted(n for columns in Cache(cache).groups("heldout") for n in columns["sequence_id"].tolist())
    assert sitting.heldout == alone.heldout == {0: everything, 1: everything}, "a held-out row was counted twice"
    assert_same_weights(run, runs / "alone")
    ours, theirs = metrics(run), metrics(runs / "alone")
    assert len(ours) == len(theirs) > STEPS
    for found, expected in zip(ours, theirs, strict=True):
        assert found == pytest.approx(expected, rel=1e-4), "what is logged is not the whole batch's"
    assert "finished 10 steps" in sitting.said[0] and set(sitting.said[1:]) == {""}, "another rank than 0 spoke"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert len(list((run / "tensorboard").glob("events*"))) == 1


def test_a_run_goes_on_with_other_numbers_of_ranks(cache: Path, runs: Path, alone: Ranks, stopped: Ranks) -> None:
    """2 -> 1 -> 2 ranks: the rows of every step are those of a run that nothing disturbed."""
    run = shutil.copytree(runs / "stopped", runs / "changing")
    single = Ranks(runs / "changing-1", arguments(cache, run), stop=7)
    assert single.status == [130] and "going on with" in single.said[0]
    last = Ranks(runs / "changing-2", arguments(cache, run), nodes=2)
    assert last.status == [0, 0], last.said
    assert stopped.rows | single.rows | last.rows == alone.rows
    assert (list(single.rows), list(last.rows)) == ([3, 4, 5, 6], [7, 8, 9])
    assert_same_weights(run, runs / "alone")
    assert [row["step"] for row in metrics(run) if "train/loss" in row] == list(range(1, STEPS + 1))


def test_sharded_weights_and_back(cache: Path, runs: Path, alone: Ranks, stopped: Ranks) -> None:
    """A run of plain ranks goes on with `fsdp`, and without it again; its checkpoints are those of any run."""
    run = shutil.copytree(runs / "stopped", runs / "sharded")
    sitting = Ranks(runs / "sharded-1", arguments(cache, run, "--trainer.strategy=fsdp"), nodes=2, stop=8)
    assert sitting.status == [143, 0], sitting.said  # the first rank itself got no signal
    student, _ = load_student(run)
    plain, _ = load_student(runs / "alone")
    assert {n: p.shape for n, p in student.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}
    last = Ranks(runs / "sharded-2", arguments(cache, run))
    assert last.status == [0], last.said
    assert stopped.rows | sitting.rows | last.rows == alone.rows
    assert_same_weights(run, runs / "alone")


@pytest.mark.parametrize(("strategy", "parts"), [("auto", "both"), ("fsdp", "both"), ("fsdp", "head")])
def test_a_trained_embedding_and_head_on_two_ranks(cache: Path, runs: Path, strategy: str, parts: str) -> None:
    """The toy teacher ties them: one parameter whose gradient comes from both ends, or a head of its own."""
    shape = ["--model.student.train_head=true", f"--model.student.train_embedding={str(parts == 'both').lower()}"]
    one, two = runs / f"{parts}-{strategy}-1", runs / f"{parts}-{strategy}-2"
    single = Ranks(runs / f"{one.name}-output", arguments(cache, one, *shape))
    sitting = Ranks(
        runs / f"{two.name}-output", arguments(cache, two, *shape, f"--trainer.strategy={strategy}"), nodes=2
    )
    assert single.status == [0] and sitting.status == [0, 0], (single.said, sitting.said)
    stored = {"both": "model.embedding_VD", "head": "model.untied_head_VD"}[parts]
    assert stored in torch.load(two / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert_same_weights(two, one)
    for found, expected in zip(metrics(two), metrics(one), strict=True):  # grad_norm too: AdamW hides a wrong size
        assert found == pytest.approx(expected, rel=1e-3)


def test_torchrun_on_two_nodes(cache: Path, runs: Path, alone: Ranks) -> None:
    """As docs/scale.md has it, with both nodes on this machine."""
    run = runs / "torchrun"
    launch = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "test"]
    launch += ["--rdzv-endpoint", f"localhost:{free_port()}", "-m", "--", "student"]
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *launch, *arguments(cache, run)],
            env=environment(GLOO_SOCKET_IFNAME="lo"),
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert sorted("finished 10 steps" in text for text in said) == [False, True], said
    assert_same_weights(run, runs / "alone")


def test_a_loss_that_is_not_a_number_is_told_of_the_rows_it_is_of(cache: Path, tmp_path: Path) -> None:
    """All ranks stop; the one whose rows they were names them, the other one that rank."""
    found = Ranks(tmp_path / "ranks", arguments(cache, tmp_path / "run"), per_node=2, spoilt=6)
    assert all(status not in (0, None) for status in found.status)
    assert "the loss is nan at step 5 on rank 1's sequences, which it names itself" in found.said[0]
    named = re.search(r"the loss is nan at step 5 on sequences \[(\d+), (\d+)\]:", found.said[1])
    assert named is not None and "Traceback" not in "".join(found.said)
    alone = Ranks(tmp_path / "alone", arguments(cache, tmp_path / "other"))
    assert {int(name) for name in named.groups()} < set(alone.rows[5])
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 5


def test_a_rank_that_fails_ends_the_others(cache: Path, tmp_path: Path) -> None:
    """`make train-student GPUS=2` on a cache with a damaged shard, which only one of the ranks meets."""
    damaged = shutil.copytree(cache, tmp_path / "damaged")
    file = damaged / "shard-00001.parquet"
    group = pq.read_metadata(file).row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    chunk = next(column for column in columns if column.path_in_schema.startswith("topk_logits"))
    data = bytearray(file.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size - 3] ^= 16
    file.write_bytes(data)
    command = [sys.executable, "-m", "student", *arguments(damaged, tmp_path / "run", "--trainer.devices=2")]
    done = subprocess.run(command, env=environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode not in (0, None)
    assert "shard-00001.parquet: row group 0, column topk_logits" in done.stderr and "Traceback" not in done.stderr
    lines = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it ended meanwhile
            lines.append(Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace"))
    assert not any(str(damaged) in line for line in lines), "a rank was left"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (["--model.optimizer.lr=0.5"], "rank 1 on .* was started with other settings than rank 0"),
        (["--run={elsewhere}"], "rank 1 on .* does not see the run folder of rank 0 at .*elsewhere: --run must be on"),
    ],
)
def test_ranks_of_different_runs_are_refused(cache: Path, tmp_path: Path, other: list[str], message: str) -> None:
    words = [word.format(elsewhere=tmp_path / "elsewhere") for word in other]
    sitting = Ranks(tmp_path / "output", arguments(cache, tmp_path / "run"), nodes=2, of_rank={1: words})
    assert sitting.status == [2, 2], sitting.said
    for said in sitting.said:
        assert "Traceback" not in said
        assert re.search(message, said), said
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_transformer_shaped_weights_are_cut_too(cache: Path, runs: Path) -> None:
    """One head of keys cannot be halved: the second rank has none of its feature map."""
    shape = {"feedforward": 48, "kv_heads": 1, "rope_theta": 100}
    more = [f"--model.student.transformer.{name}={value}" for name, value in shape.items()]
    for name, options in (("shaped", {}), ("shaped-2", {"nodes": 2})):
        strategy = ["--trainer.strategy=fsdp"] if options else []
        sitting = Ranks(runs / f"{name}-output", arguments(cache, runs / name, *more, *strategy), **options)
        assert set(sitting.status) == {0}, sitting.said
    assert_same_weights(runs / "shaped-2", runs / "shaped")
