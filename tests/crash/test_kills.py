"""A dump that is killed leaves nothing wrong and nothing behind: the small set of `make chaos`, part kills."""

from __future__ import annotations

import pytest
from chaos import kills

pytestmark = pytest.mark.timeout(300)


def test_killed_dumps_are_whole_and_go_on() -> None:
    """At random moments, at every kind of step, with power lost, in chains, in pairs, with several engines."""
    figures = kills.run(seed=1, small=True)
    assert len(figures) == 8 and sum(figure.trials for figure in figures) > 90
    assert [(figure.what, figure.facts) for figure in figures if figure.failures] == []
    steps = next(figure.facts["steps"] for figure in figures if "steps" in figure.facts)
    for step in (
        "shard: create",
        "shard: write",
        "shard: read back",
        "shard: hash",
        "shard: fsync",
        "shard: rename",
        "shard: fsync folder",
        "shard's JSON: rename",
        "manifest: link",
        "plan: rename",
        "teacher file: rename",
        "claim: link",
        "claim: unlink",
    ):
        assert f"{step} " in steps, "a step of the protocol was not among those that were killed"
