"""`python -m student.from_teacher`: a student that begins with its teacher's weights, as a run that others start from.

    python -m student.from_teacher --run runs/recommended-start --cache caches/embedded
    make train-student STUDENT=recommended ARGS="--init_from runs/recommended-start"

The blocks must be transformer-shaped (`model.student.transformer`). They get the weights of the teacher's layers
(`teacher_weights.py`); then their mixers are taught the teacher's attention, layer by layer (`attention_transfer.py`).
This is the only part of stage two that holds the teacher; training itself does not.

RUN/from_teacher.json: the layers, tokens, and each mixer's relative squared error at the first steps and the last.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from pipeline.commit import commit_file, commit_json
from pipeline.config import parse_into
from pipeline.errors import UserError, run_command
from student.data.loader import CacheDataModule
from student.evaluation.device import pick_device
from student.evaluation.hugging_face import load_causal_lm
from student.model import DistilXLSTM, StudentConfig
from student.runs.checkpoint import PREFIX, RunRecord
from student.runs.run_folder import ORIGIN, copy_teacher
from student.runs.seal import check_seal, seal
from student.training.callbacks import LAST
from student.transfer.attention_transfer import transfer
from student.transfer.teacher_weights import (
    check_same_function,
    check_same_teacher,
    copy_teacher_weights,
    decoder_layers,
    layers_of_blocks,
)


@dataclass(frozen=True)
class FromTeacherOptions:
    """What to make of which teacher."""

    run: str
    """Folder of the new run, which must not be there yet."""
    cache: str
    """A cache of the teacher: its rows are read for the transfer."""
    student: str = "manifests/students/recommended.yaml"
    """File with the student's shape under model.student."""
    teacher: str | None = None
    """Folder or hub id of the teacher's weights; null: where the cache's dump read it."""
    align_tokens: int = 4_000_000
    """Tokens that the mixers are taught the teacher's attention on; 0: the teacher's weights as they are."""
    align_lr: float = 1e-3
    """Peak learning rate of the transfer."""
    batch_rows: int = 16
    """Rows of a step of the transfer."""
    seed: int = 0
    """Of the rows' order."""
    device: str = "auto"
    """auto, cpu or cuda."""


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    description = "Begin a student with its teacher's weights."
    options = parse_into(FromTeacherOptions, "python -m student.from_teacher", description, "--config", arguments)
    record = from_teacher(options)
    print(f"{options.run}: blocks from layers {record['layers']}; start a run with --init_from {options.run}")
    return 0


def from_teacher(options: FromTeacherOptions) -> dict[str, Any]:
    """Make the run folder and return what from_teacher.json holds.

    Raises:
        UserError: the folder is there, the student has no transformer-shaped blocks or another shape than the teacher,
            or there is no such cache or teacher.
    """
    run = Path(options.run)
    if (run / "run.json").exists():
        raise UserError(f"--run {run} is a run already: name another folder, or remove it")
    if options.align_tokens < 0 or options.align_lr <= 0:
        raise UserError("--align_tokens must be 0 or more and --align_lr above 0")
    config = read_student(Path(options.student))
    if config.transformer is None:
        raise UserError(
            f"--student {options.student}: model.student.transformer is not set: only transformer-shaped blocks can "
            "take a teacher's weights, as those of recommended.yaml do"
        )
    data = CacheDataModule(options.cache, batch_rows=options.batch_rows, seed=options.seed)
    data.read_only(())
    device = pick_device(options.device)
    source = options.teacher or data.caches[0].manifest.teacher_path
    if options.teacher is None and not Path(source).is_dir():  # a stranger's manifest must not choose a download
        raise UserError(f"the cache's teacher {source!r} is not here: name its folder or hub id with --teacher")
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    model = load_causal_lm(source, dtype, str(device)).model
    layers = decoder_layers(model, source)
    note = check_same_function(model.config, config.transformer.rope_theta, source)
    chosen = layers_of_blocks(config.blocks, len(layers))
    torch.manual_seed(options.seed)
    student = DistilXLSTM(config, data.teacher.facts, data.teacher.tensors(), data.max_length)
    check_same_teacher(model, student.embedding_VD, source)
    copy_teacher_weights(student, layers, chosen)
    student.to(device)
    record: dict[str, Any] = {"teacher": source, "layers": chosen, "student": options.student, "seed": options.seed}
    if note is not None:
        record["note"] = note
        print(f"note: {note}", flush=True)
    length = data.max_length
    steps = -(-options.align_tokens // (options.batch_rows * length))
    record |= {"align_tokens": steps * options.batch_rows * length, "align_lr": options.align_lr}
    if steps:
        record |= _transfer(options, student, model.model, layers, chosen, data, device, steps)
    _write(run, student, config, data, record)
    return record


def read_student(path: Path) -> StudentConfig:
    """`model.student` of a file of manifests/students.

    Raises:
        UserError: no such file, or no such part of it.
    """
    try:
        return StudentConfig.of(yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["student"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"--student {path}: no student's shape under model.student ({error}); name another file"
        ) from None


def _transfer(
    options: FromTeacherOptions, student: DistilXLSTM, model: Any, layers: Any, chosen: list[int],
    data: CacheDataModule, device: torch.device, steps: int,
) -> dict[str, Any]:  # fmt: skip
    def ids() -> Iterator[Tensor]:
        loader = data.train_dataloader()
        while True:
            for batch in loader:
                yield batch.input_ids_BT.to(device, non_blocking=True)

    errors: list[Tensor] = []
    started = time.perf_counter()

    def told(step: int, errors_N: Tensor) -> None:
        errors.append(errors_N)
        if step % 20 == 0 or step == steps:
            speed = step * options.batch_rows * data.max_length / (time.perf_counter() - started)
            mean = float(errors_N.mean())
            print(f"transfer {step}/{steps}  relative error {mean:.4f}  {speed:.0f} tokens/s", flush=True)

    transfer(student, model, layers, chosen, ids(), steps, options.align_lr, told)
    few = max(1, steps // 20)
    errors_SN = torch.stack(errors).cpu()
    ends = {"first": errors_SN[:few], "last": errors_SN[-few:]}
    return {
        "seconds": time.perf_counter() - started,
        **{f"error_{name}": [round(x, 5) for x in part.mean(0).tolist()] for name, part in ends.items()},
    }


def _write(
    run: Path, student: DistilXLSTM, config: StudentConfig, data: CacheDataModule, record: dict[str, Any]
) -> None:
    """The run folder; run.json last: a folder with it has everything else."""
    run.mkdir(parents=True, exist_ok=True)
    copy_teacher(data.teacher.path, run)
    state = {PREFIX + name: tensor.cpu() for name, tensor in student.state_dict().items()}
    content = {"state_dict": state, "global_step": 0, "compat_id": data.compat_id, "compat": data.compat}

    def place(temporary: Path) -> None:
        torch.save(content, temporary)
        seal(temporary)

    commit_file(run / "checkpoints" / LAST, place, check=check_seal)
    commit_json(run / ORIGIN, record)
    RunRecord(
        student=config, teacher="teacher", max_length=data.max_length, compat_id=data.compat_id,
        width=data.teacher.facts.width, vocab_size=data.teacher.facts.vocab_size, compat=data.compat,
    ).write(run)  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_command(main))
