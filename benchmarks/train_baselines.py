"""What our training step is compared with: the `xlstm` package's blocks and a loss in plain PyTorch.

`package` reads the same sparse targets as we do; `online` is how the authors of Distil-xLSTM train: the teacher runs
beside the student at every step, and the divergence is taken over the whole vocabulary. Both have bf16-mixed precision,
AdamW and gradient clipping as ours. Neither has attention maps or hidden states to learn from: they do less than ours.

Legend: B rows, T tokens a row, N positions of a forward pass, V vocabulary, D width; C rows of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from xlstm import xLSTMBlockStack
from xlstm.components.ln import LayerNorm

from benchmarks.dump_throughput import SHAPES
from benchmarks.random_cache import random_tensors
from benchmarks.train_step import Case, adamw, autocast, synthetic_batch
from student.data.batch import Batch
from student.losses.sparse_kd import cross_entropy, kl_k1, log_tail_at
from student.model import stack_config

CHUNK_ROWS = 4096
WEIGHT_CE, WEIGHT_KL, TAU = 0.2, 0.8, 1.5


class PackageStack(torch.nn.Module):
    """The student's blocks as the package computes them: dense mLSTM, its own sLSTM kernel on a GPU."""

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__()
        backend: Any = "cuda" if device.type == "cuda" else "vanilla"
        self.blocks = xLSTMBlockStack(stack_config(case.student(), case.width, case.length, backend))
        self.final_norm = LayerNorm(ndim=case.width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.final_norm(self.blocks(x_BTD))  # type: ignore[no-any-return]


class BaselineStep:
    """One optimiser step of B rows, gathered over forward passes of `rows` rows."""

    def __init__(self, case: Case, device: torch.device, rows: int) -> None:
        self.case, self.device = case, device
        torch.manual_seed(0)
        self.embedding_VD = random_tensors(case.vocab, case.width, device)["embedding_VD"]
        self.stack = PackageStack(case, device).to(device).train()
        self.teacher = random_teacher_model(case, device) if case.case == "online" else None
        self.optimizer = adamw(self.stack.parameters(), device)
        whole = synthetic_batch(case, device)
        self.parts = [rows_of(whole, slice(first, first + rows)) for first in range(0, case.batch, rows)]

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        positions = self.case.batch * self.case.length
        for part in self.parts:
            with autocast(self.device):
                h_BTD = self.stack(F.embedding(part.input_ids_BT, self.embedding_VD).float())
            if self.teacher is None:
                total += self.sparse_loss(h_BTD, part) / positions
            else:
                loss = self.full_loss(h_BTD, part) / positions
                loss.backward()
                total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.stack.parameters(), 1.0)
        self.optimizer.step()
        return total

    def sparse_loss(self, h_BTD: Tensor, batch: Batch) -> Tensor:
        """Loss on top-k targets, a chunk of logits at a time; its gradient is passed on to the blocks."""
        h_ND = h_BTD.flatten(0, 1)
        apart_ND = h_ND.detach().requires_grad_()
        target_N = batch.target_BT.flatten()
        ids_NK, logits_NK = batch.topk_ids_BTK.flatten(0, 1).long(), batch.topk_logits_BTK.flatten(0, 1)
        tail_N = log_tail_at(batch.log_tail_BTR, batch.taus, TAU).flatten()
        total = torch.zeros((), device=self.device)
        for first in range(0, len(target_N), CHUNK_ROWS):
            at = slice(first, first + CHUNK_ROWS)
            with autocast(self.device):
                logits_CV = F.linear(apart_ND[at], self.embedding_VD).float()
            ce_C = cross_entropy(logits_CV, target_N[at])
            kl_C = kl_k1(logits_CV, ids_NK[at], logits_NK[at], tail_N[at], TAU, target_N[at] >= 0)
            loss = (WEIGHT_CE * ce_C + WEIGHT_KL * TAU**2 * kl_C).sum()
            loss.backward()
            total += loss.detach()
        assert apart_ND.grad is not None
        h_ND.backward(apart_ND.grad / (self.case.batch * self.case.length))
        return total

    def full_loss(self, h_BTD: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy and the divergence from the teacher over the whole vocabulary, all positions at once."""
        assert self.teacher is not None
        with autocast(self.device):
            logits_NV = F.linear(h_BTD.flatten(0, 1), self.embedding_VD)
            with torch.no_grad():
                teacher_NV = self.teacher(input_ids=batch.input_ids_BT).logits.flatten(0, 1)
        ce = F.cross_entropy(logits_NV.float(), batch.target_BT.flatten(), ignore_index=-100, reduction="sum")
        kl = F.kl_div(
            F.log_softmax(logits_NV.float() / TAU, -1), F.softmax(teacher_NV.float() / TAU, -1), reduction="sum"
        )
        return WEIGHT_CE * ce + WEIGHT_KL * TAU**2 * kl


def rows_of(batch: Batch, rows: slice) -> Batch:
    """A batch of some of the rows."""
    values: dict[str, Any] = {
        name: value[rows] if isinstance(value, Tensor) else value for name, value in vars(batch).items()
    }
    return Batch(**values)


def teacher_config(case: Case) -> dict[str, Any]:
    """Qwen2.5-1.5B's shape, at the case's width, vocabulary and number of layers."""
    shape = {**SHAPES["qwen2.5-1.5b"], "vocab_size": case.vocab, "num_hidden_layers": case.teacher_layers}
    if case.width != shape["hidden_size"]:  # a small one, to check the code with
        shape |= {"hidden_size": case.width, "intermediate_size": 2 * case.width}
        shape |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    shape.pop("architectures")
    return shape


def random_teacher_model(case: Case, device: torch.device) -> Any:
    """A Transformer of the teacher's shape with random bfloat16 weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**teacher_config(case))
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)
