"""Top-k, logsumexp, tails and tail draws against dense float64 references."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from teacher_dump.kernels.head_topk import VocabShard, head_topk
from teacher_dump.kernels.head_topk_reference import select_top_k
from teacher_dump.kernels.tail_sample import draw_uniforms

TAUS = (1.0, 1.2, 1.5, 2.0)


def reference(logits_NV: Tensor, k: int, taus: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """ids, lse and log tails by a stable sort and float64 logsumexp."""
    z_NV = logits_NV.double()
    ids_NK = z_NV.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    rest_NV = z_NV.scatter(1, ids_NK, -torch.inf)
    return ids_NK, z_NV.logsumexp(-1), torch.stack([(rest_NV / tau).logsumexp(-1) for tau in taus], dim=-1)


def check(logits_NV: Tensor, k: int, taus: tuple[float, ...] = TAUS, tolerance: float = 2e-5) -> None:
    targets_N = torch.arange(len(logits_NV)) % logits_NV.shape[1]
    targets_N[-1] = -1
    rows = head_topk(logits_NV, targets_N, k, taus)
    ids_NK, lse_N, log_tail_NR = reference(logits_NV, k, taus)
    assert rows.ids_NK.dtype == torch.int32 and torch.equal(rows.ids_NK.long(), ids_NK)
    assert torch.equal(rows.logits_NK, logits_NV.float().gather(1, ids_NK))
    torch.testing.assert_close(rows.lse_N.double(), lse_N, rtol=1e-6, atol=tolerance)
    torch.testing.assert_close(rows.log_tail_NR.double(), log_tail_NR, rtol=1e-6, atol=tolerance)
    assert torch.equal(rows.target_logit_N[:-1], logits_NV.float()[torch.arange(len(logits_NV) - 1), targets_N[:-1]])
    assert rows.target_logit_N[-1].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("vocab", "k"), [(517, 1), (517, 64), (517, 517), (4099, 64), (9001, 8), (50000, 64), (3, 2)])
def test_matches_dense_reference(vocab: int, k: int, dtype: torch.dtype) -> None:
    """bfloat16 logits of a few thousand ids tie at the boundary in most rows."""
    torch.manual_seed(vocab + k)
    check((torch.randn(33, vocab) * 3).to(dtype), k)


@given(
    st.integers(1, 5), st.integers(2, 3000), st.integers(1, 40), st.integers(1, 6), st.integers(0, 2**31), st.booleans()
)
@settings(max_examples=60, deadline=None)
def test_ties(rows: int, vocab: int, k: int, levels: int, seed: int, signed_zero: bool) -> None:
    """A handful of distinct values: every boundary is a tie, and -0.0 ties with 0.0."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.arange(levels).float() - 2
    if signed_zero:
        values = torch.cat([values, torch.tensor([-0.0])])
    logits_NV = values[torch.randint(len(values), (rows, vocab), generator=generator)]
    k = min(k, vocab)
    ids_NK, values_NK = select_top_k(logits_NV, k)
    expected = logits_NV.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(ids_NK, expected)
    assert torch.equal(values_NK, logits_NV.gather(1, expected))


def test_one_block_full_of_ties_reaches_the_exact_search() -> None:
    """More tied blocks than are searched: the smallest ids must still win."""
    logits_NV = torch.zeros(2, 20000)
    logits_NV[1, 19000:] = 1.0
    ids_NK, _ = select_top_k(logits_NV, 16)
    assert ids_NK[0].tolist() == list(range(16))
    assert ids_NK[1].tolist() == list(range(19000, 19016))


@pytest.mark.parametrize("gap", [14.0, 40.0, 300.0])
def test_small_tails_keep_their_digits(gap: float) -> None:
    """A tail of mass 1e-6, 1e-17, or far below float32's smallest exponential."""
    torch.manual_seed(0)
    logits_NV = torch.randn(16, 6000)
    logits_NV[:, 100:108] += gap + 8
    check(logits_NV, 8, tolerance=1e-5)


def test_no_tail_is_minus_infinity() -> None:
    rows = head_topk(torch.randn(4, 40), torch.zeros(4, dtype=torch.int64), 40, TAUS)
    assert (rows.log_tail_NR == -math.inf).all() and rows.lse_N.isfinite().all()


def test_temperatures_without_a_common_denominator() -> None:
    torch.manual_seed(1)
    check(torch.randn(9, 2000) * 4, 16, taus=(0.7, 1.37, 2.9))


def test_nan_logits_show_in_lse() -> None:
    logits_NV = torch.randn(2, 4000)
    logits_NV[1, 7] = torch.nan
    rows = head_topk(logits_NV, torch.zeros(2, dtype=torch.int64), 8, TAUS)
    assert rows.lse_N[0].isfinite() and not rows.lse_N[1].isfinite()


@pytest.mark.parametrize("k", [0, 41])
def test_impossible_k_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match="ids"):
        head_topk(torch.randn(2, 40), torch.zeros(2, dtype=torch.int64), k, TAUS)


def sharded(logits_NV: Tensor, targets_N: Tensor, k: int, bounds: list[int], **more: object) -> list:
    """Run every vocabulary shard in a thread of its own, meeting at each gather."""
    count = len(bounds) - 1
    meeting, slots, results = threading.Barrier(count), [None] * count, [None] * count

    def work(rank: int) -> None:
        def gather(x: Tensor) -> Tensor:
            slots[rank] = x
            meeting.wait()
            everyone = torch.stack(list(slots))
            meeting.wait()
            return everyone

        shard = VocabShard(bounds[rank], gather)
        results[rank] = head_topk(
            logits_NV[:, bounds[rank] : bounds[rank + 1]], targets_N, k, TAUS, shard=shard, **more
        )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return results


@pytest.mark.parametrize("bounds", [[0, 1500, 3001], [0, 30, 3000, 3001]])
def test_vocabulary_shards_agree_with_the_whole(bounds: list[int]) -> None:
    """Every rank gets the rows of the whole vocabulary, ties included, from shards smaller than k too."""
    torch.manual_seed(2)
    logits_NV = (torch.randn(21, 3001) * 2).bfloat16()
    targets_N = torch.randint(3001, (21,))
    targets_N[3] = -1
    identity = {"sequence_ids_N": torch.arange(21), "positions_N": torch.arange(21) + 5}
    whole = head_topk(logits_NV, targets_N, 64, TAUS, tail_samples=7, seed=1, **identity)
    for rows in sharded(logits_NV, targets_N, 64, bounds, tail_samples=7, seed=1, **identity):
        assert torch.equal(rows.ids_NK, whole.ids_NK) and torch.equal(rows.logits_NK, whole.logits_NK)
        torch.testing.assert_close(rows.target_logit_N, whole.target_logit_N, equal_nan=True)
        torch.testing.assert_close(rows.lse_N, whole.lse_N)
        torch.testing.assert_close(rows.log_tail_NR, whole.log_tail_NR)
        assert (rows.tail_ids_NM == whole.tail_ids_NM).float().mean() > 0.99  # a draw on a rounded edge may move
        drawn_NM = logits_NV.float().gather(1, rows.tail_ids_NM.long())
        torch.testing.assert_close(rows.tail_logits_NM, drawn_NM, rtol=0, atol=1e-5)


def test_tail_draws_follow_the_tail() -> None:
    """Chi-square of 40,000 draws over 60 tail ids; no id of the top k is ever drawn."""
    torch.manual_seed(3)
    logits_1V, k, draws = torch.randn(1, 68) * 1.5, 8, 40000
    rows = head_topk(
        logits_1V, torch.tensor([0]), k, TAUS, tail_samples=draws, seed=5,
        sequence_ids_N=torch.tensor([77]), positions_N=torch.tensor([3]),
    )  # fmt: skip
    ids = rows.tail_ids_NM[0].long()
    assert not set(ids.tolist()) & set(rows.ids_NK[0].tolist())
    p_V = logits_1V[0].double().scatter(0, rows.ids_NK[0].long(), -torch.inf).softmax(0)
    expected, seen = p_V * draws, torch.bincount(ids, minlength=68)
    inside = expected > 0
    chi_square = ((seen - expected)[inside] ** 2 / expected[inside]).sum()
    assert chi_square < 59 + 4 * math.sqrt(2 * 59)
    torch.testing.assert_close(rows.tail_logits_NM[0], logits_1V[0][ids], rtol=0, atol=1e-5)


def test_draws_depend_on_seed_sequence_and_position_only() -> None:
    sequence, position = torch.tensor([4, 4, (3 << 32) + 4]), torch.tensor([0, 1, 0])
    base = draw_uniforms(9, sequence, position, 6)
    assert ((base >= 0) & (base < 1)).all() and base.unique().numel() == base.numel()
    assert torch.equal(base[1:2, :4], draw_uniforms(9, sequence[1:2], position[1:2], 4))
    assert not (base == draw_uniforms(10, sequence, position, 6)).any()
