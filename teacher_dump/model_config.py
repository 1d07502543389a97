"""The fields of a teacher's `config.json` under the names that most models give them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


def read_config(path: Path) -> dict[str, Any]:
    """A model's `config.json`; of a model with several parts, the language model's.

    Fields that the model calls otherwise (GPT-2's n_embd, n_layer, n_head) stand under transformers' common names too.

    Raises:
        UserError: there is no such file, it is no JSON, or a size is missing.
    """
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the teacher must be a Hugging Face model folder") from None
    except ValueError as error:
        raise UserError(f"teacher {path} is not valid JSON ({error}): fetch the file again") from None
    config = {**config, **(config.get("text_config") or {})}
    if any(name not in config for name in SIZES):
        config = {**_renamed(config), **config}
    missing = [name for name in SIZES if name not in config]
    if missing:
        raise UserError(
            f"teacher {path} lacks {', '.join(missing)}: the teacher must be a causal language model whose "
            "configuration gives them, by these names or those that transformers knows for its model_type"
        )
    return config


def _renamed(config: dict[str, Any]) -> dict[str, Any]:
    """What the configuration says under names of its own, by the common names; nothing for an unknown model_type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        names: dict[str, str] = CONFIG_MAPPING[str(config.get("model_type"))].attribute_map
    except KeyError:
        return {}
    return {common: config[own] for common, own in names.items() if own in config}
