"""Cards in Markdown: front matter, tables, and values of strangers as plain text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

MOST_VALUE = 300
"""Characters of a value that a card shows."""


def front_matter(fields: dict[str, Any]) -> str:
    """The YAML block that a card begins with."""
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=1000)}---\n"


def plain(value: object) -> str:
    """A value on one line that Markdown shows as it is."""
    text = " ".join(str(value).split())
    text = text if len(text) <= MOST_VALUE else text[: MOST_VALUE - 1] + "…"
    return re.sub(r"([\\`*_{}\[\]<>#|~$])", r"\\\1", text)


def code(value: object) -> str:
    """A value on one line as code."""
    text = " ".join(str(value).split())[:MOST_VALUE]
    fence = "``" if "`" in text else "`"
    pad = " " if fence == "``" else ""
    return f"{fence}{pad}{text}{pad}{fence}".replace("|", "\\|")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; cells are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
