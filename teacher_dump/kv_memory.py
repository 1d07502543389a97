"""How much memory vLLM needs for keys and values: what two steps take, and no more."""

from __future__ import annotations

import os
from typing import Any

_KV_PAGE = 256
"""Tokens; no smaller than the pages vLLM keeps keys and values in by default."""

_UNFOLDED = ("minicpm3",)
"""Models with latent keys that vLLM unfolds to those of ordinary attention."""


def kv_cache_bytes(config: dict[str, Any], length: int, rows_per_step: int, tensor_parallel: int = 1) -> int:
    """Memory of one device for the keys and values of two steps, four bytes a number.

    Args:
        config: of the model, see `read_config`.
        length: T.
    """
    pages = rows_per_step * -(-(length + 1) // _KV_PAGE) + 2
    numbers = config["num_hidden_layers"] * _kv_width(config, tensor_parallel)
    return 2 * pages * _KV_PAGE * numbers * 4


def _kv_width(config: dict[str, Any], tensor_parallel: int) -> int:
    """Numbers that one device keeps of a token in one layer."""
    heads, rank = config["num_attention_heads"], config.get("kv_lora_rank")
    kv_heads = config.get("num_key_value_heads") or heads
    width = config.get("head_dim") or config["hidden_size"] // heads
    if rank:  # multi-head latent attention: what all heads share, whole on every device
        rope = config["qk_rope_head_dim"]
        if config.get("model_type") not in _UNFOLDED and os.environ.get("VLLM_MLA_DISABLE", "0") == "0":
            return int(rank + rope)
        width = config["qk_nope_head_dim"] + rope
    return int(2 * max(1, kv_heads // tensor_parallel) * width)
