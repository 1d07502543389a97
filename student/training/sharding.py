"""`--trainer.strategy fsdp`: trained weights, their gradients and the optimiser's moments are cut over the ranks.

PyTorch's `fully_shard` (FSDP2) on every block: a block's weights are gathered while it computes. The teacher's frozen
embedding and head stay whole on every rank: the loss multiplies by all of them, row after row. Trained ones are cut too
and, with the rest of the outermost module, whole from the forward pass to the end of the backward. A checkpoint is one
file in the format of an unsharded run, so that a run may go on with or without sharding, on any number of ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from pipeline.errors import UserError
from student.model import DistilXLSTM

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-true")
"""What Lightning's strategy takes."""
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for `fully_shard`, over all ranks; writes and reads checkpoints of unsharded runs."""

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    def _setup_distributed(self) -> None:
        super()._setup_distributed()
        self._data_parallel_size, self._tensor_parallel_size = self.world_size, 1

    @property
    def is_set_up(self) -> bool:
        """Whether the ranks have met."""
        return self._device_mesh is not None

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state on the first rank, numbered as an optimiser numbers its own: by group."""
        assert self.model is not None
        plain: Optimizer = getattr(optimizer, "_optimizer", optimizer)
        state: dict[str, Any] = dict(get_optimizer_state_dict(self.model, plain, options=FULL))
        if self.global_rank:
            return {}
        number = {name: i for i, name in enumerate(n for group in state["param_groups"] for n in group["params"])}
        groups = [{**group, "params": [number[n] for n in group["params"]]} for group in state["param_groups"]]
        return {"state": {number[n]: value for n, value in state["state"].items()}, "param_groups": groups}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Every rank reads the file and keeps its part of it."""
        assert self.model is not None
        path = Path(self.broadcast(checkpoint_path))
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        set_model_state_dict(self.model, checkpoint["state_dict"], options=StateDictOptions(full_state_dict=True))
        name_of = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", []), strict=True):
            names = [[name_of[p] for p in group["params"]] for group in optimizer.param_groups]
            groups = [{**group, "params": own} for group, own in zip(state["param_groups"], names, strict=True)]
            order = [number for group in state["param_groups"] for number in group["params"]]
            flat = dict(zip(order, [name for own in names for name in own], strict=True))
            by_name: dict[str, Any] = {
                "state": {flat[n]: value for n, value in state["state"].items()},
                "param_groups": groups,
            }
            set_optimizer_state_dict(self.model, optimizer, by_name, options=StateDictOptions(full_state_dict=True))
        return checkpoint


def strategy_of(name: Any, precision: Any) -> Any:
    """What `--trainer.strategy` means here: `fsdp` is `ShardedStrategy`, others are Lightning's own.

    Raises:
        UserError: another kind of FSDP, or a precision that does not go with it.
    """
    if name != "fsdp":
        if isinstance(name, str) and name.startswith("fsdp"):
            raise UserError(f"--trainer.strategy {name}: weights are cut over the ranks by `fsdp` only")
        return name
    if precision not in (None, *PRECISIONS):
        raise UserError(f"--trainer.strategy fsdp with --trainer.precision {precision}: choose {', '.join(PRECISIONS)}")
    return ShardedStrategy()


def shard(model: DistilXLSTM, mesh: Any) -> None:
    """Cut the trained weights over the ranks of `mesh`, a block at a time."""
    for block in model.stack.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(value: Tensor) -> Tensor:
    """A value that is the same on all ranks as a plain tensor."""
    return value.full_tensor() if isinstance(value, DTensor) else value
