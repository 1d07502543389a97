"""Thrift's compact protocol as a tree that can be changed and written again: what the fuzzer mutates headers with.

A struct is a list of [number, type, value]; a list is (type of its items, items); everything else is an int, bytes or
bool. It writes what it is told to, sense or not.
"""

from __future__ import annotations

from typing import Any

from pipeline.thrift import BINARY, BITS, BYTE, DOUBLE, LIST, SET, STRUCT, TRUE, Reader

FALSE = 2


def read_tree(data: bytes, position: int = 0) -> tuple[list[Any], int]:
    """(the struct at `position`, where it ends)."""
    reader = Reader(data, position)
    return _struct(reader), reader.position


def _struct(reader: Reader) -> list[Any]:
    fields, number = [], 0
    while header := reader._byte():
        number = number + (header >> 4) if header >> 4 else reader._zigzag(16)
        fields.append([number, header & 15, _value(reader, header & 15)])
    return fields


def _value(reader: Reader, kind: int, item: bool = False) -> Any:
    if kind in (TRUE, FALSE):
        return reader._byte() if item else kind == TRUE
    if kind == BYTE:
        return reader._byte()
    if kind in BITS:
        return reader._zigzag(BITS[kind])
    if kind == DOUBLE:
        start = reader._skip_bytes(8)
        return reader.data[start : start + 8]
    if kind == BINARY:
        return reader._binary()
    if kind in (LIST, SET):
        count, of = reader._list_header()
        return (of, [_value(reader, of, item=True) for _ in range(count)])
    assert kind == STRUCT, kind
    return _struct(reader)


def write_tree(fields: list[Any]) -> bytes:
    """The bytes of a struct."""
    out = bytearray()
    last = 0
    for number, kind, value in fields:
        if kind in (TRUE, FALSE):
            kind = TRUE if value else FALSE
        if 0 < number - last < 16:
            out.append((number - last) << 4 | kind)
        else:
            out.append(kind)
            out += _zigzag(number)
        last = number
        if kind not in (TRUE, FALSE):
            out += _written(kind, value)
    return bytes(out) + b"\0"


def _written(kind: int, value: Any) -> bytes:
    if isinstance(value, Claim):
        head = bytes([value.count << 4 | value.kind]) if value.count < 15 else bytes([0xF0 | value.kind])
        return head + (varint(value.count) if value.count >= 15 else b"") + value.rest
    if kind in (LIST, SET):
        of, items = value
        head = bytes([len(items) << 4 | of]) if len(items) < 15 else bytes([0xF0 | of]) + varint(len(items))
        return head + b"".join(_written(of, item) for item in items)
    if kind == STRUCT:
        return write_tree(value)
    if kind == BINARY:
        return varint(len(value)) + value
    if kind == DOUBLE:
        return bytes(value)
    if kind in (TRUE, FALSE, BYTE):
        return bytes([int(value) & 255])
    return _zigzag(value)


class Claim:
    """A list that says it has `count` items, whatever follows."""

    def __init__(self, count: int, kind: int, rest: bytes = b"") -> None:
        self.count, self.kind, self.rest = count, kind, rest


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _zigzag(value: int) -> bytes:
    return varint((value << 1) ^ (value >> 127) if value >= 0 else ((-value) << 1) - 1)


def field(fields: list[Any], *numbers: int) -> list[Any]:
    """The [number, type, value] entry at a path of field numbers; an int after a list takes that item."""
    found: Any = None
    here: Any = fields
    for number in numbers:
        if isinstance(here, tuple):
            here = here[1][number]
            continue
        found = next(entry for entry in here if entry[0] == number)
        here = found[2]
    return list(found) if found is None else found
