"""The report and the summary of a cache and a run, whole and in parts."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from helpers_cache import toy_logits, write_toy_cache
from PIL import Image

from pipeline.__main__ import main
from pipeline.cache import Cache
from pipeline.commit import commit_json
from pipeline.report import Options, build
from pipeline.report.distance_picture import distance_picture
from pipeline.report.figures import BLUE, ORANGE, SHARES, attention_maps, training_curves
from pipeline.report.position_figure import position_curves
from pipeline.report.sources import Maps, cache_facts, column_costs, positions_of, read_curves, read_run, sample_cache

FIGURES = {
    "targets": 1234,
    "target_bytes": 5678,
    "rows": 9,
    "student_cross_entropy": 3.21987,
    "student_perplexity": 25.0251,
    "student_bits_per_byte": 1.2345,
    "teacher_cross_entropy": 2.5,
    "teacher_perplexity": 12.1825,
    "teacher_bits_per_byte": 0.9876,
    "unigram_cross_entropy": 5.5,
    "unigram_perplexity": 244.69,
    "unigram_bits_per_byte": 2.2222,
    "kl_k1": 0.4321,
    "top1_agreement": 0.567,
    "unigram": "add-one smoothed",
    "checkpoint": "last",
    "trainable_parameters": 84210000,
    "by_position": [
        {"first": 0, "last": 0, "targets": 9, "student_cross_entropy": 6.0, "teacher_cross_entropy": 5.0, "kl_k1": 1.0},
        {"first": 1, "last": 1, "targets": 9, "student_cross_entropy": 4.0, "teacher_cross_entropy": 3.0, "kl_k1": 0.5},
        {
            "first": 2,
            "last": 3,
            "targets": 18,
            "student_cross_entropy": 3.0,
            "teacher_cross_entropy": 2.0,
            "kl_k1": 0.4,
        },
    ],
}
ZERO_SHOT = {
    "limit": 200,
    "package": "some-package==1.0",
    "tasks": {
        "piqa": {"documents": 200, "chance": 0.5, "measure": "acc_norm"},
        "lambada": {"documents": 200, "chance": None, "measure": "acc"},
    },
    "models": {
        "student": {
            "tasks": {
                "piqa": {"acc_norm": 0.612, "acc_norm_stderr": 0.035},
                "lambada": {"acc": 0.1, "acc_stderr": 0.02},
            }
        },
    },
}
DISTANCES = {
    "rows": 80,
    "fitted_rows": 256,
    "tokens_per_block": 8,
    "depth": [
        {
            s: {d: {"student": 0.0707, "recency": 0.2} for d in ("jensen_shannon", "total_variation")}
            for s in ("keep", "drop")
        }
    ],
    "mean": {
        s: {d: {"student": 0.0808, "recency": 0.2} for d in ("jensen_shannon", "total_variation")}
        for s in ("keep", "drop")
    },
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_cache(tmp_path_factory.mktemp("cache") / "c", units=2, rows=4, length=32, block=8)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with everything in it, as training and evaluation leave it."""
    folder = tmp_path / "first-run"
    folder.mkdir()
    lines = ["step,seconds,train/loss,train/ce,train/kl_k1,alpha,tau,lr,val/ce"]
    lines += [f"{s},{s}.0,{5 / s},{6 / s},{1 / s},0.8,1.5,0.001,{7 / s if s % 5 == 0 else ''}" for s in range(1, 21)]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    (folder / "config.yaml").write_text("data:\n  batch_rows: 4\ntrainer:\n  accumulate_grad_batches: 2\nnote: <b>&\n")
    commit_json(folder / "evaluation.json", FIGURES)
    commit_json(folder / "evaluation-other.json", {**FIGURES, "student_cross_entropy": 4.3219, "cache": "caches/else"})
    commit_json(folder / "zero_shot.json", ZERO_SHOT)
    commit_json(folder / "attention_distance.json", DISTANCES)
    panel = np.tri(3) / 3
    (folder / "attention_distance.png").write_bytes(
        distance_picture(["teacher", "student"], ["depth 0–100%"], [[panel, None]], [[None, None]])
    )
    rng = np.random.default_rng(0)
    np.savez_compressed(
        folder / "attention_maps.npz",
        sequence_id=np.array([1 << 62, (1 << 62) + 1]),
        length=np.array([32, 32]),
        pool_block=np.int64(8),
        student_blocks=np.int64(4),
        teacher=rng.random((2, 2, 4, 4), dtype=np.float32),
        student_block_1=rng.standard_normal((2, 4, 4)).astype(np.float32),
        student_block_3=rng.standard_normal((2, 4, 4)).astype(np.float32),
    )
    return folder


class Page(HTMLParser):
    """Collects tags, text and addresses, and checks that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[bytes] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        for name in ("src", "href", "srcset", "data", "action"):
            if values.get(name):
                self.addresses.append(str(values[name]))
        if tag == "img":
            assert values["alt"]
            self.images.append(base64.b64decode(str(values["src"]).removeprefix("data:image/png;base64,")))
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data + " "


def test_report_has_pictures_and_figures_and_needs_nothing_else(
    cache: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "--cache", str(cache), "--run", str(run)]) == 0
    assert str(run / "report.html") in capsys.readouterr().out
    text = (run / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    # curves, by position, two sequences' maps, maps beside baselines, bytes by column, distributions
    assert len(page.images) == 7
    for picture in page.images:
        assert min(Image.open(io.BytesIO(picture)).size) > 300
    assert all(address.startswith("data:") for address in page.addresses)
    assert not re.search(r"https?://|url\(|@import|<script", text)
    for value in ("3.2199", "25.03", "1.2345", "2.5000", "0.9876", "244.69", "0.4321", "56.7%", "84,210,000", "1,234"):
        assert value in page.text, value
    manifest = Cache(cache).manifest
    for value in (manifest.compat_id, manifest.data_id, "toy words", "256 tokens in 2 shards", "heldout-00000, row 1"):
        assert value in page.text, value
    for value in (
        "On other text",
        "4.3219",
        "caches/else",
        "61.2 ± 3.5",
        "10.0 ± 2.0",
        "some-package==1.0",
        "0.0707",
        "0.0808",
    ):
        assert value in page.text, value
    assert "20 optimiser steps, 5,120 tokens" in page.text
    assert "note: <b>&" in page.text and "note: <b>" not in text  # the configuration is shown, not interpreted
    assert "missing" not in re.sub(r"<style>.*?</style>", "", text, flags=re.S)


def test_parts_that_are_not_there_name_the_command(cache: Path, tmp_path: Path) -> None:
    text = build(Options(cache, tmp_path / "none"))
    page = Page(text)
    assert len(page.images) == 2
    assert f"make train-student CACHE={cache} RUN={tmp_path / 'none'}" in page.text
    assert f"make eval CACHE={cache} RUN={tmp_path / 'none'}" in page.text
    assert "has not been evaluated" in page.text


def test_damaged_parts_are_named_and_the_rest_is_shown(cache: Path, run: Path) -> None:
    (run / "evaluation.json").write_text("{}")
    (run / "attention_maps.npz").write_bytes(b"PK\x03\x04 cut")
    page = Page(build(Options(cache, run)))
    assert "evaluation.json does not match the digest" in page.text
    assert "attention_maps.npz cannot be read" in page.text
    assert len(page.images) == 4


def test_pictures_of_a_run_are_pictures(cache: Path, run: Path) -> None:
    (run / "attention_distance.png").write_text("<svg onload=...>")
    (run / "zero_shot.json").unlink()
    page = Page(build(Options(cache, run)))
    assert "attention_distance.png is no PNG of at most 16 MiB" in page.text
    assert len(page.images) == 6 and "Zero-shot" not in page.text


def test_curves_by_position_lie_at_their_bins() -> None:
    """The student's curve falls from the upper left, the teacher's lies below it."""
    picture = position_curves(FIGURES["by_position"])
    assert picture is not None and position_curves([]) is None
    image = np.asarray(Image.open(io.BytesIO(picture)))[..., :3].astype(int)
    image = image[:, : image.shape[1] // 2]
    height = {}
    for name, colour in (("student", BLUE), ("teacher", ORANGE)):
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        rows, columns = np.nonzero((np.abs(image - rgb) < 3).all(-1))
        inside = columns < image.shape[1] * 0.7  # not the legend
        rows, columns = rows[inside], columns[inside]
        assert len(rows) > 500
        height[name] = rows.mean()
        assert rows[columns < np.median(columns)].mean() < rows[columns > np.median(columns)].mean()
    assert height["student"] < height["teacher"]  # rows count from above


def test_cache_whose_dump_has_just_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = write_toy_cache(tmp_path / "c", units=0, heldout_units=0)
    page = Page(build(Options(cache, tmp_path / "none")))
    assert "No shard is committed yet" in page.text and page.images == []
    assert main(["summary", "--cache", str(cache), "--run", str(tmp_path / "none")]) == 0
    assert "0 tokens in 0 training and 0 held-out shards" in capsys.readouterr().out


def test_curves_are_read_where_they_were_logged(run: Path) -> None:
    curves = read_curves(run / "metrics.csv")
    assert curves["val/ce"].step_N.tolist() == [5, 10, 15, 20]
    assert curves["val/ce"].value_N.tolist() == pytest.approx([7 / 5, 7 / 10, 7 / 15, 7 / 20])
    assert curves["train/ce"].value_N[0] == 6.0 and len(curves["train/ce"].step_N) == 20


def test_curves_of_lightnings_own_logger_are_read_too(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,step,train/ce,val/ce\n0,9,2.0,\n0,19,1.5,\n0,19,,1.75\n")
    curves = read_run(tmp_path).curves
    assert curves["train/ce"].step_N.tolist() == [9, 19] and curves["val/ce"].value_N.tolist() == [1.75]
    assert training_curves(curves, None) is not None and training_curves({}, 1.0) is None


def test_sample_is_what_the_full_logits_say(cache: Path) -> None:
    opened = Cache(cache)
    columns = next(opened.groups("train"))
    entropy_N, tail_NS = positions_of(columns, opened.spec)
    z_NV = toy_logits(cache, "train", 0).reshape(-1, opened.spec.vocab_size).astype(np.float64)
    for s, tau in enumerate(opened.spec.taus):
        p_NV = np.exp(z_NV / tau)
        p_NV = -np.sort(-p_NV / p_NV.sum(1, keepdims=True), axis=1)
        np.testing.assert_allclose(tail_NS[:, s], p_NV[:, opened.spec.k :].sum(1), atol=1e-5)
    sample = sample_cache(opened, 10_000)
    assert len(sample.entropy_N) == 2 * 4 * 32  # both shards, each position once
    np.testing.assert_array_equal(sample.entropy_N[:128], entropy_N)
    z_RTV = toy_logits(cache, "heldout", 0).astype(np.float64)
    held = next(opened.groups("heldout"))
    follow_RT = np.concatenate([held["input_ids"][:, 1:], held["next_id"][:, None]], axis=1)
    nats_RT = np.log(np.exp(z_RTV).sum(-1)) - np.take_along_axis(z_RTV, follow_RT[..., None], -1)[..., 0]
    assert sample.heldout_ce == pytest.approx(nats_RT.mean(), abs=1e-5)


def test_costs_sum_to_the_size_of_the_shard(cache: Path) -> None:
    opened = Cache(cache)
    record = opened.find(0)
    assert sum(value for _, value in column_costs(opened)) == pytest.approx(record.bytes / record.tokens)
    facts = cache_facts(opened)
    assert (facts.train_tokens, facts.heldout_tokens) == (256, 128)
    assert facts.bytes == sum(path.stat().st_size for path in cache.glob("*.parquet"))


def test_map_colours_show_sign_and_place() -> None:
    """A positive share at the lower left and a negative one on the diagonal, found again in the picture."""
    teacher, student = np.zeros((1, 1, 2, 2), np.float32), np.zeros((1, 2, 2), np.float32)
    teacher[0, 0, 1, 0], student[0, 1, 1] = 1.0, -1.0
    ids, lengths = np.array([0]), np.array([2])
    picture = np.asarray(Image.open(io.BytesIO(attention_maps(Maps(ids, lengths, 1, 1, teacher, {0: student}), 0))))
    picture = picture[:, : picture.shape[1] * 2 // 3, :3].astype(int)  # without the colour bar
    positive, negative = (np.array(SHARES(v)[:3]) * 255 for v in (1.0, 0.0))
    rows_p, columns_p = np.nonzero((np.abs(picture - positive) < 3).all(-1))
    rows_n, columns_n = np.nonzero((np.abs(picture - negative) < 3).all(-1))
    assert len(rows_p) > 1000 and len(rows_n) > 1000
    assert rows_p.mean() < rows_n.mean() and columns_p.mean() < columns_n.mean()


def test_summary(cache: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summary", "--cache", str(cache), "--run", str(run)]) == 0
    text = capsys.readouterr().out
    records = [*Cache(cache).shards("train"), *Cache(cache).shards("heldout")]
    cost = sum(r.bytes for r in records) / sum(r.tokens for r in records)
    assert f"384 tokens in 2 training and 1 held-out shards, {cost:.1f} B/token" in text
    assert "20 steps, 5,120 tokens" in text
    assert re.search(r"student +3\.2199 +25\.03 +1\.2345\n +teacher +2\.5000", text)
    assert f"make report CACHE={cache} RUN={run}" in text and f"make inspect CACHE={cache} SHARD=0" in text
    assert main(["summary", "--cache", str(cache), "--run", str(tmp_path / "none")]) == 0
    assert "not yet: make train-student" in capsys.readouterr().out
