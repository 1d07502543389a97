"""`python -m benchmarks`: every benchmark that this machine can run."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.measured import device_name


def main() -> int:
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
