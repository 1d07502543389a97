"""A cache's card: what it tells, that its own lines run, and that readers and `verify` pass it over."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from helpers_cache import write_toy_cache
from huggingface_hub import DatasetCard

from pipeline.__main__ import main
from pipeline.cache import Cache
from pipeline.card import MEANINGS
from pipeline.errors import UserError
from pipeline.schema import CacheSpec
from pipeline.verify import verify_cache


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of two training shards and a held-out one, with its card."""
    cache = write_toy_cache(tmp_path_factory.mktemp("caches") / "toy", window=16, tail_samples=2)
    main(["card", "--cache", str(cache)])
    return cache


def card_of(cache: Path) -> tuple[dict[str, Any], str]:
    """Front matter and text."""
    _, front, text = (cache / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


def test_datasets_finds_the_splits(made: Path, tmp_path: Path) -> None:
    loaded = datasets.load_dataset(str(made), cache_dir=str(tmp_path))
    assert {name: split.num_rows for name, split in loaded.items()} == {"train": 16, "heldout": 8}
    expected = next(Cache(made).groups("train"))
    row = loaded["train"].with_format("numpy")[0]
    assert row["sequence_id"] == 0 and (row["topk_ids"] == expected["topk_ids"][0].ravel()).all()
    assert set(row) == set(expected)
    tokens = datasets.load_dataset(str(made), "token_bytes", cache_dir=str(tmp_path), split="train")
    assert tokens.num_rows == 61
    streamed = datasets.load_dataset(str(made), split="heldout", streaming=True, cache_dir=str(tmp_path))
    assert next(iter(streamed))["sequence_id"] == (1 << 30) << 32


def test_its_own_lines_run(made: Path, tmp_path: Path) -> None:
    snippet = re.search(r"```python\n(.*?)```", card_of(made)[1], re.DOTALL)
    assert snippet is not None
    environment = {"HOME": str(tmp_path), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-I", "-c", snippet[1]]
    done = subprocess.run(command, cwd=made.parent, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[0].startswith("16 rows;") and float(lines[1].rpartition(" ")[2]) > 0
    assert re.search("[a-z]+ [a-z]+", lines[2])


def test_readers_and_verify_pass_it_over(made: Path) -> None:
    result = verify_cache(made)
    assert result.ok and result.notes == []
    assert len(Cache(made).shards("train")) == 2
    (made / "README.txt").write_text("a stranger's")
    assert [note.file for note in verify_cache(made).notes] == ["README.txt"]
    (made / "README.txt").unlink()


def test_it_tells_counts_columns_and_origin(made: Path) -> None:
    front, text = card_of(made)
    DatasetCard.load(made / "README.md")
    cache = Cache(made)
    for split in ("train", "heldout"):
        entries = cache.shards(split)
        sums = (len(entries), int(entries.rows.sum()), int(entries.tokens.sum()), int(entries.bytes.sum()))
        assert f"| {split} | " + " | ".join(f"{number:,}" for number in sums) + " |" in text
    for name in cache.spec.arrow_schema().names:
        assert f"| `{name}` | " in text
    assert "| `topk_ids` | `uint16` | 64 x 8 |" in text and "| `hidden` | `float32` | 4 x 64 |" in text
    for words in ("toy words", cache.manifest.compat_id, cache.manifest.data_id, "1, 1.2, 1.5, 2", "stream packing"):
        assert words in text, words
    assert front["license"] == "unknown" and front["size_categories"] == ["n<1K"]


def test_every_column_that_a_cache_may_have_is_explained() -> None:
    spec = CacheSpec(64, 61, 8, (1.0,), 16, 2, 16, 64, 2, "stream")
    assert set(spec.arrow_schema().names) == set(MEANINGS)


def test_a_split_without_shards_is_left_out(tmp_path: Path) -> None:
    cache = write_toy_cache(tmp_path / "toy", units=1, heldout_units=0, rows=2)
    main(["card", "--cache", str(cache), "--name", "two rows: | of --- text", "--corpus_licence", "cc0-1.0"])
    front, text = card_of(cache)
    assert front["configs"][0]["data_files"] == [{"split": "train", "path": "shard-*.parquet"}]
    assert front["license"] == "cc0-1.0" and "# two rows: \\| of --- text" in text
    loaded = datasets.load_dataset(str(cache), cache_dir=str(tmp_path / "datasets"))
    assert list(loaded) == ["train"]


def test_a_card_is_written_again_as_the_cache_grows(tmp_path: Path) -> None:
    cache = write_toy_cache(tmp_path / "toy", units=1, heldout_units=0, rows=2)
    main(["card", "--cache", str(cache)])
    write_toy_cache(tmp_path / "toy", units=2, heldout_units=0, rows=2)
    main(["card", "--cache", str(cache)])
    assert "| train | 2 | 4 |" in card_of(cache)[1]
    assert not list(cache.glob(".*"))


def test_a_cache_without_shards_has_no_card_yet(tmp_path: Path) -> None:
    cache = write_toy_cache(tmp_path / "toy", units=0, heldout_units=0)
    with pytest.raises(UserError, match="has no shards yet"):
        main(["card", "--cache", str(cache)])
    with pytest.raises(UserError, match="is no cache"):
        main(["card", "--cache", str(tmp_path)])
    assert not (cache / "README.md").exists()


def test_a_cache_on_a_store_gets_one_too(made: Path) -> None:
    from pipeline.store import open_path

    remote = open_path("memory://cards/toy")
    for path in made.rglob("*"):
        if path.is_file() and path.name != "README.md":
            target = remote / path.relative_to(made).as_posix()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    main(["card", "--cache", "memory://cards/toy"])
    assert (remote / "README.md").read_text() == (made / "README.md").read_text()
