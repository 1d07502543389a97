"""The tests that need a GPU, side by side: most of their time is compiling, which takes cores and not the GPU.

    python scripts/gpu_tests.py                                  # every file of tests/gpu, a process each
    python scripts/gpu_tests.py graphs_on_gpu training_on_gpu:resumed --timeout 300

A name is that of a file without `test_`; after a colon, what pytest's -k takes. Output goes to LOGS/NAME.log; the
status is 0 if nothing failed and all was over in time.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path("tests/gpu")
LINES = 15
"""Of a log that is shown where tests failed."""


def parser() -> argparse.ArgumentParser:
    known = sorted(path.stem.removeprefix("test_") for path in TESTS.glob("test_*.py"))
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("names", nargs="*", default=known, help=f"some of {', '.join(known)}")
    options.add_argument("--timeout", type=float, default=1800.0, help="seconds for all of them")
    options.add_argument("--logs", type=Path, default=Path("runs/gpu_tests"), help="folder for their output")
    return options


def main(words: list[str] | None = None) -> int:
    options = parser()
    given = options.parse_args(words)
    started = time.monotonic()
    given.logs.mkdir(parents=True, exist_ok=True)
    running: dict[str, tuple[subprocess.Popen[bytes], Path]] = {}
    for name in given.names:
        file, _, wanted = name.partition(":")
        path = TESTS / f"test_{file}.py"
        if not path.is_file():
            options.error(f"{name}: there is no {path}")
        log = given.logs / f"{name.replace(':', '-').replace(' ', '_')}.log"
        command = [sys.executable, "-m", "pytest", "-q", "-s", "-ra", str(path), *(["-k", wanted] if wanted else [])]
        with open(log, "wb") as file_of_log:
            process = subprocess.Popen(command, stdout=file_of_log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        running[name] = process, log
    failed = []
    for name, (process, log) in running.items():
        try:
            status: int | str = process.wait(max(0.0, started + given.timeout - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            status = "stopped"
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
        print(f"{name}: {lines[-1] if status in (0, 1) else f'status {status}'} ({time.monotonic() - started:.0f} s)")
        if status != 0:
            failed.append(name)
            print("\n".join(f"    {line}" for line in lines[-LINES:]), flush=True)
    print(f"failed: {', '.join(failed)}, see {given.logs}" if failed else "nothing failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
