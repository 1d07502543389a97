"""What an experiment counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    Attributes:
        part: the experiment, one word.
        what: what was done how often, in words.
        trials: times it was done.
        failures: times the promise was broken; must be 0.
        facts: further figures, by name.
    """

    part: str
    what: str
    trials: int
    failures: int
    facts: dict[str, Any] = field(default_factory=dict)
