"""`python -m benchmarks`: every benchmark that this machine can run, with its defaults.

Storage everywhere; on a GPU also kernels, dump_throughput, train_throughput and decode, up to an hour in all. Each
writes benchmarks/results/NAME.json and is a command of its own: `python -m benchmarks.storage --help`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from benchmarks.measured import device_name


def main(words: list[str] | None = None) -> int:
    """Returns how many failed."""
    argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(words)
    import torch

    names = ["storage"]
    if torch.cuda.is_available():
        names += ["kernels", "dump_throughput", "train_throughput", "decode"]
    else:
        print(f"{device_name()}: no CUDA device: only {names[0]} is measured")
    shapes = {"dump_throughput": ["--shapes", "qwen2.5-1.5b", "llama-3.1-8b", "--model", "data/smollm2-135m"]}
    failed = [
        name
        for name in names
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *shapes.get(name, [])]).returncode
    ]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
