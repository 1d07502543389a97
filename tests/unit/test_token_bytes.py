"""The bytes of a text's tokens, one after the other, are the text's bytes: bits per byte rest on that."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from teacher_dump.token_bytes import byte_level_alphabet, token_bytes


def byte_level() -> Tokenizer:
    """GPT-2's kind: 256 bytes, merges across byte boundaries of characters, one special and one plain added token."""
    alphabet = {byte: char for char, byte in byte_level_alphabet().items()}
    tokens = [alphabet[byte] for byte in range(256)]
    merges = [(alphabet[0xC3], alphabet[0x9F]), (alphabet[0x20], "t"), ("h", "e"), (alphabet[0xF0], alphabet[0x9F])]
    vocab = {token: n for n, token in enumerate([*tokens, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.add_tokens([AddedToken("größe", normalized=False)])
    return tokenizer


def sentence_piece() -> Tokenizer:
    """Llama's kind: U+2581 for a space, pieces of characters, <0xNN> for bytes no piece covers."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdehot", "ß", "th", "▁t", "▁the"]
    merges = [("t", "h"), ("▁", "t"), ("▁t", "he"), ("h", "e")]
    vocab = {piece: n for n, piece in enumerate([*pieces, "he"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return tokenizer


def id_of(tokenizer: Tokenizer, piece: str) -> int:
    found = tokenizer.token_to_id(piece)
    assert found is not None
    return found


TOKENIZERS = {"byte-level": byte_level(), "sentence piece": sentence_piece()}
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40) | st.sampled_from(
    ["the größe of the thé", "ß" * 5, "a\r\n\tb", "漢字 🙂", "\x00\x7f\x80ÿ", "2024", "  the  "]
)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(TEXT)
def test_bytes_of_the_tokens_are_the_bytes_of_the_text(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    values = token_bytes(tokenizer, tokenizer.get_vocab_size() + 3)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert b"".join(values[i] for i in ids) == text.encode()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_special_and_unused_ids_stand_for_no_text(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    size = tokenizer.get_vocab_size()
    values = token_bytes(tokenizer, size + 3)
    assert len(values) == size + 3 and values[size:] == [b""] * 3
    special = "<|endoftext|>" if name == "byte-level" else "</s>"
    assert values[id_of(tokenizer, special)] == b""
    assert values[id_of(tokenizer, "he")] == b"he"


def test_pieces() -> None:
    llama, gpt = TOKENIZERS["sentence piece"], TOKENIZERS["byte-level"]
    values = token_bytes(llama, 400)
    assert [values[id_of(llama, piece)] for piece in ("▁the", "<0xE6>", "ß")] == [b" the", b"\xe6", "ß".encode()]
    values = token_bytes(gpt, 400)
    assert [values[id_of(gpt, piece)] for piece in ("Ġt", "größe")] == [b" t", "größe".encode()]


def test_alphabet_is_the_tokenizers_own() -> None:
    alphabet = byte_level_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    assert alphabet["Ġ"] == 0x20 and alphabet["Ċ"] == 0x0A
