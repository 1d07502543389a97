"""A Hugging Face model taken apart into hidden states and logits says what its own forward pass says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_cache import write_toy_cache
from helpers_teacher import VOCAB, make_teacher
from torch import Tensor, nn

from pipeline.errors import UserError
from student.evaluate import EvaluateOptions, load_teacher
from student.evaluation.hugging_face import CausalLM, load_causal_lm

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def tiny(kind: str) -> Any:
    """A random model; each kind does something else between the head's product and the logits."""
    import transformers

    configs = {
        "llama": lambda: transformers.LlamaConfig(**SHAPE),
        "soft cap": lambda: transformers.Gemma2Config(**SHAPE, final_logit_softcapping=0.5),
        "scale": lambda: transformers.GraniteConfig(**SHAPE, logits_scaling=3.0, tie_word_embeddings=True),
    }
    torch.manual_seed(3)
    return transformers.AutoModelForCausalLM.from_config(configs[kind]()).eval()


@pytest.mark.parametrize("kind", ["llama", "soft cap", "scale"])
def test_logits_of_hidden_states_are_the_models_own(kind: str) -> None:
    model = tiny(kind)
    ids_BT = torch.randint(0, 61, (3, 9))
    with torch.no_grad():
        expected_NV = model(ids_BT).logits.flatten(0, 1)
    taken = CausalLM(model, kind, torch.device("cpu"))
    h_BTD = taken.hidden(ids_BT)
    assert h_BTD.shape == (3, 9, 32)  # not logits: the head was found
    at_N = torch.tensor([5, 0, 26])
    torch.testing.assert_close(taken.logits(h_BTD.flatten(0, 1)[at_N]), expected_NV[at_N], atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(ids_BT).logits.flatten(0, 1), expected_NV)  # and left as it was
    assert (taken.vocab_size, taken.max_length) == (61, 64)


class NoHead(nn.Module):
    """A model that multiplies by its embedding without a module for it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.body, self.config, self.dtype = model.model, model.config, model.dtype

    def get_output_embeddings(self) -> nn.Module:
        module: nn.Module = self.body.embed_tokens
        return module

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        class Output:
            logits = self.body(input_ids).last_hidden_state @ self.body.embed_tokens.weight.T

        return Output


def test_a_model_that_calls_no_head_module_gives_its_logits() -> None:
    model = NoHead(tiny("llama"))
    ids_BT = torch.randint(0, 61, (2, 5))
    taken = CausalLM(model, "no head", torch.device("cpu"))
    with torch.no_grad():
        expected_BTV = model(ids_BT, use_cache=False).logits
    torch.testing.assert_close(taken.logits(taken.hidden(ids_BT)), expected_BTV)


def test_a_model_is_loaded_once(tmp_path: Path) -> None:
    source = str(make_teacher(tmp_path / "model"))
    first = load_causal_lm(source)
    assert load_causal_lm(source) is first and first.vocab_size == VOCAB
    half = load_causal_lm(source, "bfloat16")
    assert half is not first and half.model.dtype == torch.bfloat16
    h_BTD = half.hidden(torch.tensor([[1, 2, 3]]))
    assert half.logits(h_BTD[0]).dtype == torch.float32


def test_code_that_comes_with_a_model_is_run_only_when_the_user_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "config.json").write_text(
        '{"model_type": "own-kind", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}'
    )
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise ValueError('own code ran')\n")
    with pytest.raises(UserError, match=r"Python code of its own: read it, then add --trust_remote_code"):
        load_causal_lm(str(folder))
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UserError, match="own code ran"):
        load_causal_lm(str(folder), trust_remote_code=True)
    assert (tmp_path / "ran").exists()


def test_the_manifest_chooses_no_download(tmp_path: Path) -> None:
    from pipeline.cache import Cache

    cache = write_toy_cache(tmp_path / "cache", rows=2, length=16, block=8)
    with pytest.raises(UserError, match=r"'toy' is not here: name its folder or hub id with --teacher"):
        load_teacher(EvaluateOptions("run", str(cache), full_kl=True), Cache(cache), torch.device("cpu"))
