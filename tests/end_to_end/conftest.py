"""One toy dump that nothing disturbed, for all tests that compare with it."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers_dump import SHARDS, dump, write_toy_corpus, write_toy_teacher


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_corpus(tmp_path_factory.mktemp("corpus") / "toy.jsonl", documents=1500)


@pytest.fixture(scope="session")
def undisturbed(teacher: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of SHARDS shards dumped without interruption."""
    cache = tmp_path_factory.mktemp("undisturbed")
    done = dump(teacher, corpus, cache, SHARDS)
    assert done.returncode == 0, done.stderr
    return cache
