"""Attention alignment: the mLSTM's implicit attention against the teacher's, both pooled over blocks of b tokens.

A teacher map P_j[I, J] belongs to depth group j and holds the mean share of attention that queries of block I give to
keys of block J; its rows sum to one (less with sinks, zero on padded blocks). A student map is the same sum over the
mLSTM's implicit attention, which is signed: a row's sum is at most one in size, and entries may be negative.

How the three differences are treated:

- sign: `signed` compares the student's entries as they are, so a negative share costs at least its own square;
  `absolute` compares their magnitudes (of the pooled entries: what cancels within a pair of blocks stays cancelled).
- sinks: `keep` compares all key blocks; `drop` leaves the first key block out of both maps before rows are normalised,
  for attention parked on the first tokens is no information. The first query block has no other key and drops out too.
- rows: with `normalise_rows` every row of both maps is divided by the sum of its magnitudes, so that only the shape of
  a row counts; a row whose sum is below EPSILON becomes zero and gets no gradient through its normaliser.

The distance is the squared Frobenius distance of the lower-triangular blocks, averaged over the query blocks that hold
b valid tokens: the student's map of a part-filled block averages over its padding too and is not comparable.

Legend: B rows, G depth groups, n = T/b blocks.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Sign = Literal["signed", "absolute"]
Sinks = Literal["keep", "drop"]

EPSILON = 1e-6


def depth_overlap(block: int, blocks: int, groups: int) -> list[float]:
    """Weights of the teacher's G groups for student block `block` of `blocks`; they sum to one.

    Block i covers the depths [i/N, (i+1)/N], group j of G [j/G, (j+1)/G]; a weight is the share of the block's span.
    """
    low, high = block / blocks, (block + 1) / blocks
    shared = [max(0.0, min(high, (j + 1) / groups) - max(low, j / groups)) for j in range(groups)]
    return [value / (high - low) for value in shared]


def prepare_map(map_Bnn: Tensor, sign: Sign, sinks: Sinks, normalise_rows: bool) -> Tensor:
    """A pooled map as it is compared: causal blocks only, sign, sinks and row sums treated as the module says."""
    prepared_Bnn = torch.tril(map_Bnn.float())
    if sign == "absolute":
        prepared_Bnn = prepared_Bnn.abs()
    if sinks == "drop":
        prepared_Bnn = torch.cat((torch.zeros_like(prepared_Bnn[..., :1]), prepared_Bnn[..., 1:]), -1)
    if normalise_rows:
        sum_Bn1 = prepared_Bnn.abs().sum(-1, keepdim=True)
        empty_Bn1 = sum_Bn1 < EPSILON
        prepared_Bnn = torch.where(empty_Bn1, 0.0, prepared_Bnn / torch.where(empty_Bn1, 1.0, sum_Bn1))
    return prepared_Bnn


def compared_blocks(length_B: Tensor, n: int, pool_block: int, sinks: Sinks = "keep") -> Tensor:
    """bool (B, n): the query blocks whose rows of a map are compared."""
    first_I = torch.arange(n, device=length_B.device)
    valid_Bn = (first_I[None, :] + 1) * pool_block <= length_B[:, None]
    return valid_Bn & (first_I > 0) if sinks == "drop" else valid_Bn


def attention_alignment(
    maps: dict[int, Tensor],
    attn_map_BGnn: Tensor,
    length_B: Tensor,
    pool_block: int,
    blocks: int,
    sign: Sign = "signed",
    sinks: Sinks = "keep",
    normalise_rows: bool = True,
    count: Tensor | None = None,
) -> Tensor:
    """L_A: mean over the student's mLSTM blocks of the distance to the teacher's groups at the same depth.

    Args:
        maps: student block index -> (B, n, n).
        attn_map_BGnn: the cache's pooled attention.
        length_B: valid tokens a row.
        pool_block: b, tokens per block.
        blocks: N, all blocks of the student, sLSTM included: they set the depth of a block.
        count: what sums are divided by; None: the number of `compared_blocks`. Where a batch is spread over ranks, the
            mean of their numbers: the mean of their L_A is then that of the whole batch.
    """
    if not maps:
        raise ValueError("attention alignment needs at least one mLSTM block")
    n, groups = attn_map_BGnn.shape[-1], attn_map_BGnn.shape[1]
    valid_Bn = compared_blocks(length_B, n, pool_block, sinks)
    count = (valid_Bn.sum() if count is None else count).clamp_min(1)
    terms = []
    for block, map_Bnn in sorted(maps.items()):
        # Weights as numbers: a tensor of them would have to be copied to a GPU, and autocast would round the product.
        weights = depth_overlap(block, blocks, groups)
        shares = [attn_map_BGnn[:, g].float() * weight for g, weight in enumerate(weights) if weight]
        target_Bnn = torch.stack(shares).sum(0)
        target_Bnn = prepare_map(target_Bnn, "signed", sinks, normalise_rows)
        student_Bnn = prepare_map(map_Bnn, sign, sinks, normalise_rows)
        distance_Bn = (student_Bnn - target_Bnn).square().sum(-1)
        terms.append(torch.where(valid_Bn, distance_Bn, 0.0).sum() / count)
    return torch.stack(terms).mean()
