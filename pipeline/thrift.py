"""A small reader of Thrift's compact protocol: enough to look at Parquet's headers before Arrow acts on them.

It is stricter than Arrow's: where that one passes over a value of an unexpected type or lets a field come twice, this
one refuses, so that the two never understand the same bytes differently. Nothing is allocated on the word of a length:
what is said to be there must be there.

A layout names the fields to keep, by number: a type (`I32`, `I64`, `BINARY`), another layout for a struct, or `Items`
for a list. All other fields are passed over by the type they say they have, as Arrow does with those it does not know.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

STOP, TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(13)
BITS = {I16: 16, I32: 32, I64: 64}
MOST_DEPTH = 16
MOST_ITEMS = 128

Layout = dict[int, tuple[str, Any]]
"""Field number -> (name, kind)."""


@dataclass(frozen=True)
class Items:
    """A list of at most `most` items of one kind. With `each`, items are handed to it one by one and not kept."""

    kind: Any
    most: int
    each: Callable[[Any], object] | None = None


class Malformed(ValueError):
    """Bytes that are not the structure they should be."""


class CutShort(Malformed):
    """The bytes end within the structure: with more of them it may be whole."""


class Reader:
    """Reads one struct after another from `data`, beginning at `position`.

    Args:
        most_items: of a list that no layout names.
    """

    def __init__(self, data: bytes, position: int = 0, most_items: int = MOST_ITEMS) -> None:
        self.data, self.position, self.most_items = data, position, most_items

    def struct(self, layout: Layout, depth: int = 0) -> dict[str, Any]:
        """The named fields of a struct; those that are not there are left out.

        Raises:
            Malformed: see the module.
        """
        if depth > MOST_DEPTH:
            raise Malformed(f"structures nested more than {MOST_DEPTH} deep")
        found: dict[str, Any] = {}
        number = 0
        while True:
            header = self._byte()
            if header == STOP:
                return found
            kind = header & 15
            number = number + (header >> 4) if header >> 4 else self._zigzag(16)
            if number not in layout:
                self._skip(kind, depth + 1)
                continue
            name, wanted = layout[number]
            if name in found:
                raise Malformed(f"field {name} stands there twice")
            found[name] = self._value(kind, wanted, name, depth)

    def _value(self, kind: int, wanted: Any, name: str, depth: int) -> Any:
        if kind == wanted:
            return self._zigzag(BITS[kind]) if kind in BITS else self._binary()
        if isinstance(wanted, dict) and kind == STRUCT:
            return self.struct(wanted, depth + 1)
        if isinstance(wanted, Items) and kind == LIST:
            count, item = self._list_header()
            if count > wanted.most:
                raise Malformed(f"{name} has {count} items, at most {wanted.most} can be right")
            if wanted.each is None:
                return [self._value(item, wanted.kind, name, depth) for _ in range(count)]
            for _ in range(count):
                wanted.each(self._value(item, wanted.kind, name, depth))
            return count
        raise Malformed(f"field {name} has type {kind}, which it cannot have")

    def _byte(self) -> int:
        position = self.position
        if position >= len(self.data):
            raise CutShort("it ends within a structure")
        self.position = position + 1
        return self.data[position]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise Malformed("an integer of more than 64 bits")

    def _zigzag(self, bits: int) -> int:
        value = self._varint()
        if value >> bits:
            raise Malformed(f"an integer of more than {bits} bits")
        return (value >> 1) ^ -(value & 1)

    def _binary(self) -> bytes:
        start = self._skip_bytes(self._varint())
        return self.data[start : self.position]

    def _skip_bytes(self, count: int) -> int:
        start = self.position
        if count > len(self.data) - start:
            raise CutShort(f"{count} bytes are said to follow, {len(self.data) - start} do")
        self.position = start + count
        return start

    def _list_header(self) -> tuple[int, int]:
        """(items, their type); every item takes a byte at least."""
        header = self._byte()
        count = header >> 4 if header >> 4 != 15 else self._varint()
        if count > len(self.data) - self.position:
            raise CutShort(f"a list of {count} items in {len(self.data) - self.position} bytes")
        return count, header & 15

    def _skip(self, kind: int, depth: int, item: bool = False) -> None:
        """Pass over a value. Booleans of a struct stand in its field's type, those of a list in a byte each."""
        if depth > MOST_DEPTH:
            raise Malformed(f"structures nested more than {MOST_DEPTH} deep")
        if kind in (TRUE, FALSE):
            if item:
                self._byte()
        elif kind == BYTE:
            self._byte()
        elif kind in (I16, I32, I64):
            self._varint()
        elif kind == DOUBLE:
            self._skip_bytes(8)
        elif kind == BINARY:
            self._skip_bytes(self._varint())
        elif kind in (LIST, SET):
            count, of = self._list_header()
            self._check_count(count)
            for _ in range(count):
                self._skip(of, depth + 1, item=True)
        elif kind == MAP:
            count = self._varint()
            self._check_count(count)
            of = self._byte() if count else 0
            for _ in range(count):
                self._skip(of >> 4, depth + 1, item=True)
                self._skip(of & 15, depth + 1, item=True)
        elif kind == STRUCT:
            while header := self._byte():
                if not header >> 4:
                    self._zigzag(16)
                self._skip(header & 15, depth + 1)
        else:
            raise Malformed(f"a value of type {kind}, which Thrift does not have")

    def _check_count(self, count: int) -> None:
        if count > self.most_items:
            raise Malformed(f"a list of {count} items where at most {self.most_items} can be right")
