"""An optimiser step of ours without trainer and loader, its case, and the FLOPs it cannot do without.

Legend: B rows, T tokens, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from benchmarks.meters import matmul_rate, peak_gb, reset_peak, seconds_of
from benchmarks.random_cache import benchmark_spec, random_columns, random_facts, random_tensors
from pipeline.schema import CacheSpec
from student.blocks.graphed import record
from student.data.batch import IGNORE, Batch
from student.data.group_reader import to_batch
from student.losses.attention import attention_alignment
from student.model import DistilXLSTM, StudentConfig
from student.training.loss_config import LossConfig
from student.training.module import DistillModule
from student.training.optimizer import OptimizerConfig

PRESETS = Path("manifests/students")  # benchmarks run from the repository's root
LOSS_PRESET = "fast"


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        case: one of train_throughput's; `write` writes the cache that those from shards read.
        batch, length: B and T of an optimiser step, of each GPU.
        preset: the student's shape, a file in manifests/students; the loss is `fast`'s: CE, KL and attention maps.
        steps, warmup: optimiser steps that are timed, and those before them.
        width, vocab, teacher_layers: of the teacher; Qwen2.5-1.5B's.
        heads, blocks: of the student, 0: the preset's.
        micro_rows: rows of one forward pass of online and package, 0: as many as the memory holds (halved until so).
        cache, run: folders of the cases from shards.
        profile: print the kernels by their time instead.
        graphs: launch the student's blocks as CUDA graphs.
    """

    case: str
    batch: int
    length: int
    preset: str = LOSS_PRESET
    steps: int = 30
    warmup: int = 10
    width: int = 1536
    vocab: int = 151_936
    k: int = 64
    block: int = 64
    groups: int = 6
    teacher_layers: int = 28
    heads: int = 0
    blocks: int = 0
    micro_rows: int = 0
    chunk_rows: int = 0
    cache: str = ""
    run: str = ""
    profile: bool = False
    graphs: bool = False

    def spec(self) -> CacheSpec:
        return benchmark_spec(self.length, self.vocab, self.width, self.k, self.block, self.groups)

    def student(self) -> StudentConfig:
        shape = StudentConfig.of(_preset(self.preset)["student"])
        return replace(shape, heads=self.heads or shape.heads, blocks=self.blocks or shape.blocks)

    def loss(self) -> LossConfig:
        loss = LossConfig(**_preset(LOSS_PRESET)["loss"])
        return replace(loss, chunk_rows=self.chunk_rows or loss.chunk_rows)

    @property
    def gpus(self) -> int:
        return 2 if self.case == "shards_ddp2" else 1


def _preset(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8"))["model"]
    return content


def flops_per_token(trained: int, vocab: int, width: int) -> dict[str, float]:
    """FLOPs a token that no student of this shape can do without.

    Blocks: 6 for every weight of a matrix (2 forward, 4 backward); head: 4·V·D, for it is frozen and needs no gradient
    of its own. Left out: what depends on T (the mLSTM's q·k within chunks) and everything element-wise.
    """
    return {"blocks": 6.0 * trained, "head": 4.0 * vocab * width}


def trained_matrices(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad and p.ndim >= 2)


def floor(model: torch.nn.Module, case: Case, device: torch.device) -> dict[str, float]:
    """What the least FLOPs of our student would take at the rate of a large product, in microseconds a token."""
    rate = matmul_rate(device)
    flops = flops_per_token(trained_matrices(model), case.vocab, case.width)
    return {
        "gflop_blocks": flops["blocks"] / 1e9,
        "gflop_head": flops["head"] / 1e9,
        "matmul_tflop_per_s": rate / 1e12,
        "floor_us": sum(flops.values()) / rate * 1e6,
    }


def autocast(device: torch.device) -> torch.autocast:
    """As Lightning's bf16-mixed."""
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)


def adamw(parameters: Iterator[torch.nn.Parameter], device: torch.device) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01, fused=True if device.type == "cuda" else None)


def synthetic_batch(case: Case, device: torch.device) -> Batch:
    """One batch that is on the device before the clock starts."""
    generator = torch.Generator(device).manual_seed(0)
    return to_batch(random_columns(case.spec(), 0, 0, case.batch, generator), case.spec()).to(device)


class OurStep:
    """The optimiser step of `DistillModule` on one batch, without trainer and loader, in parts that can be timed."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device, self.config = case, device, case.loss()
        torch.manual_seed(0)
        facts = random_facts(case.vocab, case.width)
        tensors = random_tensors(case.vocab, case.width, device)
        self.model = DistilXLSTM(case.student(), facts, tensors, case.length).to(device).train()
        # Its own forward and loss, so that what is timed here is what is trained with.
        self.module = DistillModule(case.student(), self.config, OptimizerConfig())
        self.module.model = self.model
        if case.graphs and device.type == "cuda":
            blocks = self.model.blocks(case.block if self.config.gamma else 0)
            self.model.graphed = record(blocks, (case.batch, case.length, case.width), torch.bfloat16)
        self.batch = synthetic_batch(case, device)
        self.optimizer = adamw(self.model.parameters(), device)

    def weights(self) -> tuple[float, float, float]:
        """Weight of CE, weight of KL with its tau squared, tau; of the first step."""
        alpha, tau = self.config.alpha_start, (self.config.tau_start + self.config.tau_end) / 2
        return 1 - alpha - self.config.beta, alpha * tau**2, tau

    def head_loss(self, h_BTD: Tensor) -> Tensor:
        sums = self.module._kd(self.batch, h_BTD, *self.weights())
        return sums.total / (self.batch.target_BT != IGNORE).sum()

    def map_loss(self, maps: dict[int, Tensor]) -> Tensor:
        config, teacher = self.config, self.batch.attn_map_BGnn
        assert teacher is not None
        return attention_alignment(
            maps, teacher, self.batch.length_B, self.case.block, self.case.student().blocks,
            config.attention_sign, config.attention_sinks, config.attention_normalise_rows,
        )  # fmt: skip

    def loss(self) -> Tensor:
        with autocast(self.device):
            h_BTD, maps = self.module._forward(self.batch, with_maps=True)
            return self.head_loss(h_BTD) + self.config.gamma * self.map_loss(maps)

    def optimize(self) -> None:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), 1.0, norm)
        self.optimizer.step()

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        self.optimize()
        return loss.detach()


def measure_step(step: Callable[[], Tensor], case: Case, device: torch.device) -> dict[str, Any]:
    """Time, memory and last loss of `case.steps` steps."""
    for _ in range(case.warmup):
        step()
    reset_peak(device)
    losses: list[Tensor] = []
    seconds = seconds_of(lambda: losses.append(step()), case.steps, device)
    return {"seconds": seconds, "tokens": case.steps * case.batch * case.length, "loss": float(losses[-1])} | peak_gb(
        device
    )
