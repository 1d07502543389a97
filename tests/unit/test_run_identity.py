"""A run takes the caches it belongs to and no others, and of a cache that grew the shards it was started on."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_cache import commit_toy_shard, write_toy_cache
from helpers_student import save_checkpoint
from lightning import Callback, Trainer

import student.__main__ as command
from pipeline.cache import Cache
from pipeline.commit import commit_json, read_json
from pipeline.errors import UserError
from pipeline.manifest import identity, read_manifest
from pipeline.schema import HELDOUT_UNIT, SCHEMA_MAJOR
from student.data.loader import CacheDataModule
from student.evaluate import EvaluateOptions, evaluate
from student.generate import main as generate
from student.runs.checkpoint import load_student
from student.runs.identity import RunCache, name_units

SIZES: dict[str, Any] = {"rows": 8, "length": 32, "block": 8, "window": 4}


def write_cache(path: Path, units: int = 3, **more: Any) -> Path:
    return write_toy_cache(path, units=units, **{**SIZES, **more})


def grow(cache: Path, first: int, last: int) -> None:
    """What a dump does to a cache that is there: shards, and nothing else."""
    for unit in range(first, last):
        commit_toy_shard(cache, read_manifest(cache), unit, SIZES["rows"])


def change(cache: Path, part: str, name: str, value: object) -> Path:
    """Give a cache another identity: one field of its manifest, and the ids that follow, its shards' too."""
    record = read_json(cache / "manifest.json")
    record[part][name] = value
    record |= {"compat_id": identity(record["compat"]), "data_id": identity(record["data"])}
    commit_json(cache / "manifest.json", record)
    for path in [*cache.glob("shard-*.json"), *cache.glob("heldout-*.json")]:
        commit_json(path, {**read_json(path), **{k: record[k] for k in ("compat_id", "data_id")}})
    return cache


class Stop(Callback):
    """Ends the sitting as Ctrl-C does once `step` steps are done; `then` runs when that step begins."""

    def __init__(self, step: int, then: Any = None) -> None:
        self.step, self.then = step, then

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step + 1 == self.step:
            if self.then is not None:
                self.then()
            else:
                os.kill(os.getpid(), 2)


def train(cache: Path | list[Path], run: Path, *extra: str, callbacks: tuple[Callback, ...] = ()) -> int:
    caches = [cache] if isinstance(cache, Path) else cache
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "TRAINER_DEFAULTS", {**command.TRAINER_DEFAULTS, "callbacks": list(callbacks)})
        return command.main(
            [
                *(f"--cache={path}" for path in caches[:1]),
                *(f"--cache+={path}" for path in caches[1:]),
                *(f"--run={run}", "--data.batch_rows=4", "--model.student.blocks=2", "--model.student.heads=4"),
                *("--model.loss.beta=0", "--trainer.accelerator=cpu", "--trainer.max_epochs=2", *extra),
            ]
        )


def weights(run: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return found


def assert_same_weights(a: Path, b: Path) -> None:
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cache: three shards; whole: its undisturbed run; run: the same, stopped after five of twelve steps."""
    folder = tmp_path_factory.mktemp("identity")
    cache = write_cache(folder / "cache")
    assert train(cache, folder / "whole") == 0
    assert train(cache, folder / "run", callbacks=(Stop(5),)) == 130
    return folder


@pytest.fixture
def here(started: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(started, tmp_path / "here"))


def test_a_run_goes_on_exactly_though_its_cache_grew(here: Path) -> None:
    grow(here / "cache", 3, 6)
    commit_toy_shard(here / "cache", read_manifest(here / "cache"), HELDOUT_UNIT + 1, 8)
    assert train(here / "cache", here / "run") == 0
    assert_same_weights(here / "run", here / "whole")
    assert read_json(here / "run" / "data.json")["caches"][0]["units"] == [[0, 2, 8], [HELDOUT_UNIT, HELDOUT_UNIT, 8]]


def test_a_cache_that_grows_while_a_run_trains_does_not_change_it(here: Path) -> None:
    """Also across the epoch's end, where a loader could list shards anew."""
    more = Stop(3, then=lambda: grow(here / "cache", 3, 5))
    assert train(here / "cache", here / "beside", callbacks=(more,)) == 0
    assert len(Cache(here / "cache").shards()) == 5
    assert_same_weights(here / "beside", here / "whole")


def test_a_new_run_takes_what_is_there_and_may_begin_with_the_old_weights(here: Path) -> None:
    grow(here / "cache", 3, 4)
    assert train(here / "cache", here / "new", f"--init_from={here / 'whole'}", "--trainer.max_steps=1") == 0
    record = read_json(here / "new" / "data.json")
    assert record["caches"][0]["units"][0] == [0, 3, 8] and record["steps_per_epoch"] == 8
    before, after = weights(here / "whole"), weights(here / "new")
    fresh = "--trainer.max_steps=1", "--model.optimizer.lr=1e-12"
    assert train(here / "cache", here / "same", f"--init_from={here / 'whole'}", *fresh) == 0
    assert all(torch.allclose(before[name], value, atol=1e-6) for name, value in weights(here / "same").items())
    assert not all(torch.equal(before[name], after[name]) for name in before)
    best = here / "whole" / "checkpoints" / "best.ckpt"
    assert train(here / "cache", here / "best", f"--init_from={best}", *fresh) == 0
    with pytest.raises(UserError, match=r"--init_from was .*/whole, is "):
        train(here / "cache", here / "new", "--trainer.max_steps=1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--init_from=no/such/run",), "--init_from no/such/run: there is no such run folder or checkpoint"),
        (
            ("--init_from=RUN", "--model.student.heads=2"),
            r"another student: --model\.student\.heads is 2, in .*/whole it is 4\. Give",
        ),
    ],
)
def test_weights_that_cannot_begin_a_run_are_refused(here: Path, options: tuple[str, ...], message: str) -> None:
    given = [option.replace("RUN", str(here / "whole")) for option in options]
    with pytest.raises(UserError, match=message):
        train(here / "cache", here / "new", *given)
    assert not (here / "new" / "run.json").exists()


def test_removed_shards_are_named(here: Path) -> None:
    for name in ("shard-00001", "heldout-00000"):
        (here / "cache" / f"{name}.json").unlink()
    with pytest.raises(UserError, match=r"cache lacks shard-00001, heldout-00000, which .*/run was started on"):
        train(here / "cache", here / "run")
    assert name_units([0, 1, 2, 5, 8, 9]) == "shard-00000 to shard-00002, shard-00005, shard-00008 to shard-00009"


def test_a_shard_that_was_dumped_again_is_the_same_shard(here: Path) -> None:
    """Other bytes (its metadata), same rows: what data_id promises."""
    cache = here / "cache"
    before = read_json(cache / "shard-00001.json")["sha256"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("helpers_cache.np.__version__", "9")
        patch.setattr("pipeline.schema.SCHEMA_MINOR", 7)
        grow(cache, 1, 2)
    assert read_json(cache / "shard-00001.json")["sha256"] != before
    assert train(cache, here / "run") == 0
    assert_same_weights(here / "run", here / "whole")


def test_a_shard_with_fewer_rows_than_the_run_was_started_on_is_refused(here: Path) -> None:
    commit_toy_shard(here / "cache", read_manifest(here / "cache"), 1, 5)
    with pytest.raises(UserError, match=r"shard-00001\.json holds 5 rows, .*/run was started on 8"):
        train(here / "cache", here / "run")


def test_every_rank_reads_what_the_first_one_found(tmp_path: Path) -> None:
    """A dump commits a shard between the starts of two ranks."""
    path = write_cache(tmp_path / "cache")
    first = CacheDataModule(str(path), batch_rows=4)
    grow(path, 3, 4)
    second = CacheDataModule(str(path), batch_rows=4)
    assert (first.steps_per_epoch, second.steps_per_epoch) == (6, 8)
    sent = [cache.ranges() for cache in first.caches]
    strategy = SimpleNamespace(broadcast=lambda own: sent)
    second.trainer = SimpleNamespace(world_size=2, global_rank=1, strategy=strategy)  # type: ignore[assignment]
    second.setup("fit")
    assert second.steps_per_epoch == 6 and len(second.train_dataloader()) == 6


def test_ranges_are_compact(tmp_path: Path) -> None:
    path = write_cache(tmp_path / "cache", units=6)
    (path / "shard-00003.json").unlink()
    commit_toy_shard(path, read_manifest(path), 1, 5)
    cache = RunCache(path)
    ranges = [[0, 0, 8], [1, 1, 5], [2, 2, 8], [4, 5, 8], [HELDOUT_UNIT, HELDOUT_UNIT, 8]]
    assert cache.ranges() == ranges
    cache.use(ranges[2:4], "run")
    assert cache.shards().unit.tolist() == [2, 4, 5] and len(cache.shards("heldout")) == 0


def test_other_data_is_refused_before_the_first_step(here: Path) -> None:
    before = (here / "run" / "checkpoints" / "last.ckpt").read_bytes()
    change(here / "cache", "data", "corpus", "other text")
    change(here / "cache", "data", "newer_field", None)
    with pytest.raises(UserError) as raised:
        train(here / "cache", here / "run")
    text = str(raised.value)
    assert "corpus was 'toy', is 'other text'" in text and "newer_field was nothing, is None" in text
    assert "k was" not in text and f"--init_from {here / 'run'}" in text
    assert (here / "run" / "checkpoints" / "last.ckpt").read_bytes() == before
    assert train(here / "cache", here / "another") == 0, "a new run may learn from other data of the same teacher"


@pytest.mark.parametrize("how", ["resume", "init_from", "beside another", "evaluate"])
def test_another_teacher_is_refused_naming_the_field(here: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    other = change(Path(shutil.copytree(here / "cache", here / "other")), "compat", "soft_cap", 30.0)
    monkeypatch.setattr(Trainer, "fit", lambda *_, **__: pytest.fail("training began"))
    with pytest.raises(UserError) as raised:
        if how == "resume":
            train(other, here / "run")
        elif how == "init_from":
            train(other, here / "new", f"--init_from={here / 'run'}")
        elif how == "evaluate":
            evaluate(EvaluateOptions(run=str(here / "run"), cache=str(other)))
        else:
            train([here / "cache", other], here / "new")
    text = str(raised.value)
    assert f"soft_cap is 30.0 in {other}, None in " in text and "different teachers" in text
    assert "vocab_size" not in text


def test_checkpoint_of_another_teacher_within_a_run_is_refused(here: Path) -> None:
    path = here / "run" / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    content["compat"] = {**content["compat"], "head_dtype": "bfloat16"}
    content["compat_id"] = identity(content["compat"])
    save_checkpoint(content, path)
    for use in (lambda: train(here / "cache", here / "run"), lambda: load_student(here / "run")):
        with pytest.raises(UserError, match="head_dtype is 'bfloat16' in .* 'float32' in "):
            use()


@pytest.mark.parametrize("name", ["teacher_sha256", "tokenizer_sha256", "logit_scale", "soft_cap"])
def test_generation_refuses_the_teacher_folder_of_another_run(here: Path, name: str) -> None:
    path = here / "run" / "teacher" / "teacher.json"
    record = read_json(path)
    was, now = record["facts"][name], "0" * 64 if "sha256" in name else 2.5
    commit_json(path, {**record, "facts": {**record["facts"], name: now}})
    field = name.removesuffix("_sha256")
    with pytest.raises(UserError) as raised:
        generate([f"--run={here / 'run'}", "--prompt=the", "--max_new_tokens=1"])
    assert f"{field} is {was!r} in {here / 'run'}/run.json, {now!r} in " in str(raised.value)


def test_other_number_of_caches_is_refused(here: Path) -> None:
    longer = write_cache(here / "longer", length=64)
    with pytest.raises(UserError, match=r"was started on 1 caches \(.*/cache\), --cache names 2"):
        train([here / "cache", longer], here / "run")


def test_caches_of_two_lengths_train_together_and_resume_exactly(here: Path) -> None:
    longer = write_cache(here / "longer", units=2, length=64)
    both = [here / "cache", longer]
    assert train(both, here / "straight") == 0
    assert train(both, here / "cut", callbacks=(Stop(7),)) == 130
    grow(here / "cache", 3, 4)
    assert train(both, here / "cut") == 0
    assert_same_weights(here / "cut", here / "straight")
    lengths = {batch.input_ids_BT.shape[1] for batch in CacheDataModule(list(map(str, both)), 4).train_dataloader()}
    assert lengths == {32, 64}


def test_run_of_a_version_that_kept_no_units_is_told(here: Path) -> None:
    commit_json(here / "run" / "data.json", {"data_ids": ["x"], "steps_per_epoch": 6})
    with pytest.raises(UserError, match="did not keep the shards a run was started on: start a new --run with --init"):
        train(here / "cache", here / "run")


def add_unknown_fields(cache: Path) -> None:
    """What a later minor version may add, in every file."""
    record = read_json(cache / "manifest.json")
    record |= {"schema": f"{SCHEMA_MAJOR}.99", "later": 1, "spec": {**record["spec"], "later": 1}}
    record["data"] |= {"later": 1}
    commit_json(cache / "manifest.json", {**record, "data_id": identity(record["data"])})
    teacher = read_json(cache / "teacher" / "teacher.json")
    facts = {**teacher["facts"], "later": 1}
    commit_json(cache / "teacher" / "teacher.json", {**teacher, "facts": facts, "later": 1})
    for path in [*cache.glob("shard-*.json"), *cache.glob("heldout-*.json")]:
        commit_json(path, {**read_json(path), "data_id": identity(record["data"]), "later": 1})


def test_a_newer_minor_schema_is_read_and_unknown_fields_passed_over(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache")
    rows = [columns["sequence_id"].tolist() for columns in Cache(cache).groups("train")]
    add_unknown_fields(cache)
    assert [columns["sequence_id"].tolist() for columns in Cache(cache).groups("train")] == rows
    assert train(cache, tmp_path / "run", "--trainer.max_steps=1") == 0
    load_student(tmp_path / "run")


def test_an_older_minor_schema_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = write_cache(tmp_path / "cache")
    monkeypatch.setattr("pipeline.manifest.SCHEMA_MINOR", 9)
    monkeypatch.setattr("pipeline.schema.SCHEMA_MINOR", 9)
    assert len(Cache(cache).shards()) == 3


@pytest.mark.parametrize(
    ("major", "remedy"), [(SCHEMA_MAJOR + 1, "upgrade this software"), (0, "dump the cache again")]
)
def test_other_major_schemas_are_refused_before_anything_starts(tmp_path: Path, major: int, remedy: str) -> None:
    cache = write_cache(tmp_path / "cache")
    record = {**read_json(cache / "manifest.json"), "schema": f"{major}.0"}
    commit_json(cache / "manifest.json", {name: record[name] for name in ("schema", "created")})
    with pytest.raises(UserError, match=f"has schema {major}.0, this version reads {SCHEMA_MAJOR}.x: {remedy}"):
        train(cache, tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()
