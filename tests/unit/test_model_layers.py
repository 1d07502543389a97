"""Which layers attention is captured of, how they treat their scores, and where the head is.

The layers are stand-ins with the attributes that vLLM's classes of the same names have; real ones are in
tests/end_to_end/test_parity_hf.py.
"""

from __future__ import annotations

import sys
from enum import Enum
from types import ModuleType
from typing import Any

import pytest
import torch

from pipeline.errors import UserError
from teacher_dump.lse_tap import LseTap, tap_of
from teacher_dump.model_layers import attention_layers, attention_shape, head_owner


class AttentionType(str, Enum):  # noqa: UP042 - as vLLM's is
    DECODER = "decoder"
    ENCODER_ONLY = "encoder_only"
    ENCODER_DECODER = "encoder_decoder"


class CPUAttentionBackendImpl:
    """Keeps the window as it is given, -1 for none."""

    def __init__(self, scale: float, window: int | None, soft_cap: float | None, alibi: Any, sinks: Any) -> None:
        self.scale, self.alibi_slopes, self.sinks = scale, alibi, sinks
        self.sliding_window: Any = -1 if window is None else window
        self.logits_soft_cap = soft_cap or 0


class FlashAttentionImpl(CPUAttentionBackendImpl):
    """Keeps how many tokens before a query and after it are seen."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        window = args[1]
        self.sliding_window = (-1, -1) if window is None else (window - 1, 0)


class AttentionLayerBase:
    """Base of everything that keeps a state between tokens."""


class Attention(AttentionLayerBase):
    def __init__(
        self, impl: type = CPUAttentionBackendImpl, *, window: int | None = None, soft_cap: float | None = None,
        alibi: Any = None, sinks: Any = None, **more: Any,
    ) -> None:  # fmt: skip
        self.num_heads, self.num_kv_heads, self.head_size = 6, 2, 32
        self.sliding_window, self.use_alibi_sqrt, self.kv_cache_dtype = window, False, "auto"
        self.attn_type: str = AttentionType.DECODER
        self.kv_sharing_target_layer_name: str | None = None
        self.impl = impl(0.25, window, soft_cap, alibi, sinks)
        vars(self).update(more)


class CrossAttention(Attention):
    def __init__(self) -> None:
        super().__init__(attn_type=AttentionType.ENCODER_DECODER)


class ChunkedLocalAttention(Attention):
    pass


class MLAAttention(AttentionLayerBase):
    def __init__(self) -> None:
        self.num_heads, self.num_kv_heads, self.kv_lora_rank, self.sliding_window = 6, 1, 512, None


class MambaMixer2(AttentionLayerBase):
    pass


class FusedMoE:
    """No attention, in the same dictionary."""


BACKENDS = [CPUAttentionBackendImpl, FlashAttentionImpl]


def named(*layers: Any) -> dict[str, Any]:
    return {f"model.layers.{depth}.self_attn.attn": layer for depth, layer in enumerate(layers)}


def test_layers_come_by_depth_without_the_experts() -> None:
    found = Attention(), Attention(window=24)
    context = {
        "model.layers.10.self_attn.attn": found[1],
        "model.layers.2.mlp.experts": FusedMoE(),
        "model.layers.2.self_attn.attn": found[0],
    }
    layers = attention_layers(context)
    assert [name for name, _ in layers] == ["model.layers.2.self_attn.attn", "model.layers.10.self_attn.attn"]
    assert [layer for _, layer in layers] == list(found)


@pytest.mark.parametrize(("layers", "said"), [
    ([MLAAttention()], "layers.0.self_attn.attn is MLAAttention"),
    ([Attention(), MambaMixer2()], "layers.1.self_attn.attn is MambaMixer2"),
    ([Attention(), CrossAttention()], "layers.1.self_attn.attn is CrossAttention"),
    ([ChunkedLocalAttention()], "layers.0.self_attn.attn is ChunkedLocalAttention"),
    ([Attention(attn_type=AttentionType.ENCODER_ONLY)], "layers.0.self_attn.attn attends as encoder_only"),
    ([Attention(attn_type="encoder_only")], "layers.0.self_attn.attn attends as encoder_only"),
    ([Attention(kv_sharing_target_layer_name="x")], "layers.0.self_attn.attn reads another layer's keys"),
    ([Attention(kv_cache_dtype="fp8_e4m3")], "layers.0.self_attn.attn quantises its keys or uses square-root ALiBi"),
    ([Attention(use_alibi_sqrt=True)], "layers.0.self_attn.attn quantises its keys or uses square-root ALiBi"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_what_cannot_be_captured_is_refused_by_name(layers: list[Any], said: str) -> None:
    with pytest.raises(UserError) as raised:
        attention_layers(named(*layers))
    wanted = f"the teacher's layer model.{said}: its attention cannot be captured; set block: 0"
    assert str(raised.value) == wanted


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(UserError, match="has no attention layers: its attention cannot be captured; set block: 0"):
        attention_layers({"model.layers.0.mlp.experts": FusedMoE()})


@pytest.mark.parametrize("impl", BACKENDS)
def test_plain_attention(impl: type) -> None:
    shape = attention_shape(Attention(impl))
    assert (shape.scale, shape.window, shape.soft_cap, shape.alibi_H, shape.sinks_H) == (0.25, 0, 0.0, None, None)


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("window", [1, 24])
def test_a_window_counts_the_query_itself(impl: type, window: int) -> None:
    layer = Attention(impl, window=window)
    assert attention_shape(layer).window == window
    layer.sliding_window = None  # then the backend's
    assert attention_shape(layer).window == window


def test_soft_cap_slopes_and_sinks() -> None:
    sinks_H = torch.linspace(-1, 1, 6)
    layer = Attention(soft_cap=50.0, alibi=[0.5, 0.25], sinks=sinks_H)
    shape = attention_shape(layer)
    assert shape.soft_cap == 50.0 and shape.sinks_H is sinks_H and shape.alibi_H is not None
    assert (shape.alibi_H.dtype, shape.alibi_H.tolist()) == (torch.float32, [0.5, 0.25])
    layer.impl.sinks = sinks_H.bfloat16()  # cast after loading: read at every call
    assert attention_shape(layer).sinks_H is layer.impl.sinks


def test_a_backend_without_caps_or_sinks() -> None:
    layer = Attention()
    del layer.impl.logits_soft_cap, layer.impl.sinks
    assert attention_shape(layer).soft_cap == 0.0 and attention_shape(layer).sinks_H is None


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module with a FlashAttention that gives its logsumexp where it is asked for it, and implementations in it."""
    module = ModuleType("backend_of_a_test")

    def flash_attn_varlen_func(q: int, return_softmax_lse: bool = False) -> Any:
        return (2 * q, f"lse of {q}") if return_softmax_lse else 2 * q

    vars(module)["flash_attn_varlen_func"] = flash_attn_varlen_func
    for sinks in (None, torch.zeros(6)):
        name = "Plain" if sinks is None else "Sunk"
        vars(module)[name] = type(name, (), {"sinks": sinks, "__module__": module.__name__})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_the_tap_keeps_the_logsumexp_while_open(backend: ModuleType) -> None:
    tap = tap_of(backend.Plain())
    assert isinstance(tap, LseTap) and tap is backend.flash_attn_varlen_func
    assert tap_of(backend.Plain()) is tap  # one for all layers
    assert backend.flash_attn_varlen_func(3) == 6 and tap.lse_HN is None
    with tap.opened():
        assert backend.flash_attn_varlen_func(4) == 8 and tap.lse_HN == "lse of 4"
        assert backend.flash_attn_varlen_func(5, return_softmax_lse=True) == (10, "lse of 5")
        assert tap.lse_HN == "lse of 4"  # what asked for itself is none of ours
    assert backend.flash_attn_varlen_func(6) == 12 and tap.lse_HN == "lse of 4"
    with tap.opened():
        assert tap.lse_HN is None


def test_no_tap_with_sinks_or_without_flash_attention(backend: ModuleType) -> None:
    assert tap_of(backend.Sunk()) is None
    assert not isinstance(backend.flash_attn_varlen_func, LseTap)
    assert tap_of(Attention().impl) is None


class Model(torch.nn.Module):
    """A causal model whose head's matrix is where `path` says."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.logits_processor = torch.nn.Identity()
        self.model = torch.nn.Module()
        *parts, name = path.split(".")
        self.matrix = torch.nn.Linear(2, 3)
        (self.get_submodule(".".join(parts))).add_module(name, self.matrix)


@pytest.mark.parametrize("path", ["lm_head", "output", "model.embed_tokens"])
def test_the_head_is_found(path: str) -> None:
    model = Model(path)
    outer = torch.nn.Module()
    outer.add_module("language_model", model)
    for whole in (model, outer):
        owner, matrix = head_owner(whole)
        assert owner is model and matrix is model.matrix


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(UserError, match="Model has no language model head: choose a causal language model"):
        head_owner(Model("model.pooler"))
