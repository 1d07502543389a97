"""A cache whose manifest, plan and teacher folder were written by a dump's own code, and its shards by the toy teacher.

config = dump_config(tmp_path)      # a small model, a corpus, and settings that name them
cache = write_prepared_cache(config)
prepare(config)                     # what a dump does before its engine starts: goes on with the cache
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from helpers_cache import STRIDE, WORDS, commit_toy_shard, toy_tokenizer
from safetensors.numpy import save_file

from pipeline.schema import HELDOUT_UNIT
from teacher_dump.corpus import CorpusConfig
from teacher_dump.engine import EngineOptions
from teacher_dump.settings import DumpConfig
from teacher_dump.work import prepare

VOCABULARY, WIDTH, LENGTH, ROWS = 61, 64, 32, 4


def write_model(folder: Path, seed: int = 0) -> Path:
    """What a dump reads of a Hugging Face folder before its engine starts: ends, config and tokenizer, no layers."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    tensors = {
        "model.embed_tokens.weight": 0.3 * rng.standard_normal((VOCABULARY, WIDTH)).astype(np.float32),
        "model.norm.weight": np.ones(WIDTH, np.float32),
    }
    save_file(tensors, str(folder / "model.safetensors"))
    config = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    toy_tokenizer(VOCABULARY).save(str(folder / "tokenizer.json"))
    return folder


def write_corpus(path: Path, text_bytes: int, seed: int = 0) -> Path:
    """Sentences as JSON lines, `text_bytes` of them and a little more."""
    rng = np.random.default_rng(seed)
    with open(path, "w", encoding="utf-8") as file:
        number = 0
        while file.tell() < text_bytes:
            text = " ".join(rng.choice(WORDS, size=200))
            file.write(json.dumps({"id": f"doc-{number}", "text": text}) + "\n")
            number += 1
    return path


def dump_config(folder: Path, shards: int = 2, **changes: Any) -> DumpConfig:
    """Settings of a dump with every column; model and corpus are written under `folder` unless they are there."""
    if not (folder / "model").exists():
        write_model(folder / "model")
        write_corpus(folder / "corpus.jsonl", 8 * STRIDE)
    settings: dict[str, Any] = {
        "corpus": CorpusConfig(str(folder / "corpus.jsonl"), heldout_fraction=0.3, range_bytes=STRIDE),
        "cache": folder / "cache",
        "teacher": str(folder / "model"),
        "shards": shards,
        "tokens_per_shard": ROWS * LENGTH,
        "length": LENGTH,
        "k": 8,
        "block": 8,
        "groups": 2,
        "window": 8,
        "tail_samples": 2,
        "seed": 3,
        "engine": EngineOptions(dtype="float32"),
    }
    return DumpConfig(**{**settings, **changes})


def write_prepared_cache(config: DumpConfig) -> Path:
    """Run what a dump does before its engine starts, then commit toy rows as its shards."""
    work = prepare(config)
    for unit in [*range(config.shards), *(HELDOUT_UNIT + i for i in range(config.heldout_shards))]:
        commit_toy_shard(config.cache, work.manifest, unit, ROWS)
    return config.cache
