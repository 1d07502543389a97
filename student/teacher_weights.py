"""The teacher's own weights put into transformer-shaped blocks: norms, attention projections, feed-forwards.

What has no counterpart in the teacher (gates, feature maps) begins as `TransformerBlock` makes it. The names are those
of Hugging Face's Llama, which SmolLM2, Qwen2 and Mistral share.

Legend: L layers of the teacher, N blocks of the student.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipeline.errors import UserError
from student.model import DistilXLSTM
from student.transformer_block import TransformerBlock

OF_LAYER = {
    "mixer_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
"""Module of a block -> module of a decoder layer, both with `weight` and perhaps `bias`."""


def decoder_layers(model: Any, source: str) -> nn.ModuleList:
    """The layers of a causal language model of transformers.

    Raises:
        UserError: they are not where Llama's are, or lack one of `OF_LAYER`.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not layers:
        raise UserError(
            f"--teacher {source}: {type(model).__name__} has no model.layers as Llama has; name another teacher"
        )
    there = {name for name, _ in layers[0].named_modules()}
    lacking = [name for name in OF_LAYER.values() if name not in there]
    if lacking:
        raise UserError(
            f"--teacher {source}: a layer of {type(model).__name__} has no {lacking[0]}, which a block begins with: "
            "name a teacher of Llama's shape"
        )
    return layers


def layers_of_blocks(blocks: int, layers: int) -> list[int]:
    """The teacher's layer for each block: all, or evenly spread ones, the first and the last among them.

    Raises:
        UserError: more blocks than layers.
    """
    if blocks > layers:
        raise UserError(f"student.blocks={blocks}, but the teacher has {layers} layers: give at most so many blocks")
    return [round(i * (layers - 1) / max(1, blocks - 1)) for i in range(blocks)]


@torch.no_grad()
def copy_teacher_weights(student: DistilXLSTM, layers: nn.ModuleList, chosen: list[int]) -> None:
    """Give every block the weights of its layer.

    Raises:
        UserError: a weight has another shape than the student's; names both and the option to change.
    """
    for block, layer in zip(student.stack.blocks, chosen, strict=True):
        assert isinstance(block, TransformerBlock)
        for ours, theirs in OF_LAYER.items():
            target, source = block.get_submodule(ours), layers[layer].get_submodule(theirs)
            for name in ("weight", "bias"):
                to, of = getattr(target, name, None), getattr(source, name, None)
                shapes = [None if x is None else tuple(x.shape) for x in (to, of)]
                if shapes[0] != shapes[1]:
                    raise UserError(
                        f"layer {layer} of the teacher has {theirs}.{name} of shape {shapes[1]}, the student's wants "
                        f"{shapes[0]}: take student.heads and kv_heads, head_width, feedforward and qkv_bias of "
                        "student.transformer from the teacher's config.json"
                    )
                if to is not None and of is not None:
                    to.copy_(of)
