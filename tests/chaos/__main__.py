"""`make chaos`: every experiment, a table, and a JSON file; ends with status 1 if a promise was broken.

python -m chaos [--seed S] [--small] [--parts kills,faults,...] [--json FILE]
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.measured import cpu_name
from chaos.figure import Figure
from pipeline.commit import commit_json, read_json

PARTS = {
    "kills": "kill -9 at random moments and at every step of the protocol, recorded rows",
    "stops": "Ctrl-C and SIGTERM at random moments and at every line, recorded rows",
    "engine": "kill -9 of the real engine",
    "ray_kills": "kill -9 of workers, nodes and drivers on a Ray cluster",
    "damage": "truncated files and flipped bits",
    "faults": "full disk, no permission, input/output errors at each write",
    "identity": "every identity field changed, one at a time",
    "fuzz": "made-up manifests, plans, records and Parquet headers",
    "mutations": "the protocol broken on purpose: do the tests notice?",
}
"""Part -> what it does. Each is a module of this package with `run(seed, small) -> list[Figure]`."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="the set that `make test` runs")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--json", type=Path, help="file the figures are written to")
    options = parser.parse_args()
    parts = [name for name in options.parts.split(",") if name]
    unknown = sorted(set(parts) - PARTS.keys())
    if unknown:
        parser.error(f"--parts {','.join(unknown)}: known are {', '.join(PARTS)}")
    figures: list[Figure] = []
    record = Record(options.json, options.seed, options.small)
    for name in parts:
        print(f"\n{name}: {PARTS[name]} (seed {options.seed})", flush=True)
        started = time.monotonic()
        found = import_module(f"chaos.{name}").run(options.seed, options.small)
        record.add(name, round(time.monotonic() - started, 1), found)
        for figure in found:
            print(line(figure), flush=True)
        figures += found
    broken = [figure for figure in figures if figure.failures]
    print(f"\n{sum(f.trials for f in figures):,} trials, {sum(f.failures for f in figures)} broken promises")
    return 1 if broken else 0


class Record:
    """The JSON file: written after each part, since an hour should not be lost to its last minute.

    Parts that another run with the same seed and size left there are kept; each says where it ran.
    """

    def __init__(self, path: Path | None, seed: int, small: bool) -> None:
        self.path = path
        self.head = {"seed": seed, "small": small}
        self.parts: dict[str, dict[str, Any]] = {}
        if path is not None and path.is_file():
            before = read_json(path)
            if all(before.get(key) == value for key, value in self.head.items()):
                self.parts = before["parts"]

    def add(self, name: str, seconds: float, figures: list[Figure]) -> None:
        self.parts[name] = {"device": cpu_name(), "seconds": seconds, "rows": [vars(figure) for figure in figures]}
        if self.path is not None:
            known = {part: self.parts[part] for part in PARTS if part in self.parts}
            commit_json(self.path, {**self.head, "parts": known})


def line(figure: Figure) -> str:
    verdict = "BROKEN" if figure.failures else "ok"
    facts = "".join(f"\n      {name}: {value}" for name, value in figure.facts.items())
    return f"  {verdict:<6} {figure.failures:>5} of {figure.trials:>7,}  {figure.what}{facts}"


if __name__ == "__main__":
    sys.exit(main())
