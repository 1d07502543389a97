"""The kernels at the sizes they are for, on a GPU; odd shapes are in tests/numerics, which runs there too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from teacher_dump.kernels import head_topk_reference, head_topk_triton
from teacher_dump.kernels.head_topk import VocabShard, head_topk
from teacher_dump.kernels.pooled_attention_reference import AttentionShape, pooled_attention
from teacher_dump.kernels.pooled_attention_triton import add_pooled_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TAUS = (1.0, 1.2, 1.5, 2.0)


def zipf_logits(rows: int, vocab: int, dtype: torch.dtype) -> Tensor:
    """Peaked as a language model's: a few ids far above the rest, neighbours alike, ties where the dtype is coarse."""
    generator = torch.Generator("cuda").manual_seed(0)
    base = -1.5 * torch.arange(1, vocab + 1, device="cuda").float().log()
    return (base + 2 * torch.randn(rows, vocab, device="cuda", generator=generator)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("vocab", "k"), [(151936, 64), (128256, 256), (49152, 64)])
def test_head_search_equals_the_reference(vocab: int, k: int, dtype: torch.dtype) -> None:
    logits_NV = zipf_logits(700, vocab, dtype)
    ids_NK, values_NK, log_tail_NR = head_topk_triton.local_top_k(logits_NV, k, TAUS)
    want_ids_NK, want_values_NK, _ = head_topk_reference.local_top_k(logits_NV, k, TAUS)
    assert torch.equal(ids_NK, want_ids_NK) and torch.equal(values_NK, want_values_NK)
    rest_NV = logits_NV[:64].double().scatter(1, ids_NK[:64].long(), -torch.inf)
    exact_NR = torch.stack([(rest_NV / tau).logsumexp(-1) for tau in TAUS], dim=-1)
    torch.testing.assert_close(log_tail_NR[:64].double(), exact_NR, rtol=1e-6, atol=1e-5)


def test_vocabulary_shards_merge_to_the_whole() -> None:
    """Two shards of one vocabulary, their meetings played by hand: the rows that TP=2 would give."""
    logits_NV = zipf_logits(300, 49152, torch.bfloat16)
    targets_N = torch.randint(49152, (300,), device="cuda")
    whole = head_topk(logits_NV, targets_N, 64, TAUS)
    halves = [logits_NV[:, :24576], logits_NV[:, 24576:]]
    asked: list[list[Tensor]] = [[], []]
    for rank, half in enumerate(halves):  # what each rank would send: a first run, with itself for the other

        def recorded(x: Tensor, rank: int = rank) -> Tensor:
            asked[rank].append(x)
            return torch.stack([x, x])

        head_topk(half, targets_N, 64, TAUS, shard=VocabShard(24576 * rank, recorded))
    meetings = iter([torch.stack(pair) for pair in zip(*asked, strict=True)])
    merged = head_topk(halves[0], targets_N, 64, TAUS, shard=VocabShard(0, lambda x: next(meetings)))
    assert torch.equal(merged.ids_NK, whole.ids_NK) and torch.equal(merged.logits_NK, whole.logits_NK)
    assert torch.equal(merged.target_logit_N, whole.target_logit_N)
    torch.testing.assert_close(merged.log_tail_NR, whole.log_tail_NR, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(merged.lse_N, whole.lse_N, rtol=1e-6, atol=1e-5)


def test_the_host_never_waits_for_the_head() -> None:
    """A wait would leave the device idle while the next step is prepared."""
    logits_NV = zipf_logits(256, 49152, torch.bfloat16)
    targets_N = torch.zeros(256, dtype=torch.int64, device="cuda")
    head_topk(logits_NV, targets_N, 64, TAUS)
    torch.cuda.set_sync_debug_mode("error")
    try:
        head_topk(logits_NV, targets_N, 64, TAUS)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width"), [(12, 2, 128), (32, 8, 128), (9, 3, 64), (8, 4, 256), (12, 4, 96)]
)
def test_pooled_attention_of_long_rows(heads: int, kv_heads: int, width: int) -> None:
    """2048 and 1500 tokens in bfloat16 against float32 arithmetic on the same q and k."""
    torch.manual_seed(0)
    lengths, block = (2048, 1500), 64
    total = sum(lengths)
    q_NHE = torch.randn(total, heads, width, device="cuda").bfloat16()
    k_NHkvE = torch.randn(total, kv_heads, width, device="cuda").bfloat16()
    starts = torch.tensor([0, 2048, total], dtype=torch.int32, device="cuda")
    for shape in (AttentionShape(width**-0.5), AttentionShape(width**-0.5, window=700)):
        pooled = torch.zeros(2, 32, 32, device="cuda")
        add_pooled_attention(pooled, q_NHE, k_NHkvE, starts, 2048, None, shape, block, 1.0)
        exact = pooled_attention(q_NHE, k_NHkvE, [0, 2048, total], shape, block, 32)
        torch.testing.assert_close(pooled, exact, rtol=1e-3, atol=1e-5)
        rows = pooled.sum(-1)
        torch.testing.assert_close(rows, (exact.sum(-1) > 0).float(), rtol=1e-3, atol=1e-5)
