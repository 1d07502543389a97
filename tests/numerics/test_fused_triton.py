"""The GPU's loss rows against the plain chunk in float64: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from student.data.batch import IGNORE
from student.losses.fused import Head, TailDraws, TeacherTopK, _after_head, _before_head, _chunk
from student.losses.fused_triton import kd_rows_
from student.losses.sparse_kd import Divergence

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(rows: int, vocab: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, TeacherTopK]:
    generator = torch.Generator().manual_seed(seed)
    raw_CV = 3 * torch.randn(rows, vocab, generator=generator)
    teacher_CV = raw_CV + torch.randn(rows, vocab, generator=generator)
    logits_CK, ids_CK = teacher_CV.topk(k)
    tail_C = teacher_CV.div(1.3).scatter(1, ids_CK, -torch.inf).logsumexp(-1)
    target_C = torch.randint(vocab, (rows,), generator=generator)
    target_C[0] = ids_CK[0, k // 2]  # a target inside the top k, others outside
    return raw_CV, target_C, TeacherTopK(ids_CK, logits_CK, tail_C)


def with_draws(
    raw_CV: torch.Tensor, target_C: torch.Tensor, teacher: TeacherTopK, draws: int
) -> tuple[torch.Tensor, torch.Tensor, TeacherTopK]:
    """The same with draws from the tail, some ids twice and the second row's target among them."""
    generator = torch.Generator().manual_seed(7)
    tail_CV = torch.ones_like(raw_CV).scatter(1, teacher.ids_NK, 0.0)
    ids_CM = tail_CV.multinomial(draws, replacement=True, generator=generator)
    ids_CM[:, -1] = ids_CM[:, 0]
    target_C = target_C.clone()
    target_C[1] = ids_CM[1, 1]
    logits_CM = teacher.logits_NK[:, -1:] - 2 * torch.rand(ids_CM.shape, generator=generator)
    logits_CM = logits_CM.gather(1, (ids_CM[:, :, None] == ids_CM[:, None, :]).int().argmax(-1))  # one logit an id
    tail = TailDraws(ids_CM, logits_CM, teacher.log_tail_N + 0.3)
    return raw_CV, target_C, replace(teacher, draws=tail)


def expected(
    raw_CV: torch.Tensor,
    target_C: torch.Tensor,
    teacher: TeacherTopK,
    weights: tuple[float, float],
    tau: float,
    head: Head,
    divergence: Divergence = "tail",
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    draws = teacher.draws
    if draws is not None:
        draws = TailDraws(draws.ids_NM, draws.logits_NM.double(), draws.log_tail_1_N.double())
    double = TeacherTopK(teacher.ids_NK, teacher.logits_NK.double(), teacher.log_tail_N.double(), draws)
    logits_CV = _after_head(raw_CV.double().clone(), head)
    ce_C, kl_C, grad_CV = _chunk(logits_CV.clone(), target_C, double, *weights, tau, True, divergence)
    assert grad_CV is not None
    return ce_C, kl_C, _before_head(grad_CV, logits_CV, head)


@pytest.mark.parametrize(("rows", "vocab", "k"), [(3, 517, 16), (2, 9001, 64), (5, 40, 1), (2, 20000, 256)])
@pytest.mark.parametrize("weights", [(0.2, 0.8), (1.0, 0.0), (0.0, 1.5)])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.5, None), (1.0, 8.0)])
def test_rows_equal_the_plain_chunk(
    rows: int, vocab: int, k: int, weights: tuple[float, float], scale: float, cap: float | None
) -> None:
    raw_CV, target_C, teacher = problem(rows, vocab, k)
    head = Head(torch.empty(0), scale, cap)
    want_ce, want_kl, want_grad = expected(raw_CV, target_C, teacher, weights, 1.3, head)
    grad_CV = raw_CV.to(DEVICE)
    ce_C, kl_C = kd_rows_(
        grad_CV, target_C.to(DEVICE), teacher.ids_NK.to(DEVICE), teacher.logits_NK.to(DEVICE),
        teacher.log_tail_N.to(DEVICE), *weights, 1.3, True, scale, cap,
    )  # fmt: skip
    torch.testing.assert_close(ce_C.cpu().double(), want_ce, rtol=1e-5, atol=1e-5)
    assert (kl_C is None) == (want_kl is None)
    if kl_C is not None and want_kl is not None:
        torch.testing.assert_close(kl_C.cpu().double(), want_kl, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad_CV.cpu().double(), want_grad, rtol=1e-4, atol=2e-6)


ON_GPU = pytest.param(3, 151_936, 64, marks=pytest.mark.skipif(DEVICE == "cpu", reason="takes the interpreter minutes"))


@pytest.mark.parametrize(("rows", "vocab", "k"), [(3, 517, 16), (2, 9001, 64), ON_GPU])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.5, 8.0)])
def test_bfloat16_rows_as_training_has_them(rows: int, vocab: int, k: int, scale: float, cap: float | None) -> None:
    """Terms as of the same rounded logits; a gradient rounded once, to half a step of bfloat16. (The interpreter cuts
    off where a GPU rounds: a whole step.)"""
    step = 2.0 ** (-7 if DEVICE == "cpu" else -8)
    raw_CV, target_C, teacher = problem(rows, vocab, k)
    raw_CV, head = raw_CV.bfloat16(), Head(torch.empty(0), scale, cap)
    want_ce, want_kl, want_grad = expected(raw_CV.float(), target_C, teacher, (0.2, 0.8), 1.3, head)
    grad_CV = raw_CV.to(DEVICE)
    ce_C, kl_C = launch(grad_CV, target_C, teacher, (0.2, 0.8), 1.3, head, "tail")
    assert grad_CV.dtype == torch.bfloat16 and kl_C is not None and want_kl is not None
    torch.testing.assert_close(ce_C.cpu().double(), want_ce, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kl_C.cpu().double(), want_kl, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad_CV.cpu().double(), want_grad, rtol=step, atol=2e-6)


def launch(
    grad_CV: torch.Tensor,
    target_C: torch.Tensor,
    teacher: TeacherTopK,
    weights: tuple[float, float],
    tau: float,
    head: Head,
    divergence: Divergence,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    parts = (x.to(DEVICE) for x in (target_C, teacher.ids_NK, teacher.logits_NK, teacher.log_tail_N))
    draws = None
    if teacher.draws is not None:
        tail = teacher.draws
        draws = tail.ids_NM.to(DEVICE), tail.logits_NM.to(DEVICE), tail.log_tail_1_N.to(DEVICE)
    shape = head.logit_scale, head.soft_cap
    return kd_rows_(grad_CV, *parts, *weights, tau, True, *shape, divergence, draws)


@pytest.mark.parametrize("divergence", ["renormalised", "sampled"])
@pytest.mark.parametrize(("vocab", "k", "draws", "tau"), [(517, 16, 5, 1.0), (9001, 64, 24, 1.7), (300, 1, 1, 2.0)])
@pytest.mark.parametrize(("weights", "scale", "cap"), [((0.2, 0.8), 1.0, None), ((0.0, 1.5), 0.7, 8.0)])
def test_rows_of_the_other_divergences_equal_the_plain_chunk(
    divergence: Divergence, vocab: int, k: int, draws: int, tau: float, weights: tuple[float, float], scale: float,
    cap: float | None,
) -> None:  # fmt: skip
    raw_CV, target_C, teacher = with_draws(*problem(3, vocab, k), max(draws, 2))
    head = Head(torch.empty(0), scale, cap)
    want_ce, want_kl, want_grad = expected(raw_CV, target_C, teacher, weights, tau, head, divergence)
    grad_CV = raw_CV.to(DEVICE)
    ce_C, kl_C = launch(grad_CV, target_C, teacher, weights, tau, head, divergence)
    assert kl_C is not None and want_kl is not None
    torch.testing.assert_close(ce_C.cpu().double(), want_ce, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kl_C.cpu().double(), want_kl, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad_CV.cpu().double(), want_grad, rtol=1e-4, atol=2e-6)


def test_draws_without_a_tail_change_nothing() -> None:
    """A dump writes no id and NaN where the K ids hold all mass."""
    raw_CV, target_C, teacher = problem(2, 32, 32)
    nothing = torch.full((2, 3), torch.nan)
    empty = TailDraws(torch.zeros(2, 3, dtype=torch.int64), nothing, torch.full((2,), -torch.inf))
    teacher = TeacherTopK(teacher.ids_NK, teacher.logits_NK, torch.full((2,), -torch.inf), empty)
    arguments = target_C, teacher, (0.3, 0.7), 1.4, Head(torch.empty(0))
    grad_CV, other_CV = raw_CV.to(DEVICE).clone(), raw_CV.to(DEVICE).clone()
    found, wanted = launch(grad_CV, *arguments, "sampled"), launch(other_CV, *arguments, "tail")
    want_ce, want_kl, want_grad = expected(raw_CV, *arguments, "sampled")
    for kl_C in (found[1], wanted[1]):
        assert kl_C is not None and want_kl is not None
        torch.testing.assert_close(kl_C.cpu().double(), want_kl, rtol=1e-5, atol=1e-5)
    for grad in (grad_CV, other_CV):
        torch.testing.assert_close(grad.cpu().double(), want_grad, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("divergence", ["tail", "renormalised", "sampled"])
def test_ignored_rows_count_in_nothing_and_may_hold_nan(divergence: Divergence) -> None:
    raw_CV, target_C, teacher = with_draws(*problem(3, 600, 8), 4)
    target_C[1] = IGNORE
    assert teacher.draws is not None
    for values in (teacher.logits_NK, teacher.log_tail_N, teacher.draws.logits_NM, teacher.draws.log_tail_1_N):
        values[1] = torch.nan
    grad_CV = raw_CV.to(DEVICE)
    ce_C, kl_C = launch(grad_CV, target_C, teacher, (0.5, 0.5), 1.5, Head(torch.empty(0)), divergence)
    assert kl_C is not None and (ce_C[1], kl_C[1]) == (0, 0) and not grad_CV[1].any()
    assert grad_CV.isfinite().all() and ce_C.isfinite().all() and kl_C.isfinite().all()


def test_without_a_tail_and_with_a_tiny_one() -> None:
    """K = V leaves no tail; a student whose tail is 1e-17 keeps its gradient's digits."""
    raw_CV, target_C, _ = problem(2, 32, 32)
    ids_CK = torch.arange(32).repeat(2, 1)
    teacher = TeacherTopK(ids_CK, raw_CV + 1.0, torch.full((2,), -torch.inf))
    tiny_CV = torch.randn(2, 700, generator=torch.Generator().manual_seed(3))
    tiny_CV[:, :8] += 45.0
    tiny = TeacherTopK(torch.arange(8).repeat(2, 1), torch.randn(2, 8), torch.full((2,), -2.0))
    for raw, some in ((raw_CV, teacher), (tiny_CV, tiny)):
        want_ce, want_kl, want_grad = expected(raw, target_C, some, (0.3, 0.7), 1.0, Head(torch.empty(0)))
        grad = raw.to(DEVICE).clone()
        ce, kl = kd_rows_(
            grad, target_C.to(DEVICE), some.ids_NK.to(DEVICE), some.logits_NK.to(DEVICE), some.log_tail_N.to(DEVICE),
            0.3, 0.7, 1.0, True,
        )  # fmt: skip
        assert kl is not None and want_kl is not None
        torch.testing.assert_close(kl.cpu().double(), want_kl, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ce.cpu().double(), want_ce, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad.cpu().double(), want_grad, rtol=1e-4, atol=2e-6)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.gpu
@pytest.mark.parametrize("divergence", ["tail", "renormalised", "sampled"])
def test_the_whole_loss_on_a_gpu_equals_the_cpus(divergence: Divergence) -> None:
    """Rows that count in nothing stay in on a GPU and are left out on a CPU; the weight's gradient too."""
    from student.losses.fused import fused_kd_sums

    raw_CV, target_C, teacher = with_draws(*problem(70, 3001, 16), 12)
    target_C[5:9] = IGNORE
    h_ND = torch.randn(70, 24, generator=torch.Generator().manual_seed(5))
    weight_VD = torch.randn(3001, 24, generator=torch.Generator().manual_seed(6))
    found = []
    for device in ("cpu", "cuda"):
        h = h_ND.detach().clone().to(device).requires_grad_()
        assert teacher.draws is not None
        draws = TailDraws(*(x.to(device) for x in vars(teacher.draws).values()))
        there = TeacherTopK(*(x.to(device) for x in (teacher.ids_NK, teacher.logits_NK, teacher.log_tail_N)), draws)
        weight = weight_VD.to(device, copy=True).requires_grad_()
        sums = fused_kd_sums(
            h, Head(weight), target_C.to(device), there, 0.2, 0.8, 1.3, chunk_rows=32, kl=divergence
        )  # fmt: skip
        sums.total.backward()
        assert h.grad is not None and weight.grad is not None
        found.append([x.detach().cpu() for x in (sums.total, sums.ce, sums.kl, h.grad, weight.grad)])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
