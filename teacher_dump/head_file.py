"""`head.safetensors` of a cache, written tensor by tensor.

The format's own writer makes a temporary of a name nobody knows, which a killed dump would leave behind; here the file
is written where the commit wants it, no tensor is copied, and the digest of what was meant comes with it.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from pipeline.commit import DigestingFile

NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
ALIGNMENT = 8


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> str:
    """Write CPU tensors and return the hex sha256 of the file.

    Args:
        path: the file; replaced if it is there.
        tensors: by name; bfloat16, float16 or float32.

    Raises:
        KeyError: a tensor has another dtype.
    """
    header, end = dict[str, object](), 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with DigestingFile(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        return file.sha256()
