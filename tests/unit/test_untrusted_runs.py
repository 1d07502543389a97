"""The report reads runs of strangers as plain data: what cannot be is told and left out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.commit import commit_json
from pipeline.report.results import Measured
from pipeline.report.sources import read_run


def test_run_of_a_stranger_in_the_report(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    commit_json(run / "evaluation.json", {"rows": "many", "student_perplexity": 1.0})
    (run / "metrics.csv").write_text("step,loss\n1e400,1\n")
    (run / "config.yaml").write_text("[" * 5000)
    np.savez(run / "attention_maps.npz", pool_block=np.array({}, dtype=object))
    found = read_run(run)
    assert found.evaluation is None and found.maps is None and not found.curves and found.tokens(8) is None
    assert len(found.problems) == 3 and "rows is 'many'" in found.problems[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("evaluation.json", {"by_position": [{"first": 0}] * 65}, "by_position is .* not a list of at most 64"),
        ("evaluation.json", {"by_position": [{"first": -1, "last": 0}]}, "first is -1, not an integer from 0"),
        ("evaluation-a.json", {"student_cross_entropy": "low"}, "student_cross_entropy is 'low'"),
        ("zero_shot.json", {"limit": None, "package": "p", "tasks": {"a": 1}, "models": {}}, "a is 1, not an object"),
        ("zero_shot.json", {"limit": None, "package": "p", "tasks": {"a" * 65: {}}, "models": {}}, "long names"),
        ("attention_distance.json", {"rows": 1, "fitted_rows": 1, "tokens_per_block": 1, "depth": [{}]}, "lacks the"),
    ],
)
def test_figures_of_a_stranger_in_the_report(tmp_path: Path, name: str, content: dict[str, Any], message: str) -> None:
    commit_json(tmp_path / name, content)
    found = read_run(tmp_path)
    assert found.evaluation is None and found.measured == Measured()
    assert len(found.problems) == 1 and re.search(message, found.problems[0]), found.problems


def test_arrays_that_claim_more_than_there_is(tmp_path: Path) -> None:
    np.savez(tmp_path / "attention_maps.npz", teacher=np.zeros(4))
    data = (tmp_path / "attention_maps.npz").read_bytes()
    (tmp_path / "attention_maps.npz").write_bytes(data.replace(b"(4,), }           ", b"(40000000000,), } "))
    assert any("attention_maps.npz cannot be read" in problem for problem in read_run(tmp_path).problems)
