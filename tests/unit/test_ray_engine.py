"""What an engine on another machine looks for before it takes work, and how it talks with its driver."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.errors import UserError
from teacher_dump.plan import Unit
from teacher_dump.ray_engine import RayEngine, Stopped, check_storage


@pytest.fixture
def work(tmp_path: Path) -> Any:
    for folder in ("cache/claims", "teacher"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "teacher" / "config.json").write_text("{}")
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "cache" / "claims" / ".driver.tmp").write_text("")
    plan = SimpleNamespace(files=[SimpleNamespace(path=str(tmp_path / "a.jsonl"))])
    return SimpleNamespace(cache=tmp_path / "cache", teacher=SimpleNamespace(path=tmp_path / "teacher"), plan=plan)


def marker(work: Any) -> Path:
    return Path(work.cache / "claims" / ".driver.tmp")


def test_a_machine_that_sees_everything_leaves_no_trace(work: Any) -> None:
    check_storage(work, marker(work), "far")
    assert [path.name for path in marker(work).parent.iterdir()] == [".driver.tmp"]
    work.plan.files[0].path = "s3://bucket/a.jsonl"
    check_storage(work, marker(work), "far")


@pytest.mark.parametrize(
    "gone, told",
    [
        (
            "cache/claims/.driver.tmp",
            "far does not see what the driver wrote to .*/cache: that folder is local to each",
        ),
        (
            "cache/claims",
            "far cannot write to the cache .*/cache .No such file or directory.: a dump on several machines",
        ),
        (
            "teacher/config.json",
            "far does not find the teacher in .*/teacher: put it on storage that all machines share",
        ),
        ("a.jsonl", "far does not find the corpus file .*/a.jsonl: put the corpus on storage that all machines share"),
    ],
)
def test_what_is_missing_is_named(gone: str, told: str, work: Any) -> None:
    path = work.cache.parent / gone
    if path.is_dir():
        marker(work).unlink()
        path.rmdir()
    else:
        path.unlink()
    with pytest.raises(UserError, match=told):
        check_storage(work, marker(work), "far")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> RayEngine:
    """The actor's object without its thread and without Ray."""
    monkeypatch.setattr("teacher_dump.ray_engine.TELL_SECONDS", 2.0)
    engine = RayEngine.__new__(RayEngine)
    engine._open_mailbox()
    return engine


def test_tokens_are_told_in_sums_and_before_what_follows_them(engine: RayEngine) -> None:
    engine.captured("shard-00001", 100)
    engine.captured("shard-00001", 50)
    engine.captured("shard-00002", 7)
    started = time.monotonic()
    assert engine.exchange(None) == [("captured", "shard-00001", 150), ("captured", "shard-00002", 7)]
    assert time.monotonic() - started >= 2.0, "tokens alone are not urgent"
    engine.captured("shard-00001", 1)
    engine.by_other("shard-00001", 512)
    started = time.monotonic()
    assert engine.exchange(None) == [("captured", "shard-00001", 1), ("by_other", "shard-00001", 512)]
    assert time.monotonic() - started < 1.5
    assert engine.exchange(None) == []


def test_a_question_waits_for_its_answer(engine: RayEngine) -> None:
    answers: list[Any] = []
    unit = Unit(3, "train", 0, 1)

    def ask() -> None:
        answers.extend([engine._ask(idle=True), *engine._more()])

    thread = threading.Thread(target=ask)
    thread.start()
    assert engine.exchange(None) == [("ask", True)]
    assert engine.exchange((unit,)) == [("ask", False)]
    engine.exchange((None,))
    thread.join(5)
    assert answers == [unit]


def test_whoever_is_stopped_ends_at_the_next_row_or_question(engine: RayEngine) -> None:
    engine.captured("shard-00001", 1)
    engine.stop()
    for act in (lambda: engine.captured("shard-00001", 1), lambda: engine._ask(idle=True), engine.ready):
        with pytest.raises(Stopped):
            act()
