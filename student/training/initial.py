"""`--init_from`: a new run that begins with the weights of another one's student.

The new student has the other's shape, but may train an embedding or a head that the other had left frozen: it begins
as the teacher's. Not the other way round: a frozen one is the teacher's own, and a trained one is not.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from pipeline.commit import commit_json, read_json
from pipeline.errors import UserError
from pipeline.teacher_folder import TeacherFolder
from student.model import VOCABULARY, DistilXLSTM, StudentConfig, stays_tied
from student.runs.checkpoint import RunRecord, load_student
from student.runs.identity import Teaching, require_same_teacher
from student.runs.run_folder import ORIGIN

UNFROZEN = ("train_embedding", "train_head")
"""Fields of a student's shape that a new run may set true."""


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
        UserError: no such run, of another teacher, of another shape, or one that trained an embedding or head which the
            new one could not take over; names every field and both values.
    """
    run, _ = find_initial(place)
    record = RunRecord.read(run)
    require_same_teacher(of_cache, record.teaching(run), "Name a run of the cache's teacher with --init_from")
    before, now = asdict(record.student), asdict(student)
    for name in UNFROZEN:
        if before[name] and not now[name]:
            raise UserError(
                f"--init_from {place}: --model.student.{name} is False, in {run} it is True: a frozen one is the "
                f"teacher's, and that student's is not any more. Give the new one --model.student.{name} true"
            )
    differing = [name for name in now if name not in UNFROZEN and before[name] != now[name]]
    if differing:
        told = "; ".join(f"--model.student.{name} is {now[name]}, in {run} it is {before[name]}" for name in differing)
        raise UserError(f"--init_from {place} holds another student: {told}. Give the new student that shape")
    trained = record.student.train_embedding or record.student.train_head
    if trained and TeacherFolder(run / record.teacher).facts.tied:
        was, will = stays_tied(record.student, True), stays_tied(student, True)
        if was != will:
            raise UserError(
                f"--init_from {place}: embedding and head of {run} are two, since only one of them was trained; where "
                "both are, they are one, tied as the teacher's are. Train the same one as that run, or begin with one "
                "that trained neither"
            )


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
    """Copy the weights of the student that `--init_from` names into `model`; what it had frozen stays as it is.

    Raises:
        UserError: see `load_student`.
    """
    assert model is not None
    student, _ = load_student(*find_initial(place))
    of_teacher = {name: tensor for name, tensor in model.state_dict().items() if name in VOCABULARY}
    model.load_state_dict(of_teacher | student.state_dict())
