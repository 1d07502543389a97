"""The sLSTM recurrence on a GPU: one program walks a head and a few rows through time, its state in registers.

Reads the gates' inputs where the layer put them and writes y and the gates' gradients where the layer wants them, so
nothing is permuted or cast on the way; `slstm.slstm_scan` is the plain form of the same recurrence, with its formulas.
R's gradient is left to one product over all steps at the end.

The backward needs c and n in two combinations only, both of them at most 1 in size: with α_t = i'/n_t, the share of the
new in what is remembered, and r_t = c_t/n_t,

    r_t = (1 − α_t) r_{t−1} + α_t tanh(z)        y_t = σ(o) r_t        α_t = σ(i − log σ(f) − ℓ_{t−1})

where ℓ_t = log n_t + m_t = log(exp(ℓ_{t−1}) σ(f) + exp(i)) grows by its inputs' shares: dℓ_t/di = α_t. So what is kept
is in the dtype of the products, and nothing is divided on the way back.

Legend: B rows, T tokens, H heads, d head width, G = 4·H·d: gates i, f, z, o, each of all heads; P rows of a program.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 16
"""P: the fewest a tensor core's product takes; more programs then, and each step is short."""


def widest_triton_head(dtype: torch.dtype) -> int:
    """Widest head whose four recurrent matrices fit into an SM's shared memory (227 KB on Hopper)."""
    return 128 if dtype in (torch.bfloat16, torch.float16) else 64


@triton.jit
def _four(x_ptr, at, inside, W: tl.constexpr):
    """Four gates of a step, asked for together: their ways through memory overlap."""
    i = tl.load(x_ptr + at, mask=inside, other=0.0)
    f = tl.load(x_ptr + at + W, mask=inside, other=0.0)
    z = tl.load(x_ptr + at + 2 * W, mask=inside, other=0.0)
    o = tl.load(x_ptr + at + 3 * W, mask=inside, other=0.0)
    return i, f, z, o


# An argument that is 1 would become a constant, which `to` cannot widen: batches of one row would not compile.
@triton.jit(do_not_specialize=["batch", "length"])
def _forward(
    x_ptr, x_b, x_t, R_ptr, bias_ptr, state_ptr, y_ptr, gates_ptr, mean_ptr, last_ptr, batch, length,
    H: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, P: tl.constexpr, SAVE: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """gates (B, T, G) keeps α, f, tanh z, sigmoid o; mean (B, T, H·d) keeps r."""
    head = tl.program_id(0)
    b = tl.program_id(1) * P + tl.arange(0, P)
    e = tl.arange(0, D2)
    inside = (b < batch)[:, None] & (e < D)[None, :]
    W: tl.constexpr = H * D
    square = (e < D)[:, None] & (e < D)[None, :]
    # (k, j): what unit k's output adds to unit j's gate
    R_at = head * 4 * D * D + e[None, :] * D + e[:, None]
    R_i = tl.load(R_ptr + R_at, mask=square, other=0.0).to(DOT)
    R_f = tl.load(R_ptr + R_at + D * D, mask=square, other=0.0).to(DOT)
    R_z = tl.load(R_ptr + R_at + 2 * D * D, mask=square, other=0.0).to(DOT)
    R_o = tl.load(R_ptr + R_at + 3 * D * D, mask=square, other=0.0).to(DOT)
    unit = head * D + e
    b_i = tl.load(bias_ptr + unit, mask=e < D, other=0.0).to(tl.float32)[None, :]
    b_f = tl.load(bias_ptr + W + unit, mask=e < D, other=0.0).to(tl.float32)[None, :]
    b_z = tl.load(bias_ptr + 2 * W + unit, mask=e < D, other=0.0).to(tl.float32)[None, :]
    b_o = tl.load(bias_ptr + 3 * W + unit, mask=e < D, other=0.0).to(tl.float32)[None, :]
    state_at = b.to(tl.int64)[:, None] * W + unit[None, :]
    plane = batch.to(tl.int64) * W
    y = tl.load(state_ptr + state_at, mask=inside, other=0.0)
    c = tl.load(state_ptr + plane + state_at, mask=inside, other=0.0)
    n = tl.load(state_ptr + 2 * plane + state_at, mask=inside, other=0.0)
    m = tl.load(state_ptr + 3 * plane + state_at, mask=inside, other=0.0)
    m = tl.where(n == 0.0, float("-inf"), m)  # an empty state has no scale yet

    x_at = b.to(tl.int64)[:, None] * x_b + unit[None, :]
    out_at = b.to(tl.int64)[:, None] * length * W + unit[None, :]
    gate_at = b.to(tl.int64)[:, None] * length * (4 * W) + unit[None, :]
    x_i, x_f, x_z, x_o = _four(x_ptr, x_at, inside, W)
    left = tl.zeros([P, D2], tl.int32) + length - 1
    for _ in tl.range(0, length):
        # The next step's inputs are on their way while this one is computed.
        x_at += x_t
        next_i, next_f, next_z, next_o = _four(x_ptr, x_at, inside & (left > 0), W)
        left -= 1
        d_y = y.to(DOT)
        i = x_i.to(tl.float32) + b_i + tl.dot(d_y, R_i, input_precision=PRECISION)
        f = x_f.to(tl.float32) + b_f + tl.dot(d_y, R_f, input_precision=PRECISION)
        z = x_z.to(tl.float32) + b_z + tl.dot(d_y, R_z, input_precision=PRECISION)
        o = x_o.to(tl.float32) + b_o + tl.dot(d_y, R_o, input_precision=PRECISION)
        carried = tl.minimum(f, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(f))) + m
        m = tl.maximum(i, carried)
        i = tl.exp(i - m)
        decay = tl.exp(carried - m)
        z = 2.0 * tl.sigmoid(2.0 * z) - 1.0
        o = tl.sigmoid(o)
        c = decay * c + i * z
        n = decay * n + i
        r = c / n
        y = tl.where(inside, o * r, 0.0)
        tl.store(y_ptr + out_at, y.to(y_ptr.dtype.element_ty), mask=inside)
        if SAVE:
            kept = gates_ptr.dtype.element_ty
            tl.store(gates_ptr + gate_at, (i / n).to(kept), mask=inside)
            tl.store(gates_ptr + gate_at + W, f.to(kept), mask=inside)
            tl.store(gates_ptr + gate_at + 2 * W, z.to(kept), mask=inside)
            tl.store(gates_ptr + gate_at + 3 * W, o.to(kept), mask=inside)
            tl.store(mean_ptr + out_at, r.to(kept), mask=inside)
        x_i, x_f, x_z, x_o = next_i, next_f, next_z, next_o
        out_at += W
        gate_at += 4 * W
    tl.store(last_ptr + state_at, y, mask=inside)
    tl.store(last_ptr + plane + state_at, c, mask=inside)
    tl.store(last_ptr + 2 * plane + state_at, n, mask=inside)
    tl.store(last_ptr + 3 * plane + state_at, m, mask=inside)


@triton.jit(do_not_specialize=["batch", "length"])
def _backward(
    dy_ptr, dy_b, dy_t, dy_h, R_ptr, state_ptr, gates_ptr, mean_ptr, dx_ptr, batch, length,
    H: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, P: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    b = tl.program_id(1) * P + tl.arange(0, P)
    e = tl.arange(0, D2)
    inside = (b < batch)[:, None] & (e < D)[None, :]
    W: tl.constexpr = H * D
    square = (e < D)[:, None] & (e < D)[None, :]
    R_at = head * 4 * D * D + e[:, None] * D + e[None, :]  # (j, k): the way back
    R_i = tl.load(R_ptr + R_at, mask=square, other=0.0).to(DOT)
    R_f = tl.load(R_ptr + R_at + D * D, mask=square, other=0.0).to(DOT)
    R_z = tl.load(R_ptr + R_at + 2 * D * D, mask=square, other=0.0).to(DOT)
    R_o = tl.load(R_ptr + R_at + 3 * D * D, mask=square, other=0.0).to(DOT)
    unit = head * D + e
    last = (length - 1).to(tl.int64)
    state_at = b.to(tl.int64)[:, None] * W + unit[None, :]
    plane = batch.to(tl.int64) * W
    out_at = b.to(tl.int64)[:, None] * length * W + last * W + unit[None, :]
    gate_at = b.to(tl.int64)[:, None] * length * (4 * W) + last * (4 * W) + unit[None, :]
    dy_at = b.to(tl.int64)[:, None] * dy_b + last * dy_t + head * dy_h + e[None, :]
    n_first = tl.load(state_ptr + 2 * plane + state_at, mask=inside, other=0.0)
    r_first = tl.load(state_ptr + plane + state_at, mask=inside & (n_first != 0.0), other=0.0)
    r_first = r_first / tl.where(n_first == 0.0, 1.0, n_first)
    r = tl.load(mean_ptr + out_at, mask=inside, other=0.0).to(tl.float32)
    dr = tl.zeros([P, D2], tl.float32)
    dl = tl.zeros([P, D2], tl.float32)
    d_i = tl.zeros([P, D2], tl.float32)
    d_f = tl.zeros([P, D2], tl.float32)
    d_z = tl.zeros([P, D2], tl.float32)
    d_o = tl.zeros([P, D2], tl.float32)
    left = tl.zeros([P, D2], tl.int32) + length - 1
    kept_share, kept_f, kept_z, kept_o = _four(gates_ptr, gate_at, inside, W)
    kept_r = tl.load(mean_ptr + out_at - W, mask=inside & (left > 0), other=0.0)
    kept_dy = tl.load(dy_ptr + dy_at, mask=inside, other=0.0)
    for _ in tl.range(0, length):
        # What the step before needs is on its way while this one is computed.
        earlier = inside & (left > 0)
        next_share, next_f, next_z, next_o = _four(gates_ptr, gate_at - 4 * W, earlier, W)
        next_r = tl.load(mean_ptr + out_at - 2 * W, mask=inside & (left > 1), other=0.0)
        next_dy = tl.load(dy_ptr + dy_at - dy_t, mask=earlier, other=0.0)
        share = kept_share.to(tl.float32)
        f = kept_f.to(tl.float32)
        z = kept_z.to(tl.float32)
        o = kept_o.to(tl.float32)
        # The first step has the state before it.
        r_before = tl.where(left > 0, kept_r.to(tl.float32), r_first)
        left -= 1
        dy = kept_dy.to(tl.float32)
        dy += tl.dot(d_i.to(DOT), R_i, input_precision=PRECISION)
        dy += tl.dot(d_f.to(DOT), R_f, input_precision=PRECISION)
        dy += tl.dot(d_z.to(DOT), R_z, input_precision=PRECISION)
        dy += tl.dot(d_o.to(DOT), R_o, input_precision=PRECISION)
        dr += dy * o
        d_share = dr * (z - r_before) * share * (1.0 - share)
        d_i = d_share + dl * share
        dl = dl * (1.0 - share) - d_share
        d_f = dl * tl.sigmoid(-f)
        d_z = dr * share * (1.0 - z * z)
        d_o = dy * o * r * (1.0 - o)
        d_i = tl.where(inside, d_i, 0.0)
        d_f = tl.where(inside, d_f, 0.0)
        d_z = tl.where(inside, d_z, 0.0)
        d_o = tl.where(inside, d_o, 0.0)
        dr = dr * (1.0 - share)
        r = r_before
        kept = dx_ptr.dtype.element_ty
        tl.store(dx_ptr + gate_at, d_i.to(kept), mask=inside)
        tl.store(dx_ptr + gate_at + W, d_f.to(kept), mask=inside)
        tl.store(dx_ptr + gate_at + 2 * W, d_z.to(kept), mask=inside)
        tl.store(dx_ptr + gate_at + 3 * W, d_o.to(kept), mask=inside)
        kept_share, kept_f, kept_z, kept_o = next_share, next_f, next_z, next_o
        kept_r, kept_dy = next_r, next_dy
        out_at -= W
        gate_at -= 4 * W
        dy_at -= dy_t


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTG: Tensor, R_Hgd: Tensor, bias_G: Tensor, state_4BW: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, gates = x_BTG.shape
        heads, width = R_Hgd.shape[0], R_Hgd.shape[2]
        save = any(ctx.needs_input_grad)
        y_BTHd = x_BTG.new_empty(batch, length, heads, width)
        last_4BW = torch.empty_like(state_4BW)
        gates_BTG = x_BTG.new_empty(x_BTG.shape if save else (1,))
        mean_BTW = x_BTG.new_empty((batch, length, gates // 4) if save else (1,))
        shape = _shape(heads, width, x_BTG.dtype)
        _forward[(heads, triton.cdiv(batch, ROWS))](
            x_BTG, x_BTG.stride(0), x_BTG.stride(1), R_Hgd, bias_G, state_4BW, y_BTHd, gates_BTG, mean_BTW, last_4BW,
            batch, length, SAVE=save, **shape,
        )  # fmt: skip
        if save:
            ctx.save_for_backward(R_Hgd, state_4BW, gates_BTG, mean_BTW, y_BTHd)
        ctx.mark_non_differentiable(last_4BW)
        return y_BTHd, last_4BW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTHd: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        R_Hgd, state_4BW, gates_BTG, mean_BTW, y_BTHd = ctx.saved_tensors
        batch, length, heads, width = y_BTHd.shape
        if dy_BTHd.stride(3) != 1:
            dy_BTHd = dy_BTHd.contiguous()
        dx_BTG = torch.empty_like(gates_BTG)
        _backward[(heads, triton.cdiv(batch, ROWS))](
            dy_BTHd, dy_BTHd.stride(0), dy_BTHd.stride(1), dy_BTHd.stride(2), R_Hgd, state_4BW, gates_BTG, mean_BTW,
            dx_BTG, batch, length, **_shape(heads, width, gates_BTG.dtype),
        )  # fmt: skip
        dR_Hgd = _recurrent_gradient(y_BTHd, dx_BTG, state_4BW[0].view(batch, heads, width))
        return dx_BTG, dR_Hgd.to(R_Hgd.dtype), dx_BTG.sum((0, 1), dtype=torch.float32), None


def _shape(heads: int, width: int, dtype: torch.dtype) -> dict[str, Any]:
    dot = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(dtype, tl.float32)
    return {
        "H": heads,
        "D": width,
        "D2": max(16, triton.next_power_of_2(width)),
        "P": ROWS,
        "DOT": dot,
        "PRECISION": "ieee",
        "num_warps": 8,
    }


def _recurrent_gradient(y_BTHd: Tensor, dx_BTG: Tensor, y_before_BHd: Tensor) -> Tensor:
    """(H, 4·d, d): the sum over rows and steps of a gate's gradient times the output one step before.

    All rows as one long one, which pairs every row's first step with the last output of the row before it: what that
    adds is put right with the true state, B products beside B·T.
    """
    batch, length, heads, width = y_BTHd.shape
    y_NHd = y_BTHd.reshape(batch * length, heads, width)
    dx_N4Hd = dx_BTG.view(batch * length, 4, heads, width)
    first_B4Hd = dx_BTG.view(batch, length, 4, heads, width)[:, 0]
    wrong_BHd = torch.cat([torch.zeros_like(y_BTHd[:1, -1]), y_BTHd[:-1, -1]])
    change_BHd = (y_before_BHd - wrong_BHd.float()).to(y_BTHd.dtype)
    gates = []
    for gate in range(4):
        steps_HNd = dx_N4Hd[1:, gate].transpose(0, 1)
        product = torch.bmm(steps_HNd.transpose(1, 2), y_NHd[:-1].transpose(0, 1)).float()
        product += torch.bmm(first_B4Hd[:, gate].permute(1, 2, 0), change_BHd.transpose(0, 1)).float()
        gates.append(product)
    return torch.cat(gates, dim=1)


def slstm_recurrence(x_BTG: Tensor, R_Hgd: Tensor, bias_G: Tensor, state_4BW: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence of `slstm.slstm_scan` over whole rows.

    Args:
        x_BTG: W x, gates i, f, z, o one after another, each (H, d); its dtype is that of the products and of y.
        R_Hgd: recurrent weights as the package's vanilla cell lays them out, (H, 4·d, d).
        bias_G: the gates' biases, in the order of `x_BTG`.
        state_4BW: float32 y, c, n, m before the first step, a constant.

    Returns:
        y_BTHd and the state after the last step, a constant too.

    Raises:
        ValueError: the heads are wider than `widest_triton_head` of the inputs' dtype.
    """
    widest = widest_triton_head(x_BTG.dtype)
    if R_Hgd.shape[2] > widest:
        raise ValueError(f"sLSTM heads of width {R_Hgd.shape[2]}: the kernel takes at most {widest} in {x_BTG.dtype}")
    y_BTHd, last_4BW = _Recurrence.apply(  # type: ignore[no-untyped-call]
        x_BTG.contiguous(), R_Hgd.contiguous(), bias_G.contiguous(), state_4BW.contiguous()
    )
    return y_BTHd, last_4BW
