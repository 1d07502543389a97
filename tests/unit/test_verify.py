"""`verify` must find every kind of damage and inconsistency, name its place, and find nothing in a whole cache."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers_cache import commit_toy_shard, toy_columns, write_toy_cache

from pipeline import verify
from pipeline.__main__ import main
from pipeline.claim import try_claim
from pipeline.commit import commit_json, file_sha256, read_json
from pipeline.errors import UserError, run_command
from pipeline.folder_checks import read_plan
from pipeline.manifest import read_manifest
from pipeline.shard import Columns
from pipeline.shard_checks import UnitCheck
from pipeline.verify import Verification, verify_cache

ROWS, LENGTH = 6, 32


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with three training shards, a held-out one, padding and every optional column; three row groups each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.schema.ROW_GROUP_TOKENS", 2 * LENGTH)
        path = tmp_path_factory.mktemp("cache") / "c"
        sizes = dict(rows=ROWS, length=LENGTH, block=8, window=8, tail_samples=2, units=3)
        return write_toy_cache(path, packing="document", **sizes)  # type: ignore[arg-type]


@pytest.fixture
def cache(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may damage."""
    monkeypatch.setattr("pipeline.schema.ROW_GROUP_TOKENS", 2 * LENGTH)
    return Path(shutil.copytree(whole, tmp_path / "c"))


def lines(result: Verification) -> str:
    return "\n".join(map(str, result.problems))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def edit_json(path: Path, **changes: object) -> None:
    """Change fields and write the digest anew, as someone who edits on purpose would."""
    commit_json(path, {**read_json(path), **changes})


def test_a_whole_cache_has_nothing_wrong(cache: Path) -> None:
    result = verify_cache(cache, jobs=3)
    assert (result.problems, result.notes, result.missing) == ([], [], [])
    assert result.shards == 4 and result.rows == 4 * ROWS
    records = [read_json(path) for path in [*cache.glob("shard-*.json"), *cache.glob("heldout-*.json")]]
    assert result.tokens == sum(record["tokens"] for record in records)


@pytest.mark.parametrize("packing", ["stream", "document"])
@pytest.mark.parametrize("options", [{"k": 61, "block": 0}, {"taus": (1.0,)}, {"vocab_size": 80, "tied": False}])
def test_other_shapes_of_cache_are_whole_too(tmp_path: Path, packing: str, options: dict[str, object]) -> None:
    path = write_toy_cache(tmp_path / "c", units=1, rows=3, length=32, packing=packing, **options)  # type: ignore[arg-type]
    result = verify_cache(path)
    assert result.problems == [] and result.rows == 6


@pytest.mark.parametrize("column", ["topk_logits", "input_ids", "attn_map", "sequence_id"])
def test_flipped_byte_in_a_page_names_row_group_and_column(cache: Path, column: str) -> None:
    path = cache / "shard-00001.parquet"
    with pq.ParquetFile(path) as file:
        group = file.metadata.row_group(1)
        chunk = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema.startswith(column))
        offset = chunk.data_page_offset + chunk.total_compressed_size - 5
    flip(path, offset)
    found = {(p.file, p.row_group, p.column) for p in verify_cache(cache).problems}
    assert found == {("shard-00001.parquet", None, None), ("shard-00001.parquet", 1, column)}


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda p: flip(p, -100), "footer does not match"),
        (lambda p: flip(p, -2), "does not end as a Parquet file"),
        (lambda p: flip(p, 1), "sha256 differs"),
        (lambda p: p.write_bytes(p.read_bytes()[:-50]), "bytes, its JSON says"),
        (lambda p: p.write_bytes(b""), "has 0 bytes"),
        (lambda p: p.write_bytes(p.read_bytes() + b"x"), "bytes, its JSON says"),
        (lambda p: p.unlink(), "is missing, though shard-00002.json is there"),
    ],
)
def test_damaged_file(cache: Path, damage: Callable[[Path], None], expected: str) -> None:
    damage(cache / "shard-00002.parquet")
    result = verify_cache(cache)
    assert expected in lines(result)
    assert {p.file for p in result.problems} == {"shard-00002.parquet"}


def test_swapped_parquet_files(cache: Path) -> None:
    one, two = cache / "shard-00000.parquet", cache / "shard-00001.parquet"
    one.rename(cache / "x")
    two.rename(one)
    (cache / "x").rename(two)
    assert {p.file for p in verify_cache(cache).problems} == {one.name, two.name}


def test_swapped_or_copied_shards_with_their_json(cache: Path) -> None:
    for suffix in ("json", "parquet"):
        one, two = cache / f"shard-00000.{suffix}", cache / f"shard-00001.{suffix}"
        one.rename(cache / "x")
        two.rename(one)
        (cache / "x").rename(two)
        shutil.copy(cache / f"shard-00002.{suffix}", cache / f"shard-00003.{suffix}")
    found = {p.file for p in verify_cache(cache).problems}
    assert found == {"shard-00000.json", "shard-00001.json", "shard-00003.json"}


def test_shard_of_another_cache(cache: Path, tmp_path: Path) -> None:
    other = write_toy_cache(tmp_path / "other", seed=1, rows=ROWS, length=LENGTH, block=8)
    for suffix in ("json", "parquet"):
        shutil.copy(other / f"shard-00001.{suffix}", cache / f"shard-00001.{suffix}")
    text = lines(verify_cache(cache))
    assert "compat_id is" in text and "data_id is" in text and "its columns are not the manifest's" in text


def change(name: str, edit: Callable[[np.ndarray, Columns], None]) -> Callable[[Columns], None]:
    def apply(columns: Columns) -> None:
        edit(columns[name], columns)

    return apply


def put(name: str, place: tuple[int, ...], value: float) -> Callable[[Columns], None]:
    return change(name, lambda values, _: values.__setitem__(place, value))


def swap_pair(values: np.ndarray) -> None:
    values[..., [0, 1]] = values[..., [1, 0]]


def equal_logits_out_of_order(columns: Columns) -> None:
    columns["topk_logits"][1, 2, 1] = columns["topk_logits"][1, 2, 0]
    columns["topk_ids"][1, 2, :2] = np.sort(columns["topk_ids"][1, 2, :2])[::-1]


def on_padding(name: str, value: float) -> Callable[[Columns], None]:
    return change(name, lambda values, columns: values.__setitem__(columns["padding"], value))


def several_documents_in_a_row(columns: Columns) -> None:
    columns["segment_ids"][1, 1 : columns["length"][1]] = 1
    columns["doc_ids"][1].append("more")


def target_outside_the_top(columns: Columns) -> None:
    """A target that is none of the K ids cannot weigh more than the least of them."""
    inside = (columns["topk_ids"][:, :-1] == columns["input_ids"][:, 1:, None]).any(-1)
    row, index = np.argwhere(~inside & np.isfinite(columns["target_logit"][:, :-1]))[0]
    columns["target_logit"][row, index] = columns["topk_logits"][row, index, 3]


WRONG_NUMBERS = {
    "length too long": ("length", "between 1 and T", put("length", (3,), LENGTH + 1)),
    "sequence id": ("sequence_id", "(unit << 32) + row", put("sequence_id", (3,), 3)),
    "id beyond V": ("input_ids", "below V=61", put("input_ids", (1, 2), 61)),
    "text on padding": ("input_ids", "on padding", change("input_ids", lambda v, c: v.__setitem__(c["padding"], 5))),
    "next id": ("next_id", "neither -1 nor", put("next_id", (0,), 99)),
    "segment goes down": ("segment_ids", "0 or 1", put("segment_ids", (2, 1), 1)),
    "segment starts late": ("segment_ids", "begin at 0", put("segment_ids", (2, 0), 1)),
    "document names": ("doc_ids", "as many documents", lambda c: c["doc_ids"][4].append("more")),
    "top id beyond V": ("topk_ids", "below V=61", put("topk_ids", (1, 2, 7), 61)),
    "top id twice": ("topk_ids", "twice", change("topk_ids", lambda v, _: v.__setitem__((1, 2, 7), v[1, 2, 6]))),
    "logits unsorted": ("topk_logits", "descending", change("topk_logits", lambda v, _: swap_pair(v[1, 2]))),
    "logit NaN": ("topk_logits", "not finite", put("topk_logits", (1, 2, 3), np.nan)),
    "ids among equals": ("topk_ids", "ascending order among equal", equal_logits_out_of_order),
    "logits on padding": ("topk_logits", "NaN on padding", lambda c: c["topk_logits"].__setitem__(c["padding"], 0.0)),
    "lse low": ("lse", "below the largest", change("lse", lambda v, c: v.__setitem__((1, 2), v[1, 2] - 9))),
    "lse off": ("lse", "is not logaddexp", change("lse", lambda v, _: v.__setitem__((1, 2), v[1, 2] + 0.01))),
    "tail above 1": (
        "log_tail",
        "above 1",
        change("log_tail", lambda v, c: v.__setitem__((1, 2, 0), c["lse"][1, 2] + 1)),
    ),
    "tail infinite": ("log_tail", "NaN or infinite", put("log_tail", (1, 2, 1), np.inf)),
    "tails in a wrong order": ("log_tail", "convex", change("log_tail", lambda v, _: swap_pair(v[..., 1:]))),
    "tail too heavy": (
        "log_tail",
        "V-K ids",
        change("log_tail", lambda v, _: v.__setitem__((1, 2, 3), v[1, 2, 3] + 9)),
    ),
    "target above": ("target_logit", "above the largest", put("target_logit", (1, 2), 100.0)),
    "target of another id": (
        "target_logit",
        "differs from the stored logit",
        lambda c: c["target_logit"].__setitem__(
            (1, 2), c["topk_logits"][1, 2, list(c["topk_ids"][1, 2]).index(c["input_ids"][1, 3])] - 0.1
        ),
    ),
    "target missing": ("target_logit", "not finite", put("target_logit", (1, 2), np.nan)),
    "target on padding": (
        "target_logit",
        "where no token follows",
        lambda c: c["target_logit"].__setitem__(c["padding"], 0.0),
    ),
    "map row": ("attn_map", "more than 1", put("attn_map", (1, 0, 0, 0), 1.01)),
    "map above diagonal": ("attn_map", "above the diagonal", put("attn_map", (1, 1, 0, 1), 0.1)),
    "map negative": ("attn_map", "negative", put("attn_map", (1, 0, 0, 0), -0.5)),
    "map row empty": ("attn_map", "without any attention", put("attn_map", (1, 0, 0, 0), 0.0)),
    "hidden": ("hidden", "not finite", put("hidden", (1, 0, 5), np.inf)),
    "tail sample of the top": (
        "tail_ids",
        "names an id of the top",
        change("tail_ids", lambda v, c: v.__setitem__((1, 2, 0), c["topk_ids"][1, 2, 4])),
    ),
    "tail sample above the top": (
        "tail_logits",
        "above the smallest",
        change("tail_logits", lambda v, c: v.__setitem__((1, 2, 0), c["topk_logits"][1, 2, 0])),
    ),
    "segment on padding": ("segment_ids", "0 on padding", on_padding("segment_ids", 1)),
    "documents in a row": ("segment_ids", "hold one each", several_documents_in_a_row),
    "top id on padding": ("topk_ids", "0 on padding", on_padding("topk_ids", 3)),
    "lse NaN": ("lse", "not finite", put("lse", (1, 2), np.nan)),
    "lse on padding": ("lse", "NaN on padding", on_padding("lse", 1.0)),
    "tail on padding": ("log_tail", "NaN on padding", on_padding("log_tail", 1.0)),
    "target outside the top": ("target_logit", "above the smallest stored", target_outside_the_top),
    "map NaN": ("attn_map", "not finite", put("attn_map", (1, 0, 0, 0), np.nan)),
    "map on padding": (
        "attn_map",
        "padded blocks",
        lambda c: c["attn_map"].__setitem__((c["padding"][0], 0, -1, 0), 1.0),
    ),
    "hidden on padding": ("hidden", "padded windows", lambda c: c["hidden"].__setitem__((c["padding"][0], -1, 0), 1.0)),
    "tail id beyond V": ("tail_ids", "below V=61", put("tail_ids", (1, 2, 0), 61)),
    "tail id on padding": ("tail_ids", "0 on padding", on_padding("tail_ids", 3)),
    "tail sample NaN": ("tail_logits", "not finite", put("tail_logits", (1, 2, 0), np.nan)),
    "tail sample on padding": ("tail_logits", "NaN on padding", on_padding("tail_logits", 1.0)),
}


@pytest.mark.parametrize("kind", WRONG_NUMBERS)
def test_wrong_numbers_under_right_checksums(cache: Path, kind: str) -> None:
    """The shard is committed whole: only the arithmetic can tell."""
    column, message, edit = WRONG_NUMBERS[kind]
    manifest = read_manifest(cache)
    columns = toy_columns(manifest.spec, 1, ROWS)
    short = int(np.argmin(columns["length"]))
    assert columns["length"][short] <= LENGTH - 8  # its last block is padding
    columns["padding"] = (short, LENGTH - 1)
    edit(columns)
    del columns["padding"]
    commit_toy_shard(cache, manifest, 1, ROWS, columns=columns)
    result = verify_cache(cache)
    assert {p.file for p in result.problems} == {"shard-00001.parquet"}
    assert any(p.column == column and message in p.message for p in result.problems), lines(result)


def test_short_row_of_a_stream(tmp_path: Path) -> None:
    path = write_toy_cache(tmp_path / "c", units=1, rows=3, length=32)
    manifest = read_manifest(path)
    columns = toy_columns(manifest.spec, 0, 3)
    columns["length"][1] = 31
    commit_toy_shard(path, manifest, 0, 3, columns=columns)
    assert "column length: is shorter than T, though rows are packed as a stream" in lines(verify_cache(path))


def test_place_of_a_wrong_number(cache: Path) -> None:
    manifest = read_manifest(cache)
    columns = toy_columns(manifest.spec, 1, ROWS)
    columns["attn_map"][4, 1, 0, 1] = 0.25
    commit_toy_shard(cache, manifest, 1, ROWS, columns=columns)
    text = lines(verify_cache(cache))
    assert "shard-00001.parquet, row group 2, column attn_map" in text and "row 4, index [1, 0, 1]" in text


def test_sinks_are_noted_not_refused(cache: Path) -> None:
    manifest = read_manifest(cache)
    columns = toy_columns(manifest.spec, 1, ROWS)
    columns["attn_map"][2, 0, 0, 0] = 0.5
    commit_toy_shard(cache, manifest, 1, ROWS, columns=columns)
    result = verify_cache(cache)
    assert result.ok and "1 rows sum to less than one (the least to 0.5000)" in str(result.notes[0])


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("tokens", 1, "its JSON says 1"),
        ("rows", 5, "has 6 rows, its JSON says 5"),
        ("mean_entropy", 9.0, "mean_entropy is"),
        ("mean_tail_mass", 0.9, "mean_tail_mass is"),
        ("sha256", "0" * 64, "sha256 differs"),
        ("split", "heldout", "does not suit unit 0"),
        ("source", {"start": 65536, "end": 131072}, "is not the plan's (0, 65536)"),
    ],
)
def test_json_that_says_something_else(cache: Path, field: str, value: object, expected: str) -> None:
    edit_json(cache / "shard-00000.json", **{field: value})
    assert expected in lines(verify_cache(cache))


def test_range_covered_twice(cache: Path) -> None:
    edit_json(cache / "shard-00001.json", source={"start": 30000, "end": 95536})
    assert "overlaps that of shard-00000" in lines(verify_cache(cache))


@pytest.mark.parametrize(
    "name", ["manifest.json", "plan.json", "shard-00001.json", "teacher/teacher.json", "teacher/head.safetensors"]
)
def test_flipped_byte_in_any_other_file(cache: Path, name: str) -> None:
    flip(cache / name, (cache / name).stat().st_size // 2)
    assert {p.file for p in verify_cache(cache).problems} == {name}


def test_missing_teacher_file_and_wrong_token_bytes(cache: Path) -> None:
    (cache / "teacher/tokenizer.json").unlink()
    table = pq.read_table(cache / "teacher/token_bytes.parquet")
    assert "teacher/tokenizer.json: is missing" in lines(verify_cache(cache))
    shutil.copy(cache / "teacher/config.json", cache / "teacher/tokenizer.json")
    path = cache / "teacher/token_bytes.parquet"
    pq.write_table(table.slice(0, 60), path, compression="zstd", write_page_checksum=True)
    record = read_json(cache / "teacher/teacher.json")
    for file in ("token_bytes.parquet", "tokenizer.json"):
        at = cache / "teacher" / file
        record["files"][file] = {"bytes": at.stat().st_size, "sha256": file_sha256(at)}
    commit_json(cache / "teacher/teacher.json", record)
    assert "has 60 ids, the vocabulary 61" in lines(verify_cache(cache))


def test_teacher_record_that_leaves_a_file_out(cache: Path) -> None:
    record = read_json(cache / "teacher/teacher.json")
    del record["files"]["token_bytes.parquet"]
    commit_json(cache / "teacher/teacher.json", record)
    assert "does not name token_bytes.parquet" in lines(verify_cache(cache))


def test_gaps_are_problems_and_strays_are_notes(cache: Path) -> None:
    for suffix in ("json", "parquet"):
        (cache / f"shard-00001.{suffix}").unlink()
    (cache / ".shard-00005.parquet.host-1-abc.tmp").write_bytes(b"half")
    (cache / "shard-00007.parquet").write_bytes(b"PAR1")
    (cache / "mine.txt").write_text("x")
    result = verify_cache(cache)
    assert lines(result) == "shard-00001.json: is missing: dump it to close the gap"
    assert result.missing == ["shard-00001"]
    noted = {note.file for note in result.notes}
    assert noted == {".shard-00005.parquet.host-1-abc.tmp", "shard-00007.parquet", "mine.txt"}
    counted = verify_cache(cache, shards=4)
    assert counted.missing == ["shard-00001", "shard-00003"] and len(counted.problems) == 2


def test_a_gap_that_a_dump_is_filling_is_a_note(cache: Path) -> None:
    for suffix in ("json", "parquet"):
        (cache / f"shard-00001.{suffix}").unlink()
    claim = try_claim(cache, "shard-00001")
    assert claim is not None
    with claim:
        result = verify_cache(cache)
    assert result.ok and result.missing == []
    assert "shard-00001.json: is missing: a dump is writing this shard" in map(str, result.notes)


def test_no_more_shards_are_in_hand_than_the_threads_need(
    whole: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """However many a cache has: results are handed over as they come."""
    begun, handed = [0], [0]
    real = verify.check_unit

    def counted(*args: Any) -> UnitCheck:
        begun[0] += 1
        assert begun[0] - handed[0] <= 2 * verify.AHEAD + 2
        return real(*args)

    monkeypatch.setattr(verify, "check_unit", counted)
    manifest = read_manifest(whole)
    stems = ["shard-00000", "shard-00001"] * 20
    for _ in verify.check_units(whole, manifest, read_plan(whole)[0], stems, 2):
        handed[0] += 1
    assert begun == handed == [40]


def test_no_permission_is_no_damage(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be read is not judged; what the disk has lost is damage."""

    def denied(number: int) -> Callable[..., Any]:
        def raises(path: Path, *_: Any) -> Any:
            raise OSError(number, "made up", str(path))

        return raises

    monkeypatch.setattr("pipeline.shard_checks.check_pages", denied(errno.EACCES))
    with pytest.raises(PermissionError):
        verify_cache(cache, repair="remove")
    assert len(list(cache.glob("*.parquet"))) == 4
    monkeypatch.setattr("pipeline.shard_checks.check_pages", denied(errno.EIO))
    result = verify_cache(cache, repair="list")
    assert result.repair is not None and len(result.repair.dump_again) == 4
    assert "shard-00002.parquet: cannot be read: [Errno 5]" in lines(result)


def test_command_line_status_lines_and_json(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--cache", str(cache), "--jobs", "2"]) == 0
    assert "nothing is wrong" in capsys.readouterr().out
    flip(cache / "shard-00000.parquet", -100)
    assert main(["verify", "--cache", str(cache), "--json", str(tmp_path / "v.json")]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("problem: shard-00000.parquet: ") and printed[-1].endswith("2 problems in 1 files")
    record = read_json(tmp_path / "v.json")
    assert record["ok"] is False and record["problems"][1]["file"] == "shard-00000.parquet"


def test_what_the_user_can_mend_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: main(["verify", "--cache", str(tmp_path)])) == 2
    assert "is no cache (manifest.json is missing)" in capsys.readouterr().err
    with pytest.raises(UserError, match="known are inspect, verify, estimate, card, index, report, summary"):
        main(["veryfy"])


def test_json_is_readable_by_anything(cache: Path, tmp_path: Path) -> None:
    main(["verify", "--cache", str(cache), "--json", str(tmp_path / "v.json")])
    assert json.loads((tmp_path / "v.json").read_text())["tokens"] > 0
