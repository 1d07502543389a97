"""What a launcher says, what a rank reads and counts; the ranks themselves are in end_to_end/test_ranks.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_cache import write_toy_cache
from helpers_ranks import slurm
from lightning import LightningModule, Trainer

from pipeline import schema
from pipeline.cache import Cache
from pipeline.errors import UserError
from student.data.batch import IGNORE
from student.data.loader import CacheDataModule, SplitLoader, TrainLoader
from student.losses.attention import attention_alignment
from student.model import StudentConfig
from student.training.callbacks import RunCheckpoint
from student.training.loss_config import LossConfig
from student.training.module import DistillModule
from student.training.optimizer import OptimizerConfig
from student.training.ranks import Launch, launched, require_equal_shares, share_of, trainer_options
from student.training.sharding import ShardedStrategy, strategy_of

TORCHRUN = {"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3", "GROUP_WORLD_SIZE": "2"}
SRUN = slurm(rank=3, nodes=2, per_node=4, port=1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """56 training rows in row groups of 4, 14 held-out rows; documents with padding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "ROW_GROUP_TOKENS", 4 * 32)
        path = tmp_path_factory.mktemp("ranks") / "cache"
        write_toy_cache(path, units=8, heldout_units=2, rows=7, length=32, block=8, packing="document")
    return Cache(path)


def test_what_launchers_say() -> None:
    assert launched({}) is None
    assert launched(TORCHRUN) == Launch("torchrun", 2, 3)
    assert launched(SRUN) == Launch("srun", 2, 4)
    assert launched({**SRUN, "SLURM_JOB_NAME": "interactive"}) is None


@pytest.mark.parametrize("devices", ["auto", 3, "3", -1])
@pytest.mark.parametrize("nodes", [1, 2])
def test_the_launcher_decides_devices_and_nodes(devices: Any, nodes: int) -> None:
    assert trainer_options(devices, nodes, TORCHRUN) == {"devices": 3, "num_nodes": 2}
    assert trainer_options(devices, 1, {}) == {}


@pytest.mark.parametrize(
    ("devices", "nodes", "environment", "said"),
    [
        (2, 1, TORCHRUN, "--trainer.devices is 2, but torchrun started 3 ranks on each node: leave the option out"),
        ("auto", 4, SRUN, "--trainer.num_nodes is 4, but srun started 2 nodes: leave the option out"),
        ("auto", 2, {}, "--trainer.num_nodes 2, but neither torchrun nor srun started this process"),
        ("auto", 1, {**TORCHRUN, "WORLD_SIZE": "5"}, "torchrun started 5 ranks on 2 nodes, 3 on this one"),
        ("auto", 1, {**SRUN, "SLURM_NTASKS": "7"}, "srun started 7 ranks on 2 nodes, 4 on this one"),
        (
            "auto",
            1,
            {name: value for name, value in SRUN.items() if name != "SLURM_NTASKS_PER_NODE"},
            "srun started 8 tasks without --ntasks-per-node",
        ),
    ],
)
def test_what_cannot_be_is_a_sentence(devices: Any, nodes: int, environment: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        trainer_options(devices, nodes, environment)


def test_a_batch_must_be_dealt_out_evenly() -> None:
    require_equal_shares(12, 4)
    with pytest.raises(UserError, match="batch_rows 10: must be a multiple of the 4 ranks, for example 8"):
        require_equal_shares(10, 4)
    with pytest.raises(UserError, match="batch_rows 2: .* for example 4"):
        require_equal_shares(2, 4)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_share_batches_and_reading(ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank's rows are those of the same global batches, and few of the ranks read a row group, not all."""
    monkeypatch.setattr(schema, "ROW_GROUP_TOKENS", 16 * 32)
    cache = Cache(write_toy_cache(tmp_path / "cache", units=8, heldout_units=0, rows=32, length=32, block=8, k=2))
    loader = TrainLoader([cache], batch_rows=32, seed=0, window=8)
    readers = set()
    for _, rows in loader.plan(0, 0):
        shares = [share_of(rows, rank, ranks) for rank in range(ranks)]
        assert [len(share) for share in shares] == [32 // ranks] * ranks
        assert sorted(sum(shares, [])) == sorted(rows)
        readers |= {(rank, group) for rank, share in enumerate(shares) for group, _ in share}
    assert len(readers) / 16 < 0.7 * ranks + 0.4, "ranks read what others need"


def test_rows_of_a_group_go_to_one_rank() -> None:
    rows = [(group, row) for row in range(4) for group in (7, 3, 9, 5)]
    assert [{group for group, _ in share_of(rows, rank, 4)} for rank in range(4)] == [{3}, {5}, {7}, {9}]
    assert share_of(rows, 0, 1) == rows


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
def test_held_out_rows_are_counted_once_on_any_number_of_ranks(cache: Cache, ranks: int) -> None:
    """Also where a batch has fewer rows than there are ranks: all take as many steps, and sums are the same."""
    data = CacheDataModule(str(cache.path), batch_rows=4)
    torch.manual_seed(0)
    module = DistillModule(StudentConfig(blocks=1, heads=2), LossConfig(beta=0.0), OptimizerConfig())
    trainer = Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False)
    trainer.datamodule = data  # type: ignore[attr-defined]
    module.trainer = trainer
    module.configure_model()
    sums, rows, steps = torch.zeros(3, dtype=torch.float64), [], set()
    for rank in range(ranks):
        loader = SplitLoader(data.caches, "heldout", 4, rank, ranks)
        batches = list(loader)
        steps.add(len(batches))
        assert len(loader) == len(batches)
        module._heldout = []
        for index, batch in enumerate(batches):
            with torch.no_grad():
                module.validation_step(batch, index)
            rows += batch.sequence_id_B[(batch.target_BT != IGNORE).any(1)].tolist()
        sums += torch.stack(module._heldout).sum(0)
    assert steps == {4}, "a rank takes other steps than the others"
    assert len(rows) == len(set(rows)) == 14
    targets = sum(int((batch.target_BT != IGNORE).sum()) for batch in SplitLoader(data.caches, "heldout", 4))
    assert sums[2] == targets
    module._heldout = []
    with torch.no_grad():
        for index, batch in enumerate(SplitLoader(data.caches, "heldout", 4)):
            module.validation_step(batch, index)
    torch.testing.assert_close(sums, torch.stack(module._heldout).sum(0), rtol=1e-6, atol=0)


def test_alignment_of_padded_rows_is_the_whole_batchs() -> None:
    """The mean of the ranks' L_A, each divided by the mean number of compared blocks, is L_A of all rows."""
    generator = torch.Generator().manual_seed(0)
    maps_Bnn, teacher_BGnn = torch.rand(4, 4, 4, generator=generator), torch.rand(4, 2, 4, 4, generator=generator)
    length_B = torch.tensor([32, 32, 9, 16])
    whole = attention_alignment({0: maps_Bnn}, teacher_BGnn, length_B, 8, 1)
    mean = torch.tensor((4 + 4 + 1 + 2) / 2)
    halves = [
        attention_alignment({0: maps_Bnn[rows]}, teacher_BGnn[rows], length_B[rows], 8, 1, count=mean)
        for rows in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(torch.stack(halves).mean(), whole)


def test_lightning_does_not_ask_all_ranks_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its question about SIGTERM, which is ours to answer, would make each GPU wait for its host."""
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    loop = trainer.fit_loop.epoch_loop
    asked: list[str] = []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda *_, **__: asked.append("broadcast"))
    loop._broadcast_sigterm_tensor()
    assert asked == ["broadcast"], "Lightning no longer asks here: RunCheckpoint.on_train_start need not prevent it"
    checkpoints = RunCheckpoint(tmp_path, 1)
    checkpoints.on_train_start(trainer, LightningModule())
    loop._broadcast_sigterm_tensor()
    checkpoints.on_train_end(trainer, LightningModule())
    assert asked == ["broadcast"]


def test_strategies_that_cannot_work_are_a_sentence() -> None:
    assert strategy_of("ddp", "16-mixed") == "ddp" and isinstance(strategy_of("fsdp", "bf16-mixed"), ShardedStrategy)
    with pytest.raises(UserError, match="--trainer.strategy fsdp_cpu_offload: .* by `fsdp` only"):
        strategy_of("fsdp_cpu_offload", None)
    with pytest.raises(UserError, match="--trainer.precision 16-mixed: choose 32-true, bf16-mixed"):
        strategy_of("fsdp", "16-mixed")
