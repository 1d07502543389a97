"""Training on several ranks: who started them, what each reads, what they add up, and that they train the same run.

A rank is a process with a device of its own. They are started by `--trainer.devices n` (on one machine), by torchrun or
by srun; the batches and their order are the same whatever their number.
"""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from pipeline.commit import canonical_json
from pipeline.errors import UserError

SHARED_SECONDS = 60.0
"""How long a rank waits for what the first one wrote: network file systems show new files late."""


@dataclass(frozen=True)
class Launch:
    """How many processes a launcher started, on how many nodes."""

    launcher: str
    nodes: int
    per_node: int


def launched(environment: Mapping[str, str]) -> Launch | None:
    """What torchrun or srun says of itself; None if neither started this process.

    Raises:
        UserError: nodes have different numbers of ranks.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        launcher, ranks, per_node = "torchrun", int(environment["WORLD_SIZE"]), int(environment["LOCAL_WORLD_SIZE"])
        nodes = int(environment.get("GROUP_WORLD_SIZE", ranks // per_node))
    elif "SLURM_NTASKS" in environment and environment.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        launcher, ranks, nodes = "srun", int(environment["SLURM_NTASKS"]), int(environment.get("SLURM_NNODES", "1"))
        if ranks > 1 and "SLURM_NTASKS_PER_NODE" not in environment:
            raise UserError(
                f"srun started {ranks} tasks without --ntasks-per-node: give it --nodes and --ntasks-per-node instead "
                "of --ntasks, so that every node has as many ranks"
            )
        per_node = int(environment.get("SLURM_NTASKS_PER_NODE", ranks))
    else:
        return None
    if nodes * per_node != ranks:
        raise UserError(
            f"{launcher} started {ranks} ranks on {nodes} nodes, {per_node} on this one: start as many on every node"
        )
    return Launch(launcher, nodes, per_node)


def trainer_options(devices: Any, num_nodes: int, environment: Mapping[str, str]) -> dict[str, Any]:
    """`devices` and `num_nodes` of the trainer as the launcher decides them; {} where the options do.

    Args:
        devices: --trainer.devices: "auto", a number, or what else Lightning takes.
        num_nodes: --trainer.num_nodes.

    Raises:
        UserError: launcher and options say different numbers, or nothing starts the other nodes.
    """
    found = launched(environment)
    if found is None:
        if num_nodes > 1 and "NODE_RANK" not in environment:
            raise UserError(
                f"--trainer.num_nodes {num_nodes}, but neither torchrun nor srun started this process, so nothing "
                "starts the other nodes: docs/scale.md has both commands"
            )
        return {}
    for name, given, own, other in (
        ("devices", devices, found.per_node, ("auto", "-1")),
        ("num_nodes", num_nodes, found.nodes, ("1",)),
    ):
        if str(given) not in (str(own), *other):
            what = "ranks on each node" if name == "devices" else "nodes"
            raise UserError(
                f"--trainer.{name} is {given}, but {found.launcher} started {own} {what}: leave the option out"
            )
    return {"devices": found.per_node, "num_nodes": found.nodes}


def require_equal_shares(batch_rows: int, ranks: int) -> None:
    """Raise UserError unless every rank gets as many rows of a batch."""
    if batch_rows % ranks:
        near = batch_rows - batch_rows % ranks or ranks
        raise UserError(
            f"--data.batch_rows {batch_rows}: must be a multiple of the {ranks} ranks, for example {near} (the batch "
            "is that of all ranks together)"
        )


def share_of(rows: Sequence[tuple[int, int]], rank: int, ranks: int) -> list[tuple[int, int]]:
    """A rank's rows of a global batch of (group, row) pairs, as many as every other rank's.

    Rows of one row group stay together and go to the same rank from batch to batch, nearly always: a rank reads and
    decodes its own groups, not all of them.
    """
    if ranks == 1:
        return list(rows)
    each = len(rows) // ranks
    return sorted(rows)[rank * each : (rank + 1) * each]


def over_ranks(values: Tensor) -> Tensor:
    """The sum of all ranks' values, on every rank."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    total = values.detach().clone()
    torch.distributed.all_reduce(total)
    return total


def means_over_ranks(values: dict[str, Tensor], each: str, rank: int, ranks: int) -> tuple[dict[str, Tensor], Tensor]:
    """The means of the ranks' values, by name, and of the value `each` every rank's own, (ranks,); by one sum."""
    own = values[each].detach().float()
    if ranks == 1:
        return dict(values), own.reshape(1)
    own_R = torch.where(torch.arange(ranks, device=own.device) == rank, own, 0.0)
    sums = over_ranks(torch.cat((torch.stack([value.detach().float() for value in values.values()]), own_R)))
    means, own_R = sums[:-ranks] / ranks, sums[-ranks:]
    return dict(zip(values, means.unbind(), strict=True)), own_R


def start_sum(values: Tensor) -> Callable[[], Tensor]:
    """Begin to add up all ranks' values; what is returned gives the sum, on every rank.

    Ranks meet when it is begun, while the device goes on with other work: begin long before the sum is needed.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return lambda: values
    total = values.detach().clone()
    work = torch.distributed.all_reduce(total, async_op=True)

    def finish() -> Tensor:
        work.wait()  # on a GPU its stream waits, not the host
        return total

    return finish


class AnyRank:
    """Whether any rank has raised a flag, asked at every step: on a GPU told one call later, so that none waits for it.

    All ranks call together and get the same answer.
    """

    def __init__(self) -> None:
        self._asked: tuple[Tensor, torch.cuda.Event] | None = None

    def __call__(self, raised: bool, device: torch.device) -> bool:
        """Tell the others this rank's flag; on a GPU the answer to the call before.

        Args:
            raised: this rank's flag.
            device: of the process group.
        """
        flag = torch.tensor(float(raised))
        if device.type != "cuda":
            return bool(over_ranks(flag))
        before = self._asked
        total = over_ranks(flag.pin_memory().to(device, non_blocking=True))
        answer = torch.empty_like(flag, pin_memory=True).copy_(total, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        self._asked = answer, done
        if before is None:
            return False
        before[1].synchronize()
        return bool(before[0])


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error only says that another rank is gone."""
    of_backend = isinstance(error, torch.distributed.DistError) or "gloo" in str(error) or "NCCL" in str(error)
    return isinstance(error, RuntimeError) and of_backend


def end_other_ranks(trainer: Trainer) -> None:
    """End the ranks that this process started: without it they would wait for it. They write nothing themselves."""
    for process in getattr(trainer.strategy.launcher, "procs", []):
        process.kill()


class OneRun(Callback):
    """Before training: all ranks see the first one's run folder, and begin at the same step with the same settings.

    Args:
        run: the run folder.
        step: optimiser steps this rank believes to be done.
        settings: the resolved configuration.
    """

    def __init__(self, run: Path, step: int, settings: dict[str, Any]) -> None:
        parts = {name: settings.get(name) for name in ("model", "seed_everything", "checkpoint_every")}
        data = {name: value for name, value in (settings.get("data") or {}).items() if name != "cache"}
        text = canonical_json({**parts, "data": data})
        self.run, self.step, self.settings = run, step, hashlib.sha256(text).hexdigest()[:12]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare.

        Raises:
            UserError: on every rank, naming the one that differs.
        """
        if trainer.world_size == 1:
            return
        first = trainer.strategy.broadcast((_digest(self.run / "run.json"), self.step, self.settings))
        found: list[str] = [""] * trainer.world_size
        torch.distributed.all_gather_object(found, self._difference(*first, trainer.global_rank))
        for told in filter(None, found):
            raise UserError(told)

    def _difference(self, digest: str, step: int, settings: str, rank: int) -> str:
        who = f"rank {rank} on {socket.gethostname()}"
        until = time.monotonic() + SHARED_SECONDS
        while _digest(self.run / "run.json") != digest and time.monotonic() < until:
            time.sleep(0.2)
        if _digest(self.run / "run.json") != digest:
            return (
                f"{who} does not see the run folder of rank 0 at {self.run}: --run must be on storage all nodes share"
            )
        if settings != self.settings:
            return f"{who} was started with other settings than rank 0: give every node the same command"
        if step != self.step:
            return (
                f"{who} finds {self.step} steps done in {self.run}, rank 0 finds {step}: --run must be on storage that "
                "all nodes share; if it is, wait until they agree and start again"
            )
        return ""


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""
