"""What is done before training so that kernels are there leaves nothing behind."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers_student import toy_teacher

from student.model import DistilXLSTM, StudentConfig
from student.training.warm_up import build_kernels, first_rank_first

TRANSFORMER = {"transformer": {"feedforward": 48, "kv_heads": 1, "rope_theta": 10000.0}, "final_norm": "teacher"}


@pytest.mark.parametrize(
    "more", [{}, TRANSFORMER, {"train_embedding": True}], ids=["package", "transformer", "embedding"]
)
@pytest.mark.parametrize("map_block", [0, 8])
def test_nothing_is_left(more: dict[str, object], map_block: int) -> None:
    facts, tensors = toy_teacher(50, 32)
    model = DistilXLSTM(StudentConfig.of({"blocks": 2, "heads": 2, **more}), facts, tensors, 16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = torch.random.get_rng_state()
    blocks = model.blocks(map_block).train()
    calls: list[tuple[int, ...]] = []
    blocks.final_norm.register_full_backward_hook(lambda module, into, out: calls.append(tuple(out[0].shape)))
    build_kernels(blocks, (3, 16, 32), torch.bfloat16, input_gradient=bool(more.get("train_embedding")))
    assert calls == [(3, 16, 32)]
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_first_rank_goes_first() -> None:
    """A barrier before the others' work, and after the first one's: they meet at one."""
    order: dict[int, list[str]] = {}
    for rank in (0, 1):
        said = order.setdefault(rank, [])
        strategy = SimpleNamespace(barrier=lambda said=said: said.append("barrier"))
        with first_rank_first(SimpleNamespace(local_rank=rank, strategy=strategy)):  # type: ignore[arg-type]
            said.append("work")
    assert order == {0: ["work", "barrier"], 1: ["barrier", "work"]}
