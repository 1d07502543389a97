"""A teacher's config.json under common names, and the memory for keys and values that the engine asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from teacher_dump.kv_memory import kv_cache_bytes
from teacher_dump.model_config import read_config

LLAMA = {"vocab_size": 9, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
GPT2 = {"model_type": "gpt2", "vocab_size": 9, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128}
DEEPSEEK_V2_LITE = {
    "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048, "num_hidden_layers": 27,
    "num_attention_heads": 16, "num_key_value_heads": 16, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128, "v_head_dim": 128,
}  # fmt: skip


def written(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "config.json"


def test_names_of_its_own(tmp_path: Path) -> None:
    config = read_config(written(tmp_path, GPT2))
    assert {name: config[name] for name in LLAMA} == LLAMA and config["max_position_embeddings"] == 128


def test_the_language_models_part_comes_first(tmp_path: Path) -> None:
    config = read_config(written(tmp_path, {"hidden_size": 1, "text_config": LLAMA}))
    assert config["hidden_size"] == 64
    assert read_config(written(tmp_path, {**LLAMA, "text_config": None}))["hidden_size"] == 64


@pytest.mark.parametrize("model_type", ["gpt2", "nobody_knows", None])
def test_a_missing_size_is_named(tmp_path: Path, model_type: str | None) -> None:
    config = {**GPT2, "model_type": model_type}
    del config["n_head"]
    lacking = "num_attention_heads:" if model_type == "gpt2" else "hidden_size, num_hidden_layers, num_attention_heads:"
    with pytest.raises(UserError, match=rf"config\.json lacks {lacking} the teacher must be"):
        read_config(written(tmp_path, config))


def test_room_for_two_steps() -> None:
    """Rows of 300 tokens and one more take two pages of 256; four rows, two pages to spare, twice."""
    pages = 2 * (4 * 2 + 2)
    assert kv_cache_bytes(LLAMA, 300, 4) == pages * 256 * 3 * (2 * 4 * 16) * 4
    assert kv_cache_bytes({**LLAMA, "num_key_value_heads": 2}, 300, 4) == pages * 256 * 3 * (2 * 2 * 16) * 4
    assert kv_cache_bytes({**LLAMA, "head_dim": 32}, 300, 4) == pages * 256 * 3 * (2 * 4 * 32) * 4
    assert kv_cache_bytes(LLAMA, 255, 4) == 2 * (4 * 1 + 2) * 256 * 3 * (2 * 4 * 16) * 4


def test_devices_share_the_key_heads() -> None:
    grouped = {**LLAMA, "num_key_value_heads": 2}
    whole = kv_cache_bytes(grouped, 300, 4)
    assert [whole // kv_cache_bytes(grouped, 300, 4, parts) for parts in (1, 2, 4)] == [1, 2, 2]  # one head at least


def test_latent_attention_keeps_one_latent_for_all_heads() -> None:
    wanted = 2 * (4 * 2 + 2) * 256 * 27 * (512 + 64) * 4
    assert [kv_cache_bytes(DEEPSEEK_V2_LITE, 300, 4, parts) for parts in (1, 2, 4)] == [wanted] * 3


def test_latent_attention_unfolded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ordinary attention of heads of 128 + 64, where vLLM does so or is told to."""
    wanted = 2 * (4 * 2 + 2) * 256 * 27 * (2 * 16 * 192) * 4
    assert kv_cache_bytes({**DEEPSEEK_V2_LITE, "model_type": "minicpm3"}, 300, 4) == wanted
    monkeypatch.setenv("VLLM_MLA_DISABLE", "1")
    assert kv_cache_bytes(DEEPSEEK_V2_LITE, 300, 4) == wanted


def test_a_gpt2s_keys_and_values(tmp_path: Path) -> None:
    config = read_config(written(tmp_path, GPT2))
    assert kv_cache_bytes(config, 64, 2) == kv_cache_bytes(LLAMA, 64, 2)
