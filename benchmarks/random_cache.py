"""Rows of random numbers that look like a teacher's, and a cache of them: what a training loop is timed on.

Ids are drawn with small ones far more often than large ones, logits have bfloat16's digits and ties, tails and targets
agree with them: the shards compress, are read and are verified as a dump's. Nothing can be learnt from them.

Legend: R rows, T tokens a row, V vocabulary, K top-k ids, S temperatures, G depth groups, n = T/b blocks, D width.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.commit import commit_file, commit_json, new_claim_id
from pipeline.manifest import Manifest, create_or_match
from pipeline.schema import SCHEMA_MAJOR, CacheSpec, sequence_id
from pipeline.shard import Columns, commit_shard
from pipeline.teacher_folder import TeacherFacts, facts_record

TAUS = (1.0, 1.2, 1.5, 2.0)


def benchmark_spec(length: int, vocab: int, width: int, k: int = 64, block: int = 64, groups: int = 6) -> CacheSpec:
    """Shape of the rows: top-k, tails and maps, no hidden states."""
    return CacheSpec(length, vocab, k, TAUS, block, groups, 0, width, 0, "stream")


def random_columns(spec: CacheSpec, unit: int, first: int, rows: int, generator: torch.Generator) -> Columns:
    """All columns of R rows, as NumPy arrays; computed where the generator is."""
    device, shape = generator.device, (rows, spec.length)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    # Distinct and ascending: sorted draws of V - K ids, the j-th moved up by j.
    ids_RTK = ((spec.vocab_size - spec.k) * uniform(*shape, spec.k) ** 3).long().sort(-1).values
    ids_RTK += torch.arange(spec.k, device=device)
    drawn_RTK = (14.0 - 2.0 * uniform(*shape, spec.k).clamp_min(1e-6).log()).bfloat16().float()
    # Stable: among equal logits the ids stay in ascending order.
    logits_RTK, order_RTK = drawn_RTK.sort(dim=-1, descending=True, stable=True)
    ids_RTK = ids_RTK.gather(-1, order_RTK)

    # The tail as if all its ids had one logit: between 1% and 30% of the mass at tau 1.
    inside_RT, outside = logits_RTK.double().logsumexp(-1), math.log(spec.vocab_size - spec.k)
    mass_RT = 0.01 + 0.29 * uniform(*shape).double()
    level_RT = (inside_RT + (mass_RT / (1 - mass_RT)).log() - outside).minimum(logits_RTK[..., -1].double())
    tail_RTS = torch.stack([outside + level_RT / tau for tau in spec.taus], -1)
    lse_RT = torch.logaddexp(inside_RT, tail_RTS[..., spec.taus.index(1.0)])

    # The token that follows is one of the likelier ids.
    rank_RT1 = (spec.k * uniform(*shape, 1) ** 4).long()
    target_RT = ids_RTK.gather(-1, rank_RT1).squeeze(-1)
    input_RT = torch.cat([ids_RTK[:, :1, 0], target_RT[:, :-1]], 1)
    columns = {
        "input_ids": input_RT.int(),
        "next_id": target_RT[:, -1].int(),
        "topk_ids": ids_RTK.int(),
        "topk_logits": logits_RTK,
        "target_logit": logits_RTK.gather(-1, rank_RT1).squeeze(-1),
        "lse": lse_RT.float(),
        "log_tail": tail_RTS.float(),
    }
    if spec.block:
        map_RGnn = (3.0 * uniform(rows, spec.groups, spec.blocks, spec.blocks)).exp().tril()
        columns["attn_map"] = (map_RGnn / map_RGnn.sum(-1, keepdim=True)).half()
    arrays: Columns = {name: values.cpu().numpy() for name, values in columns.items()}
    arrays["topk_ids"] = arrays["topk_ids"].astype(spec.id_type.to_pandas_dtype())
    return {
        "sequence_id": np.array([sequence_id(unit, first + row) for row in range(rows)], dtype=np.int64),
        "length": np.full(rows, spec.length, np.int32),
        "doc_ids": [["random"]] * rows,
        "segment_ids": np.zeros(shape, np.int32),
        **arrays,
    }


def random_facts(vocab: int, width: int) -> TeacherFacts:
    """Facts of a teacher that does not exist; head and embedding are one tensor, as Qwen2.5-1.5B's."""
    return TeacherFacts(
        name="random", teacher_sha256="0" * 64, tokenizer_sha256="0" * 64, vocab_size=vocab, width=width, layers=28,
        heads=12, tied=True, norm_eps=1e-6, norm_offset=0.0, embedding_scale=1.0, logit_scale=1.0, soft_cap=None,
        dtype="bfloat16", separator_id=0, eos_id=0, bos_id=None, pad_id=0,
    )  # fmt: skip


def random_tensors(vocab: int, width: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Embedding, head and norm as `TeacherFolder.tensors()` gives them, bfloat16, logits of the size of a teacher's."""
    generator = torch.Generator(device).manual_seed(0)
    embedding_VD = torch.randn(vocab, width, generator=generator, device=device).mul_(width**-0.5).bfloat16()
    return {
        "embedding_VD": embedding_VD,
        "head_VD": embedding_VD,
        "norm_D": torch.ones(width, device=device, dtype=torch.bfloat16),
    }


def write_random_cache(
    path: Path, spec: CacheSpec, tokens: int, device: torch.device | str = "cpu", shard_tokens: int = 1 << 18
) -> int:
    """Write a cache of at least `tokens` training tokens through the code that a dump commits with.

    Returns:
        The tokens that were written: whole rows, the last shard smaller.
    """
    facts, tensors = random_facts(spec.vocab_size, spec.width), random_tensors(spec.vocab_size, spec.width, device)
    stored = {"embedding.weight": tensors["embedding_VD"].cpu(), "norm.weight": tensors["norm_D"].cpu()}
    head = commit_file(path / "teacher" / "head.safetensors", lambda to: save_file(stored, str(to)))
    files = {"head.safetensors": {"bytes": head.bytes, "sha256": head.sha256}}
    commit_json(path / "teacher" / "teacher.json", facts_record(facts, files))
    compat = {
        "teacher": facts.teacher_sha256, "tokenizer": facts.tokenizer_sha256, "vocab_size": spec.vocab_size,
        "head_dtype": facts.dtype, "logit_scale": 1.0, "soft_cap": None, "schema_major": SCHEMA_MAJOR,
    }  # fmt: skip
    data = {"corpus": "random", **spec.to_record()}
    manifest = create_or_match(path, Manifest(compat, data, spec, {}, "random", "2026-01-01T00:00:00+00:00"))
    total, most = -(-tokens // spec.length), max(1, shard_tokens // spec.length)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # encoding and hashing leave Python's lock
        jobs = [
            pool.submit(commit_random_shard, path, manifest, unit, min(most, total - first), device)
            for unit, first in enumerate(range(0, total, most))
        ]
    for job in jobs:
        job.result()
    return total * spec.length


def commit_random_shard(path: Path, manifest: Manifest, unit: int, rows: int, device: torch.device | str) -> None:
    spec, generator = manifest.spec, torch.Generator(device).manual_seed(unit)

    def groups() -> Iterator[Columns]:
        for first in range(0, rows, spec.rows_per_group):
            yield random_columns(spec, unit, first, min(spec.rows_per_group, rows - first), generator)

    def describe() -> dict[str, Any]:
        return {
            "split": "train", "rows": rows, "tokens": rows * spec.length, "short": False, "source": {},
            "mean_entropy": 0.0, "mean_tail_mass": 0.0, "compat_id": manifest.compat_id, "data_id": manifest.data_id,
            "versions": {}, "hardware": "none", "seconds": 0.0,
        }  # fmt: skip

    metadata = {"split": "train", "compat_id": manifest.compat_id, "data_id": manifest.data_id, "teacher": "random"}
    commit_shard(path, unit, spec, metadata, groups(), describe, new_claim_id())
