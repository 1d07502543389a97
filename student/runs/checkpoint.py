"""A run folder: what it says of itself, and the student it holds.

run.json              `RunRecord`: the student's shape and which teacher it belongs to
teacher/              a copy of the cache's teacher folder, so that the run alone can be evaluated and generate
checkpoints/          last.ckpt, best.ckpt and others: Lightning checkpoints whose state_dict has the student's
                      trained parameters under "model.", embedding and head only where they are trained
"""

from __future__ import annotations

import pickle
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.commit import commit_json, read_json
from pipeline.errors import UserError
from pipeline.teacher_folder import TeacherFolder
from student.model import DistilXLSTM, StudentConfig
from student.runs.identity import Teaching, require_same_teacher, require_teacher_facts
from student.runs.seal import check_seal

PREFIX = "model."


@dataclass(frozen=True)
class RunRecord:
    """`run.json`.

    Attributes:
        student: the student's shape.
        teacher: the teacher folder, relative to the run folder.
        max_length: longest row the student is trained on.
        compat_id: of the caches it learns from.
        compat: its fields; None in a record that does not say.
        width, vocab_size: of the teacher it was built for; None in a record that does not say.
    """

    student: StudentConfig
    teacher: str
    max_length: int
    compat_id: str
    width: int | None = None
    vocab_size: int | None = None
    compat: dict[str, Any] | None = None

    def teaching(self, run: Path) -> Teaching:
        """Which teacher the run learns from."""
        return Teaching(str(run), self.compat_id, self.compat)

    def write(self, run: Path) -> None:
        """Commit `run.json`."""
        commit_json(run / "run.json", asdict(self))

    @staticmethod
    def read(run: Path) -> RunRecord:
        """Read `run.json`.

        Raises:
            UserError: no such run, or a damaged or foreign record.
        """
        path = Path(run) / "run.json"
        if not Path(run).is_dir():
            raise UserError(f"run folder {run} does not exist: train a student first, or name another with --run")
        if not path.is_file():
            raise UserError(f"{path} is missing: {run} is no run folder, or its training never started")
        values = read_json(path)
        try:
            shape = StudentConfig.of(values["student"])
            known = {field.name for field in fields(RunRecord)}
            return RunRecord(**{**{k: v for k, v in values.items() if k in known}, "student": shape})
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} was written by another version ({error}): train again with this one") from None


def checkpoint_path(run: Path, checkpoint: str) -> Path:
    """The file of a checkpoint: `last`, `best` or another name in checkpoints/, or a path.

    Raises:
        UserError: there is no such file; lists those there are.
    """
    folder = Path(run) / "checkpoints"
    for path in (folder / f"{checkpoint}.ckpt", Path(checkpoint)):
        if path.is_file():
            return path
    there = sorted(path.stem for path in folder.glob("*.ckpt"))
    choice = f"checkpoints there: {', '.join(there)}" if there else "it has no checkpoints yet"
    raise UserError(f"run {run} has no checkpoint {checkpoint!r} ({choice})")


def load_student(run: Path, checkpoint: str = "last") -> tuple[DistilXLSTM, TeacherFolder]:
    """The student of a run, on the CPU and in evaluation mode, and its teacher folder.

    Args:
        run: the run folder.
        checkpoint: `last`, `best`, or a path.

    Raises:
        UserError: no such run or checkpoint, a damaged one, or one of another student or teacher than run.json says.
    """
    run = Path(run)
    record = RunRecord.read(run)
    teacher = TeacherFolder(run / record.teacher)
    if record.compat is not None:
        require_teacher_facts(record.compat, run, teacher.facts, teacher.path)
    path = checkpoint_path(run, checkpoint)
    state = _read_state(path, record.teaching(run))
    found = {"width": _width(state), "vocab_size": record.vocab_size}
    for name, value in found.items():
        of_teacher = getattr(teacher.facts, name)
        if value is not None and value != of_teacher:
            raise UserError(
                f"{path} belongs to a teacher of {name} {value}, but {teacher.path} has {name} {of_teacher}: restore "
                "the run's own teacher folder"
            )
    model = DistilXLSTM(record.student, teacher.facts, teacher.tensors(), record.max_length)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    differing = sorted(
        name for name in wanted.keys() | state.keys() if name not in state or wanted.get(name) != state[name].shape
    )
    if differing:
        raise UserError(
            f"{path} does not hold the student that {run}/run.json describes ({len(differing)} parameters differ, "
            f"the first is {differing[0]}): choose a checkpoint of this run"
        )
    model.load_state_dict(state)
    return model.eval(), teacher


def checkpoint_teaching(path: Path | str, content: dict[str, Any]) -> Teaching | None:
    """Which teacher a checkpoint's student learnt from; None if it does not say."""
    found = content.get("compat_id")
    return None if found is None else Teaching(str(path), found, content.get("compat"))


def _read_state(path: Path, of_run: Teaching) -> dict[str, Tensor]:
    check_seal(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        state = content["state_dict"]
        if (teaching := checkpoint_teaching(path, content)) is not None:
            require_same_teacher(teaching, of_run, "Choose a checkpoint of this run")
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read as a checkpoint ({reason}): choose another one") from None
    return {name.removeprefix(PREFIX): tensor for name, tensor in state.items() if name.startswith(PREFIX)}


def _width(state: dict[str, Tensor]) -> int | None:
    names = ("stack.blocks.0.xlstm_norm.weight", "stack.blocks.0.mixer_norm.weight")
    norm = next((state[name] for name in names if name in state), None)
    return None if norm is None else int(norm.shape[0])
