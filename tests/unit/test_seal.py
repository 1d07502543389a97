"""A sealed checkpoint is whole or refused; unsealed and packed ones are refused before they are loaded."""

from __future__ import annotations

import random
import zipfile
from pathlib import Path

import pytest
import torch

from student.runs.seal import COMMENT_BYTES, DamagedCheckpoint, check_seal, seal


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    path = tmp_path / "last.ckpt"
    torch.save({"global_step": 3, "state_dict": {"model.a": torch.arange(5000.0)}}, path)
    seal(path)
    return path


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_a_sealed_checkpoint(sealed: Path, mmap: bool) -> None:
    check_seal(sealed)
    content = torch.load(sealed, weights_only=True, mmap=mmap)
    assert content["global_step"] == 3 and torch.equal(content["state_dict"]["model.a"], torch.arange(5000.0))


def test_every_cut_and_many_flips_are_refused(sealed: Path) -> None:
    whole = sealed.read_bytes()
    rng = random.Random(0)
    cuts = {0, 1, 22, len(whole) - 1, len(whole) - COMMENT_BYTES, len(whole) - COMMENT_BYTES - 1}
    for size in [*cuts, *(rng.randrange(len(whole)) for _ in range(30))]:
        sealed.write_bytes(whole[:size])
        with pytest.raises(DamagedCheckpoint, match="last.ckpt"):
            check_seal(sealed)
    for at in [*range(len(whole) - COMMENT_BYTES - 22, len(whole)), *(rng.randrange(len(whole)) for _ in range(100))]:
        data = bytearray(whole)
        data[at] ^= 1 << rng.randrange(8)
        sealed.write_bytes(data)
        with pytest.raises(DamagedCheckpoint, match="last.ckpt"):
            check_seal(sealed)


def test_one_that_torch_did_not_write_is_refused(tmp_path: Path) -> None:
    plain, packed = tmp_path / "plain.ckpt", tmp_path / "packed.ckpt"
    torch.save({"a": 1}, plain)
    with pytest.raises(DamagedCheckpoint, match="does not end with a digest of itself"):
        check_seal(plain)
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(10_000_000))
    seal(packed)
    with pytest.raises(DamagedCheckpoint, match="larger than the file"):
        check_seal(packed)
    packed.write_bytes(b"no archive")
    with pytest.raises(ValueError, match="does not end as torch's archives do"):
        seal(packed)
