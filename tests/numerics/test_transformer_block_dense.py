"""The transformer-shaped block against the same block written down densely: values, gradients, its attention maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers_export import shake
from helpers_student import toy_teacher
from helpers_transformer import dense_block, shape_of, student_of
from torch import Tensor

from student.blocks.implicit_attention import pool_dense
from student.blocks.transformer_block import TransformerBlock
from student.model import DistilXLSTM

SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "softmax, a head of keys each, no positions": {"kv_heads": 0, "rope_theta": 0.0},
    "softmax, one head of keys, wide heads": {"kv_heads": 1, "head_width": 24},
    "softmax, biases": {"qkv_bias": True, "rope_theta": 500.0},
    "none, grouped": {"feature_map": "none"},
    "none, no positions": {"feature_map": "none", "rope_theta": 0.0, "kv_heads": 4},
    "none, narrow heads, biases": {"feature_map": "none", "head_width": 6, "qkv_bias": True},
}
LENGTH = 70
"""More than a chunk of the cell."""


def block_of(name: str, dtype: torch.dtype = torch.float64, eps: float = 1e-5) -> TransformerBlock:
    torch.manual_seed(0)
    return shake(TransformerBlock(64, 4, shape_of(**SHAPES[name]), eps).to(dtype), by=0.1)  # type: ignore[type-var]


def rows(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, LENGTH, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@torch.no_grad()
@pytest.mark.parametrize("name", SHAPES)
def test_float64_is_the_definition(name: str) -> None:
    """cos and sin are float32: what positions add to the error."""
    block = block_of(name)
    tolerance = 1e-6 if block.rope_theta else 1e-10
    torch.testing.assert_close(block(rows()), dense_block(block, rows())[0], rtol=tolerance, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in SHAPES if not name.startswith("none")])
def test_float32_is_as_near_as_the_dense_form_in_float32(name: str) -> None:
    block = block_of(name)
    exact = dense_block(block, rows())[0]
    block = block.float()
    ours, dense = block(rows(torch.float32)), dense_block(block, rows(torch.float32))[0]
    assert float((ours - exact).abs().max()) <= 2 * float((dense - exact).abs().max()) + 1e-6


@pytest.mark.parametrize("name", SHAPES)
def test_gradients_are_those_of_the_definition(name: str) -> None:
    block, weight = block_of(name), torch.randn(2, LENGTH, 64, dtype=torch.float64)

    def gradients(y: Tensor, x: Tensor) -> dict[str, Tensor]:
        named = dict(block.named_parameters()) | {"x": x}
        return dict(zip(named, torch.autograd.grad((y * weight).sum(), list(named.values())), strict=True))

    x = rows().requires_grad_()
    expected = gradients(dense_block(block, x)[0], x)
    found = gradients(block(x), x)
    tolerance = 1e-6 if block.rope_theta else 1e-9
    for key, gradient in expected.items():
        scale = float(gradient.abs().max())
        # One bias for all input gates of a head cancels where rows are divided by their sum.
        assert scale > 1e-9 or key == "igate.bias", f"{key} has no gradient: nothing was compared"
        torch.testing.assert_close(
            found[key], gradient, rtol=0, atol=tolerance * scale + 1e-12, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize("name", ["grouped", "softmax, biases", "none, no positions"])
def test_a_cell_that_leaves_out_its_normalisers_gradient_changes_none(name: str) -> None:
    """As the GPU's kernel does. The column of ones and the norm over each head make up for it."""
    block = block_of(name, eps=1e-12)  # which the norm's invariance ends at
    x = rows().requires_grad_()
    parameters = [*block.parameters(), x]
    weight = torch.randn(2, LENGTH, 64, dtype=torch.float64)
    expected = torch.autograd.grad((block(x) * weight).sum(), parameters)

    def cell(q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor) -> Tensor:
        F_BHT = torch.nn.functional.logsigmoid(fgate[..., 0]).cumsum(-1)
        log_D = F_BHT[..., None] - F_BHT[..., None, :] + igate[..., 0][..., None, :]
        log_D = log_D.masked_fill(~torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(), -torch.inf)
        m = log_D.amax(-1, keepdim=True).detach()
        C = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5 * (log_D - m).exp()
        divisor = torch.maximum(C.sum(-1, keepdim=True).abs(), (-m).exp()) + 1e-6
        return C @ v / divisor.detach()

    block.cell = cell  # type: ignore[assignment]
    found = torch.autograd.grad((block(x) * weight).sum(), parameters)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_the_dense_form_without_the_divisors_gradient_is_another() -> None:
    """So the test above looks at something: a softmax attention needs that gradient."""
    block, x = block_of("grouped"), rows()
    with_it, without = (
        torch.autograd.grad(dense_block(block, x, detach_divisor=detach)[0].sum(), [block.k_proj.weight])[0]
        for detach in (False, True)
    )
    assert float((with_it - without).norm() / with_it.norm()) > 0.1


@pytest.mark.parametrize("name", ["grouped", "softmax, one head of keys, wide heads"])
def test_maps_are_the_attention_pooled(name: str) -> None:
    facts, tensors = toy_teacher()
    torch.manual_seed(0)
    model = shake(DistilXLSTM(student_of(**SHAPES[name]), facts, tensors, max_length=64)).double()
    ids_BT = torch.randint(97, (2, 64), generator=torch.Generator().manual_seed(2))
    out = model(ids_BT, map_block=16)
    assert sorted(out.maps) == [0, 1] and out.maps[0].shape == (2, 4, 4)
    assert torch.equal(out.h_BTD, model(ids_BT).h_BTD)
    x_BTD, losses = model.embed(ids_BT), []
    for index, block in enumerate(model.stack.blocks):
        x_BTD, A_BHTT = dense_block(block, x_BTD)
        expected_Bnn = pool_dense(A_BHTT, 16).mean(1)
        torch.testing.assert_close(out.maps[index], expected_Bnn, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(expected_Bnn.sum(-1), torch.ones(2, 4, dtype=torch.float64))
        losses.append((out.maps[index] - expected_Bnn.detach().roll(1, 0)).square().sum())
    sum(losses).backward()
    without = {name.rpartition("blocks.")[2] for name, p in model.named_parameters() if p.grad is None}
    last = {f"1.{n}" for n in ("o_proj.weight", "out_gate.weight", "v_proj.weight", "ffn_norm.weight")}
    assert last <= without and not any(name.startswith("0.") for name in without)
