"""A run folder as training leaves it, of a student whose weights were shaken instead of trained, and its cache."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from helpers_cache import write_toy_cache
from helpers_student import save_checkpoint

from pipeline.cache import Cache
from pipeline.commit import commit_json
from student.model import DistilXLSTM, StudentConfig
from student.runs.checkpoint import RunRecord
from student.runs.identity import RunCache, cache_record
from student.training.module import LossConfig


def shake(student: DistilXLSTM, seed: int = 0, by: float = 0.05) -> DistilXLSTM:
    """Move every trained parameter, so that none is what it began as: zeros and ones would hide a wrong place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return student.eval()


def write_toy_run(folder: Path, shape: StudentConfig | None = None, *, tied: bool = True, steps: int = 7) -> Path:
    """`folder`/cache and `folder`/run, whose checkpoint is `last`; returns the run."""
    cache = Cache(write_toy_cache(folder / "cache", rows=4, tied=tied))
    run, shape = folder / "run", shape or StudentConfig(blocks=2, heads=4)
    shutil.copytree(cache.path / "teacher", run / "teacher")
    facts, compat = cache.teacher.facts, cache.manifest.compat
    record = RunRecord(
        shape, "teacher", cache.spec.length, cache.manifest.compat_id, facts.width, facts.vocab_size, compat
    )
    record.write(run)
    torch.manual_seed(0)
    student = shake(DistilXLSTM(shape, facts, cache.teacher.tensors(), cache.spec.length))
    (run / "checkpoints").mkdir()
    state = {f"model.{name}": tensor for name, tensor in student.state_dict().items()}
    save_checkpoint({"state_dict": state, "global_step": steps}, run / "checkpoints" / "last.ckpt")
    commit_json(run / "data.json", {"caches": [cache_record(RunCache(cache.path))], "steps_per_epoch": 2})
    (run / "config.yaml").write_text(yaml.safe_dump({"model": {"loss": asdict(LossConfig(beta=0.0))}}))
    return run
