"""Which trial a worker of the experiments is given, and which would not end in time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from benchmarks.measured import Row
from benchmarks.quality.__main__ import main, trials_of, with_questions
from benchmarks.quality.arms import BUDGETS, load_arms
from benchmarks.quality.caches import Dumps
from benchmarks.quality.pool import Clock, Pool, Worker, kind_of, known_seconds
from benchmarks.quality.trial import Trial, start_folder
from pipeline.errors import UserError

READY = ("experiment", "experiment-other", "experiment-long")


def trials_named(names: Sequence[str], scratch: Path) -> dict[str, Trial]:
    arms = load_arms()
    return {t.arm.name: t for t in trials_of([arms[name] for name in names], [0], BUDGETS["small"], [], scratch)}


def test_nothing_is_begun_that_would_not_end_in_time() -> None:
    clock = Clock(minutes=2.0, started=time.monotonic() - 60)
    assert clock.fits("small")  # nothing is known yet
    clock.note("small", 90, first=True)
    assert not clock.fits("small")
    clock.note("small", 50, first=False)  # kernels were loaded in the first one
    assert clock.fits("small")
    clock.note("small", 61, first=False)
    assert not clock.fits("small")
    clock.note("smaller", 5, first=False)
    assert clock.fits("smaller") and not clock.fits("small")
    assert not clock.fits("unknown")  # as long as the longest
    assert Clock(minutes=None).fits("small") and not Clock(minutes=None).overdue()
    assert not clock.overdue() and Clock(minutes=0.1, started=time.monotonic() - 60).overdue()
    known = {"small": [70.0]}
    assert not Clock(minutes=1.0, known=known).fits("small")
    clock = Clock(minutes=2.0, started=time.monotonic() - 60)
    clock.note("small", 90, first=False, start=50)
    assert clock.fits("small") and not clock.fits("small", makes_start=True)


def test_a_trial_is_missing_until_its_judges_have_answered(tmp_path: Path) -> None:
    arms, budget = load_arms(), BUDGETS["small"]
    settings = {"settings": arms["ce"].settings(budget)}
    row = {"arm": "ce", "seed": 0, "budget": "small", **settings}

    def missing(*rows: Row) -> list[tuple[int, tuple[str, ...]]]:
        asked = {0: ("attention",)}
        return [(t.seed, t.judges) for t in trials_of([arms["ce"]], [0, 1], budget, list(rows), tmp_path, asked)]

    assert missing() == [(0, ("attention",)), (1, ())]
    assert missing(row, {**row, "seed": 1}) == [(0, ("attention",))]
    assert missing({**row, "attention": {}}, {**row, "seed": 1}) == []
    assert missing({**row, "unjudged": {"attention": "it has no maps"}}) == [(1, ())]


def test_judged_seeds_are_among_the_seeds() -> None:
    with pytest.raises(UserError, match="--judged_seeds 7: not among the seeds 0, 1; add it to --seeds"):
        main(["--list", "--seeds", "0", "1", "--judges", "attention", "--judged_seeds", "1", "7"])


def test_rows_follow_their_arms_to_other_questions() -> None:
    arms = load_arms()
    rows: list[Row] = [{"arm": "ce", "question": ["k"]}, {"arm": "gone", "question": ["k"]}]
    assert [row["question"] for row in with_questions(rows, arms)] == [list(arms["ce"].question), ["k"]]


def test_nobody_waits_for_what_another_one_makes(tmp_path: Path) -> None:
    """A trial is taken that can go on by itself, until the start that the others need is there."""
    names = ("start-only", "start-aligned-long", "start-aligned-kl", "ce", "start-aligned")
    trials = trials_named(names, tmp_path)
    dumps = SimpleNamespace(ready=set(READY))
    pool = Pool(list(trials.values()), cast(Dumps, dumps), Clock(None), 3, tmp_path, lambda *_: None)
    assert pool._next() is trials["start-only"]
    pool.waiting.remove(trials["start-only"])
    maker = SimpleNamespace(busy=True, trial=trials["start-only"])
    pool.workers.append(cast(Worker, maker))
    assert pool._next() is trials["ce"]
    pool.waiting.remove(trials["ce"])
    assert pool._next() is None
    start = start_folder(trials["start-only"]) / "checkpoints" / "last.ckpt"
    start.parent.mkdir(parents=True)
    start.touch()
    assert pool._next() is trials["start-aligned-long"]
    maker.trial = trials["start-aligned-long"]  # of two phases: others need its start alone, which is there
    pool.waiting.remove(maker.trial)
    assert pool._next() is trials["start-aligned-kl"]
    dumps.ready.clear()
    assert pool._next() is None


def test_what_would_not_end_in_time_is_in_nobodys_way(tmp_path: Path) -> None:
    """The first one's start takes too long; the next one needs none."""
    trials = trials_named(("start-only", "ce"), tmp_path)
    clock = Clock(minutes=2.0, started=time.monotonic() - 60)
    clock.note(kind_of(trials["ce"].arm), 70, first=False, start=50)
    dumps = SimpleNamespace(ready=set(READY))
    pool = Pool(list(trials.values()), cast(Dumps, dumps), clock, 3, tmp_path, lambda *_: None)
    assert pool._next() is trials["ce"]
    pool.waiting.remove(trials["ce"])
    assert pool._next() is None and not pool._in_time()


def test_what_trials_took_is_known_for_the_device_the_budget_and_the_kind() -> None:
    """Students of one shape are of one kind, whatever loss they are trained with."""
    arms = load_arms()
    row: Row = {"arm": "ce", "budget": "screen", "device": "A", "seconds": {"total": 9.0, "start": 2.0}}
    other = [{**row, "device": "B"}, {**row, "budget": "headline"}, {**row, "arm": "gone"}]
    rows = [row, {**row, "arm": "delta"}, {**row, "arm": "recommended"}, *other, {"budget": "screen", "error": "x"}]
    known = known_seconds(rows, arms, "screen", "A")
    assert known == {kind_of(arms["tail-k8"]): [7.0, 7.0], kind_of(arms["recommended-ce"]): [7.0]}
    assert kind_of(arms["online"]) not in known
