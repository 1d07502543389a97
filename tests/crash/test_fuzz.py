"""A small set of `make chaos`: made-up records and Parquet files are refused in one sentence or read rightly."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos import fuzz
from chaos.fuzz import Trial, make_subjects

from pipeline import checked_parquet


def test_made_up_files_are_refused_or_read_rightly() -> None:
    figures = fuzz.run(seed=5, small=True)
    assert sum(figure.trials for figure in figures) > 3000
    for figure in figures:
        assert figure.failures == 0, (figure.what, figure.facts)
        outcomes = figure.facts["outcomes"]
        assert "read" in outcomes and ("refused" in outcomes or "claims" in figure.what), outcomes


def test_the_fuzzer_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the look at page headers, files of it are let through that fill the memory."""

    subject = make_subjects(tmp_path)["shards: page headers"]
    assert fuzz.fuzz(subject, 1, 300).failures == 0
    monkeypatch.setattr(checked_parquet, "check_pages", lambda *_: None)
    figure = fuzz.fuzz(subject, 1, 300)
    assert figure.failures > 5, figure.facts
    assert any("tried to allocate" in told or "Arrow held" in told for told in figure.facts["broken"])


def test_every_input_follows_from_its_number(tmp_path: Path) -> None:

    for name, subject in make_subjects(tmp_path).items():
        trials = [Trial(subject, 3) for _ in range(2)]
        made = [[subject.make(trial.rng(number), number) for number in range(8)] for trial in trials]
        subject.restore()
        assert made[0] == made[1] and len(set(made[0])) > 4, name
