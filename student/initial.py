"""`--init_from`: a new run that begins with the weights of another one's student."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from pipeline.commit import commit_json, read_json
from pipeline.errors import UserError
from student.checkpoint import RunRecord, load_student
from student.identity import Teaching, require_same_teacher
from student.model import DistilXLSTM, StudentConfig
from student.run_folder import ORIGIN


def find_initial(place: str) -> tuple[Path, str]:
    """(run folder, checkpoint) of what `--init_from` names: a run folder stands for its last checkpoint.

    Raises:
        UserError: there is nothing.
    """
    path = Path(place)
    if path.is_dir():
        return path, "last"
    if path.is_file():
        return path.absolute().parent.parent, str(path)
    raise UserError(f"--init_from {place}: there is no such run folder or checkpoint; name one that was trained")


def check_initial(place: str, student: StudentConfig, of_cache: Teaching) -> None:
    """Refuse a run whose student cannot go on as `student` on this cache, before anything is loaded.

    Raises:
        UserError: no such run, of another teacher, or of another shape; names every field and both values.
    """
    run, _ = find_initial(place)
    record = RunRecord.read(run)
    require_same_teacher(of_cache, record.teaching(run), "Name a run of the cache's teacher with --init_from")
    before, now = asdict(record.student), asdict(student)
    differing = [name for name in now if before[name] != now[name]]
    if differing:
        told = "; ".join(f"--model.student.{name} is {now[name]}, in {run} it is {before[name]}" for name in differing)
        raise UserError(f"--init_from {place} holds another student: {told}. Give the new student that shape")


def keep_origin(place: str, run: Path) -> None:
    """Let a new run say that its student began with the teacher's weights, if what it begins with says so.

    Args:
        place: what `--init_from` names; empty: nothing.
        run: the new run's folder.
    """
    (run / ORIGIN).unlink(missing_ok=True)  # of a start that came to nothing
    if place and (origin := find_initial(place)[0] / ORIGIN).is_file():
        commit_json(run / ORIGIN, read_json(origin))


def load_initial(place: str, model: DistilXLSTM | None) -> None:
    """Copy the weights of the student that `--init_from` names into `model`.

    Raises:
        UserError: see `load_student`.
    """
    assert model is not None
    student, _ = load_student(*find_initial(place))
    model.load_state_dict(student.state_dict())
