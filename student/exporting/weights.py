"""A student as the exported code wants it: its configuration and its tensors by their exported names.

The `xlstm` package's modules and those of `huggingface`, beside this file, compute the same function; names and layouts
differ: norm weights are stored there as what is added to 1, the sLSTM's input and forget projections under each other's
names, its biases gates-major.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from xlstm import mLSTMBlock, sLSTMBlock

from student.blocks.transformer_block import TransformerBlock
from student.exporting.huggingface.configuration_distil_xlstm import DistilXLSTMConfig
from student.exporting.huggingface.modeling_distil_xlstm import DistilXLSTMForCausalLM
from student.model import DistilXLSTM

Named = dict[str, Tensor]
MOST_DEVIATION = 1e-3
"""Of exported logits from the student's, as a share of the largest: float32 leaves some 1e-6, a wrong tensor 1."""
ROUNDINGS = 8
"""Or so many times what float32 leaves of the student's own logits: single activations of some teachers are large."""


def exported_config(student: DistilXLSTM) -> DistilXLSTMConfig:
    """The configuration of the exported model."""
    shape, facts, blocks = student.config, student.facts, student.stack.blocks
    inner = [block.xlstm.learnable_skip.shape[0] for block in blocks if isinstance(block, mLSTMBlock)]
    feedforward = [block.ffn.proj_down.weight.shape[1] for block in blocks if isinstance(block, sLSTMBlock)]
    shaped: dict[str, Any] = {"feedforward_size": feedforward[0] if feedforward else 0}
    if shape.transformer is not None:
        first: TransformerBlock = blocks[0]
        shaped = {
            "feedforward_size": shape.transformer.feedforward,
            "num_kv_heads": first.kv_heads,
            "head_size": first.head_width,
            "qkv_bias": shape.transformer.qkv_bias,
            "feature_map": shape.transformer.feature_map,
            "rotary_base": float(first.rope_theta),
            "block_norm_eps": first.eps,
        }
    bos, eos, pad = (
        index if index is not None and 0 <= index < facts.vocab_size else None
        for index in (facts.bos_id, facts.eos_id, facts.pad_id)
    )
    # Whatever ends a text for `student.generate` ends one for transformers.
    ends = sorted({facts.separator_id, facts.separator_id if eos is None else eos})
    return DistilXLSTMConfig(
        vocab_size=facts.vocab_size,
        hidden_size=facts.width,
        block_types=[_kind(block) for block in blocks],
        num_heads=shape.heads,
        mlstm_size=inner[0] if inner else 0,
        qkv_block_size=shape.mlstm_qkv_blocksize,
        conv_kernel=shape.conv_kernel,
        final_norm="rmsnorm" if isinstance(student.final_norm, nn.RMSNorm) else "layernorm",
        final_norm_eps=float(student.final_norm.eps),  # type: ignore[arg-type]
        embedding_scale=facts.embedding_scale,
        logit_scale=facts.logit_scale,
        logit_soft_cap=facts.soft_cap,
        trained_length=student.max_length,
        tie_word_embeddings=student.tied,
        bos_token_id=bos,
        eos_token_id=ends[0] if len(ends) == 1 else ends,
        pad_token_id=ends[-1] if pad is None else pad,
        **shaped,
    )


def _kind(block: nn.Module) -> str:
    if isinstance(block, TransformerBlock):
        return "transformer_mlstm"
    return "mlstm" if isinstance(block, mLSTMBlock) else "slstm"


def exported_tensors(student: DistilXLSTM, dtype: torch.dtype) -> Named:
    """The tensors of the exported model: embedding, head unless tied, blocks and norm."""
    named: Named = {"model.embed_tokens.weight": student.embedding_VD}
    if student.untied_head_VD is not None:
        named["lm_head.weight"] = student.untied_head_VD
    for index, block in enumerate(student.stack.blocks):
        tensors = TENSORS[_kind(block)](block)
        named |= {f"model.blocks.{index}.{name}": tensor for name, tensor in tensors.items()}
    norm: Any = student.final_norm
    named["model.norm.weight"] = norm.weight if isinstance(norm, nn.RMSNorm) else norm.weight_proxy
    return {name: tensor.detach().to(dtype).contiguous() for name, tensor in named.items()}


def _convolution(conv: Any) -> Named:
    return {"mixer.conv.weight": conv.conv.weight.squeeze(1), "mixer.conv.bias": conv.conv.bias}


def _mlstm_block(block: Any) -> Named:
    layer, cell = block.xlstm, block.xlstm.mlstm_cell
    return {
        "norm.weight": block.xlstm_norm.weight_proxy,
        "mixer.up_proj.weight": layer.proj_up.weight,
        **_convolution(layer.conv1d),
        "mixer.q_proj.weight": layer.q_proj.weight,
        "mixer.k_proj.weight": layer.k_proj.weight,
        "mixer.v_proj.weight": layer.v_proj.weight,
        "mixer.i_gate.weight": cell.igate.weight,
        "mixer.i_gate.bias": cell.igate.bias,
        "mixer.f_gate.weight": cell.fgate.weight,
        "mixer.f_gate.bias": cell.fgate.bias,
        "mixer.norm.weight": cell.outnorm.weight_proxy,
        "mixer.skip": layer.learnable_skip,
        "mixer.down_proj.weight": layer.proj_down.weight,
    }


def _slstm_block(block: Any) -> Named:
    layer, cell = block.xlstm, block.xlstm.slstm_cell
    gate_FD, up_FD = block.ffn.proj_up.weight.chunk(2)
    heads = layer.config.num_heads
    return {
        "norm.weight": block.xlstm_norm.weight_proxy,
        **_convolution(layer.conv1d),
        # What the package calls fgate feeds the cell's first gate, which is i.
        "mixer.i_proj.weight": layer.fgate.weight,
        "mixer.f_proj.weight": layer.igate.weight,
        "mixer.z_proj.weight": layer.zgate.weight,
        "mixer.o_proj.weight": layer.ogate.weight,
        "mixer.recurrent": cell._recurrent_kernel_,
        "mixer.bias": cell._bias_.view(4, heads, -1).transpose(0, 1).flatten(1),
        "mixer.norm.weight": layer.group_norm.weight_proxy,
        "feedforward_norm.weight": block.ffn_norm.weight_proxy,
        "feedforward.gate_proj.weight": gate_FD,
        "feedforward.up_proj.weight": up_FD,
        "feedforward.down_proj.weight": block.ffn.proj_down.weight,
    }


def _transformer_block(block: TransformerBlock) -> Named:
    mixer = {name: block.get_submodule(name) for name in ("q_proj", "k_proj", "v_proj", "o_proj", "out_gate")}
    mixer |= {"i_gate": block.igate, "f_gate": block.fgate}
    parameters = {f"{name}.{n}": p for name, module in mixer.items() for n, p in module.named_parameters()}
    own = {"q_map": block.q_map, "k_map": block.k_map, "head_norm": block.head_norm}
    parameters |= {name: p for name, p in own.items() if p is not None}
    return {
        "norm.weight": block.mixer_norm.weight,
        **{f"mixer.{name}": p for name, p in parameters.items()},
        "feedforward_norm.weight": block.ffn_norm.weight,
        "feedforward.gate_proj.weight": block.gate_proj.weight,
        "feedforward.up_proj.weight": block.up_proj.weight,
        "feedforward.down_proj.weight": block.down_proj.weight,
    }


TENSORS: dict[str, Callable[[Any], Named]] = {
    "mlstm": _mlstm_block,
    "slstm": _slstm_block,
    "transformer_mlstm": _transformer_block,
}
"""Kind of block -> its tensors by their exported names."""


def exported_model(config: DistilXLSTMConfig, tensors: Named) -> DistilXLSTMForCausalLM:
    """The exported model around these tensors, which it shares; in evaluation mode.

    Raises:
        ValueError: they are not those of the configuration.
    """
    with torch.device("meta"):
        model = DistilXLSTMForCausalLM(config)
    found = model.load_state_dict(tensors, strict=False, assign=True)
    missing = set(found.missing_keys) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    if missing or found.unexpected_keys:
        raise ValueError(f"the exported code lacks or does not know {sorted(missing) + found.unexpected_keys}")
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def deviations(student: DistilXLSTM, model: DistilXLSTMForCausalLM, length: int = 150) -> Tensor:
    """By position (B, T), the largest difference of the exported model's logits from the student's on made-up ids, as a
    share of the largest logit of all.

    Half of the ids are read at once, the others one by one.
    """
    ids_BT = _made_up(student, length)
    expected_BTV = student.logits(student(ids_BT).h_BTD)
    first = model(ids_BT[:, : length // 2], use_cache=True)
    parts, cache = [first.logits], first.past_key_values
    for t in range(length // 2, length):
        parts.append(model(ids_BT[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    return (torch.cat(parts, 1) - expected_BTV).abs().amax(-1) / expected_BTV.abs().max()


@torch.no_grad()
def rounding(student: DistilXLSTM, length: int = 150) -> float:
    """Largest difference of the student's float32 logits from those of float64, as a share of the largest."""
    ids_BT = _made_up(student, length)
    h_BTD = student(ids_BT).h_BTD
    exact_BTD = student.double()(ids_BT).h_BTD
    student.float()  # its weights were float32: nothing is lost
    difference_BTV, exact_BTV = (h.float() @ student.head_VD.float().T for h in (h_BTD - exact_BTD, exact_BTD))
    return float(difference_BTV.abs().max() / exact_BTV.abs().max())


def is_rounding(student: DistilXLSTM, found: float) -> bool:
    """Whether a `deviation` may be no more than rounding."""
    return found <= MOST_DEVIATION or found <= ROUNDINGS * rounding(student)


def _made_up(student: DistilXLSTM, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(student.facts.vocab_size, (2, length), generator=generator)
