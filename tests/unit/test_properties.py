"""What holds for any shape, text, corpus layout and number of shards: nothing is lost, doubled, mixed up or rounded.

Legend: T length of a row, V vocabulary, K top-k ids, R temperatures, G depth groups, b pooling block, w window,
M tail samples, L valid tokens of a row, n = T/b, W = T/w.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from pipeline.cache import Cache
from pipeline.commit import new_claim_id
from pipeline.errors import UserError
from pipeline.manifest import Manifest, create_or_match
from pipeline.schema import HELDOUT_UNIT, SCHEMA_MAJOR, CacheSpec
from pipeline.shard import commit_shard
from student.runs.identity import RunCache
from teacher_dump.columns import ShardStatistics, row_groups
from teacher_dump.corpus import CorpusConfig, Document, describe_corpus
from teacher_dump.packing import PackingCount, pack
from teacher_dump.pending import wanted_units
from teacher_dump.plan import Plan, Unit, make_plan
from teacher_dump.rows import CapturedRow, PackedRow
from teacher_dump.settings import DumpConfig
from teacher_dump.work import Work

THOROUGH = settings(deadline=None, suppress_health_check=list(HealthCheck))
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
"""Any text that UTF-8 can write; half a surrogate pair is refused where documents are read."""
SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -3.4e38, 65504.0, 1 / 3], np.float32)

# --- writer and reader


@st.composite
def specs(draw: st.DrawFn) -> CacheSpec:
    block = draw(st.sampled_from([0, 1, 2, 4]))
    window = draw(st.sampled_from([0, 1, 3]))
    length = draw(st.integers(1, 4)) * max(block, 1) * max(window, 1)
    vocabulary = draw(st.sampled_from([2, 61, 65_535, 65_536, 65_537, 151_936]))
    return CacheSpec(
        length=length,
        vocab_size=vocabulary,
        k=draw(st.integers(1, min(vocabulary, 5))),
        taus=tuple(sorted({1.0, *draw(st.lists(st.floats(0.25, 4.0), max_size=3))})),
        block=block,
        groups=draw(st.integers(1, 3)) if block else 0,
        window=window,
        width=draw(st.integers(1, 5)),
        tail_samples=draw(st.integers(0, 2)),
        packing=draw(st.sampled_from(["stream", "document"])),
        group_tokens=draw(st.integers(1, 4)) * length + draw(st.integers(0, length - 1)),
    )


def numbers(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """float32 of all magnitudes, some of them special."""
    values = rng.standard_normal(shape).astype(np.float32) * np.float32(10.0) ** rng.integers(-30, 30, shape)
    return np.where(rng.random(shape) < 0.1, rng.choice(SPECIAL, shape), values).astype(np.float32)


def captured_row(spec: CacheSpec, row: int, names: tuple[str, ...], rng: np.random.Generator) -> CapturedRow:
    """Whatever an engine could hand over, and much that none would."""
    T, K, V, M = spec.length, spec.k, spec.vocab_size, spec.tail_samples
    L = T if spec.packing == "stream" else int(rng.integers(1, T + 1))

    def ids(*shape: int) -> np.ndarray:
        return np.where(rng.random(shape) < 0.3, V - 1, rng.integers(0, V, shape)).astype(np.int32)

    packed = PackedRow(row, ids(L), int(rng.integers(-1, V)), rng.integers(0, 9, L).astype(np.int32), names)
    return CapturedRow(
        packed=packed,
        topk_ids_LK=ids(L, K),
        topk_logits_LK=numbers(rng, L, K),
        target_logit_L=numbers(rng, L),
        lse_L=numbers(rng, L),
        log_tail_LR=numbers(rng, L, len(spec.taus)),
        attn_map_Gnn=rng.random((spec.groups, spec.blocks, spec.blocks), np.float32) if spec.block else None,
        hidden_WD=numbers(rng, spec.windows, spec.width) if spec.window else None,
        tail_ids_LM=ids(L, M) if M else None,
        tail_logits_LM=numbers(rng, L, M) if M else None,
    )


def expected(spec: CacheSpec, unit: int, row: CapturedRow) -> dict[str, Any]:
    """One row of the contract, said without the code under test."""
    T, L = spec.length, row.packed.length

    def padded(values: np.ndarray, fill: float) -> np.ndarray:
        return np.concatenate([values, np.full((T - L, *values.shape[1:]), fill, values.dtype)])

    nan = float("nan")
    columns: dict[str, Any] = {
        "sequence_id": unit * 2**32 + row.packed.row,
        "length": L,
        "next_id": row.packed.next_id,
        "doc_ids": list(row.packed.doc_ids),
        "segment_ids": padded(row.packed.segment_ids_L, 0),
        "input_ids": padded(row.packed.input_ids_L, 0),
        "topk_ids": padded(row.topk_ids_LK, 0),
        "topk_logits": padded(row.topk_logits_LK, nan),
        "target_logit": padded(row.target_logit_L, nan),
        "lse": padded(row.lse_L, nan),
        "log_tail": padded(row.log_tail_LR, nan),
    }
    if row.attn_map_Gnn is not None:
        columns["attn_map"] = row.attn_map_Gnn.astype(np.float16)
    if row.hidden_WD is not None:
        columns["hidden"] = row.hidden_WD
    if row.tail_ids_LM is not None and row.tail_logits_LM is not None:
        columns["tail_ids"], columns["tail_logits"] = padded(row.tail_ids_LM, 0), padded(row.tail_logits_LM, nan)
    return columns


def assert_same_value(found: Any, wanted: Any, name: str) -> None:
    """Bit for bit, but for the kind of NaN."""
    if name == "doc_ids":
        assert found == wanted
        return
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert found.shape == wanted.shape, name
    if wanted.dtype.kind == "f":
        assert found.dtype == wanted.dtype, name
        nan = np.isnan(wanted)
        assert (np.isnan(found) == nan).all() and (np.signbit(found) == np.signbit(wanted))[~nan].all(), name
        found, wanted = np.where(nan, 0, found), np.where(nan, 0, wanted)
    assert (found.astype(wanted.dtype) == wanted).all(), name


@settings(THOROUGH, max_examples=250)
@given(
    specs(),
    st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 1)), min_size=1, max_size=3),
    st.integers(0, 2),
    st.lists(st.lists(NAMES, min_size=1, max_size=3), min_size=1, max_size=4),
    st.integers(0, 2**32),
)
def test_rows_come_back_as_they_were_handed_over(
    spec: CacheSpec, sizes: list[tuple[int, int]], heldout: int, names: list[list[str]], seed: int
) -> None:
    """Any shape, any number of shards, rows around the bounds of row groups, document names of any characters."""
    rng = np.random.default_rng(seed)
    counts = [max(1, groups * spec.rows_per_group + more) for groups, more in sizes]
    units = {**dict(enumerate(counts)), **{HELDOUT_UNIT + i: counts[0] for i in range(heldout)}}
    rows = {
        unit: [captured_row(spec, row, tuple(names[row % len(names)][: spec.length]), rng) for row in range(count)]
        for unit, count in units.items()
    }
    compat = {"teacher": "any", "schema_major": SCHEMA_MAJOR}
    with tempfile.TemporaryDirectory() as folder, np.errstate(all="ignore"):
        cache = Path(folder)
        manifest = create_or_match(cache, Manifest(compat, spec.to_record(), spec, {}, "", "now"))
        identities = {"compat_id": manifest.compat_id, "data_id": manifest.data_id}
        for unit in rng.permutation(list(units)).tolist():
            split = "heldout" if unit >= HELDOUT_UNIT else "train"
            facts = {"split": split, "rows": units[unit], "tokens": 1, "short": False, "source": {}, "hardware": "none"}
            facts |= {"mean_entropy": 0.0, "mean_tail_mass": 0.0, "versions": {}, "seconds": 0.0, **identities}
            groups = row_groups(spec, unit, rows[unit], ShardStatistics())
            commit_shard(cache, unit, spec, {}, groups, lambda facts=facts: facts, new_claim_id())
        opened = Cache(cache)
        assert opened.spec == spec
        for split in ("train", "heldout"):
            mine = [unit for unit in sorted(units) if (unit >= HELDOUT_UNIT) == (split == "heldout")]
            found: list[dict[str, Any]] = []
            for columns in opened.groups(split):
                assert 1 <= len(columns["length"]) <= spec.rows_per_group
                found += [{k: v[i] for k, v in columns.items()} for i in range(len(columns["length"]))]
            wanted = [expected(spec, unit, row) for unit in mine for row in rows[unit]]
            assert len(found) == len(wanted)
            for have, want in zip(found, wanted, strict=True):
                assert have.keys() == want.keys()
                for name, value in want.items():
                    assert_same_value(have[name], value, name)
        assert sum(last - first + 1 for first, last, _ in RunCache(cache).ranges()) == len(units)


# --- plan


@dataclass(frozen=True)
class Layout:
    """A corpus: its kind, and for each file the texts, blank lines between them, and rows of a Parquet row group."""

    kind: str
    files: list[list[tuple[str, int]]]
    group: int

    def write(self, folder: Path) -> list[tuple[int, str]]:
        """Write the files; returns (position in the concatenated corpus, document id) of every document."""
        documents: list[tuple[int, str]] = []
        base = 0
        for number, texts in enumerate(self.files):
            path = folder / f"{number:03d}.{self.kind}"
            if self.kind == "parquet":
                table = pa.table({"id": [f"{number}-{i}" for i in range(len(texts))], "text": [t for t, _ in texts]})
                pq.write_table(table, path, row_group_size=self.group)
                documents += [(base + i, f"{number}-{i}") for i in range(len(texts))]
                base += len(texts)
                continue
            starts, data = self._lines(number, texts)
            documents += [(base + start, name.replace("FILE", path.name)) for start, name in starts]
            base += len(data)
            path.write_bytes(self._frames(data) if self.kind == "jsonl.zst" else data)
        return documents

    def _lines(self, number: int, texts: list[tuple[str, int]]) -> tuple[list[tuple[int, str]], bytes]:
        out = io.BytesIO()
        starts = []
        for i, (text, blank) in enumerate(texts):
            if self.kind == "txt":
                starts.append((out.tell(), f"FILE:{out.tell()}"))
                out.write(text.encode() + b"\n" + b" \n" * blank + b"\n")
            else:
                starts.append((out.tell(), f"{number}-{i}"))
                record = {"id": f"{number}-{i}", "text": text}
                out.write(json.dumps(record, ensure_ascii=False).encode() + b"\n" + b"\n" * blank)
        return starts, out.getvalue()

    def _frames(self, data: bytes) -> bytes:
        size = max(1, len(data) // 5)
        return b"".join(zstandard.compress(data[at : at + size]) for at in range(0, len(data), size))


TEXTS = st.text(st.sampled_from("ab é漢\U0001f642.,"), min_size=1, max_size=60).map(lambda text: "x" + text.strip())


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    kind = draw(st.sampled_from(["jsonl", "jsonl.zst", "txt", "parquet"]))
    document = st.tuples(TEXTS, st.integers(0, 3))
    files = draw(st.lists(st.lists(document, min_size=1, max_size=25), min_size=1, max_size=4))
    return Layout(kind, files, draw(st.integers(1, 9)))


def ids(plan: Plan, config: CorpusConfig, unit: Unit) -> list[str]:
    return [document.id for document in plan.documents(config, unit)]


@settings(THOROUGH, max_examples=400)
@given(layouts(), st.integers(1, 40), st.integers(1, 200), st.floats(0, 0.95), st.data())
def test_units_cover_their_part_of_the_corpus_exactly_once(
    layout: Layout, tokens: int, range_bytes: int, fraction: float, data: st.DataObject
) -> None:
    """Every document of the part belongs to one unit, by where it begins; none to two, none to both splits."""
    config = CorpusConfig("", heldout_fraction=fraction, range_bytes=range_bytes, bytes_per_token=2.0)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("teacher_dump.corpus_files.BLANK_BYTES", 4)  # short files are sought in too
        config = replace(config, source=folder)
        documents = layout.write(Path(folder))
        try:
            plan = make_plan(config, describe_corpus(config, Path("data")), tokens)
        except UserError as error:
            assert "are less than one shard's" in str(error) or "range_bytes" in str(error)
            assume(False)
        seen: dict[str, str] = {}
        covered: list[tuple[int, int]] = []
        for split, count in (("train", plan.train_units), ("heldout", plan.heldout_units)):
            for index in range(count):
                unit = plan.unit(index, split)
                covered.append((unit.start, unit.end))
                found = ids(plan, config, unit)
                assert found == [name for start, name in documents if unit.start <= start < unit.end]
                for name in found:
                    assert name not in seen, f"{name} in {split} {index} and in {seen[name]}"
                    seen[name] = f"{split} {index}"
        assert 0 <= (plan.extent - plan.heldout_from) - plan.extent * fraction <= 1, "another part is held out"
        training, held = covered[: plan.train_units], covered[plan.train_units :]
        for ranges, first, end in ((training, 0, plan.heldout_from), (held, plan.heldout_from, plan.extent)):
            ends = [first, *(stop for _, stop in ranges)]
            assert [start for start, _ in ranges] == ends[:-1] and end - plan.stride < ends[-1] <= end
        index = data.draw(st.integers(0, plan.train_units - 1))
        again = make_plan(config, describe_corpus(config, Path("data")), tokens)
        assert again.unit(index, "train") == plan.unit(index, "train") and again == plan


@settings(THOROUGH, max_examples=60)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 3), st.integers(0, 3))
def test_unit_i_is_the_same_whatever_the_number_of_shards(few: int, many: int, held: int, more: int) -> None:
    """What a dump of `few` shards works on is a part of what one of `many` does."""
    (few, many), (held, more) = sorted((few, many)), sorted((held, more))
    plan = Plan((), stride=7, heldout_from=7 * 31 + 3, extent=7 * 36)

    def units(shards: int, heldout: int) -> dict[int, Unit]:
        config = DumpConfig(CorpusConfig("x"), Path("c"), shards=shards, heldout_shards=heldout)
        missing: Any = None
        found = list(wanted_units(Work(config, missing, plan, missing, missing, Path("c"))))
        assert len({unit.unit for unit in found}) == len(found) == shards + heldout
        return {unit.unit: unit for unit in found}

    assert units(few, held).items() <= units(many, more).items()


# --- packing


SEPARATOR = 10**6


def encode(texts: list[str]) -> list[list[int]]:
    """A token a character; a dot is none, as a text may come to none."""
    return [[ord(c) for c in text if c != "."] for text in texts]


def read_back(rows: list[PackedRow], T: int) -> Iterator[tuple[str, int]]:
    """(document, token) of every token of the rows, in order."""
    for number, row in enumerate(rows):
        assert row.row == number and 1 <= row.length <= T
        steps = np.diff(row.segment_ids_L)
        assert row.segment_ids_L[0] == 0 and ((steps == 0) | (steps == 1)).all()
        assert len(row.doc_ids) == row.segment_ids_L[-1] + 1
        yield from ((row.doc_ids[s], int(t)) for s, t in zip(row.segment_ids_L, row.input_ids_L, strict=True))


@settings(THOROUGH, max_examples=300)
@given(
    st.lists(st.text("ab.é漢", max_size=20), max_size=25),
    st.sampled_from(["stream", "document"]),
    st.integers(1, 12),
    st.integers(1, 30),
)
@example(["ab", "c"], "stream", 5, 9)  # five tokens with separators: the stream ends exactly with the row
@example(["", ".", ".."], "stream", 1, 1)
def test_tokens_are_packed_in_order_and_only_the_stated_rest_is_left(
    texts: list[str], packing: str, T: int, limit: int
) -> None:
    documents = [Document(f"doc {n}", text) for n, text in enumerate(texts)]
    count = PackingCount()
    options: dict[str, Any] = {"packing": packing, "length": T, "rows": limit, "separator": SEPARATOR, "count": count}
    rows = list(pack(iter(documents), encode, **options))
    stream = [
        [(document.id, token) for token in [*tokens, SEPARATOR]]
        for document, tokens in zip(documents, encode(texts), strict=True)
        if tokens
    ]
    found = list(read_back(rows, T))
    if packing == "stream":
        joined = [pair for document in stream for pair in document]
        assert found == joined[: len(found)] and all(row.length == T for row in rows)
        assert len(rows) == min(limit, len(joined) // T), "a row that could be filled was left"
        following = [token for _, token in joined[T::T]] + [-1]
        assert [row.next_id for row in rows] == following[: len(rows)]
    else:
        assert found == [pair for document in stream[:limit] for pair in document[:T]]
        cut = [document[T][1] if len(document) > T else -1 for document in stream[:limit]]
        assert [row.next_id for row in rows] == cut
        assert count.truncated == sum(token != -1 for token in cut)
    assert count.text_bytes <= sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("packing", ["stream", "document"])
def test_the_properties_can_fail(packing: str) -> None:
    """A packer that loses a token is noticed by what reads the rows back."""
    rows = list(
        pack(iter([Document("a", "abc"), Document("b", "de")]), encode, packing=packing, length=3, rows=9,
             separator=SEPARATOR, count=PackingCount())
    )  # fmt: skip
    broken = [replace(rows[0], input_ids_L=rows[0].input_ids_L[::-1].copy()), *rows[1:]]
    assert list(read_back(broken, 3)) != list(read_back(rows, 3))
