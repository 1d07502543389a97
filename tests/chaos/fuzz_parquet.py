"""Made-up Parquet files: footers, page headers and pages changed, digests and checksums made to match."""

from __future__ import annotations

import hashlib
import random

import zstandard

from chaos.changes import change_header, change_text
from chaos.parquet_parts import Page, ParquetParts
from chaos.thrift_tree import field, read_tree, write_tree

SIZES = [0, 1, 2**16, 2**20, 2**28, 2**30, 2**31 - 1, -1, -(2**31)]
BOMB_BYTES = 1 << 28
BOMB = zstandard.ZstdCompressor(level=3).compress(bytes(BOMB_BYTES))


class ParquetFuzzer:
    """Makes files out of one that is right."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.parts = ParquetParts(data)

    def footer(self, rng: random.Random) -> bytes:
        """The footer's structure, or its bytes."""
        if rng.random() < 0.2:
            footer = change_text(rng, self.parts.footer)
        else:
            tree = self.parts.tree()
            for _ in range(rng.choice([1, 1, 2])):
                if rng.random() < 0.35:
                    self._change_chunk(rng, tree)
                else:
                    change_header(rng, tree)
            footer = write_tree(tree)
        return self.parts.with_footer(self.data, footer)

    def _change_chunk(self, rng: random.Random, tree: list) -> None:
        """The numbers of a column chunk that a reader allocates by."""
        groups = [entry for entry in tree if entry[0] == 4 and isinstance(entry[2], tuple)]
        if not groups or not groups[0][2][1]:
            return
        group = rng.choice(groups[0][2][1])
        chunks = [entry for entry in group if entry[0] == 1 and isinstance(entry[2], tuple) and entry[2][1]]
        if rng.random() < 0.2 or not chunks:
            change_header(rng, group)
            return
        metas = [entry for entry in rng.choice(chunks[0][2][1]) if entry[0] == 3]
        numbers = [e for e in metas[0][2] if e[0] in (4, 5, 6, 7, 9, 10, 11) and type(e[2]) is int] if metas else []
        for entry in rng.sample(numbers, min(len(numbers), rng.choice([1, 2]))):
            entry[2] = rng.choice([entry[2] + 1, entry[2] - 1, entry[2] * 2, 10 * entry[2], *SIZES, 2**40, 2**62])

    def page_header(self, rng: random.Random) -> bytes:
        """One page's header; the file fits around it."""
        number = rng.randrange(len(self.parts.chunks))
        pages = list(self.parts.chunks[number])
        index = rng.randrange(len(pages))
        header, content = read_tree(pages[index].header)[0], pages[index].content
        way = rng.random()
        if way < 0.1:
            content = BOMB
            field(header, 2)[2], field(header, 3)[2] = (
                rng.choice([field(header, 2)[2], BOMB_BYTES, 2**31 - 1]),
                len(BOMB),
            )
        elif way < 0.5:
            entry = field(header, rng.choice([2, 3]))
            entry[2] = rng.choice([entry[2] + 1, entry[2] - 1, entry[2] * 2, *SIZES])
        elif way < 0.7:
            part = [entry for entry in header if entry[0] in (5, 7, 8)][0][2]
            part[rng.randrange(min(4, len(part)))][2] = rng.choice([*range(12), *SIZES])
        elif way < 0.9:
            change_header(rng, header)
        else:
            pages[index] = Page(change_text(rng, pages[index].header), content)
            return self.parts.with_pages(number, pages)
        pages[index] = Page(write_tree(header), content)
        return self.parts.with_pages(number, pages)

    def page(self, rng: random.Random) -> bytes:
        """What a page holds, its sizes and checksum right; or pages twice, in another order, or left out."""
        number = rng.randrange(len(self.parts.chunks))
        pages = list(self.parts.chunks[number])
        index = rng.randrange(len(pages))
        way = rng.random()
        if way < 0.1:
            pages = rng.choice([pages * 2, pages[::-1], pages[:-1] or pages * 3, self.parts.chunks[number - 1]])
            return self.parts.with_pages(number, pages)
        content = bytearray(self.parts.content(number, index))
        if way < 0.6:  # levels and lengths stand at the beginning
            for _ in range(rng.randrange(1, 6)):
                content[rng.randrange(min(len(content), 24))] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        elif way < 0.8:
            content[:] = change_text(rng, bytes(content))
        else:
            for _ in range(rng.randrange(1, 40)):
                content[rng.randrange(len(content))] = rng.randrange(256)
        pages[index] = self.parts.rewritten(number, index, bytes(content))
        return self.parts.with_pages(number, pages)

    def bytes(self, rng: random.Random) -> bytes:
        """Bytes that know nothing of Parquet, or little."""
        if rng.random() < 0.3:
            body = rng.randbytes(rng.randrange(300))
            return rng.choice([body, b"PAR1" + body + len(body).to_bytes(4, "little") + b"PAR1"])
        return change_text(rng, self.data)


def footer_digest(data: bytes) -> str:
    """The digest that a shard's JSON would hold for this file."""
    length = int.from_bytes(data[-8:-4], "little")
    return hashlib.sha256(data[max(0, len(data) - 8 - length) :]).hexdigest()
