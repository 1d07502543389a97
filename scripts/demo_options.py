"""Options that `make demo` adds where a CPU multiplies no bfloat16: float32, which is more than twice as fast there.

    python -m scripts.demo_options dump
    python -m scripts.demo_options train

Prints the words to pass on, nothing on other machines. A cache and a run that were begun otherwise go on as they were.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml

from pipeline.bfloat16 import slow_in_bfloat16

CACHE, RUN = Path("caches/demo"), Path("runs/demo")
SENTENCE = (
    "this CPU multiplies no bfloat16 (neither avx512_bf16 nor amx_bf16 in lscpu): teacher and student run in float32, "
    "more than twice as fast here; the figures differ a little from README's"
)


def begun_in_bfloat16(step: str) -> bool | None:
    """What is there already; None: nothing is."""
    if step == "dump":
        path = CACHE / "manifest.json"
        return json.loads(path.read_text())["data"]["dtype"] == "bfloat16" if path.is_file() else None
    path = RUN / "config.yaml"
    return yaml.safe_load(path.read_text())["trainer"]["precision"] == "bf16-mixed" if path.is_file() else None


def options(step: str) -> list[str]:
    """The words for `dump` or `train`."""
    begun = begun_in_bfloat16(step)
    in_float32 = slow_in_bfloat16() if begun is None else not begun
    if not in_float32:
        return []
    return {"dump": ["--engine.dtype", "float32"], "train": ["--trainer.precision", "32-true"]}[step]


def main() -> None:
    words = options(sys.argv[1])
    if words and sys.argv[1] == "dump":
        print(SENTENCE, file=sys.stderr)
    print(" ".join(words))


if __name__ == "__main__":
    main()
