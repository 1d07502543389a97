"""A machine with a GPU and no CUDA toolkit: the student starts, and says what is missing where it needs one."""

from __future__ import annotations

import subprocess
import sys

import pytest
from torch.utils import cpp_extension

from pipeline.errors import UserError
from student.cuda_toolkit import require_toolkit

NO_TOOLKIT = """
import torch
from torch.utils import cpp_extension
torch.cuda.is_available = lambda: True
cpp_extension.CUDA_HOME = None
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", NO_TOOLKIT + code], capture_output=True, text=True, timeout=300)


def test_the_package_alone_cannot_be_imported() -> None:
    """What `import_xlstm` is for; when this fails, it is no longer needed."""
    assert "CUDA_HOME" in run("import xlstm").stderr


def test_the_student_can() -> None:
    done = run("import student.model; print(cpp_extension.CUDA_HOME)")
    assert (done.returncode, done.stdout.strip()) == (0, "None"), done.stderr


def test_what_is_missing_for_wide_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: True)
    with pytest.raises(UserError, match=r"--model.student.heads: sLSTM heads of width 192 .* no nvcc \(set CUDA_HOME"):
        require_toolkit(192, 128)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", "/usr/local/cuda")
    require_toolkit(192, 128)
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: False)
    with pytest.raises(UserError, match="no ninja"):
        require_toolkit(192, 128)
