"""`python -m pipeline report`: one HTML page with the pictures and figures of a cache and a run."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.cache import Cache
from pipeline.commit import commit_bytes
from pipeline.config import Place
from pipeline.errors import UserError
from pipeline.report import page
from pipeline.report.results import NAMES
from pipeline.report.results_page import attention_distance, by_position, other_evaluations, zero_shot
from pipeline.report.sources import (
    CacheFacts,
    CacheSample,
    Run,
    cache_facts,
    column_costs,
    read_run,
    sample_cache,
)
from pipeline.schema import unit_name

DESCRIPTION = (
    "Write one self-contained HTML page: loss curves, the student's figures beside the teacher's, attention maps of "
    "both, and what the cache holds. Parts that do not exist yet are named with the command that makes them."
)


@dataclass(frozen=True)
class Options:
    """What to show."""

    cache: Place
    """folder of the cache"""
    run: Path
    """folder of the run; it may not exist yet"""
    output: Path | None = None
    """file to write; report.html in the run's folder by default"""
    sample_tokens: int = 262_144
    """about how many of the cache's tokens the histograms are made of"""
    maps: int = 3
    """held-out sequences whose attention maps are shown"""


def build(options: Options) -> str:
    """The page as text.

    Raises:
        UserError: no such cache, or a shard of it is damaged.
    """
    cache, run = Cache(options.cache), read_run(options.run)
    facts = cache_facts(cache)
    sample = sample_cache(cache, options.sample_tokens)
    body = [
        *top(cache, facts, run),
        *training(cache, run, sample, options),
        *evaluation(run, options),
        *other_evaluations(run),
        *zero_shot(run),
        *maps(run, options),
        *attention_distance(run),
        *dumped(cache, facts, sample),
        *configuration(cache, run),
        f"<footer>Written {time.strftime('%Y-%m-%d %H:%M')} from {options.cache} and {options.run}.</footer>",
    ]
    return page.document(f"Distil-xLSTM: {run.path.name} from {cache.path.name}", body)


def top(cache: Cache, facts: CacheFacts, run: Run) -> Iterator[str]:
    teacher = cache.teacher.facts
    yield page.heading(f"{run.path.name}: an xLSTM taught by {teacher.name}", 1)
    yield page.paragraph(
        f"The teacher read the text once and its outputs were stored in {cache.path}; the student learnt from "
        "that cache alone.",
        "lead",
    )
    items = [(f"{facts.tokens:,}", "tokens dumped"), (f"{facts.bytes_per_token:.0f} B", "on disk for each")]
    if run.steps:
        items.append((f"{run.steps:,}", "training steps"))
    if run.evaluation:
        for name in NAMES:
            value = run.evaluation.get(f"{name}_perplexity")
            if isinstance(value, int | float):
                items.append((f"{value:,.1f}", f"perplexity, {name}"))
    yield page.tiles(items)
    for problem in run.problems:
        yield page.paragraph(problem, "missing")


def training(cache: Cache, run: Run, sample: CacheSample, options: Options) -> Iterator[str]:
    from pipeline.report.figures import training_curves

    yield page.heading("Training")
    picture = training_curves(run.curves, sample.heldout_ce)
    if picture is None:
        command = f"make train-student CACHE={options.cache} RUN={options.run}"
        yield page.missing(f"{run.path} has no training curves (metrics.csv) yet. Train a student with", command)
        return
    tokens = run.tokens(cache.spec.length)
    amount = f", {tokens:,} tokens" if tokens else ""
    yield page.paragraph(
        f"{run.steps:,} optimiser steps{amount}. Every term is shown without its weight in the loss; faint lines are "
        "single steps, strong ones their running mean."
    )
    last = "; ".join(
        f"{name} {run.curves[name].value_N[-1]:.4f}" for name in ("val/ce", "val/kl_k1") if name in run.curves
    )
    caption = (
        "KL over the K stored ids and the tail as one outcome is a lower bound of the KL over the whole vocabulary."
    )
    yield page.image(picture, f"Training curves. {last}", caption)


def evaluation(run: Run, options: Options) -> Iterator[str]:
    yield page.heading("Held-out figures")
    figures = run.evaluation
    if figures is None:
        command = f"make eval CACHE={options.cache} RUN={options.run}"
        yield page.missing(f"{run.path} has not been evaluated (no evaluation.json). Evaluate it with", command)
        return
    yield page.paragraph(
        f"{figures.get('rows', 0):,} rows, {figures.get('targets', 0):,} targets, {figures.get('target_bytes', 0):,} "
        "bytes of documents that no training shard contains."
    )
    yield page.number_table(*evaluation_rows(figures))
    others = [
        ("KL over K+1 outcomes to the teacher, τ = 1", "kl_k1", "{:.4f} nats"),
        ("KL over the whole vocabulary, τ = 1", "kl_full", "{:.4f} nats"),
        ("same likeliest token as the teacher", "top1_agreement", "{:.1%}"),
        ("trainable parameters", "trainable_parameters", "{:,}"),
        ("checkpoint", "checkpoint", "{}"),
        ("unigram", "unigram", "{}"),
    ]
    yield page.facts_table([(text, form.format(figures[key])) for text, key, form in others if key in figures])
    yield from by_position(figures)


def evaluation_rows(figures: dict[str, object]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the evaluation's table; a figure that is not there is a dash."""

    def cell(name: str, digits: int) -> str:
        value = figures.get(name)
        return f"{value:,.{digits}f}" if isinstance(value, int | float) else "–"

    head = ["", "cross-entropy, nats", "perplexity", "bits per byte"]
    measures = (("cross_entropy", 4), ("perplexity", 2), ("bits_per_byte", 4))
    return head, [[name, *(cell(f"{name}_{measure}", digits) for measure, digits in measures)] for name in NAMES]


def maps(run: Run, options: Options) -> Iterator[str]:
    from pipeline.report.figures import attention_maps

    yield page.heading("Attention: teacher and student")
    if run.maps is None:
        command = f"make eval CACHE={options.cache} RUN={options.run}"
        yield page.missing(
            "There are no attention maps yet (the cache must hold attn_map). Evaluation writes them:", command
        )
        return
    yield page.paragraph(
        f"Each picture is a whole held-out sequence in blocks of {run.maps.block} tokens: rows ask, columns are looked "
        "at. Above, the teacher's attention averaged over the heads and layers of a depth group; below, the implicit "
        "attention of the student's mLSTM blocks, which has a sign (sLSTM blocks have none to show)."
    )
    for index in range(min(options.maps, len(run.maps.sequence_id_Q))):
        unit, row = divmod(int(run.maps.sequence_id_Q[index]), 1 << 32)
        name = f"{unit_name(unit)}, row {row}"
        yield page.heading(f"{name}, {int(run.maps.length_Q[index])} tokens", 3)
        yield page.image(attention_maps(run.maps, index), f"Pooled attention maps of {name}: teacher and student")


def dumped(cache: Cache, facts: CacheFacts, sample: CacheSample) -> Iterator[str]:
    from pipeline.report.figures import column_bars, uncertainty_histograms

    spec, manifest = cache.spec, cache.manifest
    yield page.heading("The cache")
    speed = f"{facts.tokens / facts.seconds:,.0f} tokens/s, " if facts.seconds else ""
    corpus = manifest.settings.get("corpus")
    source = corpus.get("source", "?") if isinstance(corpus, dict) else "?"
    rows = [
        ("teacher", f"{cache.teacher.facts.name} ({cache.teacher.facts.layers} layers, width {spec.width})"),
        ("corpus", f"{source}, {spec.packing} packing"),
        ("training", f"{facts.train_tokens:,} tokens in {facts.train_shards} shards"),
        ("held out", f"{facts.heldout_tokens:,} tokens in {facts.heldout_shards} shards"),
        ("size", f"{facts.bytes / 1e6:,.1f} MB, {facts.bytes_per_token:.1f} bytes a token"),
        (
            "rows",
            f"T = {spec.length}, K = {spec.k} of V = {spec.vocab_size:,}, τ = {', '.join(f'{t:g}' for t in spec.taus)}",
        ),
        ("maps", f"{spec.groups} depth groups, blocks of {spec.block}" if spec.block else "none"),
        ("hidden states", f"windows of {spec.window}" if spec.window else "none"),
        ("dumped", f"{speed}{facts.hardware}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in facts.versions.items())),
        ("created", manifest.created),
        ("compat_id", manifest.compat_id),
        ("data_id", manifest.data_id),
    ]
    yield page.facts_table([(name, value) for name, value in rows if value])
    if not facts.tokens:
        yield page.missing("No shard is committed yet. Go on with", f"make dump-teacher CACHE={cache.path}")
        return
    yield page.heading("Bytes a token, by column", 3)
    bars = column_bars(column_costs(cache))
    if bars:
        yield page.image(bars, "Bytes a token by column", "As stored in the first shard, compressed.")
    picture = uncertainty_histograms(sample, spec.taus, spec.k)
    if picture:
        yield page.heading("What the teacher said", 3)
        caption = (
            f"Over {len(sample.entropy_N):,} training tokens. Entropy counts the tail as one outcome: a lower bound."
        )
        yield page.image(picture, "Histograms of the teacher's entropy and of the mass outside the top k", caption)


def configuration(cache: Cache, run: Run) -> Iterator[str]:
    yield page.heading("Configuration")
    if run.config_text:
        yield page.folded(f"The run: {run.path}/config.yaml", run.config_text)
    else:
        yield page.paragraph(f"{run.path} has no config.yaml yet: training writes it.", "missing")
    settings = json.dumps(cache.manifest.settings, indent=2, ensure_ascii=False)
    yield page.folded(f"The dump: {cache.path}/manifest.json, settings", settings)


def run(options: Options) -> int:
    """Write the page and say where it is."""
    for name in ("sample_tokens", "maps"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name} {getattr(options, name)}: must not be negative")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("the report needs the package matplotlib: install it (pip install matplotlib)") from None
    output = options.output or options.run / "report.html"
    digest = commit_bytes(output, build(options).encode())
    print(f"{output}: {digest.bytes / 1e6:.1f} MB, open it in a browser")
    return 0
