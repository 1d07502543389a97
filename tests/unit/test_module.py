"""Training through its command line on a toy cache: the loss's parts, exact resumption, and what it refuses."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_cache import write_toy_cache
from lightning import Callback, Trainer

import student.__main__ as command
from pipeline.errors import UserError, run_command
from student.data.batch import Batch
from student.data.loader import CacheDataModule
from student.losses.attention import attention_alignment
from student.losses.frobenius import frobenius
from student.losses.sparse_kd import cross_entropy, kl_k1, log_tail_at
from student.model import StudentConfig
from student.runs.checkpoint import load_student
from student.training.loss_config import LossConfig
from student.training.module import DistillModule
from student.training.optimizer import OptimizerConfig

STUDENTS = Path(__file__).parents[2] / "manifests" / "students"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 training rows of 32 tokens: five steps an epoch at four rows a step."""
    return write_toy_cache(tmp_path_factory.mktemp("module") / "cache", units=2, rows=11, length=32, block=8, window=4)


def options(cache: Path, run: Path, *extra: str) -> list[str]:
    settings = {
        "cache": cache,
        "run": run,
        "checkpoint_every": 2,
        "data.batch_rows": 4,
        "model.student.blocks": 2,
        "model.student.heads": 4,
        "model.loss.beta": 0.1,
        "trainer.accelerator": "cpu",
        "trainer.max_epochs": 2,
        "trainer.log_every_n_steps": 2,
    }
    return [*(f"--{name}={value}" for name, value in settings.items()), *extra]


class Signal(Callback):
    """A real signal while the given optimiser step (from 1) is being taken."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number, self.done = step, number, False

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step + 1 == self.step and not self.done:
            self.done = True
            os.kill(os.getpid(), self.number)
            if self.number == signal.SIGTERM:  # as where torchrun and Slurm send one each
                os.kill(os.getpid(), self.number)


def train(arguments: list[str], monkeypatch: pytest.MonkeyPatch, stop_at: int = 0, number: int = signal.SIGINT) -> int:
    callbacks = [Signal(stop_at, number)] if stop_at else []
    monkeypatch.setattr(command, "TRAINER_DEFAULTS", {**command.TRAINER_DEFAULTS, "callbacks": callbacks})
    return command.main(arguments)


def last(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def metrics(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def comparable(run: Path) -> list[dict[str, str]]:
    """The logged lines without what depends on the clock."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in metrics(run)]


@pytest.mark.parametrize(
    ("extra", "stops"),
    [
        ((), (3, 5, 6)),  # in the first epoch, at its last step, at the second's first
        (("--trainer.max_epochs=-1", "--trainer.max_steps=8"), (3, 5)),
        (("--trainer.accumulate_grad_batches=2",), (1, 3)),
        (("--model.student.train_embedding=true", "--model.student.train_head=true"), (3,)),
        (("--model.student.train_head=true",), (6,)),
    ],
    ids=["epochs", "steps", "accumulated", "unfrozen", "untied"],
)
def test_a_stopped_run_goes_on_to_bit_equal_weights(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: tuple[str, ...], stops: tuple[int, ...]
) -> None:
    assert train(options(cache, tmp_path / "whole", *extra), monkeypatch) == 0
    whole = last(tmp_path / "whole")
    for stop in stops:
        run = tmp_path / f"stopped-{stop}"
        assert train(options(cache, run, *extra), monkeypatch, stop_at=stop) == 130
        assert last(run)["global_step"] == stop
        assert train(options(cache, run, *extra), monkeypatch) == 0
        resumed = last(run)
        assert resumed["global_step"] == whole["global_step"] > stop
        assert resumed["step_counter"] == whole["step_counter"]
        for name, value in whole["state_dict"].items():
            assert torch.equal(resumed["state_dict"][name], value), (stop, name)
        ours, theirs = comparable(run), comparable(tmp_path / "whole")
        assert ours == theirs


@pytest.mark.parametrize("step", [3, 5])
def test_a_terminated_run_saves_and_says_how_to_go_on(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], step: int
) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    run = tmp_path / "run"
    assert train(options(cache, run), monkeypatch, stop_at=step, number=signal.SIGTERM) == 143
    assert last(run)["global_step"] == step
    assert f"stopped at step {step} of 10" in capsys.readouterr().err
    assert {number: signal.getsignal(number) for number in before} == before


def test_ctrl_c_before_the_first_step_is_told_as_elsewhere(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class AtStart(Callback):
        def setup(self, *_: Any, **__: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(command, "TRAINER_DEFAULTS", {**command.TRAINER_DEFAULTS, "callbacks": [AtStart()]})
    try:
        assert run_command(lambda: command.main(options(cache, tmp_path / "run"))) == 130
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning has it ignored
    assert "run the same command to go on" in capsys.readouterr().err
    assert train(options(cache, tmp_path / "run"), monkeypatch) == 0


def test_a_kill_resumes_from_the_last_checkpoint(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                raise MemoryError

    run = tmp_path / "run"
    monkeypatch.setattr(command, "TRAINER_DEFAULTS", {**command.TRAINER_DEFAULTS, "callbacks": [Killed()]})
    with pytest.raises(MemoryError):
        command.main(options(cache, run))
    assert last(run)["global_step"] == 2
    (run / "checkpoints" / ".last.ckpt.dead-1-00.tmp").write_bytes(b"half")
    train(options(cache, run), monkeypatch)
    train(options(cache, tmp_path / "whole"), monkeypatch)
    ours, theirs = last(run)["state_dict"], last(tmp_path / "whole")["state_dict"]
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]


def test_a_finished_run_says_so_and_keeps_what_it_promises(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(options(cache, run), monkeypatch)
    before = (run / "metrics.csv").read_bytes()
    capsys.readouterr()
    assert train(options(cache, run), monkeypatch) == 0
    assert "is finished: 10 steps" in capsys.readouterr().out
    assert (run / "metrics.csv").read_bytes() == before
    checkpoint = last(run)
    model, teacher = load_student(run, "best")
    assert set(checkpoint["state_dict"]) == {f"model.{name}" for name, _ in model.named_parameters()}
    assert teacher.path == run / "teacher"
    assert json.loads((run / "data.json").read_text())["steps_per_epoch"] == 5
    rows = metrics(run)
    assert [r["step"] for r in rows if r["train/loss"]] == ["2", "4", "6", "8", "10"]
    assert [r["step"] for r in rows if r["val/ce"]] == ["5", "10"]
    assert float(rows[-1]["val/ce"]) < float([r for r in rows if r["val/ce"]][0]["val/ce"])


def test_the_loss_is_its_terms_put_together(cache: Path) -> None:
    data = CacheDataModule(str(cache), batch_rows=4)
    loss = LossConfig(alpha_start=0.6, tau_start=1.3, delta=None, beta=0.1, gamma=0.2)
    module = attached(data, loss)
    batch: Batch = next(iter(data.train_dataloader()))
    logged: dict[str, Any] = {}
    module.log_dict = logged.update  # type: ignore[method-assign, assignment]
    module.log = lambda name, value, **_: logged.update({name: value})  # type: ignore[method-assign, assignment]
    found = module.training_step(batch, 0)
    module.on_after_backward()

    assert module.model is not None and batch.hidden_BWD is not None and batch.attn_map_BGnn is not None
    output = module.model(batch.input_ids_BT, map_block=8)
    logits_NV = module.model.logits(output.h_BTD.flatten(0, 1))
    target_N = batch.target_BT.flatten()
    tail_N = log_tail_at(batch.log_tail_BTR, batch.taus, 1.3).flatten()
    top = (batch.topk_ids_BTK.flatten(0, 1), batch.topk_logits_BTK.flatten(0, 1))
    ce = cross_entropy(logits_NV, target_N).mean()
    kl = kl_k1(logits_NV, *top, tail_N, 1.3, torch.ones_like(target_N, dtype=torch.bool)).mean()
    hidden = frobenius(output.h_BTD, batch.hidden_BWD, batch.length_B, 4)
    maps = attention_alignment(output.maps, batch.attn_map_BGnn, batch.length_B, 8, 2)
    torch.testing.assert_close(found, 0.3 * ce + 0.6 * 1.3**2 * kl + 0.1 * hidden + 0.2 * maps)
    parts = {"train/ce": ce, "train/kl_k1": kl, "train/frobenius": hidden, "train/attention": maps}
    for name, value in parts.items():
        torch.testing.assert_close(logged[name], value.detach(), msg=name)
    assert (logged["alpha"], logged["tau"]) == (0.6, 1.3)


def attached(data: CacheDataModule, loss: LossConfig, blocks: int = 2) -> DistillModule:
    """A module whose model is built, with a trainer that has not begun."""
    torch.manual_seed(0)
    module = DistillModule(StudentConfig(blocks=blocks, heads=4), loss, OptimizerConfig())
    trainer = Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False)
    trainer.datamodule = data  # type: ignore[attr-defined]
    module.trainer = trainer
    module.configure_model()
    trainer.strategy._lightning_optimizers = []
    trainer.strategy._optimizers = [torch.optim.SGD(module.parameters(), lr=1.0)]
    return module


def test_configuring_the_model_twice_keeps_the_first(cache: Path) -> None:
    module = attached(CacheDataModule(str(cache), batch_rows=4), LossConfig(beta=0.0))
    model = module.model
    module.configure_model()
    assert module.model is model


def test_the_rate_warms_up_and_follows_a_cosine() -> None:
    config = OptimizerConfig(warmup_fraction=0.1, min_lr_fraction=0.2)
    factors = [config.factor(step, 100) for step in range(101)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1.0 and factors[55] == pytest.approx(0.6) and factors[100] == pytest.approx(0.2)


def test_a_loss_that_is_not_finite_stops_and_names_the_sequences(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Batch.to

    def poisoned(batch: Batch, *args: Any, **kwargs: Any) -> Batch:
        moved = whole(batch, *args, **kwargs)
        moved.lse_BT = moved.lse_BT * math.nan
        moved.topk_logits_BTK = moved.topk_logits_BTK * math.nan
        return moved

    monkeypatch.setattr(Batch, "to", poisoned)
    with pytest.raises(UserError, match=r"the loss is nan at step 0 on sequences \[\d+, \d+, \d+, \d+\]"):
        train(options(cache, tmp_path / "run"), monkeypatch)
    assert not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("--model.optimizer.lr=0.5", r"--model\.optimizer\.lr was 0\.0002, is 0\.5"),
        ("--data.seed=3", r"--data\.seed was 0, is 3"),
        ("--trainer.max_epochs=9", r"--trainer\.max_epochs was 2, is 9"),
    ],
)
def test_other_settings_than_the_run_began_with_are_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str, message: str
) -> None:
    train(options(cache, tmp_path / "run"), monkeypatch, stop_at=1)
    with pytest.raises(UserError, match=message):
        train(options(cache, tmp_path / "run", changed), monkeypatch)


def test_another_teachers_cache_is_refused(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = write_toy_cache(tmp_path / "other", rows=8, length=32, block=8, window=4, seed=1)
    train(options(cache, tmp_path / "run"), monkeypatch, stop_at=1)
    with pytest.raises(UserError, match="different teachers"):
        train(options(other, tmp_path / "run"), monkeypatch)
    module = attached(CacheDataModule(str(other), batch_rows=4), LossConfig(beta=0.0))
    checkpoint = last(tmp_path / "run")
    with pytest.raises(UserError, match=f"teacher is '{checkpoint['compat']['teacher']}' in the checkpoint"):
        module.on_load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("--model.loss.tau_start=2.5", r"tau_start is 2\.5, but the cache stores tails for tau 1\.0 to 2\.0"),
        ("--model.loss.alpha_start=0.95", r"alpha_start 0\.95 \+ beta 0\.1 must be at most 1"),
        ("--model.loss.alpha_end=0.9", r"alpha_start 0\.8 must not be below --model\.loss\.alpha_end 0\.9"),
        ("--model.student.heads=7", "student.heads=7"),
        ("--checkpoint_every=0", "--checkpoint_every is 0"),
        ("--model.loss.alhpa_start=0.5", "alhpa_start"),
        ("--config=manifests/students/no-such.yaml", "there is no such file"),
        ("--cache=/no/such/cache", "is no cache"),
        ("--cache=", "--cache is missing: name the folder of a cache"),
    ],
)
def test_mistakes_are_told_in_one_sentence(
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changed: str,
    message: str,
) -> None:
    assert run_command(lambda: train(options(cache, tmp_path / "run", changed), monkeypatch)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(message, error), error


def test_terms_that_the_cache_cannot_serve_are_refused(tmp_path: Path) -> None:
    bare = CacheDataModule(str(write_toy_cache(tmp_path / "bare", length=32, block=0)), batch_rows=4)
    with pytest.raises(UserError, match=r"loss\.beta is 0\.1.*`hidden`"):
        attached(bare, LossConfig(beta=0.1))
    with pytest.raises(UserError, match=r"loss\.gamma is 0\.1.*`attn_map`"):
        attached(bare, LossConfig(beta=0.0, gamma=0.1))
    mapped = CacheDataModule(str(write_toy_cache(tmp_path / "mapped", length=32, block=8)), batch_rows=4)
    with pytest.raises(UserError, match="no mLSTM block"):
        attached(mapped, LossConfig(beta=0.0, gamma=0.1), blocks=1)


@pytest.mark.parametrize("preset", sorted(p.stem for p in STUDENTS.glob("*.yaml")))
def test_presets_are_understood(preset: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every preset trains one step on the toy teacher, its own loss terms included."""
    arguments = [f"--config={STUDENTS / preset}.yaml", f"--cache={cache}", f"--run={tmp_path / preset}"]
    small = [
        "--model.student.heads=4",
        "--model.student.blocks=2",
        "--trainer.max_steps=1",
        "--trainer.accelerator=cpu",
    ]
    if "transformer:" in (STUDENTS / f"{preset}.yaml").read_text():
        small.append("--model.student.transformer.kv_heads=2")  # divides 4 heads
    assert train([*arguments, *small, "--data.batch_rows=4"], monkeypatch) == 0
    assert last(tmp_path / preset)["global_step"] == 1


def test_a_runs_own_config_starts_it_again(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(options(cache, tmp_path / "run"), monkeypatch, stop_at=1)
    assert train([f"--config={tmp_path / 'run' / 'config.yaml'}"], monkeypatch) == 0
    assert "going on with" in capsys.readouterr().out and last(tmp_path / "run")["global_step"] == 10


def test_help_shows_type_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Weight of the Frobenius term on hidden states; needs a cache with `hidden`" in text
    assert "(type: float, default: 0.1)" in text
