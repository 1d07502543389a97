"""Blocks shaped as a Transformer teacher's, so that its weights fit: an mLSTM in the place of each attention.

    x = x + o_proj(gate · mLSTM(q, k, v))      q, k, v from RMSNorm(x), with the teacher's rotary positions
    x = x + down(silu(gate(y)) · up(y))        y = RMSNorm(x)

A softmax attention becomes linear where exp(q·k/√d) is replaced by φ(q)·φ(k). `feature_map: softmax` is Hedgehog's φ
(arXiv 2402.04347, section 4.1): softmax([xW, −xW]) with a learnt W a head, which begins as d^(−1/4); its products are
positive, so Σ_s C[t,s] is, and rows are divided by it, as attention's are. A column of ones beside v carries that sum
through the cell, whose own division cancels: gradients are right although the GPU's kernel leaves its normaliser's out.
`feature_map: none` takes q and k as they are; there a norm over each head follows the cell, as in xLSTM-7B
(arXiv 2503.13427). Forget and input gates see x and begin as good as open; the output gate is 2σ(xW), and begins at 1.

Legend: B rows, T tokens, D width, H heads, K key/value heads, d head width, E = H·d, f features (2d or d), I inner
width.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from xlstm.blocks.mlstm.backends import recurrent_step_stabilized_simple

from pipeline.errors import UserError
from student.blocks.compiled import compiled
from student.blocks.mlstm import CellBackend, CellInputs, capturing, final_memory

FORGET_BIAS = 6.0
"""σ(6) = 0.9975: a memory of some 400 tokens to begin with."""
INPUT_BIAS = 10.0
"""exp(−m), the floor of the cell's normaliser, is then far below any sum of products."""
INPUT_SHIFT = 20.0
"""Added to the input gates of a softmax block, whose output does not depend on it: the floor stays out of its implicit
attention as well, however far training closes a gate."""


FEATURE_MAPS = ("q_map", "k_map")
"""Parameters of a block that are Hedgehog's W."""


@dataclass(frozen=True)
class TransformerShape:
    """What a transformer-shaped block has besides its heads; take the teacher's values, so that its weights fit."""

    feedforward: int
    """Inner width of the gated feed-forward (`intermediate_size` of a Hugging Face configuration)."""
    kv_heads: int = 0
    """Heads of keys and values (`num_key_value_heads`); 0: as many as there are heads."""
    head_width: int = 0
    """Channels of a head (`head_dim`); 0: width / heads."""
    rope_theta: float = 0.0
    """Base of the rotary positions that q and k are turned by (`rope_theta`); 0: none."""
    qkv_bias: bool = False
    """Whether the q, k and v projections have biases, as Qwen2's do."""
    feature_map: Literal["softmax", "none"] = "softmax"
    """softmax: positive features, rows divided by their sum; none: q and k as they are, a norm over each head after."""


MOST = {"feedforward": 1 << 20, "kv_heads": 4096, "head_width": 4096}
"""Largest values: a run from someone else must not ask for any memory it likes."""
MOST_INNER = 64
"""Largest heads * head_width, as a multiple of the width."""
SMALLEST_SUM = 1e-30
"""Least divisor of a row: where no key's features meet the query's in float32, the output is 0, and not 0/0."""


def check_transformer(shape: TransformerShape, blocks: int, heads: int, width: int) -> None:
    """Raise `UserError` naming the field if blocks of this shape cannot be built at this width.

    A configuration may come from the run.json of someone else, which holds whatever it holds.
    """
    at = "student.transformer"
    for name, most in MOST.items():
        value = getattr(shape, name)
        if type(value) is not int or not 0 <= value <= most:
            raise UserError(f"{at}.{name}={reprlib.repr(value)}: must be a whole number from 0 to {most}")
    if type(shape.rope_theta) not in (int, float) or not (shape.rope_theta == 0 or 1 < shape.rope_theta < 1e12):
        raise UserError(f"{at}.rope_theta={reprlib.repr(shape.rope_theta)}: must be 0, or a number above 1")
    if type(shape.qkv_bias) is not bool:
        raise UserError(f"{at}.qkv_bias={reprlib.repr(shape.qkv_bias)}: must be true or false")
    if shape.feature_map not in ("softmax", "none"):
        raise UserError(f"{at}.feature_map={reprlib.repr(shape.feature_map)}: must be softmax or none")
    if blocks < 1 or heads < 1 or shape.feedforward < 1:
        raise UserError(
            f"student needs blocks >= 1, heads >= 1 and transformer.feedforward >= 1, found blocks={blocks}, "
            f"heads={heads}, feedforward={shape.feedforward}"
        )
    if not shape.head_width and width % heads:
        raise UserError(
            f"student.heads={heads} does not divide the teacher's width {width}: give {at}.head_width, or other heads"
        )
    if (shape.head_width or width // heads) % 2 or (shape.head_width or width // heads) < 2:
        raise UserError(
            f"{at}.head_width: heads of {shape.head_width or width // heads} channels; an even number is needed"
        )
    if heads * shape.head_width > MOST_INNER * width:
        raise UserError(
            f"{at}.head_width={shape.head_width}: {heads} heads of it are more than {MOST_INNER} times the teacher's "
            f"width {width}"
        )
    if heads % (shape.kv_heads or heads):
        raise UserError(f"{at}.kv_heads={shape.kv_heads} does not divide student.heads={heads}")


class TransformerBlock(nn.Module):
    """One block.

    Args:
        width: D.
        heads: H.
        shape: the rest.
        eps: of both RMSNorms; the teacher's.
    """

    def __init__(self, width: int, heads: int, shape: TransformerShape, eps: float) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, shape.kv_heads or heads
        self.head_width = shape.head_width or width // heads
        self.rope_theta, self.eps = shape.rope_theta, eps
        self.softmax_features = shape.feature_map == "softmax"
        self.features = self.head_width * (2 if self.softmax_features else 1)
        inner, inner_kv = self.heads * self.head_width, self.kv_heads * self.head_width

        def linear(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias)

        self.mixer_norm = nn.RMSNorm(width, eps)
        self.q_proj = linear(width, inner, shape.qkv_bias)
        self.k_proj = linear(width, inner_kv, shape.qkv_bias)
        self.v_proj = linear(width, inner_kv, shape.qkv_bias)
        self.o_proj = linear(inner, width)
        self.igate = linear(width, heads, True)
        self.fgate = linear(width, heads, True)
        self.out_gate = linear(width, inner)
        self.q_map: nn.Parameter | None = None
        self.k_map: nn.Parameter | None = None
        self.head_norm: nn.Parameter | None = None
        if self.softmax_features:
            scaled_dd = torch.eye(self.head_width) * self.head_width**-0.25
            self.q_map = nn.Parameter(scaled_dd.repeat(self.heads, 1, 1))
            self.k_map = nn.Parameter(scaled_dd.repeat(self.kv_heads, 1, 1))
        else:
            self.head_norm = nn.Parameter(torch.ones(inner))
        self.ffn_norm = nn.RMSNorm(width, eps)
        self.gate_proj = linear(width, shape.feedforward)
        self.up_proj = linear(width, shape.feedforward)
        self.down_proj = linear(shape.feedforward, width)
        self.cell = CellBackend()
        with torch.no_grad():
            for gate, bias in ((self.igate, INPUT_BIAS), (self.fgate, FORGET_BIAS)):
                gate.weight.zero_()
                gate.bias.fill_(bias)
            self.out_gate.weight.zero_()

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D), each row from an empty state."""
        return self.feed_forward(self.mix(x_BTD))

    def mix(self, x_BTD: Tensor) -> Tensor:
        """x plus the mLSTM's contribution: what the teacher's block computes before its second norm."""
        inputs, gate_BTE = self.cell_inputs(x_BTD, 0)
        igate_BHT, fgate_BHT = inputs.igate_BHT, inputs.fgate_BHT
        h_BHTf = self.cell(inputs.q_BHTd, inputs.k_BHTd, inputs.v_BHTd, igate_BHT[..., None], fgate_BHT[..., None])
        return self._output(h_BHTf, gate_BTE, x_BTD)

    def feed_forward(self, x_BTD: Tensor) -> Tensor:
        """x plus its feed-forward."""
        weights = self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight
        return feed_forward(x_BTD, self.ffn_norm.weight, *weights, self.eps)

    def cell_inputs(self, x_BTD: Tensor, position: int | Tensor) -> tuple[CellInputs, Tensor]:
        """What the cell is given, q and k as features, v with its column of ones; and the output gate (B, T, E).

        Args:
            position: of the first token; a tensor on the device of x, for a single token, is not read by the host.
        """
        # One table for all blocks of a pass; single steps, each at a position of its own, are not worth keeping.
        table = rotary if x_BTD.shape[1] == 1 else kept_rotary
        cos_Td, sin_Td = table(x_BTD.shape[1], position, self.head_width, self.rope_theta, x_BTD.device)
        *cell, gate_BTE = mixer_inputs(
            x_BTD, self.mixer_norm.weight, self.q_proj.weight, self.k_proj.weight, self.v_proj.weight,
            self.q_proj.bias, self.k_proj.bias, self.v_proj.bias, self.igate.weight, self.igate.bias,
            self.fgate.weight, self.fgate.bias, self.out_gate.weight, self.q_map, self.k_map, cos_Td, sin_Td,
            self.heads, self.kv_heads, self.eps,
        )  # fmt: skip
        return CellInputs(*cell), gate_BTE

    def _output(self, h_BHTf: Tensor, gate_BTE: Tensor, x_BTD: Tensor) -> Tensor:
        return mixer_output(h_BHTf, gate_BTE, x_BTD, self.o_proj.weight, self.head_norm, self.head_width, self.eps)

    def initial_state(self, batch: int) -> dict[str, Any]:
        """The state before the first token."""
        new_zeros = self.o_proj.weight.new_zeros
        memory = (
            new_zeros(batch, self.heads, self.features, self.features),
            new_zeros(batch, self.heads, self.features, 1),
            new_zeros(batch, self.heads, 1, 1),
        )
        return {"mlstm_state": memory, "position": new_zeros((), dtype=torch.int64)}

    def prefill(self, x_BTD: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The output for whole rows, and the state that `step` goes on from."""
        with capturing(self) as seen:
            y_BTD = self.forward(x_BTD)
        position = torch.full((), x_BTD.shape[1], device=x_BTD.device)
        return y_BTD, {"mlstm_state": final_memory(seen[0]), "position": position}

    def step(self, x_B1D: Tensor, mlstm_state: tuple[Tensor, ...], position: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """One token a row: (B, 1, D) -> (B, 1, D), and the next state."""
        inputs, gate_B1E = self.cell_inputs(x_B1D, position)
        h_BH1f, memory = recurrent_step_stabilized_simple(
            *mlstm_state, inputs.q_BHTd, inputs.k_BHTd, inputs.v_BHTd,
            inputs.igate_BHT[..., None], inputs.fgate_BHT[..., None],
        )  # fmt: skip
        y_B1D = self.feed_forward(self._output(h_BH1f, gate_B1E, x_B1D))
        return y_B1D, {"mlstm_state": memory, "position": position + 1}


class TransformerStack(nn.Module):
    """Blocks one after another, under the name that the package's stack has."""

    def __init__(self, blocks: int, width: int, heads: int, shape: TransformerShape, eps: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([TransformerBlock(width, heads, shape, eps) for _ in range(blocks)])


def rotary(
    length: int, first: int | Tensor, width: int, theta: float, device: torch.device
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """cos and sin (T, d), float32, of positions first ... first+T-1, halves repeated as in Llama; None at theta 0."""
    if not theta:
        return None, None
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=device) / width
    positions = torch.arange(length, dtype=torch.float64, device=device) + first
    angles = positions[:, None] / theta**exponents
    angles_Td = torch.cat((angles, angles), -1)
    return angles_Td.cos().float(), angles_Td.sin().float()


@lru_cache(maxsize=4)
def kept_rotary(
    length: int, first: int, width: int, theta: float, device: torch.device
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """`rotary`, made once."""
    with torch.inference_mode(False):  # what is made in inference mode cannot be kept for a backward pass
        return rotary(length, first, width, theta, device)


def widened(x: Tensor) -> Tensor:
    """float32, or what is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotated(x_BHTd: Tensor, cos_Td: Tensor | None, sin_Td: Tensor | None) -> Tensor:
    """Rotary positions (arXiv 2104.09864), pairs (i, i + d/2)."""
    if cos_Td is None or sin_Td is None:
        return x_BHTd
    x_BHTd = widened(x_BHTd)
    first, second = x_BHTd.chunk(2, -1)
    return x_BHTd * cos_Td + torch.cat((-second, first), -1) * sin_Td


def softmax_features(x_BHTd: Tensor, map_Hdd: Tensor) -> Tensor:
    """Hedgehog's features (B, H, T, 2d): softmax([xW, −xW]), float32 within."""
    z_BHTd = widened(torch.einsum("bhtd,hde->bhte", x_BHTd, map_Hdd.to(x_BHTd.dtype)))
    return torch.cat((z_BHTd, -z_BHTd), -1).softmax(-1)


def rms_normed(x_BTD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return F.rms_norm(widened(x_BTD), weight_D.shape, widened(weight_D), eps)


@compiled
def mixer_inputs(
    x_BTD: Tensor, norm_D: Tensor, q_ED: Tensor, k_KD: Tensor, v_KD: Tensor, q_bias: Tensor | None,
    k_bias: Tensor | None, v_bias: Tensor | None, igate_HD: Tensor, igate_bias: Tensor, fgate_HD: Tensor,
    fgate_bias: Tensor, gate_ED: Tensor, q_map: Tensor | None, k_map: Tensor | None, cos_Td: Tensor | None,
    sin_Td: Tensor | None, heads: int, kv_heads: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k, v (B, H, T, f), both gates (B, H, T) float32 and the output gate (B, T, E)."""
    normed_BTD = rms_normed(x_BTD, norm_D, eps)

    def by_head(weight: Tensor, bias: Tensor | None, count: int) -> Tensor:
        return F.linear(normed_BTD, weight, bias).unflatten(-1, (count, -1)).transpose(1, 2)

    q = by_head(q_ED, q_bias, heads)
    k, v = by_head(k_KD, k_bias, kv_heads), by_head(v_KD, v_bias, kv_heads)
    dtype = v.dtype
    q, k = rotated(q, cos_Td, sin_Td).to(dtype), rotated(k, cos_Td, sin_Td).to(dtype)
    if q_map is not None and k_map is not None:
        q, k = softmax_features(q, q_map), softmax_features(k, k_map)
        beside = torch.zeros(v.shape[-1], dtype=dtype, device=v.device)
        beside[0] = 1  # the sum of the row, see above
        v = torch.cat((v, beside.expand(v.shape)), -1)
    groups = heads // kv_heads
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    # The bias is added in float32: beside 10, bfloat16 tells nothing below 1/16 apart.
    gates = [
        widened(F.linear(normed_BTD, weight)).transpose(1, 2) + widened(bias)[:, None]
        for weight, bias in ((igate_HD, igate_bias), (fgate_HD, fgate_bias))
    ]
    if q_map is not None:
        gates[0] = gates[0] + INPUT_SHIFT
    return q.contiguous(), k.contiguous(), v.contiguous(), gates[0], gates[1], F.linear(normed_BTD, gate_ED)


@compiled
def mixer_output(
    h_BHTf: Tensor, gate_BTE: Tensor, x_BTD: Tensor, out_DE: Tensor, norm_E: Tensor | None, head_width: int, eps: float
) -> Tensor:
    """x + o_proj(2σ(gate) · h), h divided by its sums or normed by head."""
    h = widened(h_BHTf)
    if norm_E is None:
        h = h[..., :head_width] / h[..., head_width : head_width + 1].clamp_min(SMALLEST_SUM)
        h_BTE = h.transpose(1, 2).flatten(2)
    else:
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
        h_BTE = h.transpose(1, 2).flatten(2) * widened(norm_E)
    gated_BTE = h_BTE * (2 * torch.sigmoid(widened(gate_BTE)))
    return x_BTD + F.linear(gated_BTE.to(gate_BTE.dtype), out_DE).to(x_BTD.dtype)


@compiled
def feed_forward(x_BTD: Tensor, norm_D: Tensor, gate_ID: Tensor, up_ID: Tensor, down_DI: Tensor, eps: float) -> Tensor:
    """x + down(silu(gate) · up) of the normed x."""
    normed_BTD = rms_normed(x_BTD, norm_D, eps)
    inner_BTI = F.silu(F.linear(normed_BTD, gate_ID)) * F.linear(normed_BTD, up_ID)
    return x_BTD + F.linear(inner_BTI, down_DI).to(x_BTD.dtype)
