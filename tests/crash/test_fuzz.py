"""A small set of `make chaos`: made-up records and Parquet files are refused in one sentence or read rightly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from chaos import fuzz
from chaos.fuzz import Trial, make_subjects

from pipeline import checked_parquet
from pipeline.commit import read_json

REPOSITORY = Path(__file__).resolve().parents[2]


def test_made_up_files_are_refused_or_read_rightly(tmp_path: Path) -> None:
    """In a process of its own: the peak of Arrow's memory is that of a process."""
    command = [
        sys.executable,
        "-m",
        "chaos",
        "--small",
        "--parts",
        "fuzz",
        "--seed",
        "5",
        "--json",
        str(tmp_path / "f"),
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    rows = read_json(tmp_path / "f")["parts"]["fuzz"]["rows"]
    assert sum(row["trials"] for row in rows) > 2400 and not any(row["failures"] for row in rows)
    for row in rows:
        outcomes = row["facts"]["outcomes"]
        assert "read" in outcomes and ("refused" in outcomes or "claims" in row["what"]), outcomes


def test_the_fuzzer_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the look at page headers, files of it are let through that fill the memory."""

    subject = make_subjects(tmp_path)["shards: page headers"]
    assert fuzz.fuzz(subject, 1, 120).failures == 0
    monkeypatch.setattr(checked_parquet, "check_pages", lambda *_: None)
    figure = fuzz.fuzz(subject, 1, 120)
    assert figure.failures > 2, figure.facts
    assert any("tried to allocate" in told or "Arrow held" in told for told in figure.facts["broken"])


def test_every_input_follows_from_its_number(tmp_path: Path) -> None:

    for name, subject in make_subjects(tmp_path).items():
        trials = [Trial(subject, 3) for _ in range(2)]
        made = [[subject.make(trial.rng(number), number) for number in range(8)] for trial in trials]
        subject.restore()
        assert made[0] == made[1] and len(set(made[0])) > 4, name
