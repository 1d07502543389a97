"""Token ids as text for a terminal or a page: every id has something to show, and nothing breaks a line."""

from __future__ import annotations

import unicodedata

from pipeline.teacher_folder import MOST_TOKENIZER_BYTES, TeacherFolder

VISIBLE = {" ": "·", "\n": "↵", "\r": "␍", "\t": "⇥"}


def visible(text: str) -> str:
    """`text` with whitespace and control characters shown by a character of their own."""
    return "".join(_shown(c) for c in text)


def _shown(character: str) -> str:
    if character in VISIBLE:
        return VISIBLE[character]
    if unicodedata.category(character)[0] in "CZ" or unicodedata.combining(character):
        return f"\\u{ord(character):04x}"
    return character


def columns_of(text: str) -> int:
    """Terminal columns that `text` takes: two for wide East Asian characters."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def keep_right(text: str, columns: int) -> str:
    """The end of `text` that fits `columns`, marked by … where the beginning was left out."""
    if columns_of(text) <= columns:
        return text
    start, used = len(text), 1
    while start > 0 and used + columns_of(text[start - 1]) <= columns:
        start -= 1
        used += columns_of(text[start])
    return "…" + text[start:]


def keep_left(text: str, columns: int) -> str:
    """The beginning of `text` that fits `columns`, marked by … where the end was left out."""
    if columns_of(text) <= columns:
        return text
    end, used = 0, 1
    while used + columns_of(text[end]) <= columns:
        used += columns_of(text[end])
        end += 1
    return text[:end] + "…"


class Vocabulary:
    """What token ids look like: their bytes, and the names of special tokens, which stand for no bytes."""

    def __init__(self, teacher: TeacherFolder) -> None:
        self.bytes = teacher.token_bytes()
        self.names = _special_names(teacher)

    def token(self, index: int) -> str:
        """One token, whitespace visible; undecodable bytes as U+FFFD."""
        return self.text([index])

    def text(self, ids: list[int]) -> str:
        """Consecutive tokens, decoded together, for one character's bytes may lie in several tokens."""
        shown, pending = "", b""
        for index in ids:
            if 0 <= index < len(self.bytes) and self.bytes[index]:
                pending += self.bytes[index]
            else:
                shown += visible(pending.decode("utf-8", errors="replace")) + self.names.get(index, f"<id {index}>")
                pending = b""
        return shown + visible(pending.decode("utf-8", errors="replace"))


def _special_names(teacher: TeacherFolder) -> dict[int, str]:
    """Names of added tokens; an entry of another shape than tokenizers write is left out."""
    if not (teacher.path / "tokenizer.json").is_file():
        return {}
    added = teacher.json("tokenizer.json", MOST_TOKENIZER_BYTES).get("added_tokens")
    names = {}
    for entry in added if isinstance(added, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("id"), int) and isinstance(entry.get("content"), str):
            names[entry["id"]] = entry["content"]
    return names
