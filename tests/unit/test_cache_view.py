"""A smaller K and wider windows from one cache: what a dump with them would have stored, in training and nowhere else.

Legend: B rows, T tokens a row, K ids, W windows, D width.
"""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_cache import write_toy_cache
from lightning import Callback, LightningModule, Trainer

import student.__main__ as command
from pipeline.cache import Cache
from pipeline.errors import UserError
from pipeline.shard import ShardFile
from student.data.batch import Batch
from student.data.cache_view import CacheView, tail_with
from student.data.loader import CacheDataModule, SplitLoader
from student.evaluate import EvaluateOptions, evaluate
from student.losses.frobenius import pool_windows

LENGTH = 32


def one_batch(path: Path, **options: Any) -> Batch:
    return next(iter(SplitLoader([Cache(path)], "train", 100, **options)))


@pytest.mark.parametrize("packing", ["stream", "document"])
@pytest.mark.parametrize(("stored", "k"), [(8, 3), (8, 1), (61, 60)])
def test_fewer_ids_are_what_a_dump_with_fewer_stores(tmp_path: Path, packing: str, stored: int, k: int) -> None:
    """From K = V too, where the stored tail is empty."""
    paths = [
        write_toy_cache(
            tmp_path / str(n), units=1, rows=9, length=LENGTH, k=n, packing=packing, tail_samples=2 * (n < 61)
        )
        for n in (stored, k)
    ]
    large, small = (one_batch(path, optional=("tail_ids", "tail_logits")) for path in paths)
    found = CacheView(k=k).of(large)
    assert found.tail_ids_BTM is None and found.tail_logits_BTM is None
    for name in ("topk_ids_BTK", "topk_logits_BTK", "lse_BT", "target_BT"):
        torch.testing.assert_close(getattr(found, name), getattr(small, name), rtol=0, atol=0, equal_nan=True)
        assert getattr(found, name).is_contiguous()
    torch.testing.assert_close(found.log_tail_BTR, small.log_tail_BTR, rtol=1e-6, atol=2e-6, equal_nan=True)
    assert found.log_tail_BTR[found.valid_BT].isfinite().all()
    assert found.log_tail_BTR[~found.valid_BT].isnan().all() and (packing == "stream") == bool(found.valid_BT.all())


def test_all_ids_and_the_stored_window_are_the_batch_itself(tmp_path: Path) -> None:
    batch = one_batch(write_toy_cache(tmp_path / "c", units=1, length=LENGTH, window=4))
    for view in (CacheView(), CacheView(k=8), CacheView(hidden_window=4), CacheView(k=8, hidden_window=4)):
        assert view.of(batch) is batch


def test_a_tiny_tail_keeps_its_digits() -> None:
    """Dropped mass far above or far below what the tail held: neither is lost to the other's rounding."""
    dropped_BTD = torch.tensor([[[-40.0, -41.0]], [[9.0, 3.0]]])
    tail_BTR = torch.tensor([[[-39.0, -20.0]], [[-60.0, -30.0]]])
    found_BTR = tail_with(dropped_BTD, tail_BTR, (1.0, 2.0))
    for r, tau in enumerate((1.0, 2.0)):
        parts = torch.cat((dropped_BTD / tau, tail_BTR[..., r : r + 1]), -1).double()
        torch.testing.assert_close(found_BTR[..., r], parts.exp().sum(-1).log().float(), rtol=2e-7, atol=0)


@pytest.mark.parametrize("packing", ["stream", "document"])
@pytest.mark.parametrize(("stored", "wanted"), [(1, 4), (4, 16), (2, 32)])
def test_wider_windows_are_means_over_valid_tokens(tmp_path: Path, packing: str, stored: int, wanted: int) -> None:
    path = write_toy_cache(tmp_path / "c", units=1, rows=9, length=LENGTH, block=8, window=stored, packing=packing)
    batch = one_batch(path)
    tokens_BTD = torch.randn(9, LENGTH, 5, generator=torch.Generator().manual_seed(0))
    narrow_BWD, used_BW = pool_windows(tokens_BTD, batch.length_B, stored)
    narrow_BWD[~used_BW] = torch.nan  # whatever stands there
    found = CacheView(hidden_window=wanted).of(replace(batch, hidden_BWD=narrow_BWD)).hidden_BWD
    expected_BWD, _ = pool_windows(tokens_BTD, batch.length_B, wanted)
    assert found is not None and (packing == "stream") == bool(used_BW.all())
    torch.testing.assert_close(found, expected_BWD, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("view")
    return write_toy_cache(folder / "cache", units=2, rows=8, length=LENGTH, block=8, window=2, tail_samples=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, r"--data\.k 0: must be from 1 to 8, the ids a position that .*cache holds; for more, dump"),
        ({"k": 9}, r"--data\.k 9: must be from 1 to 8"),
        ({"hidden_window": 3}, r"--data\.hidden_window 3: must be a multiple of the 2 tokens"),
        ({"hidden_window": 0}, r"--data\.hidden_window 0: must be a multiple"),
        ({"hidden_window": 12}, r"--data\.hidden_window 12: .* divide the 32 tokens of a row \(.*cache\)"),
    ],
)
def test_views_that_the_cache_cannot_give_are_refused(cache: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CacheDataModule(str(cache), batch_rows=4, **options)  # type: ignore[arg-type]


def test_every_cache_must_give_the_view(cache: Path, tmp_path: Path) -> None:
    other = write_toy_cache(tmp_path / "other", units=1, length=LENGTH, block=8, k=4)
    both = [str(cache), str(other)]
    with pytest.raises(UserError, match=r"--data\.k 5: must be from 1 to 4, the ids a position that .*other holds"):
        CacheDataModule(both, batch_rows=4, k=5)
    with pytest.raises(UserError, match=r"hidden_window 4: .*other has no column `hidden`"):
        CacheDataModule(both, batch_rows=4, hidden_window=4)
    data = CacheDataModule(both, batch_rows=4, k=4)
    assert not data.keeps_k and CacheDataModule(both, batch_rows=4).keeps_k and data.tail_samples == 0
    assert CacheDataModule(str(cache), batch_rows=4, k=8).keeps_k


class Seen(Callback):
    """What batches looked like, and a stop as Ctrl-C makes it."""

    def __init__(self, stop_at: int = 0) -> None:
        self.train: list[Batch] = []
        self.heldout: list[Batch] = []
        self.stop_at = stop_at

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self.train.append(batch)
        if self.stop_at and trainer.global_step + 1 == self.stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.heldout.append(batch)


def train(cache: Path, run: Path, *extra: str, seen: Seen | None = None) -> int:
    with pytest.MonkeyPatch.context() as patch:
        callbacks = [] if seen is None else [seen]
        patch.setattr(command, "TRAINER_DEFAULTS", {**command.TRAINER_DEFAULTS, "callbacks": callbacks})
        return command.main(
            [
                *(f"--cache={cache}", f"--run={run}", "--checkpoint_every=1", "--data.batch_rows=4"),
                *("--model.student.blocks=2", "--model.student.heads=4", "--model.loss.beta=0"),
                *("--trainer.accelerator=cpu", *extra),
            ]
        )


def weights(run: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return found


def test_training_sees_the_view_and_held_out_rows_do_not(cache: Path, tmp_path: Path) -> None:
    seen = Seen()
    extra = "--data.k=3", "--data.hidden_window=8", "--model.loss.beta=0.1"
    assert train(cache, tmp_path / "run", *extra, seen=seen) == 0
    assert len(seen.train) == 4 and len(seen.heldout) == 2
    for batch in seen.train:
        assert batch.topk_ids_BTK.shape[-1] == 3 and batch.hidden_BWD is not None and batch.hidden_BWD.shape[1] == 4
    for batch in seen.heldout:
        assert batch.topk_ids_BTK.shape[-1] == 8
        assert batch.hidden_BWD is None and batch.attn_map_BGnn is None, "columns that validation does not look at"


def test_a_run_on_fewer_ids_is_the_run_on_a_cache_of_fewer(cache: Path, tmp_path: Path) -> None:
    smaller = write_toy_cache(tmp_path / "smaller", units=2, rows=8, length=LENGTH, block=8, k=3)
    assert train(cache, tmp_path / "view", "--data.k=3") == 0
    assert train(smaller, tmp_path / "dump") == 0
    assert train(cache, tmp_path / "whole") == 0
    view, dump, whole = (weights(tmp_path / name) for name in ("view", "dump", "whole"))
    apart, moved = (
        float(torch.stack([(other[name] - dump[name]).norm() for name in dump]).norm()) for other in (view, whole)
    )
    # Rounding of log_tail, through AdamW, which divides small gradients by small moments: it differs from CPU to CPU.
    assert apart < 2e-3 * moved and moved > 1e-3


def test_the_view_is_part_of_an_exact_resume_but_not_of_the_student(cache: Path, tmp_path: Path) -> None:
    view = "--data.k=3", "--data.hidden_window=8", "--model.loss.beta=0.1"
    assert train(cache, tmp_path / "straight", *view) == 0
    assert train(cache, tmp_path / "run", *view, seen=Seen(stop_at=3)) == 130
    for changed, message in (
        (("--data.k=4", *view[1:]), r"--data\.k was 3, is 4"),
        (view[1:], r"--data\.k was 3, is None"),
        ((view[0], "--data.hidden_window=16", view[2]), r"--data\.hidden_window was 8, is 16"),
    ):
        with pytest.raises(UserError, match=message):
            train(cache, tmp_path / "run", *changed)
    assert train(cache, tmp_path / "run", *view) == 0
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "straight")
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert (
        train(cache, tmp_path / "next", f"--init_from={tmp_path / 'run'}", "--data.k=5", "--trainer.max_steps=1") == 0
    )
    found = evaluate(EvaluateOptions(run=str(tmp_path / "next"), cache=str(cache)))
    assert found["kl_k1"] > 0 and (tmp_path / "next" / "attention_maps.npz").is_file()


@pytest.mark.parametrize(
    ("extra", "wanted"),
    [
        ((), set()),
        (("--model.loss.beta=0.1",), {"hidden"}),
        (("--model.loss.gamma=0.1",), {"attn_map"}),
        (("--model.loss.kl=sampled",), {"tail_ids", "tail_logits"}),
    ],
    ids=["plain", "frobenius", "maps", "sampled"],
)
def test_only_columns_that_the_loss_looks_at_are_read(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: tuple[str, ...], wanted: set[str]
) -> None:
    read: dict[str, set[str]] = {"shard": set(), "heldout": set()}
    real = ShardFile.read_group

    def spy(self: ShardFile, group: int, columns: list[str] | None = None) -> Any:
        assert columns is not None
        read[Path(str(self.path)).name.split("-")[0]] |= set(columns)
        return real(self, group, columns)

    monkeypatch.setattr(ShardFile, "read_group", spy)
    assert train(cache, tmp_path / "run", *extra) == 0
    optional = {"attn_map", "hidden", "tail_ids", "tail_logits"}
    assert read["shard"] & optional == wanted and read["heldout"] & optional == set()
    assert read["shard"] - optional == read["heldout"] >= {"topk_ids", "log_tail"}
