"""Mixers taught to do what the teacher's attentions do, each by itself, before anything is distilled.

MOHAWK's second stage (arXiv 2408.10189, section 3.2) in LoLCATs' form (arXiv 2410.10254, section 3.1): every block's
mixer is given the input that the teacher's layer gets, so that no block's error reaches the next, and is compared with
that layer's attention output:

    loss = Σ_l ‖ mixer_l(x_l) − attention_l(x_l) ‖² / ‖ attention_l(x_l) ‖²

Legend: B rows, T tokens, D width, N blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from student.model import DistilXLSTM

PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "igate", "fgate", "out_gate", "q_map", "k_map", "head_norm")
"""What of a block is trained: all of its mixer but the norm before it, which is the teacher's."""


@contextmanager
def attentions(layers: nn.ModuleList, chosen: list[int]) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """While the `with` lasts: layer -> (its input, its attention's output), both (B, T, D), of the last pass."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    inputs: dict[int, Tensor] = {}

    def note_input(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs[index] = args[0] if args else kwargs["hidden_states"]

        return hook

    def note_output(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            seen[index] = (inputs.pop(index), output[0] if isinstance(output, tuple) else output)

        return hook

    handles = []
    for index in set(chosen):
        handles.append(layers[index].register_forward_pre_hook(note_input(index), with_kwargs=True))
        handles.append(layers[index].get_submodule("self_attn").register_forward_hook(note_output(index)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def mixer_parameters(student: DistilXLSTM) -> list[nn.Parameter]:
    """The parameters that are trained here."""
    return [
        parameter
        for block in student.stack.blocks
        for name, parameter in block.named_parameters()
        if name.split(".")[0] in PARTS
    ]


def transfer_losses(block: Any, x_BTD: Tensor, attention_BTD: Tensor) -> Tensor:
    """The relative squared error of one block's mixer."""
    wanted_BTD = attention_BTD.float()
    found_BTD = block.mix(x_BTD.float()) - x_BTD.float()
    return (found_BTD - wanted_BTD).square().sum() / wanted_BTD.square().sum().clamp_min(1e-12)


def transfer(
    student: DistilXLSTM,
    teacher: Any,
    layers: nn.ModuleList,
    chosen: list[int],
    batches: Iterator[Tensor],
    steps: int,
    lr: float,
    told: Callable[[int, Tensor], None],
) -> None:
    """Train the mixers for `steps` batches.

    Args:
        teacher: a model of transformers, with or without its head, whose layers are `layers`.
        chosen: the teacher's layer of each block.
        batches: int64 ids (B, T), on the device of both models.
        lr: AdamW's peak rate; a short warm-up, then a cosine to a tenth.
        told: called after each step with its number and the (N,) losses, still on the device.
    """
    trained = mixer_parameters(student)
    on_gpu = trained[0].is_cuda
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, betas=(0.9, 0.99), fused=on_gpu)
    warmup = max(1, steps // 20)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    student.train()
    with attentions(layers, chosen) as seen:
        for step, ids_BT in zip(range(steps), batches, strict=False):
            with torch.no_grad():
                teacher(ids_BT, use_cache=False)
            losses = []
            for block, layer in zip(student.stack.blocks, chosen, strict=True):
                with torch.autocast(ids_BT.device.type, dtype=torch.bfloat16, enabled=on_gpu):
                    loss = transfer_losses(block, *seen[layer])
                loss.backward()  # block by block: one block's activations live at a time
                losses.append(loss.detach())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            told(step + 1, torch.stack(losses))
    student.eval()
