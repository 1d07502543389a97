"""Records and paths that may come from a stranger: types and ranges are checked before anything is done with them.

A digest does not help here: whoever writes a file can write the digest that suits it.
"""

from __future__ import annotations

import math
import re
import reprlib
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.store import is_remote

MOST_TEXT = 4096
"""Characters of a text field, unless its reader says otherwise."""
SHA256 = re.compile(r"[0-9a-f]{64}")
MOST_COUNT = 1 << 60
"""No count of bytes, rows or tokens reaches this; sums and products of two of them still fit a float."""


class Fields:
    """The fields of a JSON object that someone else may have written.

    Args:
        record: the value read.
        where: file (and place in it) that messages begin with.

    Raises:
        UserError: the value is no object; and from every method: the field is missing, of another type or out of range.
    """

    def __init__(self, record: Any, where: object) -> None:
        self.where = str(where)
        if not isinstance(record, dict):
            raise UserError(
                f"{self.where} is {reprlib.repr(record)}, not a JSON object: it was damaged or another program wrote "
                "it; restore it from a copy"
            )
        self.record = record

    def integer(self, name: str, least: int = 0, most: int = MOST_COUNT) -> int:
        value = self._take(name)
        if type(value) is not int or not least <= value <= most:
            raise self.refusal(name, f"an integer from {least} to {most}")
        return value

    def number(self, name: str, least: float = -1e300, most: float = 1e300) -> float:
        """A finite number."""
        value = self._take(name)
        if type(value) not in (int, float) or not least <= value <= most:
            raise self.refusal(name, f"a number from {least:g} to {most:g}")
        return float(value)

    def text(self, name: str, most: int = MOST_TEXT) -> str:
        value = self._take(name)
        if not isinstance(value, str) or len(value) > most:
            raise self.refusal(name, f"a text of at most {most} characters")
        return value

    def sha256(self, name: str) -> str:
        """A sha256 in hex."""
        value = self._take(name)
        if not isinstance(value, str) or SHA256.fullmatch(value) is None:
            raise self.refusal(name, "a sha256 of 64 hexadecimal digits")
        return value

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        value = self._take(name)
        if not isinstance(value, str) or value not in choices:
            raise self.refusal(name, f"one of {', '.join(choices)}")
        return value

    def flag(self, name: str) -> bool:
        value = self._take(name)
        if not isinstance(value, bool):
            raise self.refusal(name, "true or false")
        return value

    def object(self, name: str) -> dict[str, Any]:
        value = self._take(name)
        if not isinstance(value, dict):
            raise self.refusal(name, "an object")
        return value

    def fields(self, name: str) -> Fields:
        """The fields of an object within this one."""
        return Fields(self.object(name), f"{self.where}: {name}")

    def list(self, name: str, most: int) -> list[Any]:
        value = self._take(name)
        if not isinstance(value, list) or len(value) > most:
            raise self.refusal(name, f"a list of at most {most} values")
        return value

    def absent(self, name: str) -> bool:
        """Whether the field is null."""
        return self._take(name) is None

    def _take(self, name: str) -> Any:
        if name not in self.record:
            raise UserError(
                f"{self.where} lacks the field {name!r}: it was damaged or another version wrote it; restore it from "
                "a copy"
            )
        return self.record[name]

    def refusal(self, name: str, wanted: str) -> UserError:
        """What to raise where the field is there but is not what it must be."""
        return UserError(
            f"{self.where}: {name} is {reprlib.repr(self.record[name])}, not {wanted}: the file was damaged or another "
            "program wrote it; restore it from a copy"
        )


def finite(value: Any) -> bool:
    """Whether a JSON value is a number that arithmetic can be done with."""
    return type(value) in (int, float) and -1e300 <= value <= 1e300 and math.isfinite(value)


def child(folder: Path, name: str, where: object) -> Path:
    """The path of a file that a record names: one in `folder` itself, which no link leads out of.

    Args:
        where: the record, for messages.

    Raises:
        UserError: the name has folders in it or is none, or the file is a link out of `folder`.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & {"/", "\\", "\0"} or len(name) > 255:
        raise UserError(
            f"{where} names the file {reprlib.repr(name)}: only plain names of files in {folder} are followed; it was "
            "damaged or made to lead elsewhere: do not use it"
        )
    check_stays(folder, folder / name)
    return folder / name


def check_stays(folder: Path, path: Path) -> None:
    """Refuse a link that leads out of `folder`: a cache from someone else must not make other files of this machine
    part of itself.

    Raises:
        UserError: `path` is such a link.
    """
    if is_remote(path) or not path.is_symlink():
        return
    try:
        stays = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a link that leads to itself
        stays = False
    if not stays:
        raise UserError(
            f"{path} is a link out of {folder}: links are not followed out of a folder; put the file itself there "
            "(cp -L)"
        )
