"""`python -m benchmarks.kl_gradients`: its truth is the truth, and what it calls bias and noise are that."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.kl_gradients import NORMALISED, Pair, compare, found_gradient, measure, top_k, true_gradient


@pytest.fixture(scope="module")
def pair() -> Pair:
    generator = torch.Generator().manual_seed(0)
    head_VD = torch.randn(120, 8, generator=generator)
    teacher_ND = torch.randn(300, 8, generator=generator)
    return Pair(teacher_ND, teacher_ND + 0.5 * torch.randn(300, 8, generator=generator), head_VD)


@pytest.mark.parametrize("tau", [1.0, 1.6])
def test_all_ids_give_the_true_gradient(pair: Pair, tau: float) -> None:
    h_ND = pair.student_ND.clone().requires_grad_()
    log_p, log_q = ((h @ pair.head_VD.T / tau).log_softmax(-1) for h in (pair.teacher_ND, h_ND))
    kl = (log_p.exp() * (log_p - log_q)).sum()
    (expected_ND,) = torch.autograd.grad(tau * kl, h_ND)
    truth_ND, mean = true_gradient(pair, tau)
    torch.testing.assert_close(truth_ND, expected_ND, rtol=1e-4, atol=1e-5)
    assert mean == pytest.approx(float(kl.detach()) / 300, rel=1e-5)
    generator = torch.Generator().manual_seed(1)
    teacher, mass = top_k(pair, 119, tau, 3, generator)
    assert 0 < mass < 1e-2
    torch.testing.assert_close(found_gradient(pair, teacher, tau, "tail"), expected_ND, rtol=1e-4, atol=1e-5)


def test_bias_is_told_from_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    truth_ND, h_ND = torch.randn(200, 6, generator=generator), torch.randn(200, 6, generator=generator)
    noise_SND = 0.4 * torch.randn(50, 200, 6, generator=generator)
    unbiased, biased = (
        compare(truth_ND + noise_SND, truth_ND, h_ND),
        compare(1.3 * truth_ND + noise_SND, truth_ND, h_ND),
    )
    assert unbiased["noise"] == pytest.approx(0.4, rel=0.05) == biased["noise"]
    assert unbiased["bias"] < 0.03 and biased["bias"] == pytest.approx(0.3, rel=0.05)
    alone = compare(1.3 * truth_ND[None], truth_ND, h_ND)
    assert alone["bias"] == pytest.approx(alone["layer_bias"]) == pytest.approx(0.3, rel=1e-4)
    assert (alone["noise"], alone["layer_cosine"]) == (0.0, pytest.approx(1.0))


def test_it_ranks_the_divergences(pair: Pair) -> None:
    rows = list(measure(pair, [6], [1.0, 1.5], [2, 8], 12))
    normalised = [row for row in rows if row["divergence"] == NORMALISED]
    rows = [row for row in rows if row["divergence"] != NORMALISED]
    assert [row["divergence"] for row in rows] == ["tail", "renormalised", "sampled", "sampled"] * 2
    for tau in (1.0, 1.5):
        tail, renormalised, two, eight = (row for row in rows if row["tau"] == tau)
        assert renormalised["bias"] > tail["bias"] > 0.05
        assert two["noise"] / eight["noise"] == pytest.approx(2.0, rel=0.3) and eight["bias"] < tail["bias"]
    assert [(row["tau"], row["draws"]) for row in normalised] == [(1.5, 2), (1.5, 8)]
    for other, plain in zip(normalised, rows[-2:], strict=True):
        assert other["bias"] > plain["bias"] and other["noise"] < plain["noise"]
    assert all(math.isfinite(v) for row in [*rows, *normalised] for v in row.values() if isinstance(v, float))
