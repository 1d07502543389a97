"""Units are a pure function of corpus and settings, never of how many are asked for; a changed corpus is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.schema import HELDOUT_UNIT
from teacher_dump.corpus import CorpusConfig, describe_corpus
from teacher_dump.corpus_files import SourceFile
from teacher_dump.plan import Plan, make_plan, open_plan, store_plan

NOWHERE = Path("data")


def write_corpus(folder: Path, documents: int = 200, files: int = 3) -> CorpusConfig:
    folder.mkdir()
    for number in range(files):
        lines = [
            json.dumps({"id": f"{number}-{n}", "text": "word " * (n % 17)}) for n in range(number, documents, files)
        ]
        (folder / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    return CorpusConfig(str(folder), heldout_fraction=0.2, bytes_per_token=4.0, range_bytes=256)


@pytest.fixture
def config(tmp_path: Path) -> CorpusConfig:
    return write_corpus(tmp_path / "corpus")


def plan_of(config: CorpusConfig, tokens: int = 100) -> Plan:
    return make_plan(config, describe_corpus(config, NOWHERE), tokens)


def test_units_are_disjoint_and_split_documents_between_them(config: CorpusConfig) -> None:
    plan = plan_of(config)
    assert plan.train_units > 5 and plan.heldout_units >= 2
    train = [plan.unit(i, "train") for i in range(plan.train_units)]
    heldout = [plan.unit(i, "heldout") for i in range(plan.heldout_units)]
    ranges = sorted((unit.start, unit.end) for unit in [*train, *heldout])
    assert all(a[1] <= b[0] for a, b in zip(ranges, ranges[1:], strict=False))
    assert ranges[0][0] == 0 and ranges[-1][1] <= plan.extent
    ids = [document.id for unit in [*train, *heldout] for document in plan.documents(config, unit)]
    assert len(set(ids)) == len(ids) > 150
    assert len({unit.unit for unit in [*train, *heldout]}) == len(train) + len(heldout)
    assert heldout[0].unit == HELDOUT_UNIT and (train[2].unit, train[2].split) == (2, "train")


@given(st.integers(1, 4000), st.integers(1, 500), st.floats(0, 0.99), st.integers(1, 300), st.integers(1, 10**5))
def test_no_training_unit_reaches_into_the_held_out_part(
    extent: int, tokens: int, fraction: float, range_bytes: int, text_bytes: int
) -> None:
    config = CorpusConfig("x", heldout_fraction=fraction, range_bytes=range_bytes)
    files = [SourceFile("x.jsonl", "jsonl", extent, text_bytes, "f")]
    try:
        plan = make_plan(config, files, tokens)
    except UserError:
        return
    last = plan.unit(plan.train_units - 1, "train")
    assert last.end <= plan.heldout_from <= extent
    if plan.heldout_units:
        assert plan.unit(0, "heldout").start == plan.heldout_from
        assert plan.unit(plan.heldout_units - 1, "heldout").end <= extent
    elif fraction == 0:
        assert plan.heldout_from == extent
    for split, units in (("train", plan.train_units), ("heldout", plan.heldout_units)):
        with pytest.raises(UserError):
            plan.unit(units, split)


def test_unit_does_not_depend_on_the_number_asked_for(config: CorpusConfig) -> None:
    """`Plan` does not even know the number of shards; the same corpus gives the same plan again."""
    first, again = plan_of(config), plan_of(config)
    assert first == again and first.unit(3, "train") == again.unit(3, "train")
    assert "shards" not in json.dumps(first.to_record())
    assert plan_of(config, 200).stride > first.stride


def test_corpus_may_move_but_not_change(config: CorpusConfig, tmp_path: Path) -> None:
    moved = write_corpus(tmp_path / "elsewhere")
    assert plan_of(moved).corpus_id == plan_of(config).corpus_id
    other = write_corpus(tmp_path / "other", documents=199)
    assert plan_of(other).corpus_id != plan_of(config).corpus_id


def test_more_shards_than_text_names_the_number(config: CorpusConfig) -> None:
    plan = plan_of(config)
    with pytest.raises(UserError, match=rf"^--shards 5000: the corpus has text for {plan.train_units} train shards"):
        plan.unit(4999, "train")
    with pytest.raises(UserError, match=rf"^--heldout_shards 99: .* {plan.heldout_units} heldout .*heldout_fraction"):
        plan.unit(98, "heldout")


def test_corpus_smaller_than_a_shard_is_told(config: CorpusConfig) -> None:
    with pytest.raises(UserError, match=r"less than one shard's 400000000: .*range_bytes or tokens_per_shard"):
        plan_of(config, 100_000_000)


def test_parquet_units_are_rows_of_the_mean_size(tmp_path: Path) -> None:
    texts = [f"{n:04d}" * 250 for n in range(500)]
    pq.write_table(pa.table({"text": texts, "more": [text * 5 for text in texts]}), tmp_path / "a.parquet")
    config = CorpusConfig(str(tmp_path / "a.parquet"), range_bytes=1, bytes_per_token=4.0)
    plan = plan_of(config, 5000)
    assert 15 <= plan.stride <= 20 and plan.extent == 500, "5000 tokens of 4 bytes are 20 rows of 1000 bytes"
    unit = plan.unit(0, "train")
    assert len(list(plan.documents(config, unit))) == plan.stride


def test_stored_plan_is_used_again(config: CorpusConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = open_plan(tmp_path, config, 100, NOWHERE)
    store_plan(tmp_path, made, "claim")
    before = (tmp_path / "plan.json").read_bytes()

    def refuse(*args: object) -> None:
        raise AssertionError("the corpus was described again")

    monkeypatch.setattr("teacher_dump.plan.describe_corpus", refuse)
    assert open_plan(tmp_path, config, 100, NOWHERE) == made
    store_plan(tmp_path, plan_with(made, stride=7), "claim")
    assert (tmp_path / "plan.json").read_bytes() == before


def plan_with(plan: Plan, stride: int) -> Plan:
    return Plan(plan.files, stride, plan.heldout_from, plan.extent)


def test_moved_corpus_is_read_from_its_new_place(config: CorpusConfig, tmp_path: Path) -> None:
    store_plan(tmp_path, open_plan(tmp_path, config, 100, NOWHERE), "claim")
    (tmp_path / "corpus").rename(tmp_path / "moved")
    moved = CorpusConfig(str(tmp_path / "moved"), heldout_fraction=0.2, bytes_per_token=4.0, range_bytes=256)
    plan = open_plan(tmp_path, moved, 100, NOWHERE)
    assert [Path(file.path).parent.name for file in plan.files] == ["moved"] * 3
    assert list(plan.documents(moved, plan.unit(0, "train")))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda d: (d / "1.jsonl").write_text((d / "1.jsonl").read_text().replace("1-1", "1-9", 1)),
            r"1\.jsonl changed",
        ),
        (lambda d: (d / "1.jsonl").write_text((d / "1.jsonl").read_text() + "{}\n"), r"1\.jsonl changed"),
        (lambda d: (d / "2.jsonl").unlink(), r"has 2 files, .* with 3 \(2\.jsonl is gone\)"),
        (lambda d: (d / "3.jsonl").write_text('{"text": "x"}\n'), r"has 4 files, .* with 3 \(3\.jsonl is new\)"),
    ],
    ids=["edited", "appended", "missing", "extra"],
)
def test_changed_corpus_is_noticed(change, said: str, config: CorpusConfig, tmp_path: Path) -> None:
    store_plan(tmp_path, open_plan(tmp_path, config, 100, NOWHERE), "claim")
    open_plan(tmp_path, config, 100, NOWHERE)
    change(tmp_path / "corpus")
    with pytest.raises(UserError, match=said):
        open_plan(tmp_path, config, 100, NOWHERE)


def test_missing_single_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "word word"}\n' * 100)
    config = CorpusConfig(str(path), range_bytes=100)
    store_plan(tmp_path, open_plan(tmp_path, config, 10, NOWHERE), "claim")
    path.unlink()
    with pytest.raises(UserError, match=r"a\.jsonl is missing"):
        open_plan(tmp_path, config, 10, NOWHERE)


@pytest.mark.parametrize("harm", ["edited", "cut", "gone"])
def test_damaged_plan_is_made_and_stored_again(config: CorpusConfig, tmp_path: Path, harm: str) -> None:
    """The same plan comes out; were the corpus another one, `create_or_match` would refuse its identity."""
    made = open_plan(tmp_path, config, 100, NOWHERE)
    store_plan(tmp_path, made, "claim")
    path = tmp_path / "plan.json"
    before = path.read_bytes()
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(before.replace(b'"jsonl"', b'"text"', 1) if harm == "edited" else before[:40])
    again = open_plan(tmp_path, config, 100, NOWHERE)
    assert again == made
    store_plan(tmp_path, again, "claim")
    assert path.read_bytes() == before
