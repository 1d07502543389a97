"""`python -m pipeline index`: build the index of a cache."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.cache import Cache
from pipeline.config import Place

DESCRIPTION = (
    "Gather what readers need of every shard's JSON in one file. A dump does so by itself when a thousand shards are "
    "new; the JSON files stay the truth, and the index can be removed and built again at any time."
)


@dataclass(frozen=True)
class Options:
    """Which cache."""

    cache: Place
    """folder or URL of the cache"""


def run(options: Options) -> int:
    """Build the index; print how many shards it has."""
    cache = Cache(options.cache)
    print(f"{options.cache}: index of {cache.build_index():,} shards written")
    return 0
