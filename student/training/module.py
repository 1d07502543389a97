"""Training as a LightningModule: the loss put together, schedules, optimiser, checkpoints that refuse another teacher.

    L = (1 - alpha - beta) CE + alpha tau^2 KL + beta L_F + gamma L_A

CE and KL (which one, `LossConfig.kl` says) are averaged over the targets of the whole batch (over all ranks); a
position without a target counts in neither. The model is built in `configure_model` from the data module's teacher, so
that a checkpoint holds trained weights only.

Legend: B rows, T tokens, N = B*T positions, D width, W windows, n pooling blocks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from pipeline.errors import UserError
from student.blocks.graphed import record
from student.data.batch import IGNORE, Batch
from student.losses.attention import attention_alignment, compared_blocks
from student.losses.frobenius import frobenius
from student.losses.fused import Head, KDSums, TailDraws, TeacherTopK, fused_kd_sums
from student.losses.sparse_kd import Divergence, log_tail_at
from student.model import DistilXLSTM, StudentConfig
from student.runs.identity import Teaching, require_same_teacher
from student.training.finite import FiniteWatch
from student.training.loss_config import LossConfig
from student.training.optimizer import OptimizerConfig, decays
from student.training.ranks import means_over_ranks, over_ranks, start_sum
from student.training.schedule import StepCounter
from student.training.sharding import ShardedStrategy, shard, whole
from student.training.warm_up import build_kernels, first_rank_first

METRICS = (
    "train/loss",
    "train/ce",
    "train/kl_k1",
    "train/kl_renormalised",
    "train/kl_sampled",
    "train/frobenius",
    "train/attention",
    "alpha",
    "tau",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "val/ce",
    "val/kl_k1",
)
"""Everything that training logs; losses in nats, the terms without their coefficients. Of the train/kl_* there is the
one that is trained on; val/kl_k1 is at tau 1 and over the ids that the cache holds, whatever is trained on."""

KL_METRIC: dict[Divergence, str] = {
    "tail": "train/kl_k1",
    "renormalised": "train/kl_renormalised",
    "sampled": "train/kl_sampled",
}


class DistillModule(LightningModule):
    """The student and how it is trained.

    Args:
        student: shape of the student.
        loss: terms and schedules of the loss.
        optimizer: AdamW and its learning rate.
        graphs: on one GPU, launch the blocks as CUDA graphs (`student/blocks/graphed.py`); not with
            accumulated gradients.

    Needs a `CacheDataModule` as the trainer's data module.
    """

    def __init__(
        self, student: StudentConfig, loss: LossConfig, optimizer: OptimizerConfig, graphs: bool = False
    ) -> None:
        super().__init__()
        self.student, self.loss, self.optimizer, self.graphs = student, loss, optimizer, graphs
        self.save_hyperparameters(
            {"student": asdict(student), "loss": asdict(loss), "optimizer": asdict(optimizer)}, logger=False
        )
        self.model: DistilXLSTM | None = None
        self.counter = StepCounter()
        self._tokens, self._since = 0, time.perf_counter()
        self._heldout: list[Tensor] = []
        self._batch_ids: list[int] = []
        self._terms: dict[str, Tensor] = {}
        self._schedule = 0.0, 0.0
        self.watch = FiniteWatch()
        self._norm: Tensor = torch.zeros(())

    def configure_model(self) -> None:
        """Build the student from the data module's teacher, once; cut it over the ranks where the strategy says so."""
        if self.model is None:
            self.model = self._built()
        strategy = self.trainer.strategy
        if isinstance(strategy, ShardedStrategy) and strategy.is_set_up and not isinstance(self.model, FSDPModule):
            shard(self.model, strategy.device_mesh["data_parallel"])

    def _built(self) -> DistilXLSTM:
        data = self._data
        with torch.device("cpu"):  # a GPU draws other numbers: the first weights are those of the seed, on any device
            student = DistilXLSTM(self.student, data.teacher.facts, data.teacher.tensors(), data.max_length)
        draws = data.tail_samples if data.keeps_k else None
        self.loss.check(data.taus, data.has_hidden, data.pool_block > 0, len(student.mlstm_blocks), draws)
        data.read_only(self.loss.columns())
        # Frozen and read by every rank from the same file: DDP would send them round before each step. What is trained
        # is a parameter, and none of them.
        frozen = [f"model.{name}" for name, _ in student.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, frozen)
        return student

    @property
    def _data(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def total_steps(self) -> int:
        """Optimiser steps of the whole run, without asking Lightning (whose estimate resets a stateful loader)."""
        trainer = self.trainer
        batches = self._data.steps_per_epoch
        limit = trainer.limit_train_batches
        if limit is not None:
            batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        per_epoch = max(1, math.ceil(batches / trainer.accumulate_grad_batches))
        by_epochs = per_epoch * trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
        candidates = [n for n in (by_epochs, trainer.max_steps if trainer.max_steps > 0 else None) if n is not None]
        if not candidates:
            raise UserError("--trainer.max_epochs and --trainer.max_steps are both unlimited: set one of them")
        return min(candidates)

    def configure_optimizers(self) -> Any:
        assert self.model is not None
        trained = [(decays(name, p), p) for name, p in self.model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for decayed, p in trained if decayed], "weight_decay": self.optimizer.weight_decay},
            {"params": [p for decayed, p in trained if not decayed], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.optimizer.lr, betas=self.optimizer.betas, fused=self._fused())
        total = self.total_steps()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.optimizer.factor(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _fused(self) -> bool | None:
        """On a GPU: a pass over the weights, and one that the device can be told to leave out (`FiniteWatch`).

        Not with float16's loss scaler, which a fused optimiser would have to apply itself, after the clipping; nor
        where weights are cut over ranks.
        """
        strategy = self.trainer.strategy
        plain = self.trainer.scaler is None and not isinstance(strategy, ShardedStrategy)
        return True if strategy.root_device.type == "cuda" and plain else None

    def on_fit_start(self) -> None:
        """On a GPU compile what the blocks need; record graphs, if they are wanted and can be: before the loader's
        threads, whom no recording must meet. Not where weights are cut over ranks, which only compute together."""
        trainer, data = self.trainer, self._data
        if self.device.type != "cuda" or isinstance(trainer.strategy, ShardedStrategy):
            return
        assert self.model is not None
        dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(trainer.precision)
        blocks = self.model.blocks(data.pool_block if self.loss.gamma else 0).train()
        lengths = sorted({spec.length for spec in data.specs})
        with first_rank_first(trainer):
            for length in lengths:
                shape = (data.batch_rows // trainer.world_size, length, self.model.facts.width)
                build_kernels(blocks, shape, dtype, input_gradient=self.student.train_embedding)
        alone = trainer.world_size == 1 and trainer.accumulate_grad_batches == 1
        if self.graphs and alone and len(lengths) == 1:
            self.model.graphed = record(blocks, shape, dtype, input_gradient=self.student.train_embedding)

    def on_train_start(self) -> None:
        self._tokens, self._since = 0, time.perf_counter()

    def on_train_epoch_start(self) -> None:
        self.counter.enter(self.trainer.current_epoch)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.counter.step()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch; every term without its coefficient is logged after the backward pass."""
        config = self.loss
        alpha = config.alpha().at(self.counter.epoch, self.counter.k)
        tau = config.tau().at(self.counter.epoch, self.counter.k)
        self._batch_ids = batch.sequence_id_B.tolist()
        counted = self._start_counts(batch)
        h_BTD, maps = self._forward(batch, with_maps=config.gamma > 0)
        count, compared = counted()
        weight_ce = max(0.0, 1 - alpha - config.beta)  # rounding
        sums = self._kd(batch, h_BTD, weight_ce, alpha * tau**2, tau, config.kl)
        loss = sums.total / count
        logged = {"train/ce": sums.ce / count}
        if alpha > 0:
            logged[KL_METRIC[config.kl]] = sums.kl / count
        length = batch.input_ids_BT.shape[1]
        if config.beta > 0:
            assert batch.hidden_BWD is not None
            term = frobenius(h_BTD, batch.hidden_BWD, batch.length_B, length // batch.hidden_BWD.shape[1])
            loss = loss + config.beta * term
            logged["train/frobenius"] = term.detach()
        if config.gamma > 0:
            assert batch.attn_map_BGnn is not None
            term = attention_alignment(
                maps,
                batch.attn_map_BGnn,
                batch.length_B,
                length // batch.attn_map_BGnn.shape[-1],
                self.student.blocks,
                config.attention_sign,
                config.attention_sinks,
                config.attention_normalise_rows,
                compared,
            )
            loss = loss + config.gamma * term
            logged["train/attention"] = term.detach()
        self._terms, self._schedule = {**logged, "train/loss": loss.detach()}, (alpha, tau)
        return loss

    def on_after_backward(self) -> None:
        """Log, and look at the loss.

        Here, where the gradients' sum has brought the ranks together: before it, they would wait for the slowest twice.

        Raises:
            UserError: see `FiniteWatch.loss`.
        """
        # Each rank's values are its part of the whole batch's times the number of ranks: their means are the batch's.
        logged, loss_R = means_over_ranks(self._terms, "train/loss", self.trainer.global_rank, self.trainer.world_size)
        # Of all ranks: where one's is not finite, all stop, and none waits for another.
        self.watch.loss(self._seen(loss_R), self.trainer.global_rank, self.trainer.global_step, self._batch_ids)
        alpha, tau = self._schedule
        logged |= {"alpha": _on_host(alpha), "tau": _on_host(tau)}
        logged["lr"] = _on_host(self.trainer.optimizers[0].param_groups[0]["lr"])
        # Never with prog_bar: Lightning reads what the bar is to show at every step, and the host waits for it.
        self.log_dict(logged)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(gradients))
        # float16's loss scaler meets infinite gradients by itself; a loss that is not finite none gets better.
        self.watch.gradients(self._seen(norm) if self.trainer.scaler is None else None, optimizer)
        self._norm = norm
        self.log("grad_norm", norm)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, by the norm that was just measured. Lightning's own clipping refuses every fused optimiser."""
        if not gradient_clip_val:
            return
        if gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(self.parameters(), gradient_clip_val)
        else:
            torch.nn.utils.clip_grads_with_norm_(self.parameters(), gradient_clip_val, self._norm)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device, non_blocking=True)

    def on_train_end(self) -> None:
        self.watch.wait()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self._tokens += batch.tokens * self.trainer.world_size
        speed = self._tokens / (time.perf_counter() - self._since)
        self.log("tokens_per_second", _on_host(speed))
        every = max(1, self.trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if self.trainer.global_step % every == 0:
            self._tokens, self._since = 0, time.perf_counter()

    def on_validation_epoch_start(self) -> None:
        self._heldout = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        h_BTD, _ = self._forward(batch)
        sums = self._kd(batch, h_BTD, 1.0, 1.0, 1.0)
        count = (batch.target_BT != IGNORE).sum()
        self._heldout.append(torch.stack((sums.ce, sums.kl, count.to(sums.ce.dtype))).double())

    def on_validation_epoch_end(self) -> None:
        if self._heldout:
            ce, kl, count = over_ranks(torch.stack(self._heldout).sum(0))
            self.log_dict({"val/ce": ce / count, "val/kl_k1": kl / count})
        self._tokens, self._since = 0, time.perf_counter()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.watch.wait()
        checkpoint["compat_id"], checkpoint["compat"] = self._data.compat_id, self._data.compat
        checkpoint["step_counter"] = self.counter.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the schedule's place.

        Raises:
            UserError: the checkpoint was trained on another teacher's cache.
        """
        found = Teaching("the checkpoint", checkpoint["compat_id"], checkpoint.get("compat"))
        remedy = "Name a cache of the checkpoint's teacher, or another --run"
        require_same_teacher(found, Teaching.of(self._data.caches[0]), remedy)
        self.counter.load_state_dict(checkpoint["step_counter"])
        for state in checkpoint.get("optimizer_states", ()):
            for group in state["param_groups"]:  # of the device it was written on
                group["fused"] = self._fused()

    def _forward(self, batch: Batch, with_maps: bool = False) -> tuple[Tensor, dict[int, Tensor]]:
        assert self.model is not None
        block = 0
        if with_maps:
            assert batch.attn_map_BGnn is not None
            block = batch.input_ids_BT.shape[1] // batch.attn_map_BGnn.shape[-1]
        output = self.model(batch.input_ids_BT, map_block=block)
        return output.h_BTD, output.maps

    def _kd(
        self,
        batch: Batch,
        h_BTD: Tensor,
        weight_ce: float,
        weight_kl: float,
        tau: float,
        kl: Divergence = "tail",
    ) -> KDSums:
        assert self.model is not None
        facts = self.model.facts
        return fused_kd_sums(
            h_BTD.flatten(0, 1),
            Head(self.model.head_VD, facts.logit_scale, facts.soft_cap),
            batch.target_BT.flatten(),
            _teacher(batch, tau, kl if weight_kl else None),
            weight_ce,
            weight_kl,
            tau,
            self.loss.chunk_rows,
            kl=kl,
        )

    def _start_counts(self, batch: Batch) -> Callable[[], tuple[Tensor, Tensor | None]]:
        """What sums over targets and over compared rows of maps are divided by: the means of the ranks' numbers.

        Lightning averages gradients over ranks; dividing by such a mean averages over the targets of all of them.
        """
        numbers = [(batch.target_BT != IGNORE).sum()]
        if self.loss.gamma > 0:
            assert batch.attn_map_BGnn is not None
            n = batch.attn_map_BGnn.shape[-1]
            block = batch.input_ids_BT.shape[1] // n
            numbers.append(compared_blocks(batch.length_B, n, block, self.loss.attention_sinks).sum())
        finish, ranks = start_sum(torch.stack(numbers).float()), self.trainer.world_size

        def means() -> tuple[Tensor, Tensor | None]:
            targets, *compared = (finish() / ranks).unbind()
            return targets.clamp_min(1), compared[0] if compared else None

        return means

    def _seen(self, value: Tensor) -> Tensor:
        """As `FiniteWatch` wants it: only a fused optimiser can be told on the device."""
        return value.cpu() if isinstance(self.trainer.strategy, ShardedStrategy) else value


def _teacher(batch: Batch, tau: float, kl: Divergence | None) -> TeacherTopK:
    """What the divergence `kl` compares with, of all positions; None: nothing will be looked at."""

    def indices(ids_BTX: Tensor) -> Tensor:
        return ids_BTX.flatten(0, 1) if ids_BTX.is_cuda else ids_BTX.flatten(0, 1).long()  # torch's gather wants int64

    tails_BTR, draws = batch.log_tail_BTR, None
    if kl == "sampled":
        assert batch.tail_ids_BTM is not None and batch.tail_logits_BTM is not None
        log_tail_1_BT = log_tail_at(tails_BTR, batch.taus, 1.0)
        draws = TailDraws(indices(batch.tail_ids_BTM), batch.tail_logits_BTM.flatten(0, 1), log_tail_1_BT.flatten())
    looked_at = kl in ("tail", "sampled")
    log_tail_BT = log_tail_at(tails_BTR, batch.taus, tau) if looked_at else tails_BTR[..., 0]
    top = indices(batch.topk_ids_BTK), batch.topk_logits_BTK.flatten(0, 1)
    return TeacherTopK(*top, log_tail_BT.flatten(), draws)


def _on_host(value: float) -> Tensor:
    """A number to be logged. Lightning would copy a bare one to the GPU, and the host would wait for all its work."""
    return torch.tensor(value, dtype=torch.float64, device="cpu")
