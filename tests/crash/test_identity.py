"""Every identity field changed, one at a time: refused wherever it must be, by its name and both values."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

from chaos import identity
from chaos.identity import Count, fields_of, run
from helpers_prepared import dump_config, write_prepared_cache

from pipeline.errors import UserError
from pipeline.manifest import read_manifest
from pipeline.schema import CacheSpec


def test_no_other_identity_is_let_in() -> None:
    figures = run(seed=0, small=True)
    assert [figure.facts.get("broken") for figure in figures if figure.failures] == []
    trials = {figure.what.split(":")[0]: figure.trials for figure in figures}
    assert trials["another teacher"] >= 7 * 4 and trials["another identity"] >= 29 * 2


def test_all_fields_of_a_real_manifest_are_changed(tmp_path: Path) -> None:
    manifest = read_manifest(write_prepared_cache(dump_config(tmp_path)))
    named = {(field.part, field.name) for field in fields_of(manifest)}
    assert named == {("compat", name) for name in manifest.compat} | {("data", name) for name in manifest.data}
    assert {name for _, name in named} > {"teacher", "tokenizer", "soft_cap", "corpus", "seed", "rows_per_step"}
    assert {name for _, name in named} > set(CacheSpec.__dataclass_fields__)


def test_a_check_that_is_left_out_is_counted() -> None:
    """The experiment can fail: a resume that compares nothing, and a message that names nothing."""
    with mock.patch("student.__main__.open_data"), mock.patch.object(identity, "fields_of", some_fields):
        figures = {figure.what.partition(":")[2][:13]: figure for figure in run(seed=0, small=True)}
    resume = figures[" exact resume"]
    assert resume.failures == 1 and "data.k, resume: not refused, training began" in resume.facts["broken"]
    count = Count()
    count.add("x", lambda: (_ for _ in ()).throw(UserError("no")).__next__(), ["k", "8"])
    count.add("y", lambda: None, [])
    assert count.figure("z").failures == 2


def some_fields(manifest: object) -> list[identity.Field]:
    return [field for field in fields_of(manifest) if field.name in ("k", "soft_cap")]  # type: ignore[arg-type]
