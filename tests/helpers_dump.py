"""A toy teacher and corpus on disk, and the command line that dumps them through the real vLLM."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pipeline.cache import Cache

REPOSITORY = Path(__file__).resolve().parent.parent
WORDS = "the a river stone light of and runs under cold bridge where two old men speak about rain 1 27 404".split()
SHARDS = 24
"""Enough that an interruption after the first shard still finds work left."""


def byte_tokenizer() -> Tokenizer:
    """One token a byte of the byte-level alphabet, then the separator."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def write_toy_teacher(path: Path, seed: int = 0) -> Path:
    """A random Llama of 3 layers and 263 ids as a Hugging Face folder, with a byte tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=263,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.1,
        eos_token_id=256,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).float().save_pretrained(path)
    byte_tokenizer().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return path


def write_toy_corpus(path: Path, documents: int = 400, seed: int = 0) -> Path:
    """Random sentences as JSON lines."""
    rng = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(documents):
            text = " ".join(rng.choice(WORDS) for _ in range(rng.randrange(3, 60)))
            file.write(json.dumps({"id": f"doc{number}", "text": text}) + "\n")
    return path


def dump_command(teacher: Path, corpus: Path, cache: Path, shards: int, *more: str) -> list[str]:
    """The command line of a toy dump: T = 64, K = 8, 2 groups, hidden states, 512 tokens a shard."""
    return [
        *(sys.executable, "-m", "teacher_dump", "--teacher", str(teacher), "--corpus.source", str(corpus)),
        *("--cache", str(cache), "--shards", str(shards), "--heldout_shards", "1", "--length", "64"),
        *("--tokens_per_shard", "512", "--k", "8", "--block", "16", "--groups", "2", "--window", "16"),
        *("--corpus.range_bytes", "2048", "--corpus.bytes_per_token", "2", "--engine.dtype", "float32", *more),
    ]


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **more}


def dump(teacher: Path, corpus: Path, cache: Path, shards: int, *more: str) -> subprocess.CompletedProcess[str]:
    """Run a toy dump to its end."""
    command = dump_command(teacher, corpus, cache, shards, *more)
    return subprocess.run(command, env=environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=300)


def rows(cache: Path) -> dict[str, dict[str, np.ndarray]]:
    """Every column of every shard, by shard name."""
    opened = Cache(cache)
    found: dict[str, dict[str, np.ndarray]] = {}
    for split in ("train", "heldout"):
        for record in opened.shards(split):
            with opened.open(record) as shard:
                assert shard.row_groups == 1
                found[record.name] = shard.read_group(0)
    return found


def assert_same_rows(a: dict[str, dict[str, np.ndarray]], b: dict[str, dict[str, np.ndarray]]) -> None:
    for name in a.keys() & b.keys():
        for column in a[name]:
            if column == "doc_ids":
                assert a[name][column] == b[name][column], name
            else:
                np.testing.assert_array_equal(a[name][column], b[name][column], err_msg=f"{name} {column}")
