"""A small but real cache for tests: `write_toy_cache` writes it through the same code a dump uses.

The "teacher" is a table of next-token counts over a little language of English words, with noise. It is calibrated on
the text in the cache, so a student can learn from it, a unigram model is worse than it, and every stored number follows
from full logits over the whole vocabulary. Texts are made of readable words, encoded by a real byte-level tokenizer.

    cache = write_toy_cache(tmp_path / "cache", units=2, rows=8, length=64)
    Cache(cache).shards("train")                        # two records
    toy_logits(cache, "train", 0)                       # float32 (rows, T, V): what the stored top-k was cut from

Legend: R rows, T tokens a row, V vocabulary, K top-k ids, G depth groups, n = T/b blocks, W = T/w windows, D width.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pipeline.commit import commit_file, commit_json, file_sha256, new_claim_id
from pipeline.manifest import Manifest, create_or_match, read_manifest
from pipeline.schema import HELDOUT_UNIT, SCHEMA_MAJOR, CacheSpec, sequence_id
from pipeline.shard import Columns, ShardRecord, commit_shard
from pipeline.teacher_folder import TeacherFacts, facts_record

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SPACE, NEWLINE = "\u0120", "\u010a"  # how the byte-level alphabet spells them
TEXT = (
    "the of and to in a is that it was for on are as with his they at be this from have or by one had not but what all "
    "were when we there can an your which their said if do will each about how up out them then she many some so these "
    "would other into has more her two like him see time could no make than first been its who now people my made over"
)
WORDS = TEXT.split()
STRIDE = 65_536


def toy_tokenizer(vocab_size: int = 61) -> Tokenizer:
    """A byte-level BPE tokenizer of lower-case letters, digits and a few pairs; id 0 is `<|endoftext|>`.

    Bytes outside its alphabet are dropped. Ids beyond some 700 stand for no token, as the padding of real heads does.
    """
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*SPECIALS, SPACE, NEWLINE, *letters, *"0123456789.,'"]
    if vocab_size < len(tokens):
        raise ValueError(f"vocab_size {vocab_size}: the toy tokenizer needs {len(tokens)}")
    common = ["th", "he", "in", "er", "an", "re", "on", "at", "en", "nd", "or", "es", "is", "it", "ou", "ar"]
    pairs = dict.fromkeys([*common, *(a + b for a in letters for b in letters)])
    merges = [(pair[0], pair[1]) for pair in pairs][: vocab_size - len(tokens)]
    vocab = {token: i for i, token in enumerate([*tokens, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    return tokenizer


def write_toy_cache(
    path: Path | str,
    *,
    units: int = 2,
    heldout_units: int = 1,
    rows: int = 8,
    length: int = 64,
    vocab_size: int = 61,
    k: int = 8,
    taus: tuple[float, ...] = (1.0, 1.2, 1.5, 2.0),
    block: int = 16,
    groups: int = 2,
    window: int = 0,
    tail_samples: int = 0,
    packing: str = "stream",
    width: int = 64,
    layers: int = 4,
    heads: int = 4,
    tied: bool = True,
    seed: int = 0,
) -> Path:
    """Write a cache folder and return its path.

    Args:
        path: folder to make; units that are there already are written again.
        units: training shards; unit i does not depend on how many there are.
        heldout_units: held-out shards.
        rows: rows of a shard.
        length: T; must be a multiple of `block` and `window` where those are not 0.
        vocab_size: V, at least 44.
        k: K <= V. With k == V the tails are -inf.
        taus: temperatures of `log_tail`, 1 among them.
        block: b of `attn_map`; 0 leaves it out.
        groups: G.
        window: w of `hidden`; 0 leaves it out.
        tail_samples: M of `tail_ids`; 0 leaves them out.
        packing: "stream", or "document" (rows of differing length, padded).
        width, layers, heads, tied: of the teacher whose embedding and head stand in `teacher/`.
        seed: of text, table, noise and weights; caches of one seed and vocabulary share the teacher (`compat_id`).

    A cache of several row groups stays small with `monkeypatch.setattr("pipeline.schema.ROW_GROUP_TOKENS", 256)`.
    """
    path = Path(path)
    spec = CacheSpec(
        length=length,
        vocab_size=vocab_size,
        k=k,
        taus=taus,
        block=block,
        groups=groups if block else 0,
        window=window,
        width=width,
        tail_samples=tail_samples,
        packing=packing,
    )
    claim = new_claim_id()
    facts = write_toy_teacher(path / "teacher", vocab_size, width, layers, heads, tied, seed)
    record = {"stride": STRIDE, "heldout_from": units * STRIDE, "extent": (units + heldout_units) * STRIDE, "files": []}
    commit_json(path / "plan.json", record, claim=claim)
    compat = {
        "teacher": facts.teacher_sha256,
        "tokenizer": facts.tokenizer_sha256,
        "vocab_size": vocab_size,
        "head_dtype": "float32",
        "logit_scale": 1.0,
        "soft_cap": None,
        "schema_major": SCHEMA_MAJOR,
    }
    data = {"corpus": "toy", "tokens_per_shard": rows * length, **spec.to_record(), "seed": seed}
    settings = {"corpus": {"source": "toy words", "heldout_fraction": 0.5}, "teacher": "toy", "cache": str(path)}
    manifest = create_or_match(path, Manifest(compat, data, spec, settings, "toy", "2025-01-01T00:00:00+00:00"))
    for unit in [*range(units), *(HELDOUT_UNIT + i for i in range(heldout_units))]:
        commit_toy_shard(path, manifest, unit, rows, seed)
    return path


def toy_logits(cache: Path, split: str, shard: int, seed: int = 0) -> np.ndarray:
    """Full logits (R, T, V) float32 that shard `shard` of `split` was cut from; positions beyond a row are noise."""
    manifest = read_manifest(cache)
    unit = shard + (HELDOUT_UNIT if split == "heldout" else 0)
    record = json.loads((cache / f"{'heldout' if split == 'heldout' else 'shard'}-{shard:05d}.json").read_text())
    return _unit_logits(manifest.spec, unit, record["rows"], seed)[1]


def toy_columns(spec: CacheSpec, unit: int, rows: int, seed: int = 0) -> Columns:
    """All columns of one unit, consistent with each other."""
    packed, logits_RTV = _unit_logits(spec, unit, rows, seed)
    rng = np.random.default_rng([seed, unit, 2])
    R, T, K = rows, spec.length, spec.k
    length_R = packed["length"]
    valid_RT = np.arange(T)[None, :] < length_R[:, None]
    order_RTV = np.argsort(-logits_RTV, axis=-1, kind="stable")
    top_RTK, tail_RTV = order_RTV[..., :K], np.take_along_axis(logits_RTV, order_RTV[..., K:], -1)
    target_RT = np.concatenate([packed["input_ids"][:, 1:], np.full((R, 1), -1)], axis=1)
    target_RT[np.arange(T)[None, :] >= length_R[:, None] - 1] = -1
    target_RT[np.arange(R), length_R - 1] = packed["next_id"]
    target_logit_RT = np.take_along_axis(logits_RTV, np.maximum(target_RT, 0)[..., None], -1)[..., 0]

    def padded(values: np.ndarray, fill: float) -> np.ndarray:
        keep = valid_RT.reshape(R, T, *[1] * (values.ndim - 2))
        return np.where(keep, values, fill).astype(values.dtype)

    id_dtype = spec.id_type.to_pandas_dtype()
    columns: Columns = {
        "sequence_id": np.array([sequence_id(unit, row) for row in range(R)], dtype=np.int64),
        **packed,
        "topk_ids": padded(top_RTK.astype(id_dtype), 0),
        "topk_logits": padded(np.take_along_axis(logits_RTV, top_RTK, -1), np.nan),
        "target_logit": np.where(target_RT >= 0, target_logit_RT, np.nan).astype(np.float32),
        "lse": padded(_logsumexp(logits_RTV), np.nan),
        "log_tail": padded(np.stack([_logsumexp(tail_RTV / tau) for tau in spec.taus], axis=-1), np.nan),
    }
    if spec.block:
        columns["attn_map"] = _maps(spec, length_R, rng)
    if spec.window:
        columns["hidden"] = _bfloat16(rng.standard_normal((R, spec.windows, spec.width)))
        used_RW = np.arange(spec.windows)[None, :] * spec.window < length_R[:, None]
        columns["hidden"][~used_RW] = 0.0
    if spec.tail_samples:
        tail_p = np.exp(tail_RTV - _logsumexp(tail_RTV)[..., None]).astype(np.float64)
        cut = np.cumsum(tail_p, -1)[..., None, :] / tail_p.sum(-1)[..., None, None]
        draw = (rng.random((R, T, spec.tail_samples, 1)) > cut).sum(-1)
        columns["tail_ids"] = padded(np.take_along_axis(order_RTV[..., K:], draw, -1).astype(id_dtype), 0)
        columns["tail_logits"] = padded(np.take_along_axis(tail_RTV, draw, -1), np.nan)
    return columns


def commit_toy_shard(
    path: Path,
    manifest: Manifest,
    unit: int,
    rows: int,
    seed: int = 0,
    columns: Columns | None = None,
) -> ShardRecord:
    """Commit one unit; `columns` may be given, to write a shard whose numbers are wrong but whose bytes are whole."""
    spec = manifest.spec
    columns = toy_columns(spec, unit, rows, seed) if columns is None else columns
    split = "heldout" if unit >= HELDOUT_UNIT else "train"
    size = spec.rows_per_group
    tau_one = spec.taus.index(1.0)
    log_p_RTK = columns["topk_logits"] - columns["lse"][..., None]
    log_r_RT = columns["log_tail"][..., tau_one] - columns["lse"]
    with np.errstate(invalid="ignore"):
        entropy_RT = -(np.exp(log_p_RTK) * log_p_RTK).sum(-1) - np.where(
            np.isneginf(log_r_RT), 0, np.exp(log_r_RT) * log_r_RT
        )
    number = unit - HELDOUT_UNIT if split == "heldout" else unit
    record = json.loads((path / "plan.json").read_text())
    start = number * STRIDE + (record["heldout_from"] if split == "heldout" else 0)

    def describe() -> dict[str, Any]:
        return {
            "split": split,
            "rows": rows,
            "tokens": int(columns["length"].sum()),
            "short": False,
            "source": {"start": start, "end": start + STRIDE, "documents": 1, "text_bytes": 1, "truncated": 0},
            "mean_entropy": float(np.nanmean(entropy_RT)),
            "mean_tail_mass": float(np.nanmean(np.exp(log_r_RT))),
            "compat_id": manifest.compat_id,
            "data_id": manifest.data_id,
            "versions": {"numpy": np.__version__},
            "hardware": "toy",
            "seconds": 1.0,
        }

    groups = [
        {name: values[first : first + size] for name, values in columns.items()} for first in range(0, rows, size)
    ]
    metadata = {"split": split, "compat_id": manifest.compat_id, "data_id": manifest.data_id, "teacher": "toy"}
    return commit_shard(path, unit, spec, metadata, groups, describe, new_claim_id())


def write_toy_teacher(
    folder: Path, vocab_size: int, width: int, layers: int, heads: int, tied: bool, seed: int
) -> TeacherFacts:
    """Write a complete `teacher/` folder with random weights (float32) and the toy tokenizer."""
    claim = new_claim_id()
    tokenizer = toy_tokenizer(vocab_size)
    rng = np.random.default_rng([seed, 3])
    tensors = {
        "embedding.weight": 0.3 * rng.standard_normal((vocab_size, width)).astype(np.float32),
        "norm.weight": np.ones(width, dtype=np.float32),
    }
    if not tied:
        tensors["lm_head.weight"] = 0.3 * rng.standard_normal((vocab_size, width)).astype(np.float32)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocab_size,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "eos_token_id": 2,
    }
    writers = {
        "config.json": lambda to: to.write_text(json.dumps(config)),
        "tokenizer.json": lambda to: tokenizer.save(str(to)),
        "tokenizer_config.json": lambda to: to.write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}'),
        "head.safetensors": lambda to: save_file(tensors, str(to)),
        "token_bytes.parquet": lambda to: pq.write_table(
            token_bytes_table(tokenizer, vocab_size), to, compression="zstd", write_page_checksum=True
        ),
    }
    files = {}
    for name, write in writers.items():
        digest = commit_file(folder / name, write, claim=claim)
        files[name] = {"bytes": digest.bytes, "sha256": digest.sha256}
    facts = TeacherFacts(
        name="toy",
        teacher_sha256=file_sha256(folder / "head.safetensors"),
        tokenizer_sha256=file_sha256(folder / "tokenizer.json"),
        vocab_size=vocab_size,
        width=width,
        layers=layers,
        heads=heads,
        tied=tied,
        norm_eps=1e-5,
        norm_offset=0.0,
        embedding_scale=1.0,
        logit_scale=1.0,
        soft_cap=None,
        dtype="float32",
        separator_id=0,
        eos_id=2,
        bos_id=None,
        pad_id=2,
    )
    commit_json(folder / "teacher.json", facts_record(facts, files), claim=claim)
    return facts


def token_bytes_table(tokenizer: Tokenizer, vocab_size: int) -> pa.Table:
    """The table of `token_bytes.parquet`: special tokens and unused ids stand for no bytes."""
    spelled = {SPACE: " ", NEWLINE: "\n"}
    values = [b""] * vocab_size
    for token, index in tokenizer.get_vocab().items():
        if token not in SPECIALS:
            values[index] = "".join(spelled.get(c, c) for c in token).encode()
    return pa.table({"token_id": pa.array(range(vocab_size), pa.int32()), "bytes": pa.array(values, pa.binary())})


def _documents(tokenizer: Tokenizer, rng: np.random.Generator, tokens: int) -> list[list[int]]:
    """Token ids of documents of 2 words and more, each ended by the separator, at least `tokens` in all."""
    weights = 1.0 / np.arange(1, len(WORDS) + 1)
    documents: list[list[int]] = []
    held = 0
    while held < tokens:
        words = rng.choice(WORDS, size=2 + int(rng.exponential(12.0)), p=weights / weights.sum())
        ids = [*tokenizer.encode(" ".join(words) + ".").ids, 0]
        documents.append(ids)
        held += len(ids)
    return documents


def _unit_logits(spec: CacheSpec, unit: int, rows: int, seed: int) -> tuple[Columns, np.ndarray]:
    """Packed rows of a unit, and the table teacher's logits (R, T, V) for them."""
    V, T = spec.vocab_size, spec.length
    tokenizer = toy_tokenizer(V)
    text = np.concatenate(_documents(tokenizer, np.random.default_rng([seed, 0]), 20_000))
    counts_VV = np.full((V, V), 0.02)
    np.add.at(counts_VV, (text[:-1], text[1:]), 1.0)
    table_VV = np.log(counts_VV / counts_VV.sum(1, keepdims=True)) + 3.0
    rng = np.random.default_rng([seed, unit, 1])
    packed = _pack(spec, _documents(tokenizer, rng, rows * T + 1 if spec.packing == "stream" else rows * 1000), rows)
    logits_RTV = table_VV[packed["input_ids"]] + 0.3 * rng.standard_normal((rows, T, V))
    return packed, logits_RTV.astype(np.float32)


def _pack(spec: CacheSpec, documents: list[list[int]], rows: int) -> Columns:
    """Rows as the contract packs them: joined and cut at T, or one document a row with padding."""
    T = spec.length
    columns: Columns = {
        "length": np.zeros(rows, np.int32),
        "next_id": np.zeros(rows, np.int32),
        "doc_ids": [],
        "segment_ids": np.zeros((rows, T), np.int32),
        "input_ids": np.zeros((rows, T), np.int32),
    }
    ids = np.concatenate(documents)
    owner = np.repeat(np.arange(len(documents)), [len(d) for d in documents])
    for row in range(rows):
        first = row * T if spec.packing == "stream" else int(np.searchsorted(owner, row))
        last = first + T if spec.packing == "stream" else min(first + T, first + len(documents[row]))
        kept = slice(first, last)
        size = last - first
        columns["length"][row] = size
        cut = spec.packing == "stream" or len(documents[row]) > T
        columns["next_id"][row] = ids[last] if cut else -1
        columns["input_ids"][row, :size] = ids[kept]
        columns["segment_ids"][row, :size] = owner[kept] - owner[first]
        columns["doc_ids"].append([f"doc-{i}" for i in range(owner[first], owner[last - 1] + 1)])
    return columns


def _maps(spec: CacheSpec, length_R: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pooled attention (R, G, n, n) float16: rows of valid blocks sum to one, blocks above the diagonal are zero."""
    n = spec.blocks
    weight = np.exp(rng.standard_normal((len(length_R), spec.groups, n, n)))
    weight *= np.tril(np.ones((n, n)))
    weight /= weight.sum(-1, keepdims=True)
    used_Rn = np.arange(n)[None, :] * spec.block < length_R[:, None]
    return (weight * used_Rn[:, None, :, None]).astype(np.float16)


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """Float32 values cut to bfloat16 precision."""
    return (values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def _logsumexp(values: np.ndarray) -> np.ndarray:
    """Over the last axis, float32; -inf where it is empty."""
    if values.shape[-1] == 0:
        return np.full(values.shape[:-1], -np.inf, np.float32)
    wide = values.astype(np.float64)
    top = wide.max(-1)
    return (top + np.log(np.exp(wide - top[..., None]).sum(-1))).astype(np.float32)
