"""The sLSTM cell of the student: a scan over time, the same parameters on a CPU and on a GPU.

One step of the sLSTM (arXiv 2405.04517, section 2.2), with i, f, z, o the gates' pre-activations W x_t + R y_{t−1} + b,
R block-diagonal over heads:

    m_t = max(log σ(f) + m_{t−1}, i)      i' = exp(i − m_t)      f' = exp(log σ(f) + m_{t−1} − m_t)
    c_t = f' c_{t−1} + i' tanh(z)         n_t = f' n_{t−1} + i'    y_t = σ(o) c_t / n_t

m only scales c and n alike, so y does not depend on it and its gradient is zero.

The package has two cells for this, `vanilla` (a Python loop that autograd records) and `cuda` (compiled at first use),
which lay the same parameters out differently. `ScanCell` keeps vanilla's layout always, so a checkpoint is the same
wherever it was written. On a GPU it runs `slstm_triton`; heads wider than that takes are trained by the CUDA kernel,
the parameters laid out at each call. Elsewhere, and for such heads without gradients, `slstm_scan`.

Legend: T tokens, B rows, H heads, d head width, g = 4·d: the gates i, f, z, o of one head, in
that order.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from xlstm import sLSTMBlock, sLSTMLayerConfig
from xlstm.blocks.slstm.cell import DTYPES, sLSTMCell_vanilla, sLSTMCellConfig, sLSTMCellFuncGenerator

from student.blocks.mlstm import conv_inputs, last_inputs
from student.cuda_toolkit import require_toolkit


class _Scan(torch.autograd.Function):
    """The recurrence with its backward written out: two plain loops, R's gradient in one product at the end."""

    @staticmethod
    def forward(ctx: Any, input_TBHg: Tensor, R_Hdg: Tensor, state_4BHd: Tensor) -> tuple[Tensor, Tensor]:
        length, batch, heads, width = *input_TBHg.shape[:3], R_Hdg.shape[1]
        # Heads lead, so that a step's recurrence is one batched product.
        raw_THBg = input_TBHg.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        y, c, n = (raw_THBg.new_empty(length + 1, heads, batch, width) for _ in range(3))
        decay = raw_THBg.new_empty(length, heads, batch, width)
        y[0], c[0], n[0], m = state_4BHd.transpose(1, 2).unbind(0)
        # An empty state has no scale yet: the m it holds must not outlast it.
        m = torch.where(n[0] == 0, -torch.inf, m)
        for t in range(length):
            i, f, z, o = raw_THBg[t].baddbmm_(y[t], R_Hdg).view(heads, batch, 4, width).unbind(2)
            carried = F.logsigmoid(f).add_(m)
            m = torch.maximum(i, carried)
            i.sub_(m).exp_()
            torch.sub(carried, m, out=decay[t]).exp_()
            z.tanh_()
            o.sigmoid_()
            torch.mul(decay[t], c[t], out=c[t + 1]).addcmul_(i, z)
            torch.mul(decay[t], n[t], out=n[t + 1]).add_(i)
            torch.div(c[t + 1], n[t + 1], out=y[t + 1]).mul_(o)
        last_4BHd = torch.stack((y[-1], c[-1], n[-1], m)).transpose(1, 2).contiguous()
        ctx.mark_non_differentiable(last_4BHd)
        # raw now holds i', the forget gate's pre-activation, tanh(z) and sigmoid(o).
        ctx.save_for_backward(raw_THBg, R_Hdg, y, c, n, decay)
        return y[1:].transpose(1, 2), last_4BHd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TBHd: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
        raw_THBg, R_Hdg, y, c, n, decay = ctx.saved_tensors
        length, heads, batch, width = decay.shape
        i, f, z, o = raw_THBg.view(length, heads, batch, 4, width).unbind(3)
        # Per unit of the gradient to c, n and y: what reaches the gates. Computed for all t at once.
        from_f = decay * torch.sigmoid(-f)
        by_c = torch.stack((i * z, from_f * c[:-1], i * (1 - z * z)), 3)
        by_n = torch.stack((i, from_f * n[:-1]), 3)
        by_y = y[1:] * (1 - o)
        y_to_c = o / n[1:]
        y_to_n = -y[1:] / n[1:]

        draw_THBg = torch.empty_like(raw_THBg)
        dy_THBd = dy_TBHd.transpose(1, 2).contiguous()
        R_Hgd = R_Hdg.transpose(1, 2).contiguous()
        dc, dn = torch.zeros_like(y[0]), torch.zeros_like(y[0])
        for t in range(length - 1, -1, -1):
            dy = dy_THBd[t] if t == length - 1 else torch.baddbmm(dy_THBd[t], draw_THBg[t + 1], R_Hgd)
            dc.addcmul_(dy, y_to_c[t])
            dn.addcmul_(dy, y_to_n[t])
            draw = draw_THBg[t].view(heads, batch, 4, width)
            torch.mul(dc.unsqueeze(2), by_c[t], out=draw[:, :, :3])
            draw[:, :, :2].addcmul_(dn.unsqueeze(2), by_n[t])
            torch.mul(dy, by_y[t], out=draw[:, :, 3])
            dc.mul_(decay[t])
            dn.mul_(decay[t])
        before_HNd = y[:-1].transpose(0, 1).reshape(heads, length * batch, width)
        dR_Hdg = before_HNd.transpose(1, 2) @ draw_THBg.transpose(0, 1).reshape(heads, length * batch, 4 * width)
        return draw_THBg.transpose(1, 2), dR_Hdg, None


def slstm_scan(input_TBHg: Tensor, R_Hdg: Tensor, state_4BHd: Tensor) -> tuple[Tensor, Tensor]:
    """The sLSTM recurrence over T steps in plain tensor operations.

    Args:
        input_TBHg: W x + b, float32 or float64, g = 4·d gates-major.
        R_Hdg: recurrent weights: the pre-activations gain y_{t-1} @ R.
        state_4BHd: y, c, n, m before the first step; zeros for an empty state. Treated as a constant.

    Returns:
        y_TBHd, and the state after the last step, a constant too.
    """
    with torch.autocast(input_TBHg.device.type, enabled=False):
        return _Scan.apply(input_TBHg, R_Hdg, state_4BHd)


def cuda_layout(recurrent_kernel: Tensor, bias: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Vanilla's parameters as the package's CUDA kernel wants them: (H, 4·d, d) -> (H, d, 4·d), and the bias from
    gates-major (4, H, d) to heads-major (H, 4, d), both flat. Differentiable."""
    return recurrent_kernel.transpose(1, 2), bias.view(4, heads, -1).transpose(0, 1).reshape(-1)


def vanilla_layout(recurrent_kernel: Tensor, bias: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """The way back from `cuda_layout`: for checkpoints of the package's CUDA cell."""
    return recurrent_kernel.transpose(1, 2), bias.view(heads, 4, -1).transpose(0, 1).reshape(-1)


@lru_cache
def _compiled_kernel(hidden_size: int, heads: int, dtype: DTYPES) -> type[torch.autograd.Function]:
    config = sLSTMCellConfig(hidden_size=hidden_size, num_heads=heads, backend="cuda", dtype=dtype)
    return sLSTMCellFuncGenerator(True, config)


class ScanCell(sLSTMCell_vanilla):
    """The package's vanilla cell, parameters and all, computed by one of three forms of the recurrence.

    The package's kernel needs nvcc and ninja at its first use (25 to 50 s for each shape and precision); a single step,
    as in generation, never uses it.
    """

    def forward(self, input: Tensor, state: Tensor | None = None, lengths: None = None) -> tuple[Tensor, Tensor]:
        """Gate inputs (B, T, 4·H·d) and state (4, B, H·d) or None -> y (B, H, T, d) and the next state."""
        batch, length = input.shape[:2]
        heads, width = self.config.num_heads, self.config.head_dim
        input_TB4Hd = input.view(batch, length, 4, heads, width).transpose(0, 1)
        dtype = torch.promote_types(input.dtype, torch.float32)
        if state is None:
            state = input.new_zeros(4, batch, heads * width, dtype=dtype)
        if input.is_cuda and length > 1:
            from student.blocks.slstm_triton import slstm_recurrence, widest_triton_head

            if width <= widest_triton_head(input.dtype):
                R_Hgd, bias_G = self._recurrent_kernel_, self._bias_.flatten()
                y_BTHd, state = slstm_recurrence(input, R_Hgd, bias_G, state.float())
                return y_BTHd.transpose(1, 2), state
        # Nothing is compiled for an evaluation or a prompt.
        if input.is_cuda and length > 1 and torch.is_grad_enabled():
            y_TBHd, state = self._cuda_kernel(input_TB4Hd, state)
        else:
            biased = input_TB4Hd.to(dtype) + self._bias_.view(4, heads, width)
            y_TBHd, state_4BHd = slstm_scan(
                biased.transpose(2, 3).flatten(-2),
                self._recurrent_kernel_.transpose(1, 2),
                state.to(dtype).view(4, batch, heads, width),
            )
            state = state_4BHd.flatten(-2)
        return y_TBHd.permute(1, 2, 0, 3).to(input.dtype), state

    def _cuda_kernel(self, input_TB4Hd: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        from student.blocks.slstm_triton import widest_triton_head

        require_toolkit(self.config.head_dim, widest_triton_head(input_TB4Hd.dtype))
        bfloat16 = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.bfloat16
        kernel = _compiled_kernel(self.config.hidden_size, self.config.num_heads, "bfloat16" if bfloat16 else "float32")
        recurrent_kernel, bias = cuda_layout(self._recurrent_kernel_, self._bias_, self.config.num_heads)
        states = kernel.apply(
            torch.is_grad_enabled(),
            input_TB4Hd.transpose(2, 3).flatten(2).contiguous(),
            state.contiguous(),
            recurrent_kernel.contiguous(),
            bias.contiguous(),
        )  # (4, T + 1, B, H·d)
        return states[0, 1:].unflatten(-1, (self.config.num_heads, -1)), states[:, -1].detach().float()


def use_scan_cell(block: sLSTMBlock) -> None:
    """Replace a package block's cell by a `ScanCell` of the same configuration and initial values."""
    config: sLSTMLayerConfig = block.xlstm.config
    cell = ScanCell(config)
    cell.load_state_dict(block.xlstm.slstm_cell.state_dict())
    block.xlstm.slstm_cell = cell


def slstm_initial_state(block: sLSTMBlock, batch: int) -> dict[str, Any]:
    """The package's empty state of one block."""
    config: sLSTMLayerConfig = block.xlstm.config
    new_zeros = block.xlstm.slstm_cell._bias_.new_zeros
    return {
        "slstm_state": new_zeros(4, batch, config.hidden_size),
        "conv_state": (new_zeros(batch, config.conv1d_kernel_size, config.hidden_size),),
    }


def slstm_prefill(block: sLSTMBlock, x_BTD: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The block's output for whole rows, and the state its `step` goes on from."""
    states: list[Tensor] = []
    cell = block.xlstm.slstm_cell
    handle = cell.register_forward_hook(lambda _, inputs, outputs: states.append(outputs[1]))
    try:
        with conv_inputs(block.xlstm) as conv:
            y_BTD = sLSTMBlock.forward(block, x_BTD)  # whose convolution can be listened to
    finally:
        handle.remove()
    conv_state = last_inputs(conv[0], block.xlstm.config.conv1d_kernel_size)
    return y_BTD, {"slstm_state": states[0], "conv_state": (conv_state,)}
