"""Blocks of a Distil-xLSTM student that have a Transformer's shape: an mLSTM in the place of each attention.

q, k and v are projected as in Llama (rotary positions, several heads of q to one of k and v), turned into features
whose products take the place of exp(q·k), and read by the mLSTM of `blocks_distil_xlstm.py`; a gated feed-forward
follows. Feature map `softmax` is Hedgehog's (arXiv 2402.04347): softmax([xW, −xW]), rows divided by their sum; `none`
takes q and k as they are and norms every head (arXiv 2503.13427).

Legend: B rows, T tokens, D width, H heads, K heads of keys and values, d head width, f features (2d or d).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from .blocks_distil_xlstm import GatedFeedForward, State, mlstm_chunk
from .configuration_distil_xlstm import DistilXLSTMConfig

FORGET_BIAS, INPUT_BIAS = 6.0, 10.0
SMALLEST_SUM = 1e-30
"""Least divisor of a row: what no key answers is 0, and not 0/0; and so is padding before the first token."""


def rotated(x_BHTd: Tensor, position_BT: Tensor, base: float) -> Tensor:
    """Rotary positions (arXiv 2104.09864), pairs (i, i + d/2); float32."""
    wide = torch.float32 if x_BHTd.device.type == "mps" else torch.float64  # a position may be a large number
    half = x_BHTd.shape[-1] // 2
    speed = base ** -(torch.arange(half, dtype=wide, device=x_BHTd.device) / half)
    angle_B1Th = (position_BT[..., None].to(wide) * speed)[:, None]
    cos, sin = angle_B1Th.cos().float(), angle_B1Th.sin().float()
    first, second = x_BHTd.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def softmax_features(x_BHTd: Tensor, map_Hdd: Tensor) -> Tensor:
    """(B, H, T, 2d), positive, of sum 1."""
    z_BHTd = x_BHTd @ map_Hdd.float()
    return torch.cat((z_BHTd, -z_BHTd), -1).softmax(-1)


class TransformerMixer(nn.Module):
    """q, k, v and gates -> mLSTM cell -> output gate -> projection."""

    def __init__(self, config: DistilXLSTMConfig) -> None:
        super().__init__()
        width, self.heads, self.kv_heads = config.hidden_size, config.num_heads, config.num_kv_heads
        self.head_size, self.chunk = config.head_size, config.chunk_size
        self.rotary_base, self.eps = config.rotary_base, config.block_norm_eps
        inner, inner_kv = self.heads * self.head_size, self.kv_heads * self.head_size
        self.q_proj = nn.Linear(width, inner, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, inner_kv, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, inner_kv, bias=config.qkv_bias)
        self.o_proj = nn.Linear(inner, width, bias=False)
        self.i_gate = nn.Linear(width, self.heads)
        self.f_gate = nn.Linear(width, self.heads)
        self.out_gate = nn.Linear(width, inner, bias=False)
        self.with_sum = config.feature_map == "softmax"
        if self.with_sum:
            self.q_map = nn.Parameter(self.first_map().repeat(self.heads, 1, 1))
            self.k_map = nn.Parameter(self.first_map().repeat(self.kv_heads, 1, 1))
        else:
            self.head_norm = nn.Parameter(torch.ones(inner))

    def first_map(self) -> Tensor:
        """What feature maps begin as (d, d)."""
        return torch.eye(self.head_size) * self.head_size**-0.25

    def empty_state(self, x_BTD: Tensor) -> State:
        rows, new = x_BTD.shape[0], x_BTD.new_zeros
        features, values = (2 * self.head_size, self.head_size + 1) if self.with_sum else (self.head_size,) * 2
        return {
            "C": new(rows, self.heads, features, values, dtype=torch.float32),
            "n": new(rows, self.heads, features, dtype=torch.float32),
            "m": new(rows, self.heads, dtype=torch.float32),
            "position": new(rows, dtype=torch.int64),  # tokens read, padding not among them
        }

    def forward(self, x_BTD: Tensor, state: State, keep_BT: Tensor | None) -> tuple[Tensor, State]:
        counts_BT = torch.ones(x_BTD.shape[:2], dtype=torch.int64, device=x_BTD.device) if keep_BT is None else keep_BT
        read_BT = state["position"][:, None] + counts_BT.long().cumsum(1)
        q_BHTd, k_BKTd, v_BKTd = (
            projection(x_BTD).float().unflatten(-1, (heads, -1)).transpose(1, 2)
            for projection, heads in (
                (self.q_proj, self.heads),
                (self.k_proj, self.kv_heads),
                (self.v_proj, self.kv_heads),
            )
        )
        if self.rotary_base:
            q_BHTd, k_BKTd = (rotated(x, read_BT - 1, self.rotary_base) for x in (q_BHTd, k_BKTd))
        if self.with_sum:  # a one beside each value carries the sum of the row through the cell
            q_BHTd, k_BKTd = softmax_features(q_BHTd, self.q_map), softmax_features(k_BKTd, self.k_map)
            v_BKTd = F.pad(v_BKTd, (0, 1), value=1.0)
        k_BHTd, v_BHTd = (x.repeat_interleave(self.heads // self.kv_heads, 1) for x in (k_BKTd, v_BKTd))
        x_float = x_BTD.float()
        i_BHT, f_BHT = (
            F.linear(x_float, gate.weight.float(), gate.bias.float()).transpose(1, 2)
            for gate in (self.i_gate, self.f_gate)
        )
        log_f_BHT = F.logsigmoid(f_BHT)
        if keep_BT is not None:  # padding writes nothing into the memory and lets nothing of it go
            drop_B1T = ~keep_BT[:, None]
            i_BHT, log_f_BHT = i_BHT.masked_fill(drop_B1T, 0), log_f_BHT.masked_fill(drop_B1T, 0)
            k_BHTd = k_BHTd.masked_fill(drop_B1T[..., None], 0)
        inputs = [x.split(self.chunk, 2) for x in (q_BHTd, k_BHTd, v_BHTd, i_BHT, log_f_BHT)]
        memory, parts = state, []
        for q, k, v, i, log_f in zip(*inputs, strict=True):
            h_BHTd, memory = mlstm_chunk(q, k, v, i, log_f, memory)
            parts.append(h_BHTd)
        h_BHTd = torch.cat(parts, 2)
        if self.with_sum:
            h_BHTd = h_BHTd[..., :-1] / h_BHTd[..., -1:].clamp_min(SMALLEST_SUM)
            h_BTE = h_BHTd.transpose(1, 2).flatten(2)
        else:
            h_BHTd = F.rms_norm(h_BHTd, h_BHTd.shape[-1:], eps=self.eps)
            h_BTE = h_BHTd.transpose(1, 2).flatten(2) * self.head_norm.float()
        gated_BTE = h_BTE * (2 * self.out_gate(x_BTD).float().sigmoid())
        return self.o_proj(gated_BTE.to(x_BTD.dtype)), {**memory, "position": read_BT[:, -1]}


class TransformerBlock(GradientCheckpointingLayer):
    """x + mLSTM(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: DistilXLSTMConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.block_norm_eps)
        self.mixer = TransformerMixer(config)
        self.feedforward_norm = nn.RMSNorm(config.hidden_size, eps=config.block_norm_eps)
        self.feedforward = GatedFeedForward(config.hidden_size, config.feedforward_size, F.silu)

    def forward(self, x_BTD: Tensor, state: State | None, keep_BT: Tensor | None) -> tuple[Tensor, State]:
        """The block's output, and its state after the last token; `state` None: nothing was read before."""
        y_BTD, state = self.mixer(self.norm(x_BTD), state or self.mixer.empty_state(x_BTD), keep_BT)
        x_BTD = x_BTD + y_BTD
        return x_BTD + self.feedforward(self.feedforward_norm(x_BTD)), state
