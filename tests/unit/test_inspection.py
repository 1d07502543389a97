"""`inspect` against numbers computed from the full logits the toy cache was cut from."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from helpers_cache import toy_logits, toy_tokenizer, write_toy_cache

from pipeline.__main__ import main
from pipeline.cache import Cache
from pipeline.errors import UserError, run_command
from pipeline.inspection import Options, chosen_positions, column_facts, position_facts
from pipeline.text import Vocabulary, columns_of, keep_left, keep_right, visible


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_cache(tmp_path_factory.mktemp("cache") / "c", units=2, rows=4, length=32, window=8)


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(["inspect", *words]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("index", [0, 7, 31])
def test_position_says_what_the_full_logits_say(path: Path, index: int) -> None:
    cache = Cache(path)
    columns = next(cache.groups("train"))
    facts = position_facts(columns, cache.spec, 2, index, Vocabulary(cache.teacher))
    z_V = toy_logits(path, "train", 0)[2, index].astype(np.float64)
    p_V = np.exp(z_V - np.log(np.exp(z_V).sum()))
    order_V = np.argsort(-p_V)
    following = columns["input_ids"][2, index + 1] if index < 31 else columns["next_id"][2]
    assert facts.target == following and facts.target_p == pytest.approx(p_V[following], abs=1e-5)
    rank = order_V.tolist().index(following) + 1
    assert facts.target_rank == (rank if rank <= cache.spec.k else None)
    assert facts.ids == order_V[: cache.spec.k].tolist()
    assert facts.p == pytest.approx(p_V[order_V[: cache.spec.k]], abs=1e-5)
    rest = p_V[order_V[cache.spec.k :]].sum()
    assert facts.tail_mass == pytest.approx(rest, abs=1e-5)
    kept_p = p_V[order_V[: cache.spec.k]]
    assert facts.entropy == pytest.approx(-(kept_p * np.log(kept_p)).sum() - rest * math.log(rest), abs=1e-4)
    text = toy_tokenizer(61).decode(columns["input_ids"][2, : index + 1].tolist(), skip_special_tokens=False)
    assert facts.context == visible(text)


def test_row_without_a_following_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_toy_cache(tmp_path / "c", units=1, rows=4, length=64, packing="document")
    columns = next(Cache(path).groups("train"))
    row = int(np.flatnonzero(columns["next_id"] < 0)[0])
    lines = printed(capsys, "--cache", str(path), "--row", str(row))
    assert lines[-1].strip() and any("nothing: the text ends here" in line for line in lines)
    assert f"position {columns['length'][row] - 1}," in "\n".join(lines)


def test_output_fits_and_names_every_column_with_its_cost(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "--cache", str(path), "--shard", "1", "--positions", "3", "--candidates", "2")
    assert max(map(columns_of, lines)) <= 100
    cache = Cache(path)
    record = cache.find(1)
    with cache.open(record) as shard:
        facts = column_facts(shard)
    for column in facts:
        line = next(line for line in lines if line.split()[:1] == [column.name])
        assert f"{column.compressed_bytes / record.tokens:.2f}" in line and column.type in line
    total = next(line for line in lines if line.split()[:1] == ["total"])
    assert f"{record.bytes / record.tokens:.2f}" in total
    kinds = {column.name: (column.type, column.encoding) for column in facts}
    assert kinds["topk_ids"] == ("FixedSizeList<uint16>[256]", "BYTE_STREAM_SPLIT, zstd")
    assert kinds["attn_map"] == ("FixedSizeList<float16>[8]", "PLAIN, zstd")
    assert sum(line.startswith("position ") for line in lines) == 3


def test_second_row_group_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("pipeline.schema.ROW_GROUP_TOKENS", 64)
    path = write_toy_cache(tmp_path / "c", units=1, rows=4, length=32)
    lines = printed(capsys, "--cache", str(path), "--row", "3")
    assert any(line.startswith("row 3: sequence_id 3,") for line in lines)


def test_chosen_positions(path: Path) -> None:
    assert chosen_positions(Options(path, positions=4), 32) == [7, 15, 23, 31]
    assert chosen_positions(Options(path, positions=40), 3) == [0, 1, 2]
    assert chosen_positions(Options(path, positions=0), 3) == []
    assert chosen_positions(Options(path, start=30, positions=4), 32) == [30, 31]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--shard", "7"], "the cache has 2 training shards"),
        (["--row", "4"], "--row 4: shard-00000 has 4 rows"),
        (["--start", "32"], "the row has 32 tokens"),
        (["--positions", "-1"], "must not be negative"),
        (["--split", "test"], "'train', 'heldout'"),
        (["--sahrd", "1"], "--sahrd"),
    ],
)
def test_wrong_options_are_one_sentence(
    path: Path, words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(lambda: main(["inspect", "--cache", str(path), *words])) == 2
    error = capsys.readouterr().err
    assert expected in error and len(error.splitlines()) == 1


def test_damaged_shard_is_refused(path: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(path, tmp_path / "c"))
    file = copy / "shard-00000.parquet"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="footer does not match"):
        main(["inspect", "--cache", str(copy)])


def test_help_lists_commands_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(name in usage for name in ("inspect", "verify", "report", "summary"))
    with pytest.raises(SystemExit):
        main(["inspect", "--help"])
    shown = capsys.readouterr().out
    assert "type: int, default: 5" in shown and "how many positions to decode" in shown


def test_text_is_shown_safely() -> None:
    assert visible("a b\n\t\x1b[31mé\u200b") == "a·b↵⇥\\u001b[31mé\\u200b"
    assert keep_right("abcdef", 4) == "…def" and keep_left("abcdef", 4) == "abc…"
    assert keep_right("漢字漢字", 5) == "…漢字" and columns_of("漢a") == 3


def test_characters_split_over_tokens_and_special_tokens(path: Path) -> None:
    vocabulary = Vocabulary(Cache(path).teacher)
    vocabulary.bytes = [b"", b"\xe6\xbc", b"\xa2", b"\xff"]
    assert vocabulary.text([1, 2, 0, 3]) == "漢<|endoftext|>\ufffd"
    assert vocabulary.token(1) == "\ufffd" and vocabulary.token(99) == "<id 99>"
