"""A run folder of a student that was never trained, on a toy cache's teacher."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers_student import save_checkpoint

from pipeline.cache import Cache
from student.model import DistilXLSTM, StudentConfig
from student.runs.checkpoint import RunRecord
from student.runs.run_folder import copy_teacher

CONFIG = StudentConfig(blocks=2, heads=4, final_norm="teacher")


def write_run(run: Path, cache: Path, config: StudentConfig = CONFIG, seed: int = 1) -> Path:
    """Write the folder and return its path."""
    opened = Cache(cache)
    teacher = opened.teacher
    copy_teacher(teacher.path, run)
    RunRecord(config, "teacher", opened.spec.length, opened.manifest.compat_id).write(run)
    torch.manual_seed(seed)
    model = DistilXLSTM(config, teacher.facts, teacher.tensors(), opened.spec.length)
    (run / "checkpoints").mkdir()
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    save_checkpoint({"state_dict": state}, run / "checkpoints" / "last.ckpt")
    return run
