"""The bytes that every token id stands for: what bits per byte are counted in."""

from __future__ import annotations

import json
import re

from tokenizers import Tokenizer

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of the byte-level alphabet: printable Latin-1 stands for itself, the rest from U+0100 up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    for n, byte in enumerate(b for b in range(256) if b not in set(printable)):
        alphabet[chr(256 + n)] = byte
    return alphabet


def token_bytes(tokenizer: Tokenizer, vocab_size: int) -> list[bytes]:
    """Bytes of ids 0 .. vocab_size - 1. Special tokens and ids that no token has stand for no text: b"".

    Byte-level vocabularies (GPT-2's alphabet) and sentence-piece ones (U+2581 for a space, <0xNN> for a byte) are
    known.
    """
    state = json.loads(tokenizer.to_str())
    byte_level = "ByteLevel" in json.dumps([state.get("decoder"), state.get("pre_tokenizer")])
    alphabet = byte_level_alphabet()
    added = {entry["id"]: entry for entry in state.get("added_tokens", [])}
    values = [b""] * vocab_size
    for token, index in tokenizer.get_vocab(with_added_tokens=True).items():
        if index in added:
            values[index] = b"" if added[index]["special"] else token.encode()
        elif byte_level:
            values[index] = b"".join(bytes([alphabet[c]]) if c in alphabet else c.encode() for c in token)
        elif match := BYTE_TOKEN.fullmatch(token):
            values[index] = bytes([int(match[1], 16)])
        else:
            values[index] = token.replace("▁", " ").encode()
    return values
