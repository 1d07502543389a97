"""The tests that need a GPU, side by side: most of their time is compiling, which takes cores and not the GPU.
Those that start vLLM come after them, alone: it measures how much memory is free, and others would change that.

    python scripts/gpu_tests.py                                  # every file, a process each
    python scripts/gpu_tests.py graphs_on_gpu head_topk_triton training_on_gpu:resumed --timeout 300

The files are those of tests/gpu, and those of tests/numerics that take a GPU where there is one (the kernels' on odd
shapes, interpreted elsewhere). A name is that of a file without `test_`; after a colon, what pytest's -k takes. Output
goes to LOGS/NAME.log; the status is 0 if nothing failed and all was over in time.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

TESTS, NUMERICS = Path("tests/gpu"), Path("tests/numerics")
ALONE = ("dump_on_gpu",)
LINES = 15
"""Of a log that is shown where tests failed."""


@dataclass(frozen=True)
class Running:
    """A file of tests under way."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path


def known_files() -> dict[str, Path]:
    """Every file of tests that a GPU is good for, by its name."""
    interpreted = [path for path in NUMERICS.glob("test_*.py") if "cuda.is_available" in path.read_text("utf-8")]
    return {path.stem.removeprefix("test_"): path for path in sorted([*TESTS.glob("test_*.py"), *interpreted])}


def parser(known: dict[str, Path]) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("names", nargs="*", default=list(known), help=f"some of {', '.join(known)}")
    options.add_argument("--timeout", type=float, default=1800.0, help="seconds for all of them")
    options.add_argument("--logs", type=Path, default=Path("runs/gpu_tests"), help="folder for their output")
    return options


def start(name: str, path: Path, wanted: str, logs: Path) -> Running:
    log = logs / f"{name.replace(':', '-').replace(' ', '_')}.log"
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-ra", str(path), *(["-k", wanted] if wanted else [])]
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
    return Running(name, process, log)


def passed(test: Running, seconds: float) -> bool:
    """Wait for its end, so many seconds at most, and tell how it ended."""
    started = time.monotonic()
    try:
        status: int | str = test.process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(test.process.pid, signal.SIGKILL)  # what it has started goes with it
        test.process.wait()
        status = "stopped"
    lines = test.log.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    took = time.monotonic() - started
    print(f"{test.name}: {lines[-1] if status in (0, 1) else f'status {status}'} ({took:.0f} s more)", flush=True)
    if status != 0:
        print("\n".join(f"    {line}" for line in lines[-LINES:]), flush=True)
    return status == 0


def main(words: list[str] | None = None) -> int:
    known = known_files()
    options = parser(known)
    given = options.parse_args(words)
    end = time.monotonic() + given.timeout
    given.logs.mkdir(parents=True, exist_ok=True)
    rounds: list[list[tuple[str, Path, str]]] = [[]]
    for name in given.names:
        file, _, wanted = name.partition(":")
        if file not in known:
            options.error(f"{name}: no such file of tests: choose from {', '.join(known)}")
        if file in ALONE:
            rounds.append([(name, known[file], wanted)])
        else:
            rounds[0].append((name, known[file], wanted))
    failed = []
    for together in rounds:
        running = [start(*test, given.logs) for test in together]
        failed += [test.name for test in running if not passed(test, end - time.monotonic())]
    print(f"failed: {', '.join(failed)}, see {given.logs}" if failed else "nothing failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
