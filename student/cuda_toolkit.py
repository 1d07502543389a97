"""The `xlstm` package on a GPU's machine without a CUDA toolkit.

The package looks for the toolkit when it is imported, and fails where there is none. Only its own sLSTM kernel is
compiled with it, which a student needs for heads that `student/blocks/slstm_triton.py` does not take.
"""

from __future__ import annotations

import shutil

import torch
from torch.utils import cpp_extension

from pipeline.errors import UserError


def import_xlstm() -> None:
    """Import the package, toolkit or not."""
    if not torch.cuda.is_available() or cpp_extension.CUDA_HOME is not None:
        return  # whoever needs it imports it
    cpp_extension.CUDA_HOME = "/no-cuda-toolkit"  # it only joins paths to it
    try:
        import xlstm  # noqa: F401
    finally:
        cpp_extension.CUDA_HOME = None


def require_toolkit(width: int, widest: int) -> None:
    """Before the package's sLSTM kernel is compiled.

    Args:
        width: of the heads that need it.
        widest: that do without.

    Raises:
        UserError: something is missing to compile it with.
    """
    missing = [
        what
        for what, there in (
            ("nvcc (set CUDA_HOME to a CUDA toolkit of torch's version, such as the package cuda-toolkit installs)",
             cpp_extension.CUDA_HOME is not None),
            ("ninja (pip install ninja)", cpp_extension.is_ninja_available()),
            ("a C++ compiler (g++)", shutil.which("c++") is not None or shutil.which("g++") is not None),
        )
        if not there
    ]  # fmt: skip
    if missing:
        raise UserError(
            f"--model.student.heads: sLSTM heads of width {width} are trained by a kernel that is compiled at its "
            f"first use, and there is no {' and no '.join(missing)}: install it, or take more heads (up to {widest} "
            "wide they need none)"
        )
