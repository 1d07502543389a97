"""`head.safetensors` is what the format's own library reads, to the bit, and its digest is the file's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from pipeline.commit import file_sha256
from teacher_dump.head_file import write_safetensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_library_reads_what_was_written(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "embedding.weight": torch.randn(17, 5),
        "norm.weight": torch.randn(5),
        "lm_head.weight": torch.randn(17, 5),
    }
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T.contiguous().T  # as a view, not in memory order
    path = tmp_path / "head.safetensors"
    assert write_safetensors(path, tensors) == file_sha256(path)
    assert list(tmp_path.iterdir()) == [path]
    with safe_open(str(path), framework="pt") as file:
        assert set(file.keys()) == tensors.keys()
        for name, tensor in tensors.items():
            found = file.get_tensor(name)
            assert found.dtype == dtype and torch.equal(found, tensor)


def test_another_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        write_safetensors(tmp_path / "a", {"a": torch.zeros(2, dtype=torch.int64)})
