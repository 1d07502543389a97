"""The gradient of a trained head's weight out of the fused loss, against dense autograd in float64.

Legend: N positions, V vocabulary, D width, K top-k ids.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from student.data.batch import IGNORE
from student.losses import fused
from student.losses.fused import Head, TeacherTopK, fused_kd_sums
from student.losses.sparse_kd import Divergence, cross_entropy, kl_k1, kl_renormalised

N, V, D, K, TAU = 37, 211, 16, 9, 1.3
WEIGHTS = (0.3, 0.6 * TAU**2)
FACTOR = 0.37
"""What the loss is multiplied by after the sum, as the trainer does with the number of targets."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(padded: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h_ND, head_VD, teacher_NV and targets, float64; some positions without a target where `padded`."""
    generator = torch.Generator().manual_seed(11)
    h_ND = torch.randn(N, D, generator=generator, dtype=torch.float64)
    head_VD = torch.randn(V, D, generator=generator, dtype=torch.float64)
    teacher_NV = 3 * torch.randn(N, V, generator=generator, dtype=torch.float64)
    target_N = torch.randint(V, (N,), generator=generator)
    if padded:
        target_N[[0, 5, 36]] = IGNORE
        teacher_NV[[0, 5, 36]] = math.nan
    return h_ND, head_VD, teacher_NV, target_N


def top_k(teacher_NV: Tensor) -> TeacherTopK:
    top = teacher_NV.nan_to_num(0.0).topk(K, dim=-1)
    logits_NK = teacher_NV.gather(1, top.indices)
    return TeacherTopK(top.indices, logits_NK, (teacher_NV / TAU).scatter(1, top.indices, -math.inf).logsumexp(-1))


def dense(case: tuple[Tensor, ...], scale: float, cap: float | None, kl: Divergence = "tail") -> tuple[Tensor, Tensor]:
    """Gradients to h_ND and head_VD by plain autograd over the whole vocabulary."""
    h_ND, head_VD = (x.clone().requires_grad_() for x in case[:2])
    logits_NV = scale * (h_ND @ head_VD.T)
    if cap is not None:
        logits_NV = cap * torch.tanh(logits_NV / cap)
    top, valid_N = top_k(case[2]), case[3] != IGNORE
    ce = cross_entropy(logits_NV, case[3]).sum()
    if kl == "tail":
        divergence = kl_k1(logits_NV, top.ids_NK, top.logits_NK, top.log_tail_N, TAU, valid_N).sum()
    else:
        divergence = kl_renormalised(logits_NV, top.ids_NK, top.logits_NK, TAU, valid_N).sum()
    loss = FACTOR * (WEIGHTS[0] * ce + WEIGHTS[1] * divergence)
    return torch.autograd.grad(loss, (h_ND, head_VD))


def found(
    case: tuple[Tensor, ...], scale: float, cap: float | None, chunk: int, dtype: torch.dtype = torch.float64,
    device: str = "cpu", kl: Divergence = "tail",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    h_ND, head_VD = (x.to(device, dtype).requires_grad_() for x in case[:2])
    top = top_k(case[2])
    teacher = TeacherTopK(top.ids_NK.to(device), top.logits_NK.to(device, dtype), top.log_tail_N.to(device, dtype))
    sums = fused_kd_sums(
        h_ND, Head(head_VD, scale, cap), case[3].to(device), teacher, *WEIGHTS, TAU, chunk_rows=chunk, kl=kl
    )
    return torch.autograd.grad(FACTOR * sums.total, (h_ND, head_VD))


@pytest.mark.parametrize("chunk", [8, 64])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.5, None), (0.7, 5.0)])
@pytest.mark.parametrize("padded", [False, True])
def test_it_is_that_of_dense_autograd(padded: bool, scale: float, cap: float | None, chunk: int) -> None:
    case = problem(padded)
    for ours, theirs in zip(found(case, scale, cap, chunk), dense(case, scale, cap), strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.7, 5.0)])
@pytest.mark.parametrize("kl", ["tail", "renormalised"])
def test_so_is_that_of_the_gpus_rows(
    kl: Divergence, scale: float, cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, else with the same kernel in Triton's interpreter."""
    monkeypatch.setattr(fused, "_has_kernel", lambda *_: True)
    used: list[int] = []
    rows = fused._gpu_rows

    def seen(*arguments: Any) -> Any:
        used.append(1)
        return rows(*arguments)

    monkeypatch.setattr(fused, "_gpu_rows", seen)
    case = problem(padded=True)
    ours = found(case, scale, cap, 8, torch.float32, DEVICE, kl)
    assert len(used) > 4
    for single, exact in zip(ours, dense(case, scale, cap, kl), strict=True):
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.cpu().double(), exact, rtol=1e-4, atol=2e-5)


def test_bfloat16_products_of_many_chunks_lose_no_more_than_those_of_one() -> None:
    case = problem(padded=False)
    case = (case[0], 0.2 * case[1], *case[2:])
    _, exact_VD = dense(case, 1.0, None)
    errors = []
    for chunk in (64, 2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, grad_VD = found(case, 1.0, None, chunk, torch.float32)
        assert grad_VD.dtype == torch.float32
        errors.append(float((grad_VD.double() - exact_VD).norm() / exact_VD.norm()))
    assert 1e-5 < errors[0] < 0.02 and errors[1] < 1.2 * errors[0]


def test_a_head_that_is_frozen_or_only_measured_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("a weight gradient was computed")

    monkeypatch.setattr(fused, "_add_product", fail)
    h_ND, head_VD, teacher_NV, target_N = problem(padded=False)
    call = (target_N, top_k(teacher_NV), *WEIGHTS, TAU)
    fused_kd_sums(h_ND.clone().requires_grad_(), Head(head_VD), *call).total.backward()
    trained = Head(torch.nn.Parameter(head_VD))
    for quiet in (torch.no_grad(), torch.inference_mode()):
        with quiet:
            assert not fused_kd_sums(h_ND, trained, *call).total.requires_grad
    with pytest.raises(AssertionError, match="was computed"):
        fused_kd_sums(h_ND, trained, *call)
