"""Where the time of our training step goes, part by part.

Each part is run by itself, forward and backward, on the step's own tensors: `rest` is what the whole step takes beyond
their sum (embedding, final norm, the sum of losses, gaps between launches), and may be negative where parts overlap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.meters import seconds_of
from benchmarks.train_step import OurStep, autocast
from student.blocks.implicit_attention import pooled_implicit_attention
from student.blocks.mlstm import capturing

TIMES, WARMUP = 5, 2


def step_parts(step: OurStep, whole_us: float) -> dict[str, float]:
    """Microseconds a token of each part, forward and backward together."""
    tokens = step.case.batch * step.case.length
    found = {name: 0.0 for name in ("slstm_blocks", "mlstm_blocks", "head_and_loss", "attention_maps", "optimizer")}

    def add(name: str, work: Callable[[], object]) -> None:
        seconds = seconds_of(work, TIMES, step.device, WARMUP)
        found[name] += seconds / TIMES / tokens * 1e6
        step.model.zero_grad(set_to_none=True)

    with torch.no_grad():
        x_BTD = step.model.embed(step.batch.input_ids_BT)
    upstream_BTD = torch.randn_like(x_BTD)
    for index, block in enumerate(step.model.stack.blocks):
        name = "mlstm_blocks" if index in step.model.mlstm_blocks else "slstm_blocks"
        inputs_BTD = x_BTD.detach().requires_grad_()

        def through(block: torch.nn.Module = block, inputs_BTD: Tensor = inputs_BTD) -> None:
            with autocast(step.device):
                y_BTD = block(inputs_BTD)
            y_BTD.backward(upstream_BTD)

        add(name, through)
        with torch.no_grad(), autocast(step.device):
            x_BTD = block(x_BTD)
    inputs: list[Any] = [tuple(x.detach().requires_grad_() for x in parts) for parts in attention_inputs(step)]

    def maps() -> None:
        with autocast(step.device):
            pooled = [pooled_implicit_attention(q, k, i, f, step.case.block).mean(dim=1) for q, k, i, f in inputs]
            loss = step.map_loss(dict(zip(step.model.mlstm_blocks, pooled, strict=True)))
        loss.backward()

    add("attention_maps", maps)
    h_BTD = step.model.final_norm(x_BTD).detach().requires_grad_()

    def head() -> None:
        with autocast(step.device):
            loss = step.head_loss(h_BTD)
        loss.backward()

    add("head_and_loss", head)
    step.loss().backward()
    add("optimizer", step.optimize)
    return {**found, "rest": whole_us - sum(found.values())}


def attention_inputs(step: OurStep) -> list[tuple[Tensor, ...]]:
    """q, k and the gates of every mLSTM block, as one forward pass gives them."""
    seen: list[tuple[Tensor, ...]] = []
    with torch.no_grad(), autocast(step.device):
        x_BTD = step.model.embed(step.batch.input_ids_BT)
        for index, block in enumerate(step.model.stack.blocks):
            if index not in step.model.mlstm_blocks:
                x_BTD = block(x_BTD)
                continue
            with capturing(block) as captured:
                x_BTD = block(x_BTD)
            seen.append(captured[0].attention_inputs())
    return seen
