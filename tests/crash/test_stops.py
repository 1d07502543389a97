"""A dump that is stopped ends by itself and leaves nothing half done: the small set of `make chaos`, part stops."""

from __future__ import annotations

import pytest
from chaos import stops

pytestmark = pytest.mark.timeout(300)


def test_stopped_dumps_end_well_and_go_on() -> None:
    """At random moments, and at a sample of the lines that a dump's main thread passes."""
    figures = stops.run(seed=1, small=True)
    assert len(figures) == 2 and sum(figure.trials for figure in figures) >= 60
    assert [(figure.what, figure.facts) for figure in figures if figure.failures] == []
