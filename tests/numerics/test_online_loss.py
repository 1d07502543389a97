"""The loss with the teacher in the loop, against plain logits and against a cache of the whole vocabulary.

Legend: N positions, D width of the student and E of the teacher, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.quality.online import full_kd_sums
from pipeline.errors import UserError
from student.data.batch import IGNORE
from student.evaluation.hugging_face import CausalLM
from student.losses.fused import Head, TeacherTopK, fused_kd_sums

N, D, V = 23, 12, 31
WEIGHT_CE, WEIGHT_KL, TAU = 0.3, 1.1, 1.4


def tiny_teacher(vocab: int = V) -> CausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, initializer_range=0.5, **shape)).eval()
    return CausalLM(model, "tiny", torch.device("cpu"))


def inputs(head_options: dict[str, Any], vocab: int = V) -> tuple[Tensor, Head, Tensor, CausalLM, Tensor, Tensor]:
    torch.manual_seed(0)
    teacher = tiny_teacher(vocab)
    ids_1N = torch.randint(V, (1, N))
    h_NE = teacher.hidden(ids_1N)[0]
    head = Head(torch.randn(V, D), **head_options)
    target_N = torch.randint(V, (N,))
    target_N[4] = IGNORE
    return torch.randn(N, D, requires_grad=True), head, target_N, teacher, h_NE, teacher.logits(h_NE)[:, :V]


@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.5, "soft_cap": 3.0}], ids=["plain", "scaled and capped"])
@pytest.mark.parametrize("chunk", [5, 64])
def test_it_is_the_cached_loss_with_every_id(options: dict[str, Any], chunk: int) -> None:
    """K = V: KL_{K+1} is the KL, its tail empty."""
    h_ND, head, target_N, teacher, h_NE, logits_NV = inputs(options)
    found = full_kd_sums(h_ND, head, target_N, teacher, h_NE, WEIGHT_CE, WEIGHT_KL, TAU, chunk)
    (found_ND,) = torch.autograd.grad(found.total, h_ND)
    top = logits_NV.sort(dim=-1, descending=True)
    everything = TeacherTopK(top.indices, top.values, torch.full((N,), -torch.inf))
    expected = fused_kd_sums(h_ND, head, target_N, everything, WEIGHT_CE, WEIGHT_KL, TAU)
    (expected_ND,) = torch.autograd.grad(expected.total, h_ND)
    for name in ("total", "ce", "kl"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_ND, expected_ND, rtol=1e-4, atol=1e-5)
    assert not found_ND[4].any() and found.kl > 0


def test_a_padded_vocabulary_of_the_teacher_is_cut() -> None:
    h_ND, head, target_N, teacher, h_NE, logits_NV = inputs({}, vocab=V + 5)
    found = full_kd_sums(h_ND, head, target_N, teacher, h_NE, 0.0, 1.0, 1.0, 8)
    log_p_NV, log_q_NV = logits_NV.log_softmax(-1), (h_ND @ head.weight_VD.T).log_softmax(-1)
    kl_N = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)
    torch.testing.assert_close(found.kl, kl_N[target_N != IGNORE].sum().detach())


def test_a_trained_head_is_refused() -> None:
    h_ND, head, target_N, teacher, h_NE, _ = inputs({})
    head.weight_VD.requires_grad_()
    with pytest.raises(UserError, match="no gradient for a trained head: set model.student.train_head to false"):
        full_kd_sums(h_ND, head, target_N, teacher, h_NE, 0.0, 1.0, 1.0, 8)
