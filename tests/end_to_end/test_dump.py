"""Stage one through its command line and the real vLLM: resumed, extended and refused."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from helpers_dump import REPOSITORY, SHARDS, assert_same_rows, dump, dump_command, environment, rows


@pytest.mark.parametrize(
    ("moment", "pattern"),
    [
        ("a shard is visible", "shard-00000.json"),
        ("a shard is being written", ".shard-00002.parquet.*.tmp"),
        ("a shard's Parquet file has just appeared", "shard-00005.parquet"),
    ],
)
def test_killed_dump_goes_on_with_the_same_rows(
    teacher: Path, corpus: Path, undisturbed: Path, tmp_path: Path, moment: str, pattern: str
) -> None:
    """kill -9 at that moment; the next run writes the rest, all rows as if undisturbed."""
    cache = tmp_path / "cache"
    process = subprocess.Popen(
        dump_command(teacher, corpus, cache, SHARDS),
        env=environment(),
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 240
    while not any(cache.glob(pattern)) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = set(rows(cache))
    assert before, f"killed before {moment}"
    assert f"shard-{SHARDS - 1:05d}" not in before, "the dump was over before it could be killed"
    done = dump(teacher, corpus, cache, SHARDS)
    assert done.returncode == 0, done.stderr
    after = rows(cache)
    assert set(after) == {"heldout-00000", *(f"shard-{i:05d}" for i in range(SHARDS))}
    assert_same_rows(rows(undisturbed), after)
    assert not list(cache.glob(".*.tmp")), "the killed writer's temporaries were left"
    assert not list((cache / "claims").glob("*.json"))


def test_interrupt_keeps_what_is_committed(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    """Ctrl-C: one sentence, exit status 130, committed shards stay."""
    cache = tmp_path / "cache"
    process = subprocess.Popen(
        dump_command(teacher, corpus, cache, SHARDS),
        env=environment(),
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job would inherit it ignored
    )
    deadline = time.monotonic() + 240
    while not (cache / "heldout-00000.json").is_file() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "run the same command to go on" in errors
    assert "Traceback" not in errors
    assert "heldout-00000" in rows(cache)
    assert not list(cache.glob(".*.tmp"))


def test_more_shards_begin_with_the_same_rows(teacher: Path, corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    """More shards in another folder begin with the same rows; training and held-out documents are disjoint."""
    cache = tmp_path / "cache"
    done = dump(teacher, corpus, cache, SHARDS + 4)
    assert done.returncode == 0, done.stderr
    found = rows(cache)
    assert len(found) == SHARDS + 5
    assert_same_rows(rows(undisturbed), found)
    documents = {name: {d for row in columns["doc_ids"] for d in row} for name, columns in found.items()}
    training = [documents[name] for name in found if name.startswith("shard")]
    assert not documents["heldout-00000"] & set().union(*training)
    assert sum(len(d) for d in training) == len(set().union(*training))
    ids = np.concatenate([columns["sequence_id"] for columns in found.values()])
    assert len(set(ids.tolist())) == len(ids)


def test_same_command_again_does_nothing(teacher: Path, corpus: Path, undisturbed: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in undisturbed.glob("*.parquet")}
    done = dump(teacher, corpus, undisturbed, SHARDS)
    assert done.returncode == 0, done.stderr
    assert "0 shards written now" in done.stdout
    assert before == {path.name: path.stat().st_mtime_ns for path in undisturbed.glob("*.parquet")}


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--k", "9", "k: cache has 8, asked for 9"),
        ("--length", "32", "length: cache has 64, asked for 32"),
        ("--taus", "[1.0,2.0]", "taus: cache has"),
        ("--packing", "document", "packing: cache has 'stream', asked for 'document'"),
    ],
)
def test_other_settings_are_refused(
    teacher: Path, corpus: Path, undisturbed: Path, option: str, value: str, says: str
) -> None:
    done = dump(teacher, corpus, undisturbed, SHARDS, option, value)
    assert done.returncode == 2
    assert says in done.stderr
    assert str(undisturbed) in done.stderr
    assert "Traceback" not in done.stderr


def test_changed_corpus_is_noticed(teacher: Path, corpus: Path, undisturbed: Path) -> None:
    content = corpus.read_bytes()
    try:
        corpus.write_bytes(content.replace(b"river", b"ocean", 1))
        done = dump(teacher, corpus, undisturbed, SHARDS + 2)
    finally:
        corpus.write_bytes(content)
    assert done.returncode == 2
    assert str(corpus) in done.stderr
    assert "changed" in done.stderr


def test_document_packing_pads(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    done = dump(teacher, corpus, cache, 1, "--packing", "document")
    assert done.returncode == 0, done.stderr
    columns = rows(cache)["shard-00000"]
    lengths = columns["length"]
    assert lengths.min() < 64
    for row, length in enumerate(lengths):
        assert len(columns["doc_ids"][row]) == 1
        assert not columns["input_ids"][row, length:].any()
        assert np.isnan(columns["lse"][row, length:]).all()
        assert np.isfinite(columns["lse"][row, :length]).all()
