"""benchmarks/results/quality.json: one row for each arm, seed and budget, whichever machine measured it.

Several runners may add to one file: it is read and replaced under a lock. A row with `error` stands for a trial that
failed; a row of figures takes its place, never the other way round.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.measured import RESULTS, Row
from pipeline.commit import commit_bytes
from pipeline.errors import UserError

QUALITY = RESULTS / "quality.json"
KEYS = ("arm", "seed", "budget")
TEACHER = "teacher"
"""Arm and budget of the row that holds the teacher's own figures."""
DIGITS = 6


def key_of(row: Row) -> tuple[str, int, str]:
    return row["arm"], row["seed"], row["budget"]


class RowFile:
    """Rows told apart by `KEYS`, a line each, in a JSON file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Row]:
        """All rows; none if there is no file yet.

        Raises:
            UserError: the file is damaged, or not of this kind.
        """
        if not self.path.is_file():
            return []
        try:
            rows: list[Row] = json.loads(self.path.read_text(encoding="utf-8"))["rows"]
            for row in rows:
                key_of(row)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{self.path} holds no rows of arms ({error!r}): restore it, or move it away") from None
        return rows

    def add(self, rows: Iterable[Row]) -> None:
        """Put rows in the places of those with the same key, others behind them."""
        with self._locked():
            there = {key_of(row): row for row in self.read()}
            for row in rows:
                before = there.get(key_of(row))
                if "error" in row and before is not None and "error" not in before:
                    continue
                there[key_of(row)] = row
            lines = ",\n".join(
                f"  {json.dumps(_rounded(row), ensure_ascii=False, allow_nan=False)}" for row in there.values()
            )
            commit_bytes(self.path, f'{{"rows": [\n{lines}\n]}}\n'.encode())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path.parent, os.O_RDONLY)  # the folder: no lock file is left behind
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def curves_of(path: Path) -> Path:
    """The file of the training curves that belong to a file of rows."""
    return path.with_name(f"{path.stem}_curves.json")


def _rounded(value: object) -> object:
    if isinstance(value, float) and value and math.isfinite(value):
        return round(value, DIGITS - 1 - math.floor(math.log10(abs(value))))
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
