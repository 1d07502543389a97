"""Made-up manifests, plans, records and Parquet files: a reader refuses them with one sentence, or reads them rightly.

Digests and checksums are made to match, as a stranger's would. Not allowed: any other exception, a dead process, more
than `LIMIT_SECONDS`, and more memory than the bounds below. Every input follows from (seed, kind, number); one that
breaks the promise is left in a folder that the figure names.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch  # noqa: F401 - here, so that it is not counted as what reading takes
from helpers_cache import write_toy_cache

from chaos.figure import Figure
from chaos.forked import CRASH, in_children
from chaos.fuzz_parquet import ParquetFuzzer
from chaos.fuzz_subjects import (
    ClaimSubject,
    CorpusSubject,
    IndexSubject,
    ManifestSubject,
    PlanSubject,
    RecordSubject,
    ShardSubject,
    Subject,
    TeacherSubject,
    TokenBytesSubject,
)
from pipeline import checked_parquet, schema
from pipeline.commit import commit_json, new_claim_id
from pipeline.errors import UserError
from teacher_dump import corpus_parquet
from teacher_dump.corpus import CorpusConfig
from teacher_dump.plan import open_plan

LIMIT_SECONDS = 10
MOST_POOL_BYTES = 64 << 20
"""What Arrow may hold at a time. Row groups of the cache here have some 0.1 MB."""
SMALL_TOKENS, SMALL_PAGES = 4 << 20, 16 << 20
"""What token_bytes.parquet and pages of a corpus may take here; the real bounds are so large that a test of them would
tell nothing of what lies below."""
MOST_GROWTH_BYTES = 256 << 20
"""How much the process may grow: JSON of 4 MB may take 25 times as much."""
ADDRESS_SPACE = 512 << 20
"""Beyond what the process has at its start: what claims more than this fails at once, and is counted."""

TRIALS = {
    "manifests": 20_000,
    "plans": 12_000,
    "shard records": 20_000,
    "teacher records": 12_000,
    "indices": 4_000,
    "claims": 4_000,
    "shards: footers": 14_000,
    "shards: page headers": 10_000,
    "shards: pages": 5_000,
    "shards: bytes": 3_000,
    "token_bytes.parquet": 4_000,
    "Parquet corpora": 4_000,
}
SMALL_SHARE = 0.022


@dataclass(frozen=True)
class Answer:
    """What became of one input."""

    outcome: str
    right: bool
    pool: int
    growth: int


def run(seed: int, small: bool) -> list[Figure]:
    scratch_root = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=scratch_root) as scratch:
        subjects = make_subjects(Path(scratch))
        figures = []
        for name, count in TRIALS.items():
            figures.append(fuzz(subjects[name], seed, max(60, round(count * SMALL_SHARE)) if small else count))
    return figures


def make_subjects(folder: Path) -> dict[str, Subject]:
    """Every kind, each on a copy of one small cache of its own, with a corpus beside it."""
    former, schema.ROW_GROUP_TOKENS = schema.ROW_GROUP_TOKENS, 64
    try:
        cache = write_toy_cache(
            folder / "cache", units=1, heldout_units=1, rows=5, length=32, block=16, window=16, tail_samples=2, width=8
        )
    finally:
        schema.ROW_GROUP_TOKENS = former
    (folder / "corpus").mkdir()
    table = pa.table({"id": [f"d{n}" for n in range(90)], "text": [f"text {n % 9} " * (n % 13) for n in range(90)]})
    pq.write_table(table, folder / "corpus" / "a.parquet", row_group_size=30)
    (folder / "corpus" / "b.parquet").write_bytes((folder / "corpus" / "a.parquet").read_bytes())
    shutil.copy(folder / "corpus" / "a.parquet", cache / "corpus.parquet")
    config = CorpusConfig(str(folder / "corpus"), range_bytes=1, bytes_per_token=1.0)
    (cache / "plan.json").unlink()
    commit_json(cache / "plan.json", open_plan(cache, config, 256, cache).to_record())
    commit_json(cache / "claims" / "shard-00000.json", {"id": new_claim_id(), "machine": "m", "pid": 1, "started": "1"})
    (cache / "kept.tmp").write_text("no claim's")
    ways = {
        "shards: footers": ParquetFuzzer.footer,
        "shards: page headers": ParquetFuzzer.page_header,
        "shards: pages": ParquetFuzzer.page,
        "shards: bytes": ParquetFuzzer.bytes,
    }
    makers: dict[str, Any] = {kind.name: kind for kind in PLAIN}
    makers |= {name: partial(ShardSubject, name=name, way=way) for name, way in ways.items()}
    subjects = {}
    for number, (name, make) in enumerate(makers.items()):
        own = folder / str(number) / "cache"
        shutil.copytree(cache, own)
        os.symlink(folder / "corpus", folder / str(number) / "corpus")
        subjects[name] = make(own)
    return subjects


PLAIN: tuple[type[Subject], ...] = (
    ManifestSubject,
    PlanSubject,
    RecordSubject,
    TeacherSubject,
    IndexSubject,
    ClaimSubject,
    TokenBytesSubject,
    CorpusSubject,
)


def fuzz(subject: Subject, seed: int, count: int) -> Figure:
    """One kind: `count` inputs in children of 500 each."""
    started = time.monotonic()
    outcomes: dict[str, int] = {}
    broken: list[str] = []
    pool = growth = 0
    trial = Trial(subject, seed)
    for number, answer in in_children(list(range(count)), trial):
        if answer == CRASH:
            answer = Answer(why_it_died(trial, number), False, 0, 0)
        outcomes[answer.outcome] = outcomes.get(answer.outcome, 0) + 1
        pool, growth = max(pool, answer.pool), max(growth, answer.growth)
        if not answer.right:
            broken.append(f"{answer.outcome}: {save(subject, seed, number)}")
    seconds = time.monotonic() - started
    facts: dict[str, Any] = {
        "outcomes": ", ".join(f"{n:,} {what}" for what, n in sorted(outcomes.items(), key=lambda item: -item[1])),
        "peak": f"Arrow {pool / 1e6:.1f} MB (bound {MOST_POOL_BYTES / 1e6:.0f}), process {growth / 1e6:+.0f} MB",
        "inputs a second": round(count / seconds),
    }
    if broken:
        facts["broken"] = broken[:10]
    return Figure("fuzz", f"{subject.name}: refused in one sentence, or read rightly", count, len(broken), facts)


class Trial:
    """Makes and reads one input of a kind; runs in a child process, whose memory it limits at its first."""

    def __init__(self, subject: Subject, seed: int) -> None:
        self.subject, self.seed = subject, seed
        self._limited = 0
        self._resident = 0
        self._held = 0

    def __call__(self, number: int) -> Answer:
        if self._limited != os.getpid():
            self._limit()
        signal.alarm(LIMIT_SECONDS)
        outcome, right = self.outcome(number)
        pool = pa.default_memory_pool().max_memory()
        growth = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self._resident
        if right and pool > max(MOST_POOL_BYTES, self._held):  # a peak of before hides what lies below it
            outcome, right = f"Arrow held {pool} bytes", False
        if right and growth > MOST_GROWTH_BYTES:
            outcome, right = f"the process grew by {growth} bytes", False
        if not right:
            self._limited = 0  # a peak is told once
        return Answer(outcome, right, pool, growth)

    def outcome(self, number: int) -> tuple[str, bool]:
        rng = self.rng(number)
        try:
            self.subject.path.write_bytes(self.subject.make(rng, number))
            return self.subject.read(rng), True
        except UserError as error:
            if "alloc of size" in str(error):  # Arrow's word for memory it was refused
                return f"tried to allocate: {error}", False
            return f"refused ({type(error).__name__})", "\n" not in str(error)
        except BaseException as error:
            return f"{type(error).__name__}: {str(error)[:200]}", False
        finally:
            self.subject.restore()

    def rng(self, number: int) -> random.Random:
        return random.Random(f"{self.seed}/{self.subject.name}/{number}")

    def _limit(self) -> None:
        self._limited = os.getpid()
        self._resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self._held = pa.default_memory_pool().max_memory()
        checked_parquet.MOST_TOKEN_BYTES, corpus_parquet.MOST_PAGE_BYTES = SMALL_TOKENS, SMALL_PAGES
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + ADDRESS_SPACE, resource.RLIM_INFINITY))


def why_it_died(trial: Trial, number: int) -> str:
    """The signal that ended the process: the input once more, alone."""
    child = os.fork()
    if child == 0:
        try:
            trial(number)
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    trial.subject.restore()
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return f"still at it after {LIMIT_SECONDS} s" if name == "SIGALRM" else f"the process died of {name}"
    return "the process died, but not of this input alone"


def save(subject: Subject, seed: int, number: int) -> str:
    """Keep a made-up input; returns its place."""
    folder = Path(tempfile.gettempdir()) / "distil-xlstm-fuzz"
    folder.mkdir(exist_ok=True)
    place = folder / f"{seed}-{number}-{Path(subject.file).name}"
    rng = Trial(subject, seed).rng(number)
    place.write_bytes(subject.make(rng, number))
    subject.restore()
    return str(place)
