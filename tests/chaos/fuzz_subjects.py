"""What is made up, and how it is read: one class for every kind of file that a stranger may hand over.

A subject writes one made-up file into a copy of a small cache, its digests made to match, and reads it as the commands
do. `read` returns a word for a right read; a `UserError` is the other right outcome.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from chaos.changes import change_record, change_text
from chaos.fuzz_parquet import ParquetFuzzer, footer_digest
from pipeline import page_checksums
from pipeline.cache import Cache
from pipeline.claim import clear_dead_claims, is_held
from pipeline.folder_checks import check_teacher
from pipeline.manifest import identity, read_manifest
from pipeline.schema import MOST_GROUP_BYTES, CacheSpec
from pipeline.shard import ShardFile, ShardRecord, read_record
from pipeline.shard_checks import check_unit
from pipeline.verify import verify_cache
from teacher_dump.corpus import CorpusConfig, describe_corpus, read_range
from teacher_dump.plan import open_plan

SHARD = "shard-00000"


class Subject:
    """A kind of made-up file.

    Attributes:
        name: of the kind.
        file: the file of the cache that is made up.
    """

    name: str
    file: str

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.path = cache / self.file
        self.good = self.path.read_bytes()

    def make(self, rng: random.Random, number: int) -> bytes:
        raise NotImplementedError

    def read(self, rng: random.Random) -> str:
        raise NotImplementedError

    def restore(self) -> None:
        self.path.write_bytes(self.good)


def sealed(record: dict[str, Any], rng: random.Random) -> bytes:
    """A JSON file as `commit_json` writes it, whatever its content is."""
    try:
        text = json.dumps(record, indent=1, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):  # an integer of more digits than Python writes
        text = b'{\n "a": ' + b"9" * 5000 + b"\n}"
    return seal_text(text.removesuffix(b"\n}"))


def seal_text(text: bytes) -> bytes:
    return text + f',\n "digest": "{hashlib.sha256(text).hexdigest()}"\n}}\n'.encode()


class JsonSubject(Subject):
    """A JSON file: its values changed, or its text; the digest is right in nine of ten."""

    def make(self, rng: random.Random, number: int) -> bytes:
        if rng.random() < 0.15:
            data = change_text(rng, self.good)
            return data if rng.random() < 0.5 else seal_text(data)
        record = json.loads(self.good)
        del record["digest"]
        change_record(rng, record)
        self.follow(rng, record)
        return sealed(record, rng)

    def follow(self, rng: random.Random, record: dict[str, Any]) -> None:
        """Change what must agree with the changes."""


class ManifestSubject(JsonSubject):
    name, file = "manifests", "manifest.json"

    def follow(self, rng: random.Random, record: dict[str, Any]) -> None:
        for part in ("compat", "data"):
            if isinstance(record.get(part), dict) and rng.random() < 0.8:
                try:
                    record[f"{part}_id"] = identity(record[part])
                except (ValueError, RecursionError):
                    continue

    def read(self, rng: random.Random) -> str:
        cache = Cache(self.cache)
        assert cache.spec.group_bytes <= MOST_GROUP_BYTES
        if rng.random() < 0.1:
            assert isinstance(verify_cache(self.cache).problems, list)
        for entry in cache.shards("train"):
            with cache.open(entry) as shard:
                check_shapes(shard)
        cache.teacher.token_bytes()
        return "read"


class PlanSubject(JsonSubject):
    name, file = "plans", "plan.json"

    def __init__(self, cache: Path) -> None:
        self.config = CorpusConfig(str(cache.parent / "corpus"), range_bytes=1, bytes_per_token=1.0)
        super().__init__(cache)

    def read(self, rng: random.Random) -> str:
        plan = open_plan(self.cache, self.config, 256, self.cache)
        unit = plan.unit(0, "train")
        for count, _ in enumerate(plan.documents(self.config, unit)):
            if count == 2:
                break
        check_unit(self.cache, read_manifest(self.cache), None, SHARD)
        if rng.random() < 0.2:
            verify_cache(self.cache)
        return "read"


class RecordSubject(JsonSubject):
    name, file = "shard records", f"{SHARD}.json"

    def read(self, rng: random.Random) -> str:
        cache = Cache(self.cache)
        if rng.random() < 0.2:
            check_unit(self.cache, cache.manifest, None, SHARD)
        entries = cache.shards("train")
        assert len(entries) == 1
        with cache.open(entries[0]) as shard:
            check_shapes(shard)
        return "read"


class TeacherSubject(JsonSubject):
    name, file = "teacher records", "teacher/teacher.json"

    def read(self, rng: random.Random) -> str:
        cache = Cache(self.cache)
        if rng.random() < 0.2:
            check_teacher(self.cache, cache.manifest)
        teacher = cache.teacher
        tensors = teacher.tensors()
        assert tensors["embedding_VD"].shape == (cache.spec.vocab_size, cache.spec.width)
        assert len(teacher.token_bytes()) == cache.spec.vocab_size and isinstance(teacher.config(), dict)
        return "read"


class IndexSubject(JsonSubject):
    """index.json and the Parquet file that it names."""

    name, file = "indices", "index.json"

    def __init__(self, cache: Path) -> None:
        Cache(cache).build_index()
        super().__init__(cache)
        self.table = cache / json.loads(self.good)["file"]
        self.good_table = self.table.read_bytes()
        self.fuzzer = ParquetFuzzer(self.good_table)

    def make(self, rng: random.Random, number: int) -> bytes:
        if number % 2:
            return super().make(rng, number)
        data = one_of(self.fuzzer, rng)
        self.table.write_bytes(data)
        record = {**read_json_bytes(self.good), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        return sealed(record, rng)

    def read(self, rng: random.Random) -> str:
        cache = Cache(self.cache)
        for entry in cache.shards("train"):
            with cache.open(entry) as shard:
                check_shapes(shard)
        return "read"

    def restore(self) -> None:
        super().restore()
        self.table.write_bytes(self.good_table)


class ClaimSubject(JsonSubject):
    name, file = "claims", f"claims/{SHARD}.json"

    def make(self, rng: random.Random, number: int) -> bytes:
        if rng.random() < 0.2:
            return change_text(rng, self.good)
        record = json.loads(self.good)
        change_record(rng, record)
        try:
            return json.dumps(record).encode()
        except ValueError:
            return b"{}"

    def read(self, rng: random.Random) -> str:
        is_held(self.cache, SHARD)
        clear_dead_claims(self.cache)
        assert (self.cache / "manifest.json").is_file() and (self.cache / "kept.tmp").is_file()
        return "read"


class ShardSubject(Subject):
    """A shard's Parquet file; the digests in its JSON match it."""

    file = f"{SHARD}.parquet"

    def __init__(self, cache: Path, name: str, way: Callable[[ParquetFuzzer, random.Random], bytes]) -> None:
        super().__init__(cache)
        self.name, self.way = name, way
        self.fuzzer = ParquetFuzzer(self.good)
        self.manifest = read_manifest(cache)
        self.record = read_record(cache / f"{SHARD}.json")
        with ShardFile(cache, self.record, self.manifest.spec) as shard:
            self.rows = check_shapes(shard)

    def make(self, rng: random.Random, number: int) -> bytes:
        return self.way(self.fuzzer, rng)

    def read(self, rng: random.Random) -> str:
        data = self.path.read_bytes()
        fields = {**vars(self.record), "bytes": len(data), "footer_sha256": footer_digest(data)}
        with ShardFile(self.cache, ShardRecord(**fields), self.manifest.spec) as shard:
            if rng.random() < 0.2:
                page_checksums.check_pages(self.path, shard.parquet.metadata)
            same = check_shapes(shard) == self.rows
        assert same or self.way is not ParquetFuzzer.footer, "the pages are what they were, the rows are not"
        return "read, the rows unchanged" if same else "read, rows as the pages have them"


class TokenBytesSubject(Subject):
    name, file = "token_bytes.parquet", "teacher/token_bytes.parquet"

    def __init__(self, cache: Path) -> None:
        super().__init__(cache)
        self.fuzzer = ParquetFuzzer(self.good)
        self.teacher = cache / "teacher/teacher.json"
        self.good_teacher = self.teacher.read_bytes()

    def make(self, rng: random.Random, number: int) -> bytes:
        data = one_of(self.fuzzer, rng)
        record = read_json_bytes(self.good_teacher)
        record["files"]["token_bytes.parquet"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        self.teacher.write_bytes(sealed(record, rng))
        return data

    def read(self, rng: random.Random) -> str:
        values = Cache(self.cache).teacher.token_bytes()
        assert all(isinstance(value, bytes) for value in values)
        return "read"

    def restore(self) -> None:
        super().restore()
        self.teacher.write_bytes(self.good_teacher)


class CorpusSubject(Subject):
    """A Parquet file of a corpus, with and without dictionaries."""

    name, file = "Parquet corpora", "corpus.parquet"

    def __init__(self, cache: Path) -> None:
        super().__init__(cache)
        table = pq.read_table(self.path)
        self.fuzzers = []
        for options in ({}, {"use_dictionary": False, "compression": "zstd", "data_page_version": "2.0"}):
            sink = pa.BufferOutputStream()
            pq.write_table(table, sink, row_group_size=30, **options)
            self.fuzzers.append(ParquetFuzzer(sink.getvalue().to_pybytes()))

    def make(self, rng: random.Random, number: int) -> bytes:
        return one_of(rng.choice(self.fuzzers), rng)

    def read(self, rng: random.Random) -> str:
        config = CorpusConfig(str(self.path), max_document_bytes=1 << 20)
        files = describe_corpus(config, self.cache)
        for count, document in enumerate(read_range(config, files, 0, sum(file.extent for file in files))):
            assert len(document.text) <= 1 << 20 and len(document.id) <= 1024
            if count == 200:
                break
        return "read"


def one_of(fuzzer: ParquetFuzzer, rng: random.Random) -> bytes:
    way = rng.random()
    chosen = (
        fuzzer.footer if way < 0.4 else fuzzer.page_header if way < 0.7 else fuzzer.page if way < 0.9 else fuzzer.bytes
    )
    return chosen(rng)


def read_json_bytes(data: bytes) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(data)
    del record["digest"]
    return record


def check_shapes(shard: ShardFile) -> str:
    """Read every row group: values may be a stranger's, their shapes and types are the manifest's. Returns a digest of
    the rows."""
    digest = hashlib.sha256()
    spec: CacheSpec = shard.spec
    shapes, rows = spec.shapes(), 0
    for group in range(shard.row_groups):
        columns = shard.read_group(group)
        count = len(columns["length"])
        rows += count
        assert columns.keys() == {"sequence_id", "length", "next_id", "doc_ids", *shapes}
        for name, shape in shapes.items():
            wanted = np.dtype(spec.value_type(name).to_pandas_dtype())
            assert columns[name].shape == (count, *shape) and columns[name].dtype == wanted, name
            digest.update(columns[name].tobytes())
        assert len(columns["doc_ids"]) == len(columns["sequence_id"]) == count
        assert all(isinstance(name, str) for names in columns["doc_ids"] for name in names)
        digest.update(
            repr(columns["doc_ids"]).encode() + columns["sequence_id"].tobytes() + columns["length"].tobytes()
        )
    assert rows == shard.record.rows
    return digest.hexdigest()
