"""`python -m teacher_dump.embedded [--data DIR]`: prepare the embedded teacher and corpus, once."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from pipeline.errors import run_command
from teacher_dump.embedded import resolve_embedded
from teacher_dump.embedded.corpus import ENWIK8, PINNED
from teacher_dump.embedded.teacher import teacher_ready

SAYS = {  # what set-up prepares; the others are made when a dump first names them
    "embedded:smollm2-135m": ("teacher", "SmolLM2-135M-Instruct as a Hugging Face folder"),
    "embedded:enwik8": ("corpus", f"{PINNED.documents:,} articles of enwik8, {PINNED.text_bytes / 1e6:.0f} MB of text"),
}


def main(arguments: list[str] | None = None) -> int:
    """Prepare what is missing, teacher and corpus side by side; prints a line for each. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m teacher_dump.embedded", description=__doc__)
    parser.add_argument(
        "--data", type=Path, default=Path("data"), metavar="DIR", help="where they live (default: data)"
    )
    parser.add_argument("--quiet", action="store_true", help="say nothing when they are there")
    options = parser.parse_args(arguments)
    return run_command(lambda: _prepare(options.data, options.quiet))


def _prepare(root: Path, quiet: bool) -> None:
    ready = {"embedded:smollm2-135m": teacher_ready(root), "embedded:enwik8": ENWIK8.ready(root)}
    missing = [name for name in SAYS if not ready[name]]
    for name in SAYS:
        if ready[name] and not quiet:
            print(f"{SAYS[name][0]}: ready")
    if not missing:
        return
    print(f"{' and '.join(SAYS[name][0] for name in missing)}: being prepared under {root}, about a minute", flush=True)
    begun = time.monotonic()
    with ProcessPoolExecutor(len(missing), mp_context=multiprocessing.get_context("spawn")) as pool:
        work = {pool.submit(resolve_embedded, name, root): name for name in missing}
        for done in as_completed(work):
            what, text = SAYS[work[done]]
            print(f"{what}: {text}, {done.result()} ({time.monotonic() - begun:.0f} s)", flush=True)


if __name__ == "__main__":
    sys.exit(main())
