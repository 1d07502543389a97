"""The loss's options as a run uses them: the kinds of KL, fixed mixes of KL and cross-entropy, and what is refused."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers_cache import write_toy_cache
from lightning import Trainer

import student.__main__ as command
from pipeline.errors import UserError
from student.data.batch import Batch
from student.data.loader import CacheDataModule
from student.losses.sparse_kd import Divergence, cross_entropy, kl_k1, kl_renormalised, kl_sampled, log_tail_at
from student.model import StudentConfig
from student.training.loss_config import LossConfig
from student.training.module import KL_METRIC, DistillModule
from student.training.optimizer import OptimizerConfig

KINDS: tuple[Divergence, ...] = ("tail", "renormalised", "sampled")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 padded training rows with draws from the tail: four steps of four rows."""
    folder = tmp_path_factory.mktemp("loss")
    return write_toy_cache(folder / "cache", units=2, rows=8, length=32, block=8, tail_samples=5, packing="document")


def train(cache: Path, run: Path, *extra: str) -> int:
    return command.main(
        [
            *(f"--cache={cache}", f"--run={run}", "--checkpoint_every=2", "--data.batch_rows=4"),
            *("--model.student.blocks=2", "--model.student.heads=4", "--model.loss.beta=0"),
            *("--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1", *extra),
        ]
    )


def metrics(run: Path) -> list[dict[str, float]]:
    """Logged lines, only what was logged."""
    with open(run / "metrics.csv", newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def of_steps(run: Path) -> list[dict[str, float]]:
    return [row for row in metrics(run) if "train/loss" in row]


@pytest.mark.parametrize("kl", KINDS)
def test_the_loss_is_the_mix_of_its_terms(cache: Path, kl: Divergence) -> None:
    data = CacheDataModule(str(cache), batch_rows=4)
    loss = LossConfig(kl=kl, alpha_start=0.7, alpha_end=0.7, tau_start=1.3, tau_end=1.3, beta=0.0)
    torch.manual_seed(0)
    module = DistillModule(StudentConfig(blocks=2, heads=4), loss, OptimizerConfig())
    trainer = Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False)
    trainer.datamodule = data  # type: ignore[attr-defined]
    module.trainer = trainer
    module.configure_model()
    trainer.strategy._lightning_optimizers = []
    trainer.strategy._optimizers = [torch.optim.SGD(module.parameters(), lr=1.0)]
    batch: Batch = next(iter(data.train_dataloader()))
    logged: dict[str, Any] = {}
    module.log_dict = logged.update  # type: ignore[method-assign, assignment]
    module.log = lambda name, value, **_: logged.update({name: value})  # type: ignore[method-assign, assignment]
    found = module.training_step(batch, 0)
    module.on_after_backward()

    assert module.model is not None and (batch.tail_ids_BTM is not None) == (kl == "sampled")
    logits_NV = module.model.logits(module.model(batch.input_ids_BT).h_BTD.flatten(0, 1))
    target_N = batch.target_BT.flatten()
    valid_N = target_N >= 0
    top = batch.topk_ids_BTK.flatten(0, 1).long(), batch.topk_logits_BTK.flatten(0, 1)
    tail_N, tail_1_N = (log_tail_at(batch.log_tail_BTR, batch.taus, tau).flatten() for tau in (1.3, 1.0))
    if kl == "tail":
        kl_N = kl_k1(logits_NV, *top, tail_N, 1.3, valid_N)
    elif kl == "renormalised":
        kl_N = kl_renormalised(logits_NV, *top, 1.3, valid_N)
    else:
        assert batch.tail_ids_BTM is not None and batch.tail_logits_BTM is not None
        draws = batch.tail_ids_BTM.flatten(0, 1).long(), batch.tail_logits_BTM.flatten(0, 1)
        kl_N = kl_sampled(logits_NV, *top, tail_N, tail_1_N, *draws, 1.3, valid_N)
    count = valid_N.sum()
    assert 0 < count < len(target_N)
    expected_kl, expected_ce = kl_N.sum() / count, cross_entropy(logits_NV, target_N).sum() / count
    torch.testing.assert_close(found, 0.3 * expected_ce + 0.7 * 1.3**2 * expected_kl)
    torch.testing.assert_close(logged[KL_METRIC[kl]], expected_kl.detach())
    assert {name for name in logged if name.startswith("train/kl")} == {KL_METRIC[kl]}


@pytest.mark.parametrize("kl", KINDS)
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_a_fixed_mix_of_kl_and_cross_entropy_at_tau_one(
    cache: Path, tmp_path: Path, alpha: float, kl: Divergence
) -> None:
    """alpha_start = alpha_end at tau 1, whether a schedule is on or not; 0 is cross-entropy alone, 1 the KL alone."""
    fixed = f"--model.loss.alpha_start={alpha}", f"--model.loss.alpha_end={alpha}", f"--model.loss.kl={kl}"
    tau = "--model.loss.tau_start=1", "--model.loss.tau_end=1", "--trainer.max_epochs=2"
    states = []
    for name, delta in (("off", "null"), ("on", "0.05")):
        assert train(cache, tmp_path / name, *fixed, *tau, f"--model.loss.delta={delta}") == 0
        rows = of_steps(tmp_path / name)
        assert len(rows) == 8
        for row in rows:
            assert (row["alpha"], row["tau"]) == (alpha, 1.0)
            mix = (1 - alpha) * row["train/ce"] + (alpha * row[KL_METRIC[kl]] if alpha else 0.0)
            assert row["train/loss"] == pytest.approx(mix, rel=1e-5)
            assert (KL_METRIC[kl] in row) == (alpha > 0)
        assert rows[-1]["train/loss"] < rows[0]["train/loss"]
        states.append(torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


def test_kinds_train_differently_and_are_judged_alike(cache: Path, tmp_path: Path) -> None:
    """A student that does not move has the same held-out figures, whatever it is trained on."""
    still = "--model.optimizer.lr=1e-30", "--model.optimizer.weight_decay=0"
    arms = {kl: (f"--model.loss.kl={kl}",) for kl in KINDS} | {"k3": ("--data.k=3",)}
    heldout, trained = set(), set()
    for name, extra in arms.items():
        assert train(cache, tmp_path / name, *extra, *still) == 0
        rows = metrics(tmp_path / name)
        heldout |= {(row["val/ce"], row["val/kl_k1"]) for row in rows if "val/ce" in row}
        trained |= {row["train/loss"] for row in rows[:1]}
    assert len(heldout) == 1 and len(trained) == 4


@pytest.mark.parametrize("alpha", ["-0.1", "1.1"])
def test_weights_outside_of_their_range_are_refused(cache: Path, tmp_path: Path, alpha: str) -> None:
    with pytest.raises(UserError, match="must be at most 1 and no weight negative"):
        fixed = f"--model.loss.alpha_start={alpha}", "--model.loss.delta=null"
        train(cache, tmp_path / "run", *fixed)


def test_draws_that_are_not_there_or_of_another_tail_are_refused(cache: Path, tmp_path: Path) -> None:
    sampled = "--model.loss.kl=sampled"
    with pytest.raises(UserError, match=r"kl is sampled, but --data\.k leaves ids out: .* leave --data\.k out"):
        train(cache, tmp_path / "fewer", sampled, "--data.k=4")
    bare = write_toy_cache(tmp_path / "bare", rows=8, length=32, block=8)
    with pytest.raises(UserError, match=r"kl is sampled, but the cache has no column `tail_ids`: set it to tail, or"):
        train(bare, tmp_path / "none", sampled)
    assert train(cache, tmp_path / "all", sampled, "--data.k=8", "--trainer.max_steps=1") == 0
    off = "--model.loss.alpha_start=0", "--model.loss.alpha_end=0"
    assert train(bare, tmp_path / "off", sampled, *off, "--trainer.max_steps=1") == 0


def test_only_renormalised_needs_no_tail_at_its_temperature(cache: Path, tmp_path: Path) -> None:
    hot = "--model.loss.tau_start=3", "--trainer.max_steps=1"
    assert train(cache, tmp_path / "hot", *hot, "--model.loss.kl=renormalised") == 0
    for kl in ("tail", "sampled"):
        with pytest.raises(UserError, match=r"tau_start is 3\.0, but the cache stores tails for tau 1\.0 to 2\.0"):
            train(cache, tmp_path / kl, *hot, f"--model.loss.kl={kl}")


def test_the_kind_is_part_of_an_exact_resume(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, save = tmp_path / "run", DistillModule.on_save_checkpoint

    def killed(self: DistillModule, checkpoint: dict[str, Any]) -> None:
        save(self, checkpoint)
        if checkpoint["global_step"] == 4:
            raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(DistillModule, "on_save_checkpoint", killed)
        with pytest.raises(MemoryError):
            train(cache, run)
    with pytest.raises(UserError, match=r"--model\.loss\.kl was tail, is renormalised"):
        train(cache, run, "--model.loss.kl=renormalised")

    # A run of a version that knew one kind only, and had no columns for the others.
    config = yaml.safe_load((run / "config.yaml").read_text())
    for part, name in (("model", "kl"), ("data", "k"), ("data", "hidden_window")):
        del (config[part]["loss"] if name == "kl" else config[part])[name]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with open(run / "metrics.csv", newline="") as file:
        rows = [[v for k, v in row.items() if k not in list(KL_METRIC.values())[1:]] for row in csv.DictReader(file)]
        file.seek(0)
        names = [name for name in next(csv.reader(file)) if name not in list(KL_METRIC.values())[1:]]
    (run / "metrics.csv").write_text("".join(",".join(row) + "\n" for row in [names, *rows]))
    before = metrics(run)
    capsys.readouterr()
    assert train(cache, run) == 0 and "at step 2 of 4" in capsys.readouterr().out
    after = metrics(run)
    assert after[:2] == before[:2] and [row["step"] for row in after if "train/loss" in row] == [1, 2, 3, 4]
