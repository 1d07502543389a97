"""The embedded teacher on the embedded corpus through the real vLLM: what the README says of a shard holds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_dump import REPOSITORY, environment

from pipeline.cache import Cache
from pipeline.inspection import column_facts
from pipeline.verify import verify_cache

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `caches/demo`: one training shard of 16384 tokens (smaller ones compress less well)."""
    root = tmp_path_factory.mktemp("embedded")
    command = [
        *(sys.executable, "-m", "teacher_dump", "--manifest", "manifests/dumps/demo.yaml", "--shards", "1"),
        *("--heldout_shards", "0", "--tokens_per_shard", "16384", "--cache", str(root / "caches" / "demo")),
    ]
    done = subprocess.run(
        command, env=environment(OMP_NUM_THREADS="2"), cwd=REPOSITORY, capture_output=True, text=True, timeout=1700
    )
    assert done.returncode == 0, done.stderr
    return root


def test_bytes_per_token(folder: Path) -> None:
    """K=64 and 4 temperatures: at most 165 B/token, and at most 12 more for the maps."""
    cache = Cache(folder / "caches" / "demo")
    assert (cache.spec.k, len(cache.spec.taus), cache.spec.vocab_size) == (64, 4, 49152)
    with cache.open(cache.find(0)) as shard:
        per_token = {fact.name: fact.compressed_bytes / shard.record.tokens for fact in column_facts(shard)}
    maps = per_token.pop("attn_map")
    assert sum(per_token.values()) <= 165
    assert 0 < maps <= 12


def test_the_dump_verifies(folder: Path) -> None:
    result = verify_cache(folder / "caches" / "demo")
    assert result.ok, result.problems
    assert result.tokens == 16384


def test_readme_pandas_lines(folder: Path) -> None:
    """The README's five lines run in a folder that holds a cache, with nothing of this project imported."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, flags=re.S)
    assert len([line for line in code.splitlines() if line]) == 5
    assert not re.search(r"pipeline|student|teacher_dump", code)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "p0" in done.stdout and "tail" in done.stdout
    probabilities = [float(line.split()[1]) for line in done.stdout.strip().splitlines()[1:]]
    assert len(probabilities) == 5
    assert all(0 < p <= 1 for p in probabilities)
