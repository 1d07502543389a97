"""The columns of a shard: Arrow types, Parquet encodings and the facts that travel in every shard's metadata.

Legend: T length of a row, K top-k ids, R temperatures, G depth groups, n = T/b pooling blocks, W = T/w windows,
D teacher width, M tail samples, V vocabulary.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.errors import UserError
from pipeline.fields import Fields

SCHEMA_MAJOR = 1
SCHEMA_MINOR = 0
ROW_GROUP_TOKENS = 131_072
HELDOUT_UNIT = 1 << 30
"""Held-out units are numbered from here, so that `sequence_id` stays unique in the cache."""
METADATA_KEY = b"distil_xlstm"
MOST_ID_BYTES = 1024
"""Bytes of a document's id in `doc_ids`."""
MOST_GROUPS = 4096
"""Row groups of a shard: at 131,072 tokens each, 500 million tokens."""
MOST_ROW_BYTES = 4 << 30
"""Bytes of a row's numbers."""
MOST_GROUP_BYTES = 8 << 30
"""Bytes of a row group's numbers: what reading it takes."""
MOST_TOKENS = 1 << 24
MOST_VOCABULARY = 1 << 24
MOST_WIDTH = 1 << 20
MOST_TAUS = 64
MOST_TAU = 1e6
PACKINGS = ("stream", "document")


@dataclass(frozen=True)
class CacheSpec:
    """Everything that fixes the shape of a row.

    Attributes:
        length: T, tokens of a row.
        vocab_size: V of the teacher.
        k: K, ids kept per position.
        taus: R temperatures of `log_tail`, ascending.
        block: b, tokens of a pooling block of `attn_map`; 0: the column is left out.
        groups: G, depth groups of `attn_map`.
        window: w, tokens of a window of `hidden`; 0: the column is left out.
        width: D, width of the teacher (of `hidden`).
        tail_samples: M, draws from the tail; 0: the columns are left out.
        packing: "stream" or "document".
        group_tokens: tokens of a row group, at most (one row where a row is longer).
    """

    length: int
    vocab_size: int
    k: int
    taus: tuple[float, ...]
    block: int
    groups: int
    window: int
    width: int
    tail_samples: int
    packing: str
    group_tokens: int = field(default_factory=lambda: ROW_GROUP_TOKENS)

    @property
    def blocks(self) -> int:
        """n, pooling blocks of a row (0 without maps)."""
        return self.length // self.block if self.block else 0

    @property
    def windows(self) -> int:
        """W, windows of a row (0 without hidden states)."""
        return self.length // self.window if self.window else 0

    @property
    def id_type(self) -> pa.DataType:
        return pa.uint16() if self.vocab_size <= 1 << 16 else pa.int32()

    @property
    def rows_per_group(self) -> int:
        return max(1, self.group_tokens // self.length)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one row's value, for every fixed-size column."""
        T, K, R = self.length, self.k, len(self.taus)
        shapes: dict[str, tuple[int, ...]] = {
            "segment_ids": (T,),
            "input_ids": (T,),
            "topk_ids": (T, K),
            "topk_logits": (T, K),
            "target_logit": (T,),
            "lse": (T,),
            "log_tail": (T, R),
        }
        if self.block:
            shapes["attn_map"] = (self.groups, self.blocks, self.blocks)
        if self.window:
            shapes["hidden"] = (self.windows, self.width)
        if self.tail_samples:
            shapes["tail_ids"] = (T, self.tail_samples)
            shapes["tail_logits"] = (T, self.tail_samples)
        return shapes

    def value_type(self, column: str) -> pa.DataType:
        """Arrow type of one number of a fixed-size column."""
        types = {
            "segment_ids": pa.int32(),
            "input_ids": pa.int32(),
            "topk_ids": self.id_type,
            "tail_ids": self.id_type,
            "attn_map": pa.float16(),
        }
        return types.get(column, pa.float32())

    def arrow_schema(self, metadata: dict[str, Any] | None = None) -> pa.Schema:
        """The shard's schema; `metadata` is stored as JSON under the key `distil_xlstm`, with the shapes."""
        fields = [
            pa.field("sequence_id", pa.int64(), nullable=False),
            pa.field("length", pa.int32(), nullable=False),
            pa.field("next_id", pa.int32(), nullable=False),
            pa.field("doc_ids", pa.list_(pa.field("element", pa.string(), nullable=False)), nullable=False),
        ]
        for name, shape in self.shapes().items():
            size = 1
            for extent in shape:
                size *= extent
            element = pa.field("element", self.value_type(name), nullable=False)
            fields.append(pa.field(name, pa.list_(element, size), nullable=False))
        record = {
            "schema": f"{SCHEMA_MAJOR}.{SCHEMA_MINOR}",
            **asdict(self),
            "shapes": self.shapes(),
            **(metadata or {}),
        }
        return pa.schema(fields, metadata={METADATA_KEY: json.dumps(record).encode()})

    def write_options(self) -> dict[str, Any]:
        """Keyword arguments for `pyarrow.parquet.ParquetWriter`.

        BYTE_STREAM_SPLIT groups the bytes of equal significance, which zstd then packs well; float16 stays PLAIN
        because DuckDB refuses it otherwise. Statistics on list columns would cost space and tell nothing. Level 1 packs
        `hidden`, half of whose bytes are zero, more tightly than level 3 and 3.6 times as fast.
        """
        encodings = {"sequence_id": "PLAIN", "length": "PLAIN", "next_id": "PLAIN", "doc_ids.list.element": "PLAIN"}
        for name in self.shapes():
            encodings[f"{name}.list.element"] = "PLAIN" if name == "attn_map" else "BYTE_STREAM_SPLIT"
        levels = {path: 1 if path.startswith("hidden") else 3 for path in encodings}
        return {
            "use_dictionary": False,
            "column_encoding": encodings,
            "compression": "zstd",
            "compression_level": levels,
            "write_statistics": ["sequence_id"],
            "write_page_checksum": True,
            "store_schema": True,
            "version": "2.6",
        }

    def to_record(self) -> dict[str, Any]:
        return {**asdict(self), "taus": list(self.taus)}

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's fixed-size columns in memory."""
        return sum(math.prod(shape) * (self.value_type(name).bit_width // 8) for name, shape in self.shapes().items())

    @property
    def group_bytes(self) -> int:
        """Bytes of a full row group's fixed-size columns in memory."""
        return self.rows_per_group * self.row_bytes

    def problem(self) -> tuple[str, str] | None:
        """(field, what is wrong with it) if no cache can have this shape; None if one can."""
        taus = self.taus
        if self.k > self.vocab_size:
            return "k", f"is {self.k}, the vocabulary has {self.vocab_size} ids"
        if not taus or len(taus) > MOST_TAUS or list(taus) != sorted(set(taus)) or 1.0 not in taus:
            return "taus", f"are {list(taus)[:8]}, not at most {MOST_TAUS} ascending temperatures with 1 among them"
        if not all(0 < tau <= MOST_TAU for tau in taus):
            return "taus", f"are {list(taus)[:8]}, which are not all positive and at most {MOST_TAU:g}"
        for name in ("block", "window"):
            size = getattr(self, name)
            if size and self.length % size:
                return name, f"is {size}, which does not divide the length {self.length}"
        if self.block and not self.groups:
            return "groups", "is 0, though there are maps"
        if self.row_bytes > MOST_ROW_BYTES:
            return "length", f"{self.length} makes rows of {self.row_bytes} bytes; at most {MOST_ROW_BYTES} are read"
        if self.group_bytes > MOST_GROUP_BYTES:
            return "k", f"{self.k} makes row groups of {self.group_bytes} bytes; at most {MOST_GROUP_BYTES} are read"
        if any(math.prod(shape) >= 1 << 31 for shape in self.shapes().values()):
            return "length", f"{self.length} makes lists of 2^31 numbers and more, which Arrow does not hold"
        return None

    @classmethod
    def from_record(cls, record: Any, where: object = "the cache's spec") -> CacheSpec:
        """The spec of a manifest, checked; fields that a newer minor version added are passed over.

        Args:
            where: file that messages name.

        Raises:
            UserError: a field is missing, of another type, or no cache can have it.
        """
        given = Fields(record, where)
        taus = given.list("taus", MOST_TAUS)
        if not all(type(tau) in (int, float) for tau in taus):
            raise given.refusal("taus", "a list of numbers")
        spec = cls(
            length=given.integer("length", 1, MOST_TOKENS),
            vocab_size=given.integer("vocab_size", 1, MOST_VOCABULARY),
            k=given.integer("k", 1, MOST_VOCABULARY),
            taus=tuple(taus),
            block=given.integer("block", 0, MOST_TOKENS),
            groups=given.integer("groups", 0, 1 << 16),
            window=given.integer("window", 0, MOST_TOKENS),
            width=given.integer("width", 1, MOST_WIDTH),
            tail_samples=given.integer("tail_samples", 0, 1 << 16),
            packing=given.choice("packing", PACKINGS),
            group_tokens=given.integer("group_tokens", 1, 1 << 30),
        )
        problem = spec.problem()
        if problem is not None:
            raise UserError(f"{where}: {problem[0]} {problem[1]}: it was damaged or edited; restore it from a copy")
        return spec


def sequence_id(unit: int, row: int) -> int:
    """(unit << 32) + row: unique in the cache, whatever the number of shards."""
    return (unit << 32) + row


def unit_name(unit: int) -> str:
    """File stem of a unit: `shard-00000` for training, `heldout-00000` for held-out units."""
    return f"heldout-{unit - HELDOUT_UNIT:05d}" if unit >= HELDOUT_UNIT else f"shard-{unit:05d}"
