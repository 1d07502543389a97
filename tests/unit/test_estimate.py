"""What `python -m pipeline estimate` says: that its rules reproduce what was measured, and that it says where from."""

from __future__ import annotations

import json
import shutil
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers_cache import write_toy_cache

from benchmarks.dump_throughput import SHAPES
from pipeline.__main__ import main
from pipeline.cache import Cache
from pipeline.costs import (
    KNOWN,
    TeacherShape,
    column_bytes,
    raw_bytes,
    read_results,
    readers,
    student_flop,
    student_rate,
)
from pipeline.errors import UserError, run_command
from pipeline.estimate import estimate
from pipeline.estimate_plan import CORPUS_DEFAULTS, DUMP_DEFAULTS, DUMP_FIELDS, Options
from pipeline.index import ShardEntries
from pipeline.schema import CacheSpec
from student.data.order import RowGroups, epoch_rows
from student.training.ranks import share_of
from teacher_dump.corpus import CorpusConfig
from teacher_dump.settings import DumpConfig

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results"


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """The measured dump: Qwen2.5-1.5B at T = 2048, K = 64."""
    path = tmp_path / "measured.yaml"
    path.write_text(yaml.safe_dump({"corpus": {"source": "none"}, "teacher": "Qwen/Qwen2.5-1.5B", "cache": "none"}))
    return path


@pytest.fixture
def cards(tmp_path: Path) -> Path:
    """The committed figures, as if Llama's rows were an H100's and all others an H200's."""
    folder = tmp_path / "results"
    shutil.copytree(RESULTS, folder)
    path = folder / "dump_throughput.json"
    found = json.loads(path.read_text())
    found["device"] = "NVIDIA H200"
    for row in found["rows"]:
        row.pop("device", None)
        if row["shape"].startswith("llama"):
            row["device"] = "NVIDIA H100 80GB HBM3"
    path.write_text(json.dumps(found))
    return folder


def of(manifest: Path, results: Path = RESULTS, **changes: Any) -> dict[str, dict[str, Any]]:
    sections, _ = estimate(Options(manifest=str(manifest), results=results, **changes))
    return {title: {name: figure.value for name, figure in rows.items()} for title, rows in sections.items()}


def test_defaults_and_options_are_stage_ones() -> None:
    for kind, wanted in ((DumpConfig, DUMP_DEFAULTS), (CorpusConfig, CORPUS_DEFAULTS)):
        own = {field.name: field.default for field in fields(kind) if field.default is not MISSING}
        assert {name: own[name] for name in wanted} == wanted
    assert {field.name for field in fields(DumpConfig)} == DUMP_FIELDS


def test_shapes_are_those_that_were_measured_and_have_the_published_sizes() -> None:
    for name, config in SHAPES.items():
        assert {key: config[key] for key in KNOWN[name]} == KNOWN[name]
    published = {"qwen2.5-1.5b": 1.544e9, "qwen2.5-7b": 7.616e9, "llama-3.1-8b": 8.030e9, "llama-3.1-70b": 70.55e9}
    published |= {"smollm2-135m": 134.5e6, "qwen2.5-0.5b": 494e6}
    for name, parameters in published.items():
        assert TeacherShape.of_config(name, KNOWN[name]).parameters == pytest.approx(parameters, rel=2e-3)


def measured(shape: str) -> dict[str, float]:
    rows = read_results(RESULTS, "dump_throughput")["rows"]
    return {row["case"]: row["tokens_per_s"] for row in rows if row["shape"] == shape}


def test_measured_shapes_come_out_as_measured(manifest: Path) -> None:
    found, small = of(manifest)["stage one"], measured("qwen2.5-1.5b")
    assert found["bare prefill, a GPU"] == small["bare"]
    assert found["dump, a GPU"] == pytest.approx(small["committed"], rel=0.01)
    llama, large = of(manifest, teacher="meta-llama/Llama-3.1-8B")["stage one"], measured("llama-3.1-8b")
    assert llama["bare prefill, a GPU"] == large["bare"]
    # What comes after the capture was not measured there: it is that of the nearest shape, not of the smallest.
    kept = large["all"] / large["bare"] * small["committed"] / small["all"]
    assert llama["our share"] == pytest.approx(kept, rel=1e-3)
    # Either shape from the other one's share of peak: how far the rule is off between 1.5 and 8 B parameters.
    assert found["share of peak"] / llama["share of peak"] == pytest.approx(1.0, abs=0.15)


def test_bytes_of_the_measured_rows_come_out_as_measured() -> None:
    storage = read_results(RESULTS, "storage")
    for row in storage["rows"]:
        if row["layout"] == "ours":
            spec = CacheSpec.from_record({**storage["spec"], "k": row["K"]})
            found = sum(float(figure.value or 0) for figure in column_bytes(spec, storage).values())
            assert found + row["columns"]["footer"] == pytest.approx(row["bytes_per_token"], rel=2e-3), row["K"]
    between = replace(spec, k=45)
    ids = column_bytes(between, storage)["topk_ids"]
    assert 52.12 < float(ids.value or 0) < 108.0 and "scaled to K=45" in ids.source


def test_bytes_of_a_larger_vocabulary_are_near_those_of_its_dump(manifest: Path) -> None:
    """178.8 B/token were committed at V = 151,936, from random weights."""
    assert of(manifest)["bytes of a token"]["all"] == pytest.approx(178.8, rel=0.03)


def test_uncompressed_bytes_are_what_arrow_holds(tmp_path: Path) -> None:
    cache = Cache(write_toy_cache(tmp_path / "c", units=1, length=32, block=8, window=4, tail_samples=3))
    with cache.open(cache.shards()[0]) as shard:
        table = shard.parquet.read_row_group(0)
    found = raw_bytes(cache.spec)
    for name in cache.spec.shapes():
        values = table.column(name).combine_chunks().flatten()
        assert found[name] == len(values) * values.type.bit_width / 8 / (len(table) * 32), name


def test_numbers_follow_from_each_other(manifest: Path) -> None:
    found = of(
        manifest, tokens=1e12, gpus=64, teacher_tokens_per_s=1e5, student_tokens_per_s=8e4, gpu_hour_cost=2.5, epochs=3
    )
    assert found["what"]["training shards"] == 953_675 and found["what"]["training tokens"] >= 1e12
    tokens = (953_675 + 1) * 2**20
    one, two = found["stage one"], found["stage two"]
    assert one["GPU hours"] == pytest.approx(tokens / 1e5 / 3600) and one["time"] == pytest.approx(
        one["GPU hours"] / 64
    )
    assert one["cost"] == pytest.approx(2.5 * one["GPU hours"])
    assert two["GPU hours"] == pytest.approx(3 * 953_675 * 2**20 / 8e4 / 3600)
    per_token = found["bytes of a token"]["all"]
    assert found["disk"]["bytes"] == pytest.approx(per_token * tokens, rel=1e-6)
    assert two["bytes read"] == pytest.approx(3.4 * 64 * 8e4 * per_token, rel=1e-3)
    assert found["disk"]["files"] == 2 * (953_675 + 1)


def test_row_groups_are_read_as_often_as_the_loader_reads_them() -> None:
    """The constants are the loader's own order, played through: 32 rows a rank, groups of 64 rows, a window of 16."""
    digest = np.zeros((192, 32), np.uint8)
    same = {name: np.full(192, 64) for name in ("bytes", "rows", "tokens")}
    entries = ShardEntries({"unit": np.arange(192), **same, "sha256": digest, "footer_sha256": digest})
    rows = list(epoch_rows(RowGroups(entries, 64), 0, 0, 16))
    for ranks in (1, 2, 4, 8, 16):
        batches = [rows[at : at + 32 * ranks] for at in range(0, len(rows) - 32 * ranks + 1, 32 * ranks)]
        pairs = {(r, group) for batch in batches for r in range(ranks) for group, _ in share_of(batch, r, ranks)}
        assert len(pairs) / 192 == pytest.approx(readers(ranks), rel=0.12), ranks


def test_a_teacher_that_is_not_known_is_scaled_by_its_parameters(manifest: Path, cards: Path) -> None:
    sizes = {"teacher": "someone/Large", "vocab_size": 128_256, "width": 8192}
    half = of(manifest, cards, teacher_params=35e9, **sizes)["stage one"]
    whole = of(manifest, cards, teacher_params=70e9, **sizes)["stage one"]
    head = 2 * 128_256 * 8192
    assert half["bare prefill, a GPU"] / whole["bare prefill, a GPU"] == pytest.approx((70e9 - head) / (35e9 - head))
    assert whole["GPUs a teacher"] == 2 and half["GPUs a teacher"] == 1
    assert of(manifest, cards, teacher_params=60e9, **sizes)["stage one"]["GPUs a teacher"] == 2, "120 GB, on H100s"
    known = of(manifest, cards, teacher="meta-llama/Llama-3.1-70B")["stage one"]
    assert known["bare prefill, a GPU"] == pytest.approx(whole["bare prefill, a GPU"], rel=0.05)


def test_the_gpus_a_teacher_needs_are_of_the_card_that_was_measured(manifest: Path, cards: Path) -> None:
    """Llama's rate is an H100's, Qwen's an H200's; a rate that is given names no card."""

    def needs(**changes: Any) -> tuple[Any, str]:
        sections, notes = estimate(Options(manifest=str(manifest), results=cards, **changes))
        figure = sections["stage one"]["GPUs a teacher"]
        return figure.value, figure.source + "; ".join(notes)

    large = {"teacher": "meta-llama/Llama-3.1-70B"}
    for changes, gpus, told in (
        (large, 2, "80 GB a GPU (H100, which the rate was measured on)"),
        ({}, 1, "141 GB a GPU (H200, which the rate was measured on)"),
        ({**large, "teacher_tokens_per_s": 4000.0}, 2, "80 GB a GPU (taken: the rate names no card"),
        ({**large, "gpu_memory_gb": 40.0}, 4, "40 GB a GPU (given: --gpu_memory_gb)"),
        ({**large, "gpu_memory_gb": 192.0}, 1, "192 GB a GPU"),
        ({**large, "tp": 1}, 1, "do not fit 1 GPUs of 80 GB: --tp 2"),
    ):
        value, said = needs(**changes)
        assert value == gpus and told in said, (changes, value, said)


def test_both_stages_are_summed(manifest: Path) -> None:
    found = of(manifest, gpus=8, gpu_hour_cost=3)
    for name in ("GPU hours", "time", "cost"):
        assert found["both stages"][name] == pytest.approx(found["stage one"][name] + found["stage two"][name]), name
    assert of(manifest)["both stages"]["cost"] is None


def test_the_time_of_verify_grows_with_k(manifest: Path) -> None:
    hours = {k: of(manifest, k=k)["disk"]["verify"] for k in (16, 64, 256)}
    assert hours[64] == pytest.approx(of(manifest)["what"]["rows"] * 2048 / 280_000 / 3600)
    assert hours[16] == pytest.approx(hours[64] / 4) and hours[256] == pytest.approx(hours[64] * 4)
    sections, _ = estimate(Options(manifest=str(manifest), results=RESULTS, k=16))
    assert "scaled by 64/16 ids a token" in sections["disk"]["verify"].source


def test_the_measurements_are_found_from_any_folder(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert estimate(Options(manifest=str(manifest)))[0]["stage one"]["GPU hours"].value
    with pytest.raises(UserError, match="none.json is missing .by default benchmarks/results beside the package"):
        read_results(Options().results, "none")


def test_small_windows_are_limited_by_encoding(manifest: Path) -> None:
    every, wide = (of(manifest, window=w)["stage one"]["dump, a GPU"] for w in (1, 64))
    assert every == 54_000 and wide > 2 * every


def test_the_students_rate_is_scaled_from_what_was_measured(manifest: Path) -> None:
    train = {
        "device": "chip",
        "rows": [
            {"case": "synthetic", "preset": "fast", "batch": 64, "length": 512, "tokens_per_s": 9e9},
            {"case": "shards", "preset": "fast", "batch": 64, "length": 512, "tokens_per_s": 160_000},
            {
                "case": "shards",
                "preset": "fast",
                "batch": 16,
                "length": 2048,
                "tokens_per_s": 150_000,
                "device": "other chip",
            },
        ],
    }
    shape = TeacherShape.of_config("qwen2.5-1.5b", KNOWN["qwen2.5-1.5b"])
    same = student_rate(shape, 6, 2048, train, 989.0)
    assert same.value == 150_000 and same.source.startswith("measured: preset fast, 16 x 2048, other chip,")
    llama = student_rate(TeacherShape.of_config("llama-3.1-8b", KNOWN["llama-3.1-8b"]), 6, 512, train, 989.0)
    ratio = student_flop(1536, 6, 151_936) / student_flop(4096, 6, 128_256)
    assert llama.value == pytest.approx(160_000 * ratio) and llama.source.startswith("scaled")
    assert student_rate(shape, 6, 2048, None, 989.0).value is None


def test_training_is_estimated_as_soon_as_it_was_measured(manifest: Path, tmp_path: Path) -> None:
    shutil.copytree(RESULTS, tmp_path / "results")
    rows = [{"case": "shards", "preset": "fast", "batch": 16, "length": 2048, "tokens_per_s": 150_000}]
    (tmp_path / "results" / "train_throughput.json").write_text(json.dumps({"device": "chip", "rows": rows}))
    sections, _ = estimate(Options(manifest=str(manifest), results=tmp_path / "results"))
    assert sections["stage two"]["training, a GPU"].value == 150_000


def test_every_figure_says_where_it_is_from(manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["estimate", "--manifest", str(manifest), "--results", str(RESULTS), "--student_tokens_per_s", "80000"]
    assert main([*arguments, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    sections = {title: rows for title, rows in record.items() if title not in ("options", "notes")}
    assert len(sections) == 6
    assert all(figure["source"] for rows in sections.values() for figure in rows.values())
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert all(name in text for rows in sections.values() for name in rows)
    assert "given: --student_tokens_per_s" in text and "no cost: give --gpu_hour_cost" in text


@pytest.mark.parametrize("path", sorted((REPOSITORY / "manifests" / "dumps").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_manifest_here_is_understood(path: Path) -> None:
    given = yaml.safe_load(path.read_text())
    found = of(path)
    assert found["what"]["training shards"] == given.get("shards", 64) and found["stage one"]["GPU hours"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--manifest is missing"),
        (["--manifest", "manifests/dumps/none.yaml"], "there is no such file: known there are"),
        (["--manifest", "{m}", "--tokens", "0"], "--tokens 0: must be 1 or more"),
        (["--manifest", "{m}", "--tokens", "many"], "many"),
        (["--manifest", "{m}", "--tokens", "1e9", "--shards", "3"], "--tokens and --shards both say how much"),
        (["--manifest", "{m}", "--k", "0"], "k is 0 .given: --k.: must be a whole number, 1 or more"),
        (["--manifest", "{m}", "--k", "999999"], "the teacher's vocabulary has only 151936 ids"),
        (["--manifest", "{m}", "--length", "1000"], "must be a multiple of length 1000"),
        (["--manifest", "{m}", "--block", "100"], "must be a multiple of block 100"),
        (["--manifest", "{m}", "--teacher", "some/one"], "its size is not known here; give --teacher_params"),
        (["--manifest", "{m}", "--teacher", "some/one", "--teacher_params", "7e9"], "needs --vocab_size too"),
        (["--manifest", "{m}", "--teacher_params", "1e6"], "embedding and head alone have"),
        (["--manifest", "{m}", "--gpus", "0"], "--gpus 0: must be above 0"),
        (["--manifest", "{m}", "--gpu_memory_gb", "0"], "--gpu_memory_gb 0: must be above 0"),
        (["--manifest", "{m}", "--gpu_hour_cost", "-1"], "--gpu_hour_cost -1: must be 0 or more"),
        (["--manifest", "{m}", "--teacher_tokens_per_s", "0"], "--teacher_tokens_per_s 0: must be above 0"),
        (["--manifest", "{m}", "--student", "none.yaml"], "--student none.yaml: there is no such file"),
        (["--manifest", "{m}", "--results", "nowhere"], "nowhere/storage.json is missing: run `python -m benchmarks"),
        (["--manifest", "{bad}"], "shard is no option of a dump"),
    ],
)
def test_mistakes_are_one_sentence(
    manifest: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    bad = manifest.with_name("bad.yaml")
    bad.write_text("shard: 3\n")
    given = [word.format(m=manifest, bad=bad) for word in words]
    assert run_command(lambda: main(["estimate", *given])) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    with pytest.raises(UserError, match=said):
        main(["estimate", *given])
