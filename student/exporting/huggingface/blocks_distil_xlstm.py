"""The xLSTM blocks of a Distil-xLSTM student: sLSTM and mLSTM (arXiv 2405.04517), in plain tensor operations.

A block reads tokens from any state and returns the state after them, so that the same code reads a prompt and a single
token: an mLSTM takes `chunk_size` tokens at once, an sLSTM one after the other. States have a fixed size. Cells compute
in float32 whatever the weights are: gates are exponents.

Legend: B rows, T tokens (S where they are read from), D width, H heads, d head width, C inner width of an mLSTM, K
convolution kernel, g = 4·d: the gates i, f, z, o of one sLSTM head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_distil_xlstm import DistilXLSTMConfig

EPS = 1e-6  # of the mLSTM's normaliser
NORM_EPS = 1e-5

State = dict[str, Tensor]
"""What a block remembers; the first dimension of every tensor is the row."""


class BlockDiagonalLinear(nn.Module):
    """A linear map without bias whose matrix is blocks on the diagonal: each group of channels is projected alone."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, width // groups, width // groups))  # (group, out, in)

    def forward(self, x: Tensor) -> Tensor:
        grouped = x.unflatten(-1, (self.weight.shape[0], -1))
        return torch.einsum("...gi,goi->...go", grouped, self.weight).flatten(-2)


class CausalConvolution(nn.Module):
    """Every channel's weighted sum over its last K tokens, then SiLU."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, kernel))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x_BTC: Tensor, before_BKC: Tensor, keep_BT: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs (B, T, C) and the last K - 1 inputs, which the next call takes as `before_BKC`."""
        remembered = before_BKC.shape[1]
        x = torch.cat([before_BKC.to(x_BTC.dtype), x_BTC], dim=1)
        if keep_BT is not None:  # what is remembered must touch the first token that counts: padding goes before it
            order = F.pad(keep_BT, (remembered, 0), value=True).long().argsort(stable=True, dim=1)
            x = x.gather(1, order[..., None].expand_as(x))
        y = F.conv1d(x.transpose(1, 2), self.weight[:, None], self.bias, groups=x.shape[-1]).transpose(1, 2)
        return F.silu(y), x[:, x.shape[1] - remembered :]


class HeadNorm(nn.Module):
    """Layer norm over the channels of every head: (..., H, d) -> (..., H·d)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS).flatten(-2).to(self.weight.dtype) * self.weight


def mlstm_chunk(
    q_BHTd: Tensor, k_BHTd: Tensor, v_BHTd: Tensor, i_BHT: Tensor, log_f_BHT: Tensor, state: State
) -> tuple[Tensor, State]:
    """A chunk of tokens through the mLSTM cell (arXiv 2405.04517, section 2.3), one token or more.

    With F_t = Σ log f and the memory Σ exp(F_t − F_s + i_s) k_s v_s^T / √d, a token reads q_t · memory and divides by
    max(|q_t · Σ exp(F_t − F_s + i_s) k_s / √d|, 1). All of it is held times exp(−m_t), so that no exponential
    overflows; m drops out of the result, hence without gradient.

    Args:
        q_BHTd, k_BHTd, v_BHTd, i_BHT, log_f_BHT: float32; i and log f are logarithms of the gates. v's width may be
            another than q's and k's.
        state: `C` (B, H, d of k, d of v), `n` (B, H, d) and `m` (B, H) before the chunk.

    Returns:
        h_BHTd and the state after the chunk.
    """
    length, width = q_BHTd.shape[-2:]
    k_BHTd = k_BHTd * width**-0.5
    F_BHT = log_f_BHT.cumsum(-1)
    g_BHT = i_BHT - F_BHT
    # m_t = F_t + top_t
    top_BHT = torch.maximum(g_BHT.detach().cummax(-1).values, state["m"].detach()[..., None])

    # From tokens of the chunk, and from the state before it.
    causal_TS = torch.ones(length, length, dtype=torch.bool, device=q_BHTd.device).tril()
    log_decay_BHTS = (g_BHT[..., None, :] - top_BHT[..., :, None]).masked_fill(~causal_TS, -torch.inf)
    scores_BHTS = (q_BHTd @ k_BHTd.transpose(-1, -2)) * log_decay_BHTS.exp()
    carried_BHTd = q_BHTd * (state["m"][..., None] - top_BHT).exp()[..., None]
    h_BHTd = scores_BHTS @ v_BHTd + carried_BHTd @ state["C"]
    sum_BHT = scores_BHTS.sum(-1) + (carried_BHTd @ state["n"][..., None]).squeeze(-1)
    scale_BHT = torch.maximum(sum_BHT.abs(), (-F_BHT - top_BHT).exp()) + EPS

    last_BH = top_BHT[..., -1]
    kept_BH = (state["m"] - last_BH).exp()
    source_BHTd = k_BHTd * (g_BHT - last_BH[..., None]).exp()[..., None]
    after = {
        "C": kept_BH[..., None, None] * state["C"] + source_BHTd.transpose(-1, -2) @ v_BHTd,
        "n": kept_BH[..., None] * state["n"] + source_BHTd.sum(-2),
        "m": F_BHT[..., -1] + last_BH,
    }
    return h_BHTd / scale_BHT[..., None], after


class MLSTM(nn.Module):
    """Up-projection -> convolution -> q, k, v and gates -> mLSTM cell -> output gate -> down-projection."""

    def __init__(self, config: DistilXLSTMConfig) -> None:
        super().__init__()
        inner, self.heads, self.chunk = config.mlstm_size, config.num_heads, config.chunk_size
        groups = inner // config.qkv_block_size
        self.up_proj = nn.Linear(config.hidden_size, 2 * inner, bias=False)
        self.conv = CausalConvolution(inner, config.conv_kernel)
        self.q_proj = BlockDiagonalLinear(inner, groups)
        self.k_proj = BlockDiagonalLinear(inner, groups)
        self.v_proj = BlockDiagonalLinear(inner, groups)
        self.i_gate = nn.Linear(3 * inner, self.heads)
        self.f_gate = nn.Linear(3 * inner, self.heads)
        self.norm = HeadNorm(inner)
        self.skip = nn.Parameter(torch.ones(inner))
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def empty_state(self, x_BTD: Tensor) -> State:
        rows, width = x_BTD.shape[0], self.skip.shape[0] // self.heads
        new = x_BTD.new_zeros
        return {
            "conv": new(rows, self.conv.weight.shape[1] - 1, self.skip.shape[0]),
            "C": new(rows, self.heads, width, width, dtype=torch.float32),
            "n": new(rows, self.heads, width, dtype=torch.float32),
            "m": new(rows, self.heads, dtype=torch.float32),
        }

    def forward(self, x_BTD: Tensor, state: State, keep_BT: Tensor | None) -> tuple[Tensor, State]:
        inner_BTC, z_BTC = self.up_proj(x_BTD).chunk(2, -1)
        act_BTC, remembered_BKC = self.conv(inner_BTC, state["conv"], keep_BT)
        qkv = self.q_proj(act_BTC), self.k_proj(act_BTC), self.v_proj(inner_BTC)
        seen = torch.cat(qkv, -1).float()
        i_BTH = F.linear(seen, self.i_gate.weight.float(), self.i_gate.bias.float())
        log_f_BTH = F.logsigmoid(F.linear(seen, self.f_gate.weight.float(), self.f_gate.bias.float()))
        q_BTHd, k_BTHd, v_BTHd = (x.float().unflatten(-1, (self.heads, -1)) for x in qkv)
        if keep_BT is not None:  # padding writes nothing into the memory and lets nothing of it go
            drop_BT1 = ~keep_BT[..., None]
            i_BTH, log_f_BTH = i_BTH.masked_fill(drop_BT1, 0), log_f_BTH.masked_fill(drop_BT1, 0)
            k_BTHd = k_BTHd.masked_fill(drop_BT1[..., None], 0)
        inputs = [x.transpose(1, 2).split(self.chunk, 2) for x in (q_BTHd, k_BTHd, v_BTHd, i_BTH, log_f_BTH)]
        memory, parts = state, []
        for q, k, v, i, log_f in zip(*inputs, strict=True):
            h_BHTd, memory = mlstm_chunk(q, k, v, i, log_f, memory)
            parts.append(h_BHTd)
        h_BTC = self.norm(torch.cat(parts, 2).transpose(1, 2))
        y_BTD = self.down_proj((h_BTC + self.skip * act_BTC) * F.silu(z_BTC))
        return y_BTD, {"conv": remembered_BKC, **memory}


def slstm_scan(
    inputs_BTHg: Tensor, recurrent_Hgd: Tensor, state: State, keep_BT: Tensor | None
) -> tuple[Tensor, State]:
    """Tokens through the sLSTM cell (arXiv 2405.04517, section 2.2), one after the other.

    m_t = max(log σ(f) + m_{t−1}, i) only scales c and n alike: y does not depend on it, hence it is without gradient.

    Args:
        inputs_BTHg: what the gates i, f, z, o get from the token, float32.
        recurrent_Hgd: what they get from the output before, times y.
        state: `y`, `c`, `n` and `m` (B, H, d) before the first token.
        keep_BT: False where the state must stay as it is.

    Returns:
        y_BTHd and the state after the last token.
    """
    y, c, n, m = (state[name].transpose(0, 1) for name in ("y", "c", "n", "m"))  # (H, B, d)
    R_Hdg = recurrent_Hgd.transpose(1, 2)
    outputs = []
    for t, inputs_BHg in enumerate(inputs_BTHg.unbind(1)):
        i, f, z, o = torch.baddbmm(inputs_BHg.transpose(0, 1), y, R_Hdg).chunk(4, -1)
        carried = F.logsigmoid(f) + m
        top = torch.maximum(i, carried).detach()
        write, decay = (i - top).exp(), (carried - top).exp()
        after_c = decay * c + write * z.tanh()
        after_n = decay * n + write
        after = o.sigmoid() * after_c / after_n, after_c, after_n, top
        if keep_BT is None:
            y, c, n, m = after
        else:
            keep_B1 = keep_BT[:, t, None]
            y, c, n, m = (torch.where(keep_B1, new, old) for new, old in zip(after, (y, c, n, m), strict=True))
        outputs.append(y)
    last = {name: value.transpose(0, 1) for name, value in zip(("y", "c", "n", "m"), (y, c, n, m), strict=True)}
    return torch.stack(outputs).permute(2, 0, 1, 3), last


class SLSTM(nn.Module):
    """Convolution -> gates -> sLSTM cell -> norm of every head."""

    def __init__(self, config: DistilXLSTMConfig) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_heads
        head = width // self.heads
        self.conv = CausalConvolution(width, config.conv_kernel)
        self.i_proj = BlockDiagonalLinear(width, self.heads)
        self.f_proj = BlockDiagonalLinear(width, self.heads)
        self.z_proj = BlockDiagonalLinear(width, self.heads)
        self.o_proj = BlockDiagonalLinear(width, self.heads)
        self.recurrent = nn.Parameter(torch.zeros(self.heads, 4 * head, head))
        self.bias = nn.Parameter(torch.zeros(self.heads, 4 * head))
        self.norm = HeadNorm(width)

    def empty_state(self, x_BTD: Tensor) -> State:
        rows, _, width = x_BTD.shape
        zeros_BHd = x_BTD.new_zeros(rows, self.heads, width // self.heads, dtype=torch.float32)
        cell = {"y": zeros_BHd, "c": zeros_BHd, "n": zeros_BHd, "m": torch.full_like(zeros_BHd, -torch.inf)}
        return {"conv": x_BTD.new_zeros(rows, self.conv.weight.shape[1] - 1, width), **cell}

    def forward(self, x_BTD: Tensor, state: State, keep_BT: Tensor | None) -> tuple[Tensor, State]:
        act_BTD, remembered_BKD = self.conv(x_BTD, state["conv"], keep_BT)
        gates = self.i_proj(act_BTD), self.f_proj(act_BTD), self.z_proj(x_BTD), self.o_proj(x_BTD)
        inputs_BTHg = torch.cat([gate.float().unflatten(-1, (self.heads, -1)) for gate in gates], -1)
        y_BTHd, cell = slstm_scan(inputs_BTHg + self.bias.float(), self.recurrent.float(), state, keep_BT)
        return self.norm(y_BTHd), {"conv": remembered_BKD, **cell}


class GatedFeedForward(nn.Module):
    """An activation of one projection times another, and back."""

    def __init__(self, width: int, inner: int, activation: Callable[[Tensor], Tensor] = F.gelu) -> None:
        super().__init__()
        self.activation = activation
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class MLSTMBlock(GradientCheckpointingLayer):
    """x + mLSTM(norm(x))."""

    def __init__(self, config: DistilXLSTMConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=NORM_EPS, bias=False)
        self.mixer = MLSTM(config)

    def forward(self, x_BTD: Tensor, state: State | None, keep_BT: Tensor | None) -> tuple[Tensor, State]:
        """The block's output, and its state after the last token; `state` None: nothing was read before."""
        y_BTD, state = self.mixer(self.norm(x_BTD), state or self.mixer.empty_state(x_BTD), keep_BT)
        return x_BTD + y_BTD, state


class SLSTMBlock(GradientCheckpointingLayer):
    """x + sLSTM(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: DistilXLSTMConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=NORM_EPS, bias=False)
        self.mixer = SLSTM(config)
        self.feedforward_norm = nn.LayerNorm(config.hidden_size, eps=NORM_EPS, bias=False)
        self.feedforward = GatedFeedForward(config.hidden_size, config.feedforward_size)

    def forward(self, x_BTD: Tensor, state: State | None, keep_BT: Tensor | None) -> tuple[Tensor, State]:
        """As `MLSTMBlock.forward`."""
        y_BTD, state = self.mixer(self.norm(x_BTD), state or self.mixer.empty_state(x_BTD), keep_BT)
        x_BTD = x_BTD + y_BTD
        return x_BTD + self.feedforward(self.feedforward_norm(x_BTD)), state
