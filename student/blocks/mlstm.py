"""The mLSTM cell of the student: how the package's layer is computed here, and what is captured of it.

The mLSTM (arXiv 2405.04517, section 2.3) is linear attention with exponential gates. With f, i the gates'
pre-activations, F_t = Σ_{s<=t} log σ(f_s), and m_t = max_{s<=t} (F_t − F_s + i_s):

    C[t,s] = (q_t·k_s / √d) · exp(F_t − F_s + i_s − m_t)                        for s <= t
    h_t    = Σ_s C[t,s] v_s / (max(|Σ_s C[t,s]|, exp(−m_t)) + ε)

The package computes C as a dense T×T matrix. `mlstm_cell_backend` puts a chunkwise form in its place: on a GPU the
Triton kernel `mlstm_chunkwise__xl_chunk` of `mlstm_kernels`, elsewhere `mlstm_chunkwise` below. Every parameter stays
in the package's modules.

Legend: B rows, H heads, T tokens, d head width, n chunks of L tokens (T = n·L), I and J chunk indices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from xlstm import mLSTMBlock

EPS = 1e-6  # of the package's normaliser
CHUNK = 64
KERNEL_CHUNK = 128
LAUNCH_LIMIT = 65_535  # rows x heads x chunks of one launch of the kernel: CUDA's limit of a grid's third dimension


@dataclass(frozen=True)
class LogDecay:
    """Stabilised log gates, cut into chunks. With g_s = i_s − F_s, log of the decay from s to t is F_t + g_s.

    Maxima are constants for autograd: they scale numerator and normaliser alike, so their gradient is zero. F is summed
    in float64, since a long row's total decay dwarfs the differences that matter; what is returned is small.

    Attributes:
        source_BHnL: exp(g_s − M_J), M_J the maximum of g over the chunk J of s.
        decay_BHnn: exp(M_J − G_I) for J < I, else 0; G_I the maximum of g over all chunks before I.
        carry_BHnL: exp(G_I − G_t) for t in I, G_t the maximum of g up to t; 0 in the first chunk.
        local_BHnL: g − M_J, within its chunk.
        local_max_BHnL: G_t − M_J for t in J, without gradient.
        log_floor_BHnL: −m_t = −(F_t + G_t): log of the least value of the normaliser.
    """

    source_BHnL: Tensor
    decay_BHnn: Tensor
    carry_BHnL: Tensor
    local_BHnL: Tensor
    local_max_BHnL: Tensor
    log_floor_BHnL: Tensor


def log_decay(igate_BHT: Tensor, fgate_BHT: Tensor, chunk: int) -> LogDecay:
    """Log gates of T = n·chunk tokens, see `LogDecay`; computed in float32 or the gates' wider dtype."""
    dtype = torch.promote_types(igate_BHT.dtype, torch.float32)
    F_BHT = F.logsigmoid(fgate_BHT.to(dtype)).double().cumsum(-1)
    shape = (*igate_BHT.shape[:-1], -1, chunk)
    F_BHnL = F_BHT.view(shape)
    g_BHnL = igate_BHT.double().view(shape) - F_BHnL
    with torch.no_grad():
        running_BHnL = g_BHnL.flatten(-2).cummax(-1).values.view(shape)
        before_BHn = running_BHnL[..., -1].roll(1, -1)
        before_BHn[..., 0] = -torch.inf
        chunk_max_BHn = g_BHnL.amax(-1)
        # Rows of the first chunk are masked: nothing lies before it.
        decay_BHnn = (chunk_max_BHn[..., None, :] - before_BHn[..., :, None]).tril(-1).to(dtype).exp().tril(-1)
        carry_BHnL = (before_BHn[..., None] - running_BHnL).to(dtype).exp()
        local_max_BHnL = (running_BHnL - chunk_max_BHn[..., None]).to(dtype)
    local_BHnL = (g_BHnL - chunk_max_BHn[..., None]).to(dtype)
    log_floor_BHnL = -(F_BHnL + running_BHnL).to(dtype)
    return LogDecay(local_BHnL.exp(), decay_BHnn, carry_BHnL, local_BHnL, local_max_BHnL, log_floor_BHnL)


def mlstm_chunkwise(
    q_BHTd: Tensor,
    k_BHTd: Tensor,
    v_BHTd: Tensor,
    igate_BHT: Tensor,
    fgate_BHT: Tensor,
    chunk: int = CHUNK,
    eps: float = EPS,
) -> Tensor:
    """h_BHTd of the mLSTM cell in a chunkwise form of plain tensor operations, for any T.

    Within a chunk the dense form; from the chunks before it one state per chunk, all of them by one product of the
    (n, n) decays with the chunks' own sums. The same function as the package's dense form, in a T/chunk-th of its
    T×T elements, and differentiable with the normaliser's gradient (which `mlstm_kernels` drops).
    """
    length, width = q_BHTd.shape[-2:]
    pad = -length % chunk
    if pad:
        q_BHTd, k_BHTd, v_BHTd = (F.pad(x, (0, 0, 0, pad)) for x in (q_BHTd, k_BHTd, v_BHTd))
        igate_BHT, fgate_BHT = (F.pad(x, (0, pad)) for x in (igate_BHT, fgate_BHT))
    gates = log_decay(igate_BHT, fgate_BHT, chunk)
    shape = (*igate_BHT.shape[:-1], -1, chunk, width)
    q_BHnLd, v_BHnLd = q_BHTd.reshape(shape), v_BHTd.reshape(shape)
    k_BHnLd = k_BHTd.reshape(shape) * width**-0.5

    causal_LL = torch.ones(chunk, chunk, dtype=torch.bool, device=q_BHTd.device).tril()
    log_D = gates.local_BHnL[..., None, :] - gates.local_max_BHnL[..., :, None]
    inside_BHnLL = (q_BHnLd @ k_BHnLd.transpose(-1, -2)) * log_D.masked_fill(~causal_LL, -torch.inf).exp()
    h_BHnLd = inside_BHnLL.to(v_BHnLd.dtype) @ v_BHnLd
    sum_BHnL = inside_BHnLL.sum(-1)
    if gates.decay_BHnn.shape[-1] > 1:
        source_BHnLd = k_BHnLd * gates.source_BHnL[..., None]
        sums_BHndd = source_BHnLd.transpose(-1, -2) @ v_BHnLd.to(source_BHnLd.dtype)
        states_BHndd = (gates.decay_BHnn @ sums_BHndd.flatten(-2)).view(sums_BHndd.shape)
        normaliser_BHnd = gates.decay_BHnn @ source_BHnLd.sum(-2)
        carried_BHnLd = q_BHnLd * gates.carry_BHnL[..., None]
        h_BHnLd = h_BHnLd + carried_BHnLd @ states_BHndd
        sum_BHnL = sum_BHnL + (carried_BHnLd @ normaliser_BHnd[..., None]).squeeze(-1)
    scale_BHnL = torch.maximum(sum_BHnL.abs(), gates.log_floor_BHnL.exp()) + eps
    return (h_BHnLd / scale_BHnL[..., None]).flatten(-3, -2)[..., :length, :].to(q_BHTd.dtype)


def mlstm_cell_backend(
    queries: Tensor, keys: Tensor, values: Tensor, igate_preact: Tensor, fgate_preact: Tensor
) -> Tensor:
    """h of the cell by the fastest form at hand; shapes as the package's cell passes them, gates (B, H, T, 1)."""
    gates_BHT = igate_preact.squeeze(-1), fgate_preact.squeeze(-1)
    if queries.is_cuda and queries.shape[-1] % 64 == 0:
        return _mlstm_kernel(queries, keys, values, *gates_BHT)
    return mlstm_chunkwise(queries, keys, values, *gates_BHT)


def _mlstm_kernel(q_BHTd: Tensor, k_BHTd: Tensor, v_BHTd: Tensor, igate_BHT: Tensor, fgate_BHT: Tensor) -> Tensor:
    """The Triton kernel, on rows padded to a length it takes. Its backward leaves out the normaliser's gradient, which
    the norm over each head that follows the cell cancels."""
    from mlstm_kernels.torch.chunkwise.triton_xl_chunk import mlstm_chunkwise__xl_chunk

    heads, length = q_BHTd.shape[1:3]
    padded = -(-length // KERNEL_CHUNK) * KERNEL_CHUNK if length > 64 else max(16, 1 << (length - 1).bit_length())
    rows = LAUNCH_LIMIT // (heads * -(-padded // KERNEL_CHUNK))
    if not rows:
        return mlstm_chunkwise(q_BHTd, k_BHTd, v_BHTd, igate_BHT, fgate_BHT)
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else q_BHTd.dtype
    qkv = [x.to(dtype) for x in (q_BHTd, k_BHTd, v_BHTd)]
    gates = [x.float() for x in (igate_BHT, fgate_BHT)]
    if padded > length:  # padding by nothing would copy
        qkv = [F.pad(x, (0, 0, 0, padded - length)) for x in qkv]
        gates = [F.pad(x, (0, padded - length)) for x in gates]
    parts = []
    with torch.autocast("cuda", enabled=False):  # which would round the gates to bfloat16
        for part in zip(*(x.split(rows) for x in (*qkv, *gates)), strict=True):
            parts.append(
                mlstm_chunkwise__xl_chunk(*part, eps=EPS, chunk_size=KERNEL_CHUNK, autocast_kernel_dtype=dtype)
            )
    h_BHTd = parts[0] if len(parts) == 1 else torch.cat(parts)
    return h_BHTd[..., :length, :]


@dataclass
class CellInputs:
    """What one forward pass gave to a cell, still part of the autograd graph."""

    q_BHTd: Tensor
    k_BHTd: Tensor
    v_BHTd: Tensor
    igate_BHT: Tensor
    fgate_BHT: Tensor

    def attention_inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k and the gates' pre-activations: all the implicit attention depends on."""
        return self.q_BHTd, self.k_BHTd, self.igate_BHT, self.fgate_BHT


class CellBackend:
    """`mlstm_cell_backend` in the form of the package's `backend_fn`; notes its inputs while `seen` is a list."""

    def __init__(self) -> None:
        self.seen: list[CellInputs] | None = None

    def __call__(
        self, queries: Tensor, keys: Tensor, values: Tensor, igate_preact: Tensor, fgate_preact: Tensor, **_: Any
    ) -> Tensor:
        if self.seen is not None:
            self.seen.append(CellInputs(queries, keys, values, igate_preact.squeeze(-1), fgate_preact.squeeze(-1)))
        return mlstm_cell_backend(queries, keys, values, igate_preact, fgate_preact)

    def heads_first(
        self, q_HBTd: Tensor, k_HBTd: Tensor, v_HBTd: Tensor, igate_HBT: Tensor, fgate_HBT: Tensor
    ) -> Tensor:
        """h_HBTd of inputs laid out by head, which the kernel takes as they are; noted as rows of heads."""
        inputs_HBT = q_HBTd, k_HBTd, v_HBTd, igate_HBT, fgate_HBT
        if self.seen is not None:
            self.seen.append(CellInputs(*(x.transpose(0, 1) for x in inputs_HBT)))
        # To the cell every head of every row is a row of one head.
        q, k, v, igate, fgate = (x.flatten(0, 1)[:, None] for x in inputs_HBT)
        h = mlstm_cell_backend(q, k, v, igate[..., None], fgate[..., None])
        return h.reshape(q_HBTd.shape)


def use_cell_backend(block: mLSTMBlock) -> None:
    """Replace the dense form of a package block's cell."""
    block.xlstm.mlstm_cell.backend_fn = CellBackend()


@contextmanager
def capturing(block: torch.nn.Module) -> Iterator[list[CellInputs]]:
    """Collect what the block's cell is given, one entry per forward pass. Nothing is kept after the `with`."""
    # A transformer-shaped block has the cell itself.
    backend: Any = block.xlstm.mlstm_cell.backend_fn if isinstance(block, mLSTMBlock) else block.cell
    seen: list[CellInputs] = []
    backend.seen = seen
    try:
        yield seen
    finally:
        backend.seen = None


@contextmanager
def conv_inputs(layer: torch.nn.Module) -> Iterator[list[Tensor]]:
    """Collect the inputs of an mLSTM or sLSTM layer's causal convolution."""
    seen: list[Tensor] = []
    handle = layer.get_submodule("conv1d").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()


def last_inputs(x_BTC: Tensor, count: int) -> Tensor:
    """The last `count` tokens, zeros before the first: the state of a causal convolution of that kernel size."""
    return F.pad(x_BTC, (0, 0, max(0, count - x_BTC.shape[1]), 0))[:, -count:]


def mlstm_initial_state(block: mLSTMBlock, batch: int) -> dict[str, Any]:
    """The package's empty state of one block."""
    layer = block.xlstm
    heads, inner = layer.mlstm_cell.config.num_heads, layer.config._inner_embedding_dim
    new_zeros = layer.proj_up.weight.new_zeros
    return {
        "mlstm_state": (
            new_zeros(batch, heads, inner // heads, inner // heads),
            new_zeros(batch, heads, inner // heads, 1),
            new_zeros(batch, heads, 1, 1),
        ),
        "conv_state": (new_zeros(batch, layer.config.conv1d_kernel_size, inner),),
    }


def final_memory(cell: CellInputs) -> tuple[Tensor, Tensor, Tensor]:
    """The state after whole rows: memory (B, H, d, d), normaliser (B, H, d, 1), their log scale (B, H, 1, 1)."""
    dtype = torch.promote_types(cell.q_BHTd.dtype, torch.float32)
    F_BHT = F.logsigmoid(cell.fgate_BHT.to(dtype)).double().cumsum(-1)
    g_BHT = cell.igate_BHT.double() - F_BHT
    max_BH1 = g_BHT.amax(-1, keepdim=True)
    source_BHTd = cell.k_BHTd * ((g_BHT - max_BH1).exp() * cell.k_BHTd.shape[-1] ** -0.5).to(dtype)[..., None]
    return (
        source_BHTd.transpose(-1, -2) @ cell.v_BHTd.to(dtype),
        source_BHTd.sum(-2)[..., None],
        (F_BHT[..., -1:] + max_BH1).to(dtype)[..., None],
    )


def mlstm_prefill(block: mLSTMBlock, x_BTD: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The block's output for whole rows, and the state its `step` goes on from."""
    with capturing(block) as seen, conv_inputs(block.xlstm) as conv:
        y_BTD = mLSTMBlock.forward(block, x_BTD)  # whose convolution can be listened to
    memory = final_memory(seen[0])
    conv_state = last_inputs(conv[0], block.xlstm.config.conv1d_kernel_size)
    return y_BTD, {"mlstm_state": memory, "conv_state": (conv_state,)}
