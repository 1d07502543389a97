"""Whether this machine's CPU multiplies bfloat16, or only stores it and is several times slower in it."""

from __future__ import annotations

import re
from pathlib import Path

FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""Of x86 (AVX-512, AMX) and of Arm, as /proc/cpuinfo has them."""
CPUINFO = Path("/proc/cpuinfo")


def slow_in_bfloat16() -> bool:
    """Whether work of this machine in bfloat16 is several times slower than in float32: no GPU, and such a CPU."""
    import torch

    return not torch.cuda.is_available() and not cpu_multiplies_bfloat16()


def cpu_multiplies_bfloat16() -> bool:
    """True where it cannot be known."""
    try:
        text = CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return flags is None or not FLAGS.isdisjoint(flags[1].split())
