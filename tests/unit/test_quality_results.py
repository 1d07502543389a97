"""The file that figures are added to, by several runners and out of the files of other machines."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.quality.__main__ import main
from benchmarks.quality.results import RowFile, curves_of
from pipeline.errors import UserError


def test_rows_are_replaced_by_key_and_never_by_errors(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "deep" / "quality.json")
    assert file.read() == []
    key = {"arm": "ce", "seed": 0, "budget": "screen"}
    file.add([{**key, "error": "first"}, {**key, "seed": 1, "value": 1.23456789}])
    file.add([{**key, "value": 2.0}])
    file.add([{**key, "error": "later"}])
    assert file.read() == [{**key, "value": 2.0}, {**key, "seed": 1, "value": 1.23457}]
    assert [path.name for path in file.path.parent.iterdir()] == ["quality.json"]
    file.path.write_text('{"rows": [{"arm": "ce"}]}')
    with pytest.raises(UserError, match="quality.json holds no rows"):
        file.read()


def test_runners_may_add_at_the_same_time(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "quality.json")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: file.add([{"arm": "a", "seed": seed, "budget": "screen"}]), range(40)))
    assert sorted(row["seed"] for row in file.read()) == list(range(40))


def test_merging_files_of_other_machines(tmp_path: Path) -> None:
    for name, seed in (("here", 0), ("there", 1)):
        row = {"arm": "ce", "seed": seed, "budget": "screen"}
        path = tmp_path / name / "quality.json"
        RowFile(path).add([row])
        RowFile(curves_of(path)).add([{**row, "step": [1]}])
    here = tmp_path / "here" / "quality.json"
    assert main(["--results", str(here), "--merge", str(tmp_path / "there" / "quality.json")]) == 0
    for path in (here, curves_of(here)):
        assert [row["seed"] for row in RowFile(path).read()] == [0, 1]
