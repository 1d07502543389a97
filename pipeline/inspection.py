"""`python -m pipeline inspect`: the columns of a shard and what they cost, and some positions decoded to text.

Legend: T length of a row, K top-k ids, R temperatures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from pipeline.cache import Cache
from pipeline.config import Place
from pipeline.errors import UserError
from pipeline.row_checks import targets
from pipeline.schema import CacheSpec
from pipeline.shard import Columns, ShardFile
from pipeline.text import Vocabulary, columns_of, keep_left, keep_right

WIDTH = 100
BAR = 30
DESCRIPTION = (
    "Show what a shard holds: its columns with type, shape, encoding and bytes a token, then some positions of one row "
    "as text: what the teacher read, what came next, and what it expected."
)
TYPE_NAMES = {"halffloat": "float16", "float": "float32", "double": "float64"}


@dataclass(frozen=True)
class Options:
    """What to look at."""

    cache: Place
    """folder of the cache"""
    shard: int = 0
    """number of the shard"""
    split: Literal["train", "heldout"] = "train"
    """training shards, or held-out ones"""
    row: int = 0
    """row of the shard whose positions are decoded"""
    positions: int = 5
    """how many positions to decode"""
    start: int | None = None
    """decode consecutive positions from this one; by default they are spread over the row"""
    candidates: int = 5
    """how many of the K stored candidates to show at each position"""


@dataclass(frozen=True)
class ColumnFacts:
    """One column of a shard, as the Parquet footer describes it."""

    name: str
    type: str
    shape: tuple[int, ...]
    encoding: str
    compressed_bytes: int  # of all row groups, page headers included


@dataclass(frozen=True)
class Position:
    """What the cache says about one position; probabilities are at tau 1."""

    index: int
    segment: int
    context: str
    target: int | None  # the id that came next, None where nothing follows
    target_p: float
    target_rank: int | None  # 1 is the likeliest; None if it lies outside the top K
    ids: list[int]
    p: list[float]
    tail_mass: float
    entropy: float  # nats, the tail as one outcome: a lower bound


def type_name(kind: pa.DataType) -> str:
    """Arrow type as the data contract writes it."""
    if pa.types.is_fixed_size_list(kind):
        return f"FixedSizeList<{type_name(kind.value_type)}>[{kind.list_size}]"
    if pa.types.is_list(kind):
        return f"list<{type_name(kind.value_type)}>"
    return TYPE_NAMES.get(str(kind), str(kind))


def column_facts(shard: ShardFile) -> list[ColumnFacts]:
    """Columns in stored order with type, shape of a row's value, encoding and compressed size."""
    metadata = shard.parquet.metadata
    shapes = shard.spec.shapes()
    sizes: dict[str, int] = {}
    encodings: dict[str, str] = {}
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(number)
            name = chunk.path_in_schema.split(".")[0]
            sizes[name] = sizes.get(name, 0) + chunk.total_compressed_size
            values = [e for e in chunk.encodings if e != "RLE"]  # RLE holds the list levels
            encodings[name] = f"{'+'.join(values) or 'RLE'}, {chunk.compression.lower()}"
    return [
        ColumnFacts(field.name, type_name(field.type), shapes.get(field.name, ()), encodings[field.name], size)
        for field in shard.parquet.schema_arrow
        for size in [sizes[field.name]]
    ]


def position_facts(columns: Columns, spec: CacheSpec, row: int, index: int, vocabulary: Vocabulary) -> Position:
    """Decode position `index` of row `row` of a row group."""
    ids_T = columns["input_ids"][row]
    top_K = columns["topk_ids"][row, index].astype(np.int64)
    log_p_K = columns["topk_logits"][row, index].astype(np.float64) - float(columns["lse"][row, index])
    p_K = np.exp(log_p_K)
    log_r = float(columns["log_tail"][row, index, spec.taus.index(1.0)]) - float(columns["lse"][row, index])
    tail = float(np.exp(log_r))
    target = int(targets({n: columns[n][row : row + 1] for n in ("length", "input_ids", "next_id")}, spec)[0, index])
    rank = np.flatnonzero(top_K == target)
    return Position(
        index=index,
        segment=int(columns["segment_ids"][row, index]),
        context=vocabulary.text(ids_T[max(0, index - 80) : index + 1].tolist()),
        target=target if target >= 0 else None,
        target_p=float(np.exp(float(columns["target_logit"][row, index]) - float(columns["lse"][row, index]))),
        target_rank=int(rank[0]) + 1 if target >= 0 and len(rank) else None,
        ids=top_K.tolist(),
        p=p_K.tolist(),
        tail_mass=tail,
        entropy=float(-(p_K * log_p_K).sum() - (tail * log_r if tail > 0 else 0.0)),
    )


def chosen_positions(options: Options, length: int) -> list[int]:
    """Positions to decode: consecutive ones from `start`, or spread over the row, its last one among them."""
    if options.start is not None:
        if not 0 <= options.start < length:
            raise UserError(f"--start {options.start}: the row has {length} tokens; name 0 to {length - 1}")
        return list(range(options.start, min(length, options.start + options.positions)))
    count = min(options.positions, length)
    return [(i + 1) * length // count - 1 for i in range(count)]


def shard_lines(cache: Cache, shard: ShardFile) -> Iterator[str]:
    """The shard's facts and its columns, as lines."""
    record, spec, facts = cache.record(shard.record.unit), cache.spec, cache.teacher.facts
    short = ", its source range held fewer than planned" if record.short else ""
    shape = f"T={spec.length} K={spec.k} V={spec.vocab_size:,} tau={', '.join(f'{t:g}' for t in spec.taus)}"
    if spec.block:
        shape += f"; maps of {spec.groups} depth groups, blocks of {spec.block}"
    yield f"{record.name} of {cache.path}"
    yield ""
    for label, text in (
        ("teacher", facts.name),
        ("shape", shape),
        (
            "content",
            f"{record.split} split, {spec.packing} packing, {record.rows:,} rows, {record.tokens:,} tokens{short}",
        ),
        (
            "teacher's view",
            f"mean entropy at least {record.mean_entropy:.3f} nats, mean tail mass {record.mean_tail_mass:.4f}",
        ),
        ("file", f"{record.file}, {record.bytes:,} bytes, {shard.row_groups} row groups, sha256 {record.sha256[:16]}…"),
        ("made", f"in {record.seconds:,.0f} s on {record.hardware}"),
    ):
        yield f"  {label:<15} {keep_left(text, WIDTH - 18)}"
    yield ""
    yield f"  {'column':<13} {'Arrow type':<30} {'shape':<10} {'encoding':<23} {'B/token':>8} {'share':>6}"
    stored = 0
    for column in column_facts(shard):
        stored += column.compressed_bytes
        extent = "×".join(map(str, column.shape)) or "1"
        yield _cost_line(column.name, column.type, extent, column.encoding, column.compressed_bytes, shard)
    yield _cost_line("(footer)", "", "", "", record.bytes - stored, shard)
    yield _cost_line("total", "", "", "", record.bytes, shard)


def _cost_line(name: str, kind: str, shape: str, encoding: str, size: int, shard: ShardFile) -> str:
    tokens, total = shard.record.tokens, shard.record.bytes
    return f"  {name:<13} {kind:<30} {shape:<10} {encoding:<23} {size / tokens:>8.2f} {size / total:>6.1%}"


def position_lines(position: Position, spec: CacheSpec, vocabulary: Vocabulary, candidates: int) -> Iterator[str]:
    """One decoded position, as lines."""
    yield f"position {position.index}, document {position.segment} of the row"
    yield f"  read so far   {keep_right(position.context, WIDTH - 17)}"
    if position.target is None:
        yield "  came next     nothing: the text ends here"
    else:
        place = f"rank {position.target_rank}" if position.target_rank else f"outside the top {spec.k}"
        token = keep_left(vocabulary.token(position.target), 30)
        nats = -np.log(position.target_p) if position.target_p > 0 else float("inf")
        yield f"  came next     {token}   p {position.target_p:.4f}, {nats:.2f} nats, {place}"
    outside = f"mass outside the top {spec.k}: {position.tail_mass:.4f}"
    yield f"  entropy       at least {position.entropy:.2f} nats; {outside}"
    shown = min(candidates, len(position.ids))
    yield f"  {'teacher expects':<32} {'id':>7} {'p':>7}"
    for index, p in zip(position.ids[:shown], position.p[:shown], strict=True):
        mark = "  ← came next" if index == position.target else ""
        yield f"{_bar_line(vocabulary.token(index), str(index), p)}{mark}"
    if shown < len(position.ids):
        yield _bar_line(f"(the other {len(position.ids) - shown} stored)", "", float(sum(position.p[shown:])))
    if spec.vocab_size > spec.k:
        yield _bar_line(f"(the {spec.vocab_size - spec.k:,} not stored)", "", position.tail_mass)


def _bar_line(text: str, index: str, p: float) -> str:
    text = keep_left(text, 30)
    return f"    {text}{' ' * (30 - columns_of(text))} {index:>7} {p:>7.4f}  {'█' * round(BAR * min(p, 1.0))}".rstrip()


def run(options: Options) -> int:
    """Print the shard.

    Raises:
        UserError: no such cache, shard, row or position, or the shard is damaged.
    """
    for name in ("positions", "candidates", "row", "shard"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name} {getattr(options, name)}: must not be negative")
    cache = Cache(options.cache)
    record = cache.find(options.shard, options.split)
    if options.row >= record.rows:
        raise UserError(f"--row {options.row}: {record.name} has {record.rows} rows; name 0 to {record.rows - 1}")
    with cache.open(record) as shard:
        for line in shard_lines(cache, shard):
            print(line)
        group, row = 0, options.row
        while row >= shard.group_rows[group]:
            row -= shard.group_rows[group]
            group += 1
        wanted = ["sequence_id", "length", "next_id", "doc_ids", "segment_ids", "input_ids"]
        columns = shard.read_group(group, [*wanted, "topk_ids", "topk_logits", "target_logit", "lse", "log_tail"])
    vocabulary = Vocabulary(cache.teacher)
    length, documents = int(columns["length"][row]), columns["doc_ids"][row]
    print()
    print(f"row {options.row}: sequence_id {columns['sequence_id'][row]}, {length} tokens")
    print(keep_left(f"documents: {', '.join(documents)}", WIDTH))
    print("whitespace is shown as · ↵ ⇥; position t predicts token t+1")
    for index in chosen_positions(options, length):
        print()
        for line in position_lines(
            position_facts(columns, cache.spec, row, index, vocabulary), cache.spec, vocabulary, options.candidates
        ):
            print(line)
    return 0
