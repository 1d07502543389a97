"""The teacher's own weights put into transformer-shaped blocks: norms, attention projections, feed-forwards.

What has no counterpart in the teacher (gates, feature maps) begins as `TransformerBlock` makes it. The names are those
of Hugging Face's Llama, which SmolLM2, Qwen2 and Mistral share.

Legend: L layers of the teacher, N blocks of the student.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from student.blocks.transformer_block import TransformerBlock
from student.model import DistilXLSTM

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
    there = {name for name, module in layers[0].named_modules() if any(True for _ in module.parameters(recurse=False))}
    lacking = [name for name in OF_LAYER.values() if name not in there]
    if lacking:
        raise UserError(
            f"--teacher {source}: a layer of {type(model).__name__} has no {lacking[0]}, which a block begins with: "
            "name a teacher of Llama's shape"
        )
    if others := sorted(there - set(OF_LAYER.values())):
        raise UserError(
            f"--teacher {source}: a layer of {type(model).__name__} has {others[0]}, which a block has no place for: "
            "name a teacher of Llama's shape"
        )
    return layers


def check_same_function(config: Any, theta: float, source: str) -> str | None:
    """Refuse weights that would compute something else in a block than in their layer.

    Args:
        config: of the teacher's model in transformers.
        theta: the student's `rope_theta`.
        source: the teacher, for messages.

    Returns:
        A sentence on what the transfer has to make up for, None where there is nothing.

    Raises:
        UserError: another activation, scaled residuals, or rotary positions of another base.
    """
    activation, scale = getattr(config, "hidden_act", "silu"), getattr(config, "residual_multiplier", 1.0)
    if activation not in ("silu", "swish") or scale != 1.0:
        told = f"the activation {activation}" if scale == 1.0 else f"residuals times {scale}"
        raise UserError(f"--teacher {source}: its layers have {told}, blocks have silu and plain residuals")
    rope = getattr(config, "rope_parameters", None) or {}
    base = rope.get("rope_theta", getattr(config, "rope_theta", None))
    kind = rope.get("rope_type", "default")
    if theta and base is not None and theta != base:
        raise UserError(
            f"student.transformer.rope_theta is {theta:g}, the teacher {source} has {base:g}: take the teacher's, or 0 "
            "for no rotary positions"
        )
    if not theta and base is not None:
        return f"blocks have no rotary positions, the teacher has (rope_theta {base:g})"
    if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"blocks have plain rotary positions, the teacher others (rope_type {kind})"
    return None


def check_same_teacher(model: Any, embedding_VD: Tensor, source: str) -> None:
    """Raise `UserError` unless the model's embedding is the cache's teacher's."""
    found_VD = model.get_input_embeddings().weight[: embedding_VD.shape[0]]
    same = found_VD.shape == embedding_VD.shape and torch.allclose(
        found_VD.float().cpu(), embedding_VD.to(found_VD.dtype).float().cpu(), rtol=1e-2, atol=1e-6
    )
    if not same:
        raise UserError(f"--teacher {source}: its embedding is not that of the cache's teacher; name the cache's own")


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
