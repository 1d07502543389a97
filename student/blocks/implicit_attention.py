"""The attention an mLSTM computes without naming it, pooled over blocks of tokens as the teacher's is.

With C and m_t as in `student/blocks/mlstm.py`, the mLSTM's output is h_t = Σ_s A[t,s] v_s, where

    A[t,s] = C[t,s] / max(|Σ_s C[t,s]|, exp(−m_t))        for s <= t, else 0

A is signed, its rows sum to at most one in size, and it is linear in the keys. So its block sums

    P[I,J] = (1/b) Σ_{t in I} Σ_{s in J, s<=t} A[t,s]

need no T×T matrix: the keys of a block J collapse to one decayed sum K̄_J, the queries of a block I, each divided by
its normaliser, to one Q̄_I, and P[I,J] is their product times the decay from J to I; only the diagonal blocks are
computed entry by entry. That is O(T·d·b + n²·d) work and O(T·(d + b)) memory a head, against O(T²·d) and O(T²).

Legend: B rows, H heads, T tokens, d head width, b tokens a block, n = T/b blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from student.blocks.mlstm import log_decay


def pooled_implicit_attention(
    q_BHTd: Tensor, k_BHTd: Tensor, igate_BHT: Tensor, fgate_BHT: Tensor, block: int
) -> Tensor:
    """P (B, H, n, n) per head, float32 or the inputs' wider dtype, zero above the diagonal.

    Differentiable through q, k and both gates' pre-activations, the normaliser included. On a GPU by the kernels of
    `implicit_attention_triton`, elsewhere and for what those do not take by plain autograd.

    Raises:
        ValueError: T is no positive multiple of `block`.
    """
    length, width = q_BHTd.shape[-2:]
    if block < 1 or length < 1 or length % block:
        raise ValueError(f"T={length} is no multiple of the pooling block {block}")
    if q_BHTd.is_cuda:
        from student.blocks.implicit_attention_triton import pooled_by_kernels, takes

        if takes(q_BHTd, k_BHTd, block):
            with torch.autocast("cuda", enabled=False):
                return pooled_by_kernels(q_BHTd, k_BHTd, igate_BHT, fgate_BHT, block)
    dtype = torch.promote_types(q_BHTd.dtype, torch.float32)
    with torch.autocast(q_BHTd.device.type, enabled=False):
        gates = log_decay(igate_BHT, fgate_BHT, block)
        shape = (*igate_BHT.shape[:-1], -1, block, width)
        q_BHnbd = q_BHTd.to(dtype).reshape(shape)
        k_BHnbd = k_BHTd.to(dtype).reshape(shape) * width**-0.5

        causal_bb = torch.ones(block, block, dtype=torch.bool, device=q_BHTd.device).tril()
        log_D = gates.local_BHnL[..., None, :] - gates.local_max_BHnL[..., :, None]
        D_BHnbb = log_D.masked_fill(~causal_bb, -torch.inf).exp()
        inside_BHnb = ((q_BHnbd @ k_BHnbd.transpose(-1, -2)) * D_BHnbb).sum(-1)

        keys_BHnd = (k_BHnbd * gates.source_BHnL[..., None]).sum(-2)
        # Σ_{s before I} of each row at once: the decayed sum of the K̄_J is the recurrence's own normaliser state.
        before_BHnd = gates.decay_BHnn @ keys_BHnd
        carried_BHnbd = q_BHnbd * gates.carry_BHnL[..., None]
        sum_BHnb = inside_BHnb + (carried_BHnbd @ before_BHnd[..., None]).squeeze(-1)
        weight_BHnb = 1 / (block * torch.maximum(sum_BHnb.abs(), gates.log_floor_BHnL.exp()))

        queries_BHnd = (carried_BHnbd * weight_BHnb[..., None]).sum(-2)
        off_diagonal_BHnn = gates.decay_BHnn * (queries_BHnd @ keys_BHnd.transpose(-1, -2))
        return off_diagonal_BHnn + torch.diag_embed((inside_BHnb * weight_BHnb).sum(-1))


def dense_implicit_attention(q_BHTd: Tensor, k_BHTd: Tensor, igate_BHT: Tensor, fgate_BHT: Tensor) -> Tensor:
    """A (B, H, T, T) straight from the definition: the reference."""
    length, width = q_BHTd.shape[-2:]
    F_BHT = F.logsigmoid(fgate_BHT).cumsum(-1)
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=q_BHTd.device).tril()
    log_D = F_BHT[..., :, None] - F_BHT[..., None, :] + igate_BHT[..., None, :]
    log_D = log_D.masked_fill(~causal_TT, -torch.inf)
    m_BHT1 = log_D.amax(-1, keepdim=True)
    C_BHTT = (q_BHTd @ k_BHTd.transpose(-1, -2)) * width**-0.5 * (log_D - m_BHT1).exp()
    return C_BHTT / torch.maximum(C_BHTT.sum(-1, keepdim=True).abs(), (-m_BHT1).exp())


def pool_dense(A_BHTT: Tensor, block: int) -> Tensor:
    """P (B, H, n, n) of a dense A: mean over the queries, sum over the keys of every block."""
    length = A_BHTT.shape[-1]
    blocks = length // block
    return A_BHTT.view(*A_BHTT.shape[:-2], blocks, block, blocks, block).sum(-1).mean(-2)
