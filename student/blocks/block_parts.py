"""The student's blocks cut into a few differentiable parts, each with its backward written out.

A part keeps for the backward what a product needs and computes the element-wise rest again; gradients that meet are
added where one of them is written. Products are in one dtype, `dtype` of the callers; gradients of weights come out of
them in float32.

Legend: B rows, T tokens, N = B·T positions, H heads, d head width, D width, C = H·d inner width, F inner width of the
feed-forward, G = 2·H: the input gates of all heads, then the forget gates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from student.blocks import pointwise

HALF = (torch.bfloat16, torch.float16)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of two matrices or two batches of them, in float32 for half-precision inputs."""
    product = torch.mm if a.dim() == 2 else torch.bmm
    if a.dtype not in HALF:
        return product(a, b)
    # Of the accumulator's own precision where a kernel can write it.
    return product(a, b, out_dtype=torch.float32) if a.is_cuda else product(a.float(), b.float())


def by_head(x_NC: Tensor, heads: int) -> Tensor:
    """View (H, N, d) of (N, H·d)."""
    return x_NC.view(x_NC.shape[0], heads, -1).transpose(0, 1)


class NormBeside(torch.autograd.Function):
    """x as it is, for the residual, and its layer norm in `dtype`: the two gradients of x meet in one pass."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x_ND, weight_D)
        ctx.eps = eps
        return x_ND.view_as(x_ND), pointwise.layer_norm(x_ND, weight_D, eps, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_ND: Tensor, dy_ND: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_ND, weight_D = ctx.saved_tensors
        return *pointwise.layer_norm_backward(dy_ND, dx_ND, x_ND, weight_D, ctx.eps), None, None


class TwoProjections(torch.autograd.Function):
    """Both halves of x @ W.T, each a tensor of its own."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_2CD: Tensor) -> tuple[Tensor, Tensor]:
        cast_2CD = weight_2CD.to(x_ND.dtype)
        ctx.save_for_backward(x_ND, cast_2CD)
        ctx.dtype = weight_2CD.dtype
        first_CD, second_CD = cast_2CD.chunk(2)
        return x_ND @ first_CD.T, x_ND @ second_CD.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, da_NC: Tensor, db_NC: Tensor) -> tuple[Tensor, Tensor]:
        x_ND, cast_2CD = ctx.saved_tensors
        first_CD, second_CD = cast_2CD.chunk(2)
        dx_ND = (da_NC @ first_CD).addmm_(db_NC, second_CD)
        return dx_ND, torch.cat([_mm(da_NC.T, x_ND), _mm(db_NC.T, x_ND)]).to(ctx.dtype)


class MLSTMInputs(torch.autograd.Function):
    """Convolution, q, k, v and both gates of an mLSTM.

    The gates are products of q, k and v with the gates' weights; here those are multiplied with the weights of q, k and
    v first, so that the gates are products of x and act: `from_act_GC` and `from_x_GC`.
    """

    @staticmethod
    def forward(
        ctx: Any, x_BTC: Tensor, conv_CK: Tensor, conv_C: Tensor, q_Hdd: Tensor, k_Hdd: Tensor, v_Hdd: Tensor,
        from_act_GC: Tensor, from_x_GC: Tensor, bias_G: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """act (N, C), q, k, v (H, N, d), gates (G, N), these in float32."""
        dtype, heads = x_BTC.dtype, q_Hdd.shape[0]
        act_NC = pointwise.conv_silu(x_BTC, conv_CK, conv_C).flatten(0, 1)
        x_NC = x_BTC.flatten(0, 1)
        weights = [w.to(dtype) for w in (q_Hdd, k_Hdd, v_Hdd, from_act_GC, from_x_GC)]
        inputs = (by_head(act_NC, heads), by_head(act_NC, heads), by_head(x_NC, heads))
        q_HNd, k_HNd, v_HNd = (torch.bmm(x, w.transpose(1, 2)) for x, w in zip(inputs, weights, strict=False))
        gates_GN = _mm(weights[3], act_NC.T) + _mm(weights[4], x_NC.T) + pointwise.wide(bias_G)[:, None]
        ctx.save_for_backward(x_BTC, act_NC, conv_CK, conv_C, *weights)
        ctx.dtype = q_Hdd.dtype
        return act_NC, q_HNd, k_HNd, v_HNd, gates_GN

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dact_NC: Tensor, dq_HNd: Tensor, dk_HNd: Tensor, dv_HNd: Tensor, dgates_GN: Tensor
    ) -> tuple[Tensor, ...]:
        x_BTC, act_NC, conv_CK, conv_C, q_Hdd, k_Hdd, v_Hdd, from_act_GC, from_x_GC = ctx.saved_tensors
        heads = q_Hdd.shape[0]
        x_NC = x_BTC.flatten(0, 1)
        rounded_GN = dgates_GN.to(x_NC.dtype)

        more_NC, dx_NC = torch.empty_like(act_NC), torch.empty_like(x_NC)
        torch.bmm(dq_HNd, q_Hdd, out=by_head(more_NC, heads))
        by_head(more_NC, heads).baddbmm_(dk_HNd, k_Hdd)
        more_NC.addmm_(rounded_GN.T, from_act_GC)
        torch.bmm(dv_HNd, v_Hdd, out=by_head(dx_NC, heads))
        dx_NC.addmm_(rounded_GN.T, from_x_GC)

        shape = x_BTC.shape
        da_BTC = pointwise.silu_backward(dact_NC.view(shape), more_NC.view(shape), x_BTC, conv_CK, conv_C)
        dx_BTC, dconv_CK, dconv_C = pointwise.conv_backward(da_BTC, dx_NC.view(shape), x_BTC, conv_CK)
        weights = (
            _mm(dq_HNd.transpose(1, 2), by_head(act_NC, heads)),
            _mm(dk_HNd.transpose(1, 2), by_head(act_NC, heads)),
            _mm(dv_HNd.transpose(1, 2), by_head(x_NC, heads)),
            _mm(rounded_GN, act_NC),
            _mm(rounded_GN, x_NC),
            dgates_GN.sum(1),
        )
        return dx_BTC, dconv_CK, dconv_C, *(w.to(ctx.dtype) for w in weights)


class MLSTMOutput(torch.autograd.Function):
    """x + the projection of `pointwise.mlstm_gate`."""

    @staticmethod
    def forward(
        ctx: Any, h_HNd: Tensor, act_NC: Tensor, z_NC: Tensor, x_ND: Tensor, weight_C: Tensor, skip_C: Tensor,
        down_DC: Tensor, eps: float,
    ) -> Tensor:  # fmt: skip
        cast_DC = down_DC.to(z_NC.dtype)
        ctx.save_for_backward(h_HNd, act_NC, z_NC, weight_C, skip_C, cast_DC)
        ctx.eps, ctx.dtype = eps, down_DC.dtype
        return x_ND + pointwise.mlstm_gate(h_HNd, act_NC, z_NC, weight_C, skip_C, eps) @ cast_DC.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_ND: Tensor) -> tuple[Tensor | None, ...]:
        h_HNd, act_NC, z_NC, weight_C, skip_C, cast_DC = ctx.saved_tensors
        rounded_ND = dx_ND.to(z_NC.dtype)
        dy_NC = rounded_ND @ cast_DC
        *gradients, y_NC = pointwise.mlstm_gate_backward(dy_NC, h_HNd, act_NC, z_NC, weight_C, skip_C, ctx.eps)
        dh_HNd, dact_NC, dz_NC, dweight_C, dskip_C = gradients
        ddown_DC = _mm(rounded_ND.T, y_NC).to(ctx.dtype)
        return dh_HNd, dact_NC, dz_NC, dx_ND, dweight_C, dskip_C, ddown_DC, None


class SLSTMInputs(torch.autograd.Function):
    """Convolution and the inputs (B, T, 4·D) of an sLSTM's gates: two of the convolution, two of x itself."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, conv_DK: Tensor, conv_D: Tensor, *gates_Hdd: Tensor) -> Tensor:
        heads = gates_Hdd[0].shape[0]
        x_ND = x_BTD.flatten(0, 1)
        act_ND = pointwise.conv_silu(x_BTD, conv_DK, conv_D).flatten(0, 1)
        weights = [w.to(x_BTD.dtype) for w in gates_Hdd]
        gates_N4D = x_ND.new_empty(x_ND.shape[0], 4 * x_ND.shape[1])
        for out_ND, source_ND, w in zip(gates_N4D.chunk(4, -1), _sources(act_ND, x_ND), weights, strict=True):
            torch.bmm(by_head(source_ND, heads), w.transpose(1, 2), out=by_head(out_ND, heads))
        ctx.save_for_backward(x_BTD, act_ND, conv_DK, conv_D, *weights)
        ctx.dtype = gates_Hdd[0].dtype
        return gates_N4D.view(*x_BTD.shape[:2], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dgates_BT4D: Tensor) -> tuple[Tensor, ...]:
        x_BTD, act_ND, conv_DK, conv_D, *weights = ctx.saved_tensors
        shape, heads = x_BTD.shape, weights[0].shape[0]
        x_ND = x_BTD.flatten(0, 1)
        dgates = [by_head(part, heads) for part in dgates_BT4D.flatten(0, 1).chunk(4, -1)]
        dact_ND, dx_ND = torch.empty_like(act_ND), torch.empty_like(x_ND)
        for into_ND, first in ((dact_ND, 0), (dx_ND, 2)):
            into_HNd = by_head(into_ND, heads)
            torch.bmm(dgates[first], weights[first], out=into_HNd)
            into_HNd.baddbmm_(dgates[first + 1], weights[first + 1])
        da_BTD = pointwise.silu_backward(dact_ND.view(shape), None, x_BTD, conv_DK, conv_D)
        dx_BTD, dconv_DK, dconv_D = pointwise.conv_backward(da_BTD, dx_ND.view(shape), x_BTD, conv_DK)
        sources = _sources(act_ND, x_ND)
        dweights = (
            _mm(dg.transpose(1, 2), by_head(s, heads)).to(ctx.dtype) for dg, s in zip(dgates, sources, strict=True)
        )
        return dx_BTD, dconv_DK, dconv_D, *dweights


def _sources(act_ND: Tensor, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return act_ND, act_ND, x_ND, x_ND


class HeadNormAdd(torch.autograd.Function):
    """x + the norm of y over each head."""

    @staticmethod
    def forward(ctx: Any, y_NHd: Tensor, x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(y_NHd, weight_D)
        ctx.eps = eps
        return pointwise.head_norm_add(y_NHd, x_ND, weight_D, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_ND: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        y_NHd, weight_D = ctx.saved_tensors
        dy_NHd, dweight_D = pointwise.head_norm_backward(dx_ND, y_NHd, weight_D, ctx.eps)
        return dy_NHd, dx_ND, dweight_D, None


class FeedForwardAdd(torch.autograd.Function):
    """x + the gated feed-forward of its norm."""

    @staticmethod
    def forward(ctx: Any, normed_ND: Tensor, x_ND: Tensor, up_2FD: Tensor, down_DF: Tensor) -> Tensor:
        cast_2FD, cast_DF = up_2FD.to(normed_ND.dtype), down_DF.to(normed_ND.dtype)
        up_N2F = normed_ND @ cast_2FD.T
        ctx.save_for_backward(normed_ND, up_N2F, cast_2FD, cast_DF)
        ctx.dtype = up_2FD.dtype
        return x_ND + pointwise.gelu_gate(up_N2F) @ cast_DF.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_ND: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        normed_ND, up_N2F, cast_2FD, cast_DF = ctx.saved_tensors
        rounded_ND = dx_ND.to(normed_ND.dtype)
        dup_N2F, y_NF = pointwise.gelu_gate_backward(rounded_ND @ cast_DF, up_N2F)
        ddown_DF, dup_2FD = _mm(rounded_ND.T, y_NF), _mm(dup_N2F.T, normed_ND)
        return dup_N2F @ cast_2FD, dx_ND, dup_2FD.to(ctx.dtype), ddown_DF.to(ctx.dtype)
