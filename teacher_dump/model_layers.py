"""Finding one's way in a model that vLLM has loaded: its head, its decoder layers, its attention by depth."""

from __future__ import annotations

import re
from contextlib import suppress
from itertools import accumulate
from operator import attrgetter
from typing import Any

import torch

from pipeline.errors import UserError
from teacher_dump.kernels.pooled_attention_reference import AttentionShape

_HEADS = ("lm_head", "output", "model.embed_tokens")
"""Where vLLM's models keep the head's matrix; those with tied weights only (Gemma 2, Command R) have no `lm_head`."""


def depth_groups(layers: int, groups: int) -> list[range]:
    """Split the layers into contiguous groups as equal as can be, the deeper ones getting the extra layers.

    Raises:
        UserError: more groups than layers, or none.
    """
    if not 0 < groups <= layers:
        raise UserError(f"groups: {groups} depth groups of {layers} attention layers: choose 1 to {layers}")
    small = groups - layers % groups
    ends = list(accumulate(layers // groups + (group >= small) for group in range(groups)))
    return [range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def attention_layers(context: dict[str, Any]) -> list[tuple[str, Any]]:
    """The model's attention layers by depth.

    Args:
        context: vLLM's `static_forward_context`, layer name -> layer; mixture-of-experts layers stand in it too.

    Raises:
        UserError: a layer's attention cannot be recomputed from its q and k.
    """
    layers = []
    for name, layer in context.items():
        kind = type(layer).__name__
        if all(base.__name__ != "AttentionLayerBase" for base in type(layer).__mro__):
            continue
        attends = getattr(layer, "attn_type", "decoder")
        attends = getattr(attends, "value", attends)  # a string or a member of an enumeration
        why = None
        if kind != "Attention":
            why = f"is {kind}"
        elif attends != "decoder":
            why = f"attends as {attends}"
        elif getattr(layer, "kv_sharing_target_layer_name", None) is not None:
            why = "reads another layer's keys"
        elif str(getattr(layer, "kv_cache_dtype", "auto")).startswith("fp8") or getattr(layer, "use_alibi_sqrt", False):
            why = "quantises its keys or uses square-root ALiBi"
        if why:
            raise UserError(f"the teacher's layer {name} {why}: its attention cannot be captured; set block: 0")
        layers.append((name, layer))
    if not layers:
        raise UserError("the teacher has no attention layers: its attention cannot be captured; set block: 0")
    return sorted(layers, key=lambda item: [int(x) for x in re.findall(r"\d+", item[0])])


def attention_shape(layer: Any) -> AttentionShape:
    """How an attention layer treats its scores; read at every call, as sinks are loaded and cast late."""
    impl = layer.impl
    alibi = impl.alibi_slopes
    if alibi is not None:
        alibi = torch.as_tensor(alibi, dtype=torch.float32)
    return AttentionShape(
        scale=float(impl.scale),
        window=_window(layer),
        soft_cap=float(getattr(impl, "logits_soft_cap", None) or 0.0),
        alibi_H=alibi,
        sinks_H=getattr(impl, "sinks", None),
    )


def _window(layer: Any) -> int:
    window = getattr(layer, "sliding_window", None)
    if window is None:  # backends keep (window - 1, 0), or -1 for none
        window = getattr(layer.impl, "sliding_window", None)
        window = window[0] + 1 if isinstance(window, tuple) else window
    return max(0, int(window or 0))


def head_owner(model: Any) -> tuple[Any, Any]:
    """The module that holds the `logits_processor` (the text part of a multimodal model), and the head's matrix.

    Raises:
        UserError: no module has both.
    """
    for module in model.modules():
        if hasattr(module, "logits_processor"):
            for path in _HEADS:
                with suppress(AttributeError):
                    return module, attrgetter(path)(module)
    raise UserError(f"{type(model).__name__} has no language model head: choose a causal language model as the teacher")


def decoder_layers(model: Any, attention_names: list[str], count: int) -> list[Any]:
    paths = dict.fromkeys(match[0] for name in attention_names if (match := re.match(r".*?\.\d+(?=\.)", name)))
    modules = dict(model.named_modules())
    layers = [modules[path] for path in sorted(paths, key=lambda p: int(p.rsplit(".", 1)[1])) if path in modules]
    if len(layers) != count:
        raise UserError(
            f"{len(layers)} of {type(model).__name__}'s {count} layers could be found: its hidden states cannot be "
            "captured; set window: 0"
        )
    return layers
