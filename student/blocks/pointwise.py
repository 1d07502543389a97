"""The element-wise parts of the student's blocks and their derivatives, each one pass over its tensors when compiled.

All sums are in float32 (or the inputs' wider dtype), results in the dtype that is asked for or the inputs' own. Scales
of norms are 1 + weight, as the package stores them.

Legend: B rows, T tokens, N = B·T positions, H heads, d head width, C = H·d channels, K taps of the convolution,
F inner width of the feed-forward.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from student.blocks.compiled import compiled


def wide(x: Tensor) -> Tensor:
    """In float32, or its own wider dtype."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x − mean) / σ over the last dimension, and 1/σ."""
    var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    rstd = torch.rsqrt(var + eps)
    return (x - mean) * rstd, rstd


def _normalised_backward(g: Tensor, xhat: Tensor, rstd: Tensor) -> Tensor:
    return rstd * (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True))


@compiled
def layer_norm(x_NC: Tensor, weight_C: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """The norm over C, in `dtype`."""
    xhat_NC, _ = _normalised(wide(x_NC), eps)
    return (xhat_NC * (1 + wide(weight_C))).to(dtype)


@compiled
def layer_norm_backward(
    dy_NC: Tensor, beside_NC: Tensor, x_NC: Tensor, weight_C: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """dx, with what reached x beside the norm added, and dweight."""
    xhat_NC, rstd_N1 = _normalised(wide(x_NC), eps)
    dy_NC = wide(dy_NC)
    dx_NC = _normalised_backward(dy_NC * (1 + wide(weight_C)), xhat_NC, rstd_N1) + beside_NC
    return dx_NC.to(x_NC.dtype), (dy_NC * xhat_NC).sum(0).to(weight_C.dtype)


def _later(x_BTC: Tensor, by: int) -> Tensor:
    """x of `by` tokens before, zeros before the first."""
    length = x_BTC.shape[1]
    return F.pad(x_BTC[:, : max(0, length - by)], (0, 0, min(by, length), 0)) if by else x_BTC


def _sooner(x_BTC: Tensor, by: int) -> Tensor:
    length = x_BTC.shape[1]
    return F.pad(x_BTC[:, min(by, length) :], (0, 0, 0, min(by, length))) if by else x_BTC


def _conv(x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor) -> Tensor:
    taps = weight_CK.shape[1]
    y_BTC = wide(bias_C).expand(x_BTC.shape)
    for tap in range(taps):
        y_BTC = y_BTC + wide(_later(x_BTC, taps - 1 - tap)) * wide(weight_CK[:, tap])
    return y_BTC


@compiled
def conv_silu(x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor) -> Tensor:
    """SiLU of the causal depthwise convolution over T, in x's dtype."""
    return F.silu(_conv(x_BTC, weight_CK, bias_C)).to(x_BTC.dtype)


@compiled
def silu_backward(dy_BTC: Tensor, more_BTC: Tensor | None, x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor) -> Tensor:
    """Gradient to the convolution's output before the SiLU, which gets dy and, unless None, more."""
    a_BTC = _conv(x_BTC, weight_CK, bias_C)
    sigmoid_BTC = torch.sigmoid(a_BTC)
    dy_BTC = wide(dy_BTC) if more_BTC is None else wide(dy_BTC) + wide(more_BTC)
    return (dy_BTC * sigmoid_BTC * (1 + a_BTC * (1 - sigmoid_BTC))).to(x_BTC.dtype)


@compiled
def conv_backward(
    da_BTC: Tensor, beside_BTC: Tensor, x_BTC: Tensor, weight_CK: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, with what reached x beside the convolution added, dweight and dbias, for da at the convolution's output."""
    taps = weight_CK.shape[1]
    dx_BTC = wide(beside_BTC)
    for tap in range(taps):
        dx_BTC = dx_BTC + wide(_sooner(da_BTC, taps - 1 - tap)) * wide(weight_CK[:, tap])
    sums = [(wide(da_BTC) * wide(_later(x_BTC, taps - 1 - tap))).sum((0, 1)) for tap in range(taps)]
    dbias_C = wide(da_BTC).sum((0, 1))
    return dx_BTC.to(x_BTC.dtype), torch.stack(sums, 1).to(weight_CK.dtype), dbias_C.to(weight_CK.dtype)


@compiled
def mlstm_gate(h_HNd: Tensor, act_NC: Tensor, z_NC: Tensor, weight_C: Tensor, skip_C: Tensor, eps: float) -> Tensor:
    """(the norm of h over each head + skip · act) · SiLU(z), in z's dtype."""
    h_NHd = h_HNd.transpose(0, 1)
    shape = h_NHd.shape
    xhat_NHd, _ = _normalised(wide(h_NHd), eps)
    normed_NHd = xhat_NHd * (1 + wide(weight_C)).view(shape[1:])
    skipped_NHd = normed_NHd + wide(skip_C).view(shape[1:]) * act_NC.view(shape)
    return (skipped_NHd * F.silu(wide(z_NC.view(shape)))).to(z_NC.dtype).reshape(z_NC.shape)


@compiled
def mlstm_gate_backward(
    dy_NC: Tensor, h_HNd: Tensor, act_NC: Tensor, z_NC: Tensor, weight_C: Tensor, skip_C: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dh (H, N, d), dact, dz, dweight, dskip, and y once more."""
    h_NHd = h_HNd.transpose(0, 1)
    shape = h_NHd.shape
    xhat_NHd, rstd_NH1 = _normalised(wide(h_NHd), eps)
    scale_Hd, skip_Hd = (1 + wide(weight_C)).view(shape[1:]), wide(skip_C).view(shape[1:])
    act_NHd, z_NHd, dy_NHd = (wide(x.view(shape)) for x in (act_NC, z_NC, dy_NC))
    sigmoid_NHd = torch.sigmoid(z_NHd)
    gate_NHd = z_NHd * sigmoid_NHd
    skipped_NHd = xhat_NHd * scale_Hd + skip_Hd * act_NHd
    inner_NHd = dy_NHd * gate_NHd
    dh_NHd = _normalised_backward(inner_NHd * scale_Hd, xhat_NHd, rstd_NH1).to(h_HNd.dtype)
    dz_NHd = dy_NHd * skipped_NHd * sigmoid_NHd * (1 + z_NHd * (1 - sigmoid_NHd))
    return (
        dh_NHd.transpose(0, 1).contiguous(),
        (inner_NHd * skip_Hd).to(act_NC.dtype).reshape(act_NC.shape),
        dz_NHd.to(z_NC.dtype).reshape(z_NC.shape),
        (inner_NHd * xhat_NHd).sum(0).flatten().to(weight_C.dtype),
        (inner_NHd * act_NHd).sum(0).flatten().to(skip_C.dtype),
        (skipped_NHd * gate_NHd).to(z_NC.dtype).reshape(z_NC.shape),
    )


@compiled
def head_norm_add(y_NHd: Tensor, x_NC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """x + the norm of y over each head, in x's dtype."""
    xhat_NHd, _ = _normalised(wide(y_NHd), eps)
    normed_NHd = xhat_NHd * (1 + wide(weight_C)).view(y_NHd.shape[1:])
    return (x_NC + normed_NHd.reshape(x_NC.shape)).to(x_NC.dtype)


@compiled
def head_norm_backward(dx_NC: Tensor, y_NHd: Tensor, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """dy and dweight of `head_norm_add`."""
    xhat_NHd, rstd_NH1 = _normalised(wide(y_NHd), eps)
    g_NHd = wide(dx_NC.view(y_NHd.shape))
    dy_NHd = _normalised_backward(g_NHd * (1 + wide(weight_C)).view(y_NHd.shape[1:]), xhat_NHd, rstd_NH1)
    return dy_NHd.to(y_NHd.dtype), (g_NHd * xhat_NHd).sum(0).flatten().to(weight_C.dtype)


@compiled
def gelu_gate(up_N2F: Tensor) -> Tensor:
    """GELU of the first half times the second."""
    a_NF, b_NF = wide(up_N2F).chunk(2, -1)
    return (F.gelu(a_NF) * b_NF).to(up_N2F.dtype)


@compiled
def gelu_gate_backward(dy_NF: Tensor, up_N2F: Tensor) -> tuple[Tensor, Tensor]:
    """dup, and y once more."""
    a_NF, b_NF = wide(up_N2F).chunk(2, -1)
    dy_NF = wide(dy_NF)
    below_NF = 0.5 * (1 + torch.erf(a_NF * math.sqrt(0.5)))
    slope_NF = below_NF + a_NF * torch.exp(-0.5 * a_NF * a_NF) / math.sqrt(2 * math.pi)
    da_NF, db_NF = dy_NF * b_NF * slope_NF, dy_NF * a_NF * below_NF
    return torch.cat([da_NF, db_NF], -1).to(up_N2F.dtype), (a_NF * below_NF * b_NF).to(up_N2F.dtype)
