"""Shapes of transformer-shaped students for tests, and one such block written down densely, after its docstring."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from student.blocks.transformer_block import TransformerBlock, TransformerShape
from student.model import StudentConfig

CELL_EPS = 1e-6
"""What the mLSTM cell adds to its divisor, at the scale of its stabiliser."""


def shape_of(**changes: Any) -> TransformerShape:
    """For a width of 64: grouped-query attention and rotary positions unless told otherwise."""
    return TransformerShape(**{"feedforward": 96, "kv_heads": 2, "rope_theta": 10_000.0, **changes})


def student_of(blocks: int = 2, heads: int = 4, **changes: Any) -> StudentConfig:
    """A student of such blocks."""
    return StudentConfig(blocks=blocks, heads=heads, final_norm="teacher", transformer=shape_of(**changes))


def dense_block(block: TransformerBlock, x_BTD: Tensor, detach_divisor: bool = False) -> tuple[Tensor, Tensor]:
    """The block's output and its attention A (B, H, T, T), in x's dtype, straight from the definition.

    A[t,s] is φ(q_t)·φ(k_s) · exp(Σ_{s<r<=t} log σ(f_r) + i_s), divided by its row's sum; without feature maps it is
    q_t·k_s/√d · exp(...), divided by max(|sum|, 1) as the mLSTM does, and a norm over each head follows.

    Args:
        detach_divisor: leave out the gradient of what rows are divided by.
    """
    H, d = block.heads, block.head_width
    normed = _rms(x_BTD, block.eps) * block.mixer_norm.weight

    def project(linear: torch.nn.Linear) -> Tensor:
        y = normed @ linear.weight.T
        y = y if linear.bias is None else y + linear.bias
        return y.unflatten(-1, (-1, d)).transpose(1, 2)

    q, k, v = project(block.q_proj), project(block.k_proj), project(block.v_proj)
    if block.rope_theta:
        q, k = _turned(q, block.rope_theta), _turned(k, block.rope_theta)
    if block.q_map is not None and block.k_map is not None:
        q, k = _hedgehog(q @ block.q_map), _hedgehog(k @ block.k_map)
    own_H = torch.arange(H) // (H // block.kv_heads)  # head -> its head of keys and values
    k, v = k[:, own_H], v[:, own_H]
    igate, fgate = ((normed @ g.weight.T + g.bias).transpose(1, 2) for g in (block.igate, block.fgate))
    log_f, length = F.logsigmoid(fgate), x_BTD.shape[1]
    rows = []
    for t in range(length):
        decay = torch.stack([log_f[..., s + 1 : t + 1].sum(-1) for s in range(t + 1)], -1)
        rows.append(F.pad(decay + igate[..., : t + 1], (0, length - t - 1), value=-torch.inf))
    log_weight = torch.stack(rows, 2)
    scores = (q @ k.transpose(-1, -2)) * log_weight.exp() * q.shape[-1] ** -0.5
    sums = scores.sum(-1, keepdim=True)
    if block.head_norm is None:
        divisor = sums
    else:
        divisor = sums.abs().clamp_min(1) + CELL_EPS * log_weight.detach().amax(-1, keepdim=True).exp()
    A = scores / (divisor.detach() if detach_divisor else divisor)
    h = A @ v
    if block.head_norm is not None:
        h = _rms(h, block.eps) * block.head_norm.unflatten(0, (H, d))[:, None]
    gated = h.transpose(1, 2).flatten(2) * 2 * torch.sigmoid(normed @ block.out_gate.weight.T)
    y = x_BTD + gated @ block.o_proj.weight.T
    normed = _rms(y, block.eps) * block.ffn_norm.weight
    gate = normed @ block.gate_proj.weight.T
    inner = gate * torch.sigmoid(gate) * (normed @ block.up_proj.weight.T)
    return y + inner @ block.down_proj.weight.T, A


def _rms(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def _turned(x: Tensor, theta: float) -> Tensor:
    """Channels i and i + d/2 as a complex number, turned by position · theta^(−2i/d)."""
    half = x.shape[-1] // 2
    speed = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * speed
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle).to(
        torch.complex128 if x.dtype == torch.float64 else torch.complex64
    )
    return torch.cat((turned.real, turned.imag), -1)


def _hedgehog(z: Tensor) -> Tensor:
    return torch.cat((z.exp(), (-z).exp()), -1) / (2 * z.cosh().sum(-1, keepdim=True))
