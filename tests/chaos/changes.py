"""Changes to JSON records and Thrift headers that keep their structure: what a stranger might put there."""

from __future__ import annotations

import json
import random
from typing import Any

from chaos.thrift_tree import Claim
from pipeline.thrift import BINARY, I32, I64, LIST, STRUCT

NUMBERS = [0, 1, -1, 2, 7, 255, 256, 65_535, 65_536, 2**24, 2**30, 2**31 - 1, 2**31, 2**32, 2**53, 2**60, 2**63, 2**64]
TEXTS = ["", "x", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "x\0y", "1.0", "2.0", "9" * 40, "\ud800", "é" * 300]
INTERESTING = [
    *NUMBERS,
    *(-n for n in NUMBERS),
    10**400,
    -(10**3000),
    1.5,
    -0.5,
    1e308,
    5e-324,
    True,
    False,
    None,
    *TEXTS,
]


def value(rng: random.Random) -> Any:
    """Any JSON value, small or not."""
    kind = rng.randrange(12)
    if kind == 0:
        return []
    if kind == 1:
        return {}
    if kind == 2:
        return [value(rng) for _ in range(rng.randrange(5))]
    if kind == 3:
        return {rng.choice(TEXTS[:8]): value(rng) for _ in range(rng.randrange(4))}
    if kind == 4 and rng.random() < 0.1:
        return rng.choice(["x" * 200_000, [0] * 50_000, [[]] * 50_000, nested(rng.choice([40, 200, 900]))])
    return rng.choice(INTERESTING)


def nested(depth: int) -> Any:
    inner: Any = 0
    for level in range(depth):
        inner = [inner] if level % 2 else {"a": inner}
    return inner


def places(record: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in a record."""
    found, open_ = [], [record]
    while open_:
        here = open_.pop()
        keys = here.keys() if isinstance(here, dict) else range(len(here)) if isinstance(here, list) else ()
        for key in keys:
            found.append((here, key))
            if isinstance(here[key], dict | list):
                open_.append(here[key])
    return found


def change_record(rng: random.Random, record: dict[str, Any]) -> None:
    """One to three changes, in place."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        all_places = places(record)
        if not all_places:
            return
        here, key = rng.choice(all_places)
        old, kind = here[key], rng.randrange(10)
        if kind == 0:
            del here[key]
        elif kind == 1 and isinstance(here, dict):
            here[rng.choice(["added", "digest", "file", "..", *TEXTS[:4]])] = value(rng)
        elif kind == 2:
            other, name = rng.choice(all_places)
            if name in other if isinstance(other, dict) else name < len(other):
                here[key] = json.loads(json.dumps(other[name]))
        elif kind in (3, 4, 5) and type(old) in (int, float):
            here[key] = rng.choice([old + 1, old - 1, -old, old * 2, old * 1000, str(old)[:50], old // 2, [old], 0.5])
        elif kind == 3 and isinstance(old, list):
            here[key] = rng.choice(
                [old * 2, old[:-1], old[::-1], [*old, value(rng)], old * 3000 if len(old) < 20 else []]
            )
        elif kind == 3 and isinstance(old, str):
            here[key] = rng.choice([old + "x", old[:-1], old.upper(), old[::-1], old * 100, [old]])
        else:
            here[key] = value(rng)


def change_text(rng: random.Random, data: bytes) -> bytes:
    """Changes that know nothing of JSON."""
    kind = rng.randrange(7)
    at = rng.randrange(len(data))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + rng.randbytes(rng.randrange(1, 20)) + data[at:]
    if kind == 2:
        return (
            data[:at]
            + rng.choice([b"[" * 5000, b'{"a":' * 3000, b"9" * 6000, b"NaN", b"1e999", b"-Infinity"])
            + data[at:]
        )
    if kind == 3:
        other = rng.randrange(len(data))
        return data[:at] + data[min(at, other) : max(at, other)] + data[at:]
    if kind == 4:
        return rng.randbytes(rng.randrange(400))
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 6)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def headers_within(fields: list[Any]) -> list[tuple[list[Any], int]]:
    """(struct, index) of every field of a Thrift tree, those of its lists' structs too."""
    found, open_ = [], [fields]
    while open_:
        here = open_.pop()
        for index, (_, kind, content) in enumerate(here):
            found.append((here, index))
            if kind == STRUCT:
                open_.append(content)
            elif kind == LIST and isinstance(content, tuple) and content[0] == STRUCT:
                open_ += content[1]
    return found


def change_header(rng: random.Random, fields: list[Any]) -> None:
    """One or two changes of a Thrift tree, in place."""
    for _ in range(rng.choice([1, 1, 2])):
        here, index = rng.choice(headers_within(fields))
        number, kind, content = here[index]
        way = rng.randrange(10)
        if way == 0:
            del here[index]
        elif way == 1:
            here.insert(index, [number, kind, content])
        elif way == 2:
            extra = rng.choice([[I32, 5], [I64, 2**40], [BINARY, b"x" * 50], [STRUCT, []], [LIST, (I32, [1] * 200)]])
            here.insert(index, [rng.choice([number + 1, 20, 300, number]), *extra])
        elif kind == LIST and isinstance(content, tuple):
            of, items = content
            here[index][2] = rng.choice(
                [
                    (of, items * 2),
                    (of, items[:-1]),
                    (of, items[::-1]),
                    (of, items * rng.choice([10, 100])),
                    (rng.choice([1, 5, 8, 12]), []),
                    Claim(rng.choice([len(items) + 1, 1000, 10**6, 2**31 - 1]), of),
                    Claim(len(items), rng.choice([1, 5, 6, 8, 9, 12]), rng.randbytes(20)),
                ]
            )
        elif kind in (I32, I64):
            near = [content + 1, content - 1, content * 2, -content, content // 2, content + 8, content * 1000]
            here[index][2] = rng.choice([*near, *near, *NUMBERS[:-1], *(-n for n in NUMBERS[:-2])])
        elif kind == BINARY:
            flipped = bytearray(content or b"\0")
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
            here[index][2] = rng.choice(
                [bytes(flipped), bytes(flipped), content[:-1], content * 3, b"", b"x" * 100_000]
            )
        elif kind == STRUCT and content:
            here[index][2] = rng.choice([[], content[::-1], content[:-1], [[1, STRUCT, content]]])
        else:
            here[index][1] = rng.choice([1, 2, 3, 5, 6, 7, 12])
            here[index][2] = {7: b"\0" * 8, 12: []}.get(here[index][1], 1)
