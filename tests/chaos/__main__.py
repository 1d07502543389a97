"""`make chaos`: every experiment, a table, and a JSON file; ends with status 1 if a promise was broken.

python -m chaos [--seed S] [--small] [--parts kills,faults,...] [--json FILE]
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from importlib import import_module
from pathlib import Path

from chaos.figure import Figure
from pipeline.commit import commit_json

PARTS = {
    "kills": "kill -9 at random moments and at every step of the protocol, recorded rows",
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
    seconds: dict[str, float] = {}
    for name in parts:
        print(f"\n{name}: {PARTS[name]} (seed {options.seed})", flush=True)
        started = time.monotonic()
        found = import_module(f"chaos.{name}").run(options.seed, options.small)
        seconds[name] = round(time.monotonic() - started, 1)
        for figure in found:
            print(line(figure), flush=True)
        figures += found
    broken = [figure for figure in figures if figure.failures]
    print(f"\n{sum(f.trials for f in figures):,} trials, {sum(f.failures for f in figures)} broken promises")
    if options.json is not None:
        record = {
            "device": f"{platform.processor() or platform.machine()}",
            "seed": options.seed,
            "small": options.small,
            "seconds": seconds,
            "rows": [vars(figure) for figure in figures],
        }
        commit_json(options.json, record)
    return 1 if broken else 0


def line(figure: Figure) -> str:
    verdict = "BROKEN" if figure.failures else "ok"
    facts = "".join(f"\n      {name}: {value}" for name, value in figure.facts.items())
    return f"  {verdict:<6} {figure.failures:>5} of {figure.trials:>7,}  {figure.what}{facts}"


if __name__ == "__main__":
    sys.exit(main())
