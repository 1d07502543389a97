"""One measurement of `train_throughput`, in a process of its own.

    python -m benchmarks.train_case '{"case": "synthetic", "batch": 64, "length": 512}'

Legend: B rows, T tokens a row, V vocabulary, D width.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from benchmarks.processes import report
from benchmarks.random_cache import benchmark_spec, random_columns, random_facts, random_tensors, write_random_cache
from pipeline.schema import CacheSpec
from student.batch import IGNORE, Batch
from student.data import TrainLoader
from student.graphed import record
from student.group_reader import to_batch
from student.losses.attention import attention_alignment
from student.model import DistilXLSTM, StudentConfig
from student.module import DistillModule, LossConfig, OptimizerConfig

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
        parts: time the parts of the step as well (synthetic).
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
    parts: bool = True
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


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait(device: torch.device) -> None:
    """Until everything that was queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object], times: int, device: torch.device, warmup: int = 0) -> float:
    """Wall-clock time of `times` calls after `warmup` others, the device's queue empty before and after."""
    for _ in range(warmup):
        work()
    wait(device)
    started = time.perf_counter()
    for _ in range(times):
        work()
    wait(device)
    return time.perf_counter() - started


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a large product in bfloat16 (on a CPU: a small one)."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = 20 if device.type == "cuda" else 3
    return times * 2 * size**3 / seconds_of(lambda: a @ b, times, device, warmup=3)


def flops_per_token(trained: int, vocab: int, width: int) -> dict[str, float]:
    """FLOPs a token that no student of this shape can do without.

    Blocks: 6 for every weight of a matrix (2 forward, 4 backward); head: 4·V·D, for it is frozen and needs no gradient
    of its own. Left out: what depends on T (the mLSTM's q·k within chunks) and everything element-wise.
    """
    return {"blocks": 6.0 * trained, "head": 4.0 * vocab * width}


def trained_matrices(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad and p.ndim >= 2)


def peak_gb(device: torch.device) -> dict[str, float]:
    """Most memory that tensors took at once, and what the allocator held; on a CPU the process's own."""
    if device.type == "cuda":
        return {
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
            "reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
        }
    import resource

    return {"peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


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


def synthetic(case: Case) -> dict[str, Any]:
    from benchmarks.train_parts import profile_table, step_parts

    device = pick_device()
    step = OurStep(case, device)
    if case.profile:
        return {"table": profile_table(step, device, case.warmup), "seconds": 1.0, "tokens": 0}
    found = measure_step(step, case, device)
    if case.parts:
        found["parts_us"] = step_parts(step, found["seconds"] / found["tokens"] * 1e6)
    return {**found, **floor(step.model, case, device)}


def baseline(case: Case) -> dict[str, Any]:
    """`online` and `package`, with fewer rows a forward pass until they fit."""
    from benchmarks.train_baselines import BaselineStep

    device = pick_device()
    rows = case.micro_rows or case.batch
    while True:
        try:
            step = BaselineStep(case, device, rows)
            found = measure_step(step, case, device)
            return {**found, "micro_rows": rows, **floor(step.stack, case, device)}
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            print(f"{rows} rows do not fit", flush=True)
        step = None  # type: ignore[assignment]
        rows = -(-rows // 2)
        torch.cuda.empty_cache()


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


def write(case: Case) -> dict[str, Any]:
    """The cache of the same name's cases: as many tokens as they read."""
    started = time.perf_counter()
    rows = (case.warmup + case.steps) * case.batch
    tokens = write_random_cache(Path(case.cache), case.spec(), rows * case.length, pick_device())
    return {"seconds": time.perf_counter() - started, "tokens": tokens}


def shards(case: Case) -> dict[str, Any]:
    """Training as a user runs it: the command line's trainer, loader and callbacks, from committed shards."""
    from pipeline.cache import Cache

    if case.case != "shards_s3":
        return train(case, case.cache)
    from benchmarks.remote_loader import copy_to, local_server

    rows = int(Cache(case.cache).shards("train").rows.sum())
    with local_server() as url:
        copy_to(Path(case.cache), url)
        # The first epoch fills the copies on the local disk; its checkpoint, too, is before the clock starts.
        case = replace(case, warmup=rows // case.batch + case.warmup)
        return train(case, url, **{"data.local_copies": f"{case.run}/copies"})


def train(case: Case, cache: str, **more: Any) -> dict[str, Any]:
    """`python -m student` with a clock inside."""
    import student.__main__ as command
    from benchmarks.train_clock import StepClock, timed_waits

    device, config = pick_device(), case.student()
    clock = StepClock(case.warmup, case.steps)
    options = {
        "config": PRESETS / f"{LOSS_PRESET}.yaml",
        "cache": cache,
        "run": case.run,
        "checkpoint_every": 1_000_000,
        "trainer.max_steps": case.warmup + case.steps,
        "trainer.devices": case.gpus,
        "trainer.accelerator": device.type,
        "trainer.limit_val_batches": 0,
        "model.loss.chunk_rows": case.loss().chunk_rows,
        "model.graphs": case.graphs,
        "data.batch_rows": case.batch * case.gpus,
        **{f"model.student.{name}": value for name, value in asdict(config).items() if value is not None},
        **more,
    }
    command.TRAINER_DEFAULTS = {**command.TRAINER_DEFAULTS, "callbacks": [clock]}
    with timed_waits(TrainLoader, clock.waits):
        status = command.main([f"--{name}={value}" for name, value in options.items()])
    if status or clock.seconds is None:
        raise RuntimeError(f"training ended with status {status} after {clock.step} steps")
    assert clock.model is not None
    tokens = case.steps * case.batch * case.gpus * case.length
    found = {"seconds": clock.seconds, "tokens": tokens, "loss": clock.loss, **clock.memory, "gpus": case.gpus}
    waits = {"loader_wait_us": sum(clock.waits) / tokens * 1e6, "longest_wait_s": max(clock.waits)}
    return {**found, **waits, **floor(clock.model, case, device)}


def main() -> None:
    case = Case(**json.loads(sys.argv[1]))
    measure = {"online": baseline, "package": baseline, "synthetic": synthetic, "write": write}.get(case.case, shards)
    found = measure(case)
    if os.environ.get("LOCAL_RANK", "0") == "0":  # the other ranks of a run started this file too
        report({**found, "tokens_per_s": found["tokens"] / found["seconds"]})


if __name__ == "__main__":
    main()
