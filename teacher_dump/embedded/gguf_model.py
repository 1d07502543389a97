"""A Llama model in a GGUF file as Hugging Face tensors and a `tokenizer.json`.

The linear layers of the file at hand are in 4 bits (Q4_1), its embedding in 8 (Q8_0): all are dequantised to float32
and rounded to bfloat16 once. Nothing here depends on the GGUF support of `transformers`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

CONTROL = 3
"""GGUF's token type of special tokens."""

_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TENSORS = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


class GgufModel:
    """A Llama GGUF file, memory-mapped."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self._reader = GGUFReader(path)

    def field(self, name: str) -> Any:
        """A metadata value; raises ValueError where the file lacks it."""
        field = self._reader.get_field(name)
        if field is None:
            raise ValueError(f"GGUF field {name} is missing")
        return field.contents()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, bfloat16 tensor of the shape PyTorch expects), in the file's order."""
        import torch
        from gguf.quants import dequantize

        heads = {
            "attn_q": self.field("llama.attention.head_count"),
            "attn_k": self.field("llama.attention.head_count_kv"),
        }
        for tensor in self._reader.tensors:
            values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
            part = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else ""
            if part in heads:
                values = rotary_order(values, heads[part])
            yield hugging_face_name(tensor.name), torch.from_numpy(values.copy()).to(torch.bfloat16)

    def tokenizer(self) -> dict[str, Any]:
        """The content of `tokenizer.json`: byte-level BPE that splits numbers into single digits first."""
        tokens = self.field("tokenizer.ggml.tokens")
        types = self.field("tokenizer.ggml.token_type")
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": i, "content": tokens[i], **plain} for i, kind in enumerate(types) if kind == CONTROL
            ],
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
            },
            "post_processor": None,
            "decoder": {**byte_level, "add_prefix_space": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {token: i for i, token in enumerate(tokens)},
                "merges": [merge.split(" ") for merge in self.field("tokenizer.ggml.merges")],
            },
        }


def hugging_face_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor of a Llama model."""
    if name in _TENSORS:
        return _TENSORS[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{_LAYER_TENSORS[part]}.{kind}"


def rotary_order(rows_ND: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection from GGUF's order to Hugging Face's.

    Both rotate pairs of coordinates. GGUF's Llama layout keeps the two of a pair side by side (0,1), (2,3), ...;
    Hugging Face rotates coordinate i with i + d/2 of a head of size d.
    """
    rows, width = rows_ND.shape
    return rows_ND.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)
