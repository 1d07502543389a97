"""What a dump works from: teacher, plan and manifest, checked and written once before any engine starts."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from pipeline.cache import Cache
from pipeline.commit import new_claim_id
from pipeline.errors import UserError
from pipeline.folder_checks import shard_stems
from pipeline.manifest import MANIFEST, Manifest, create_or_match
from pipeline.schema import CacheSpec, unit_name
from pipeline.shard import DamagedShard, read_record
from pipeline.stop_signals import stops_wait
from pipeline.store import is_file, is_remote, make_folder
from teacher_dump.plan import Plan, Unit, open_plan, store_plan
from teacher_dump.settings import DumpConfig, resolve_engine, to_plain
from teacher_dump.teacher import Teacher, open_teacher, write_teacher_folder


@dataclass(frozen=True)
class Work:
    """Everything a unit needs besides the engine; can be pickled."""

    config: DumpConfig
    teacher: Teacher
    plan: Plan
    manifest: Manifest
    spec: CacheSpec
    cache: Path


def prepare(config: DumpConfig) -> Work:
    """Check everything that can be checked without the engine, and write teacher folder, plan and manifest.

    Raises:
        UserError: see `DumpConfig.check`, `open_teacher`, `open_plan`, `create_or_match`.
    """
    teacher = open_teacher(config.teacher, config.data, config.separator)
    config.check(teacher.facts)
    config = replace(config, engine=resolve_engine(config.engine, config.length, teacher.facts.dtype))
    cache = config.cache
    make_folder(cache)
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
    if is_file(cache / MANIFEST):
        with stops_wait():
            manifest = create_or_match(cache, manifest)
    else:
        require_own_shards(cache, manifest)
    plan.unit(config.shards - 1, "train")
    if config.heldout_shards:
        plan.unit(config.heldout_shards - 1, "heldout")
    with stops_wait():
        write_teacher_folder(teacher, cache, claim)
        store_plan(cache, plan, claim)
        manifest = create_or_match(cache, manifest)
    return Work(config, teacher, plan, manifest, spec, cache)


def require_own_shards(cache: Path, manifest: Manifest) -> None:
    """In a folder whose manifest was lost: refuse to write one that does not suit the shards that are there.

    Raises:
        UserError: a shard was dumped with other settings; names its identity and the one of this run.
    """
    for stem in sorted(shard_stems(cache)):
        path = cache / f"{stem}.json"
        try:
            record = read_record(path)
        except UserError:
            continue  # damaged: it is dumped again
        for name in ("compat_id", "data_id"):
            if getattr(record, name) != getattr(manifest, name):
                raise UserError(
                    f"{cache} has no {MANIFEST}, and {path.name} has {name} {getattr(record, name)}, these settings "
                    f"{getattr(manifest, name)}: give the settings the cache was made with, or another folder "
                    "(CACHE=..., --cache)"
                )


def require_cache(work: Work) -> None:
    """Refuse to go on where the cache is gone: what is written now would lie where nobody looks for it.

    Raises:
        UserError: its manifest is no longer there.
    """
    path = work.cache / MANIFEST
    if not is_remote(work.cache) and not path.is_file():
        raise UserError(
            f"{path} is gone while the dump runs: its folder was moved or removed, or its disk is no longer there; "
            "bring it back and run the same command again"
        )


def is_done(work: Work, unit: Unit) -> bool:
    """Whether a unit's shard is committed: JSON, size and footer digest agree (a full hash is `verify`'s work).

    Raises:
        UserError: it is another cache's.
        OSError: a store does not answer; the shard may be there.
    """
    path = work.cache / f"{unit_name(unit.unit)}.json"
    if not is_file(path):
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
