"""Every identity field of a cache changed, one at a time: nothing that belongs to another identity may be let in.

The manifest is one that the dump's own code wrote. For each of its fields a second cache is made that differs in that
field alone (ids and shards follow), and is offered where the first one belongs.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

from helpers_cache import commit_toy_shard
from helpers_prepared import ROWS, dump_config, write_prepared_cache
from lightning import Callback, Trainer

import student.__main__ as command
from chaos.figure import Figure
from pipeline.cache import Cache
from pipeline.commit import commit_json, file_sha256
from pipeline.errors import UserError
from pipeline.manifest import MANIFEST, Manifest, read_manifest
from pipeline.schema import HELDOUT_UNIT, CacheSpec
from pipeline.verify import verify_cache
from student.evaluate import EvaluateOptions, evaluate
from student.runs.identity import RunCache
from teacher_dump.settings import DumpConfig
from teacher_dump.work import prepare

SHARD = "shard-00001"
CHANGES: dict[str, Any] = {
    "packing": "document",
    "taus": [1.0, 2.0],
    "k": 7,
    "dtype": "bfloat16",
    "head_dtype": "float16",
}
"""Values for fields of which not any value is one; the others are doubled, or made longer."""


class Began(Exception):
    """Training was let begin."""


@dataclass(frozen=True)
class Field:
    """One field of an identity and what it is changed to."""

    part: str  # compat or data
    name: str
    value: Any
    other: Any


@dataclass
class Count:
    """How often something was to be refused, and what went wrong."""

    trials: int = 0
    broken: list[str] = field(default_factory=list)

    def add(self, what: str, action: Callable[[], object], said: list[str]) -> None:
        """`action` must raise a UserError whose text holds every string of `said`."""
        self.trials += 1
        try:
            action()
        except UserError as error:
            missing = [part for part in said if part not in str(error)]
            if not missing:
                return
            self._break(f"{what}: refused without naming {missing}: {error}")
        except Began:
            self._break(f"{what}: not refused, training began")
        else:
            self._break(f"{what}: not refused")

    def check(self, what: str, holds: bool) -> None:
        self.trials += 1
        if not holds:
            self._break(what)

    def _break(self, sentence: str) -> None:
        self.broken.append(sentence)

    def figure(self, what: str, **facts: Any) -> Figure:
        facts |= {"broken": self.broken} if self.broken else {}
        return Figure("identity", what, self.trials, len(self.broken), facts)


TEACHERS = ("vocab_size", "width")
"""Fields of `data` that the teacher's folder states too."""


def fields_of(manifest: Manifest) -> list[Field]:
    """Every field of both identities, with another value of its type."""
    found = []
    for part, content in (("compat", manifest.compat), ("data", manifest.data)):
        for name, value in content.items():
            other = CHANGES.get(name, _another(value))
            assert other != value
            found.append(Field(part, name, value, other))
    return found


def _another(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return 2 * value if value else 1
    if isinstance(value, float):
        return value / 2
    if isinstance(value, str):
        return value[::-1] if value[::-1] != value else value + "x"
    return 30.0 if value is None else value[:-1]


def other_cache(base: Path, manifest: Manifest, field: Field, folder: Path) -> Path:
    """A cache that differs from `base` in one field and in what follows from it."""
    content = {**getattr(manifest, field.part), field.name: field.other}
    spec = manifest.spec
    if field.part == "data" and field.name in spec.to_record():
        spec = CacheSpec.from_record({**spec.to_record(), field.name: field.other})
    changed: Manifest = replace(manifest, **{field.part: content, "spec": spec})
    path = Path(shutil.copytree(base, folder / f"{field.part}-{field.name}"))
    commit_json(path / MANIFEST, changed.to_record())
    # Shards of the first one's shape: they are refused by who reads JSON and metadata, long before shapes matter.
    for unit in (0, 1, HELDOUT_UNIT):
        commit_toy_shard(path, replace(changed, spec=manifest.spec), unit, ROWS)
    return path


class StopAfter(Callback):
    """Ctrl-C once a step is done, so that a run is there to be resumed."""

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)


def train(caches: list[Path], run: Path, *more: str) -> int:
    """The command line's own way, in this process."""
    words = [f"--cache{'+' if i else ''}={cache}" for i, cache in enumerate(caches)]
    words += [f"--run={run}", "--data.batch_rows=4", "--model.student.blocks=2", "--model.student.heads=4"]
    words += ["--model.loss.beta=0", "--trainer.accelerator=cpu", "--trainer.max_epochs=2", "--checkpoint_every=1"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return command.main([*words, *more])


@contextlib.contextmanager
def no_step() -> Iterator[None]:
    """Training that is let begin, or weights that are loaded for it, raise `Began`."""

    def began(*_: Any, **__: Any) -> None:
        raise Began

    with mock.patch.object(Trainer, "fit", began), mock.patch.object(command, "load_initial", began):
        yield


def began(action: Callable[[], object]) -> bool:
    """Whether training was let begin."""
    try:
        action()
    except Began:
        return True
    return False


@dataclass
class Experiment:
    """The first cache, a run that was started on it, and a folder for what is made of them."""

    config: DumpConfig
    base: Path
    run: Path
    folder: Path

    def new_student(self, field: Field, other: Path, count: Count) -> None:
        """A student, or caches together, across a difference in `compat`."""
        said = [field.name, repr(field.value), repr(field.other)]
        fresh = self.folder / "new"
        where = f"{field.part}.{field.name}"
        count.add(f"{where}, --init_from", lambda: train([other], fresh, f"--init_from={self.run}"), said)
        count.add(f"{where}, two caches", lambda: train([self.base, other], fresh), said)
        options = EvaluateOptions(run=str(self.run), cache=str(other))
        count.add(f"{where}, evaluation", lambda: evaluate(options), said)
        count.check(f"{where}: a refused start left a run behind", not (fresh / "run.json").exists())

    def resume(self, field: Field, other: Path, count: Count) -> None:
        last = self.run / "checkpoints" / "last.ckpt"
        before = file_sha256(last)
        said = [field.name, repr(field.value), repr(field.other)]
        count.add(f"{field.part}.{field.name}, resume", lambda: train([other], self.run), said)
        count.check(f"{field.part}.{field.name}: the checkpoint changed", file_sha256(last) == before)

    def dump(self, field: Field, other: Path, count: Count) -> None:
        said = [f"{field.name}: cache has {field.other!r}, asked for {field.value!r}"]
        before = {path: path.stat().st_mtime_ns for path in other.rglob("*.*")}
        count.add(f"{field.part}.{field.name}, dump", lambda: prepare(replace(self.config, cache=other)), said)
        after = {path: path.stat().st_mtime_ns for path in other.rglob("*.*")}
        count.check(f"{field.part}.{field.name}: the refused dump wrote into the cache", before == after)

    def shard(self, field: Field, other: Path, reader: Count, verify: Count) -> None:
        """A shard of the other cache among the first one's, with its JSON and without."""
        mine, where = read_manifest(self.base), f"{field.part}.{field.name}"
        theirs = read_manifest(other)
        name = "compat_id" if field.part == "compat" else "data_id"
        said = [SHARD, name, getattr(mine, name), getattr(theirs, name)]
        with self._mixed(other, "json", "parquet") as mixed:
            reader.add(f"{where}, listing shards", lambda: Cache(mixed).shards(), said)
            reader.add(f"{where}, finding the shard", lambda: Cache(mixed).find(1), said)
            reader.add(f"{where}, training", lambda: RunCache(mixed), said)
            result = verify_cache(mixed, repair="list")
            told = [
                str(p) for p in result.problems if p.file.startswith(SHARD) and all(part in str(p) for part in said)
            ]
            verify.check(f"{where}: verify did not name both ids", bool(told))
            self._only_that(where, result, verify)
        with self._mixed(other, "parquet") as mixed:
            cache = Cache(mixed)
            reader.add(f"{where}, rows under this cache's JSON", lambda: cache.open(cache.record(1)), [SHARD])
            self._only_that(where, verify_cache(mixed, repair="list"), verify)

    def _only_that(self, where: str, result: Any, verify: Count) -> None:
        right = result.repair.dump_again == [SHARD] and {p.file.partition(".")[0] for p in result.problems} == {SHARD}
        verify.check(f"{where}: verify asks for {result.repair.dump_again}, {result.problems}", right)

    @contextlib.contextmanager
    def _mixed(self, other: Path, *suffixes: str) -> Iterator[Path]:
        mixed = Path(shutil.copytree(self.base, self.folder / "mixed"))
        try:
            for suffix in suffixes:
                shutil.copy(other / f"{SHARD}.{suffix}", mixed / f"{SHARD}.{suffix}")
            yield mixed
        finally:
            shutil.rmtree(mixed)

    def teachers_fact(self, field: Field, other: Path, count: Count) -> None:
        """A manifest whose `data` says of the teacher what its folder does not: no student begins on it."""
        said = [field.name, repr(field.value), repr(field.other)]
        fresh = self.folder / "new"
        count.add(f"{field.part}.{field.name}, a new student", lambda: train([other], fresh), said)
        count.check(f"{field.part}.{field.name}: a refused start left a run", not (fresh / "run.json").exists())

    def control(self, field: Field, other: Path, count: Count) -> None:
        """What must not be refused: a new student on other data of the same teacher, alone, beside, and beginning with
        the old one's weights."""
        fresh = self.folder / "new"
        ways = ([other], ()), ([self.base, other], ()), ([other], (f"--init_from={self.run}",))
        for caches, more in ways:
            held = began(lambda caches=caches, more=more: train(caches, fresh, *more))  # type: ignore[misc]
            count.check(f"data.{field.name}: a new student was refused", held)
            shutil.rmtree(fresh, ignore_errors=True)


def run(seed: int, small: bool) -> list[Figure]:
    """All fields; `small` leaves the positive control to the first two fields of `data`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = dump_config(folder, seed=1 + seed)
        base = write_prepared_cache(config)
        manifest = read_manifest(base)
        run = folder / "run"
        with mock.patch.dict(command.TRAINER_DEFAULTS, {"callbacks": [StopAfter()]}):
            assert train([base], run) == 128 + signal.SIGINT
        experiment = Experiment(config, base, run, folder)
        fields = fields_of(manifest)
        counts = {part: Count() for part in ("new", "resume", "dump", "reader", "verify", "control")}
        with no_step():
            # The same identity in another place is let in everywhere: what is refused below is refused for its field.
            moved = Path(shutil.copytree(base, folder / "moved"))
            counts["control"].check("a moved cache was refused", began(lambda: train([moved], run)))
            prepare(replace(config, cache=moved))
            counts["control"].check("a whole cache has problems", verify_cache(moved).ok)
            for number, field in enumerate(fields):
                other = other_cache(base, manifest, field, folder)
                experiment.resume(field, other, counts["resume"])
                experiment.dump(field, other, counts["dump"])
                experiment.shard(field, other, counts["reader"], counts["verify"])
                if field.part == "compat":
                    experiment.new_student(field, other, counts["new"])
                elif field.name in TEACHERS:
                    experiment.teachers_fact(field, other, counts["new"])
                elif not small or number < len(manifest.compat) + 2:
                    experiment.control(field, other, counts["control"])
                shutil.rmtree(other)
    compat = ", ".join(field.name for field in fields if field.part == "compat")
    data = ", ".join(field.name for field in fields if field.part == "data")
    return [
        counts["new"].figure(
            "another teacher: new student, two caches, evaluation refused, field named", compat=compat
        ),
        counts["resume"].figure("another identity: exact resume refused before a step, field named", data=data),
        counts["dump"].figure("another identity: dump into the cache refused, field named, nothing written"),
        counts["reader"].figure("shard of another cache: refused by every reader"),
        counts["verify"].figure("shard of another cache: found by verify, and nothing else"),
        counts["control"].figure("same identity elsewhere, other data for a new student: let in"),
    ]
