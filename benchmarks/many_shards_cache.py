"""A cache of very many shards on disk, without what a teacher would have to say: for measuring what their number costs.

Every shard has a JSON of its own, as a dump commits it, and a Parquet file with as many rows, row groups and columns
as a real one, but of K = 1 and all zero. Since the Parquet files are alike they are hard links, 60,000 to a file: two
directory entries a shard, as in a real cache, without the bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.commit import commit_json
from pipeline.manifest import Manifest, create_or_match
from pipeline.schema import SCHEMA_MAJOR, CacheSpec, unit_name
from pipeline.shard import Columns, footer_sha256, write_parquet

SPEC = CacheSpec(
    length=2048,
    vocab_size=151_936,
    k=1,
    taus=(1.0, 1.2, 1.5, 2.0),
    block=1024,
    groups=1,
    window=0,
    width=1536,
    tail_samples=0,
    packing="stream",
    group_tokens=131_072,
)
TOKENS_PER_SHARD = 1 << 20
STRIDE = 6 << 20
LINKS = 60_000
"""Names of one file; ext4 allows 65,000."""
MADE = "made.json"
"""Written last: the folder is complete."""


def make_many_shards(path: Path, shards: int) -> None:
    """Write a cache of `shards` training shards of 2^20 tokens; one that is there and complete is kept.

    Nothing is synced: after a power cut the folder is worth nothing. A record's sha256 is a random number, as
    different ones are: no case reads whole files.
    """
    if (path / MADE).is_file():
        return
    path.mkdir(parents=True, exist_ok=True)
    rows = TOKENS_PER_SHARD // SPEC.length
    extent = (shards + 1) * STRIDE
    commit_json(path / "plan.json", {"stride": STRIDE, "heldout_from": extent, "extent": extent, "files": []})
    manifest = create_or_match(path, manifest_of(path))
    identities = {"compat_id": manifest.compat_id, "data_id": manifest.data_id}
    digests: dict[str, Any] = {}
    source = path / ".parquet"
    rng = np.random.default_rng(0)
    for unit in range(shards):
        name = unit_name(unit)
        if unit == 0:
            write_parquet(source, SPEC, {"split": "train", **identities, "teacher": "none"}, zeros())
            digests = {"bytes": source.stat().st_size, "footer_sha256": footer_sha256(source)}
        elif unit % LINKS == 0:
            data = source.read_bytes()
            source.unlink()
            source.write_bytes(data)
        os.link(source, path / f"{name}.parquet")
        record = {
            "unit": unit,
            "split": "train",
            "file": f"{name}.parquet",
            **digests,
            "sha256": rng.bytes(32).hex(),
            "rows": rows,
            "tokens": TOKENS_PER_SHARD,
            "short": False,
            "source": {
                "start": unit * STRIDE,
                "end": (unit + 1) * STRIDE,
                "documents": 1100,
                "text_bytes": 4_700_000,
                "truncated": 0,
            },
            "mean_entropy": 2.125,
            "mean_tail_mass": 0.0625,
            **identities,
            "versions": {"python": "3.12.3", "torch": "2.11.0", "vllm": "0.26.0", "transformers": "5.17.0"},
            "hardware": "none",
            "seconds": 7.5,
        }
        (path / f"{name}.json").write_bytes(json_bytes(record))
    source.unlink(missing_ok=True)
    commit_json(path / MADE, {"shards": shards})


def manifest_of(path: Path) -> Manifest:
    compat = {"teacher": "none", "tokenizer": "none", "vocab_size": SPEC.vocab_size, "schema_major": SCHEMA_MAJOR}
    data = {"corpus": "none", "tokens_per_shard": TOKENS_PER_SHARD, **SPEC.to_record()}
    settings = {"corpus": {"source": "none"}, "teacher": "none", "cache": str(path)}
    return Manifest(compat, data, SPEC, settings, "none", "2026-01-01T00:00:00+00:00")


def zeros() -> list[Columns]:
    """The row groups of a shard of TOKENS_PER_SHARD."""
    rows = SPEC.rows_per_group
    group: Columns = {
        "sequence_id": np.zeros(rows, np.int64),
        "length": np.full(rows, SPEC.length, np.int32),
        "next_id": np.zeros(rows, np.int32),
        "doc_ids": [["none"]] * rows,
    }
    for name, shape in SPEC.shapes().items():
        group[name] = np.zeros((rows, *shape), SPEC.value_type(name).to_pandas_dtype())
    return [group] * (TOKENS_PER_SHARD // SPEC.length // rows)


def json_bytes(record: dict[str, Any]) -> bytes:
    """As `commit_json` spells it, digest included; written without its syncs, which would take hours here."""
    text = json.dumps(record, indent=1).removesuffix("\n}").encode()
    return text + f',\n "digest": "{hashlib.sha256(text).hexdigest()}"\n}}\n'.encode()
