"""Command lines from frozen dataclasses: a YAML file, dotted overrides, and `--help` with type, default and meaning."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jsonargparse import ArgumentParser, set_parsing_settings
from jsonargparse.typing import register_type

from pipeline.errors import UserError
from pipeline.store import open_path

T = TypeVar("T")

if TYPE_CHECKING:
    Place = Path
else:

    class Place:
        """Type of an option that names a folder by path or URL; its value is what `open_path` returns."""

    register_type(Place, serializer=str, deserializer=open_path, type_check=lambda value, _: hasattr(value, "joinpath"))


class Parser(ArgumentParser):
    """jsonargparse's parser whose complaints become one sentence (a `UserError`)."""

    def error(self, message: str, ex: Exception | None = None) -> Any:  # type: ignore[override]
        first = " ".join(line.strip() for line in message.splitlines() if line.strip())
        raise UserError(f"{first} (see {self.prog} --help)")


def parse_into(kind: type[T], prog: str, description: str, file_option: str, arguments: list[str] | None = None) -> T:
    """Parse a command line into a dataclass.

    Args:
        kind: a frozen dataclass; the docstring under each field becomes its help.
        prog: name shown in help and messages.
        description: one paragraph for `--help`.
        file_option: option that names a YAML file with values, for example `--manifest`.
        arguments: the words after the program's name; None takes the process's.

    Raises:
        UserError: an unknown or malformed option, or a file that is not there.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(prog=prog, description=description)
    parser.add_argument(file_option, action="config", help="YAML file with any of the options below")
    parser.add_class_arguments(kind, None)
    given = sys.argv[1:] if arguments is None else arguments
    check_files_exist(given, file_option)
    switches = {f"--{field.name}" for field in fields(kind) if field.type in (bool, "bool")}  # type: ignore[arg-type]
    given = with_values(given, switches)
    built = parser.instantiate(parser.parse_args(given))
    return kind(**{field.name: built[field.name] for field in fields(kind)})  # type: ignore[arg-type]


def with_values(arguments: list[str], switches: set[str]) -> list[str]:
    """A switch without a value says true: `--json` is `--json true`."""
    following = [*arguments, "--"][1:]
    return [
        word + "=true" if word in switches and after.startswith("--") else word
        for word, after in zip(arguments, following, strict=True)
    ]


def check_files_exist(arguments: list[str], option: str) -> None:
    """A missing manifest is told before the parser does, with what there is to choose from."""
    for i, argument in enumerate(arguments):
        name = None
        if argument == option and i + 1 < len(arguments):
            name = arguments[i + 1]
        elif argument.startswith(option + "="):
            name = argument.split("=", 1)[1]
        if name is None:
            continue
        path = Path(name)
        if not path.is_file():
            known = sorted(p.stem for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
            hint = f": known there are {', '.join(known)}" if known else ""
            raise UserError(f"{option} {name}: there is no such file{hint}")
