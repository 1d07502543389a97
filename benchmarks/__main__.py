"""`python -m benchmarks`: every benchmark that this machine can run, with its defaults.

Storage everywhere; on a GPU also kernels, dump_throughput, train_throughput, slstm and decode, an hour in all. Each
writes benchmarks/results/NAME.json and is a command of its own: `python -m benchmarks.storage --help`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.measured import device_name

TEACHER = Path("data/smollm2-135m")


def commands_of(gpu: bool, teacher: bool) -> dict[str, list[str]]:
    """Benchmark -> its options, in the order they run.

    Args:
        gpu: whether there is one.
        teacher: whether the embedded teacher's folder is there.
    """
    commands: dict[str, list[str]] = {"storage": []}
    if gpu:
        shapes = ["--shapes", "qwen2.5-1.5b", "llama-3.1-8b"]
        commands |= {
            "kernels": ["--teacher", str(TEACHER)] if teacher else [],
            "dump_throughput": [*shapes, *(["--model", str(TEACHER)] if teacher else [])],
            "train_throughput": ["--presets", "fast", "paper"],
            "slstm": [],
            "decode": [],
        }
    return commands


def main(words: list[str] | None = None) -> int:
    """Returns how many failed."""
    argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(words)
    import torch

    gpu = torch.cuda.is_available()
    commands = commands_of(gpu, TEACHER.is_dir())
    if not gpu:
        print(f"{device_name()}: no CUDA device: only {', '.join(commands)} is measured")
    failed = [
        name
        for name, options in commands.items()
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *options]).returncode
    ]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
