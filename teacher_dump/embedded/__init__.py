"""The teacher and the corpora that need no model hub: all come out of ordinary Python packages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pipeline.errors import UserError
from teacher_dump.embedded.corpus import ENWIK8
from teacher_dump.embedded.shakespeare import SHAKESPEARE
from teacher_dump.embedded.teacher import prepare_teacher

EMBEDDED: dict[str, Callable[[Path], Path]] = {
    "embedded:smollm2-135m": prepare_teacher,
    "embedded:enwik8": ENWIK8.prepare,
    "embedded:shakespeare": SHAKESPEARE.prepare,
}


def resolve_embedded(name: str, root: Path) -> Path:
    """The folder or file that an `embedded:` name of a manifest stands for, prepared under `root` if need be.

    Raises:
        UserError: no such name, or the preparation failed.
    """
    if name not in EMBEDDED:
        raise UserError(f"{name} is no embedded teacher or corpus: known are {', '.join(sorted(EMBEDDED))}")
    return EMBEDDED[name](Path(root))
