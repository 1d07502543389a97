"""The package's blocks computed in few passes over memory: the same parameters and the same function.

The package's modules, under autocast, cast, transpose and copy between every two products; on a GPU that is most of a
block's time. Here a block is a few parts (`block_parts.py`) between which only tensors in the products' dtype pass,
laid out as the cells' kernels read them; the residual keeps its own dtype. On a CPU blocks stay the package's: there
the compiler is not used, and uncompiled these parts are no faster.

Legend: B rows, T tokens, N = B·T positions, H heads, d head width, D width, C = H·d inner width of an mLSTM,
G = 2·H: the input gates of all heads, then the forget gates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from xlstm import mLSTMBlock, sLSTMBlock

from student.blocks.block_parts import (
    FeedForwardAdd,
    HeadNormAdd,
    MLSTMInputs,
    MLSTMOutput,
    NormBeside,
    SLSTMInputs,
    TwoProjections,
)
from student.blocks.mlstm import CellBackend


class FusedMLSTMBlock(mLSTMBlock):
    """The package's block, whole rows on a GPU in few passes."""

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return mlstm_block(self, x) if x.is_cuda and _mlstm_fits(self) else super().forward(x, **kwargs)


class FusedSLSTMBlock(sLSTMBlock):
    """The package's block, whole rows on a GPU in few passes."""

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return slstm_block(self, x) if x.is_cuda and _slstm_fits(self) else super().forward(x, **kwargs)


def use_fused_forward(block: mLSTMBlock | sLSTMBlock) -> None:
    """Make a package block one of ours, in place: parameters, hooks and names stay."""
    # Not an attribute of the instance: a copy of the block would go on calling the original's.
    block.__class__ = FusedMLSTMBlock if isinstance(block, mLSTMBlock) else FusedSLSTMBlock


def _mlstm_fits(block: mLSTMBlock) -> bool:
    layer = block.xlstm
    head = layer.config._inner_embedding_dim // layer.mlstm_cell.config.num_heads
    plain = not layer.config.bias and not (layer.config.dropout and block.training)
    return (
        plain and head % layer.config.qkv_proj_blocksize == 0 and isinstance(layer.mlstm_cell.backend_fn, CellBackend)
    )


def _slstm_fits(block: sLSTMBlock) -> bool:
    layer, ffn = block.xlstm, block.ffn.config
    dropout = layer.config.dropout or ffn.dropout
    return (
        layer.config.conv1d_kernel_size > 0
        and not ffn.bias
        and ffn.act_fn == "gelu"
        and not (dropout and block.training)
    )


def product_dtype(x: Tensor) -> torch.dtype:
    """What autocast, if it is on, multiplies in, else the dtype of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def head_blocks(weight_nbb: Tensor, heads: int) -> Tensor:
    """(H, d, d): the blocks of each head on the diagonal of one matrix. A few zeros are multiplied, and a head's output
    is one product, written as the kernel reads it."""
    groups = weight_nbb.shape[0] // heads
    parts_Hgbb = weight_nbb.unflatten(0, (heads, groups))
    diagonal_gg = torch.eye(groups, dtype=weight_nbb.dtype, device=weight_nbb.device)
    matrices = parts_Hgbb[:, :, :, None] * diagonal_gg[:, None, :, None]  # (H, g, b, g, b)
    return matrices.flatten(3).flatten(1, 2)


def mlstm_block(block: mLSTMBlock, x_BTD: Tensor) -> Tensor:
    """What `mLSTMBlock.forward` computes, for a block that `use_cell_backend` prepared.

    Captured inputs of the cell (`mlstm.capturing`) are part of the graph, as they are in the package's forward.
    """
    layer, dtype, shape = block.xlstm, product_dtype(x_BTD), x_BTD.shape
    cell, conv = layer.mlstm_cell, layer.conv1d.conv
    heads = cell.config.num_heads
    with torch.autocast(x_BTD.device.type, enabled=False):
        norm = block.xlstm_norm
        x_ND, normed_ND = NormBeside.apply(x_BTD.flatten(0, 1), norm.weight, norm.eps, dtype)
        inner_NC, z_NC = TwoProjections.apply(normed_ND, layer.proj_up.weight)
        q_Hdd, k_Hdd, v_Hdd = (head_blocks(p.weight, heads) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        gate_weight_GHd3 = torch.cat([cell.igate.weight, cell.fgate.weight]).unflatten(1, (3, heads, -1)).chunk(3, 1)
        q_GC, k_GC, v_GC = (
            torch.einsum("ghd,hde->ghe", w.squeeze(1), p).flatten(1)
            for w, p in zip(gate_weight_GHd3, (q_Hdd, k_Hdd, v_Hdd), strict=True)
        )
        act_NC, q_HNd, k_HNd, v_HNd, gates_GN = MLSTMInputs.apply(
            inner_NC.view(*shape[:2], -1), conv.weight.squeeze(1), conv.bias, q_Hdd, k_Hdd, v_Hdd,
            q_GC + k_GC, v_GC, torch.cat([cell.igate.bias, cell.fgate.bias]),
        )  # fmt: skip
        qkv_HBTd = [x_HNd.unflatten(1, shape[:2]) for x_HNd in (q_HNd, k_HNd, v_HNd)]
        igate_HBT, fgate_HBT = gates_GN.unflatten(1, shape[:2]).chunk(2)
        h_HNd = cell.backend_fn.heads_first(*qkv_HBTd, igate_HBT, fgate_HBT).flatten(1, 2)
        y_ND = MLSTMOutput.apply(
            h_HNd, act_NC, z_NC, x_ND, cell.outnorm.weight, layer.learnable_skip, layer.proj_down.weight,
            cell.outnorm.eps,
        )  # fmt: skip
    return y_ND.view(shape)


def slstm_block(block: sLSTMBlock, x_BTD: Tensor) -> Tensor:
    """What `sLSTMBlock.forward` computes, whichever cell it has."""
    layer, dtype, shape = block.xlstm, product_dtype(x_BTD), x_BTD.shape
    device, autocast = x_BTD.device.type, torch.is_autocast_enabled(x_BTD.device.type)
    conv, ffn = layer.conv1d.conv, block.ffn
    with torch.autocast(device, enabled=False):
        norm = block.xlstm_norm
        x_ND, normed_ND = NormBeside.apply(x_BTD.flatten(0, 1), norm.weight, norm.eps, dtype)
        # The package's names of the first two gates are swapped: what `fgate` gives is the cell's input gate.
        gates = (layer.fgate.weight, layer.igate.weight, layer.zgate.weight, layer.ogate.weight)
        gates_BT4D = SLSTMInputs.apply(normed_ND.view(shape), conv.weight.squeeze(1), conv.bias, *gates)
        with torch.autocast(device, dtype=dtype, enabled=autocast):
            y_BHTd, _ = layer.slstm_cell(gates_BT4D)
        y_NHd = y_BHTd.transpose(1, 2).flatten(0, 1)
        x_ND = HeadNormAdd.apply(y_NHd, x_ND, layer.group_norm.weight, layer.group_norm.eps)
        x_ND, normed_ND = NormBeside.apply(x_ND, block.ffn_norm.weight, block.ffn_norm.eps, dtype)
        y_ND = FeedForwardAdd.apply(normed_ND, x_ND, ffn.proj_up.weight, ffn.proj_down.weight)
    return y_ND.view(shape)
