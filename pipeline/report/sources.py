"""What the report shows, read from a cache and a run folder; every part may be missing but the cache.

Legend: T tokens a row, K top-k ids, S temperatures, G depth groups, n = T/b pooling blocks, Q sequences, N positions.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile
from zlib import error as ZlibError

import numpy as np

from pipeline.cache import Cache
from pipeline.errors import UserError
from pipeline.inspection import column_facts
from pipeline.report.results import Measured, read_evaluation, read_measured
from pipeline.schema import CacheSpec
from pipeline.shard import Columns

MOST_CONFIG = 1 << 20
"""Characters of config.yaml that are read."""
MOST_MAPS = 1 << 30
"""Bytes of the arrays of attention_maps.npz."""
UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    IndexError,
    OverflowError,
    NotImplementedError,
    BadZipFile,
    ZlibError,
)


@dataclass(frozen=True)
class Curve:
    """One metric of a run: its value at the optimiser steps where it was logged."""

    step_N: np.ndarray
    value_N: np.ndarray


@dataclass(frozen=True)
class Maps:
    """`attention_maps.npz` of an evaluation."""

    sequence_id_Q: np.ndarray
    length_Q: np.ndarray
    block: int
    student_blocks: int
    teacher_QGnn: np.ndarray
    student_Qnn: dict[int, np.ndarray]  # by block of the student, mLSTM blocks only


@dataclass(frozen=True)
class CacheSample:
    """Numbers of a sample of the cache's training positions, and the teacher's cross-entropy on held-out ones.

    Attributes:
        entropy_N: nats at tau 1, K+1 outcomes.
        tail_NS: mass outside the top K at each temperature.
        heldout_ce: the teacher's mean cross-entropy in nats over all held-out targets; None if there are none, or too
            many to read.
    """

    entropy_N: np.ndarray
    tail_NS: np.ndarray
    heldout_ce: float | None


@dataclass(frozen=True)
class CacheFacts:
    """Sums over the shards' JSON files."""

    train_shards: int
    heldout_shards: int
    train_tokens: int
    heldout_tokens: int
    bytes: int
    seconds: float
    hardware: str
    versions: dict[str, str]

    @property
    def tokens(self) -> int:
        return self.train_tokens + self.heldout_tokens

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens if self.tokens else 0.0


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Attributes:
        path: the folder, which may not exist.
        curves: metric name -> curve; empty before training.
        evaluation: content of evaluation.json, None before `student.evaluate`.
        maps: None where no maps were written.
        config_text: config.yaml as it stands, "" before training.
        config: the same as a dictionary.
        problems: sentences about files that could not be read.
        measured: what other commands measured of the student.
    """

    path: Path
    curves: dict[str, Curve]
    evaluation: dict[str, Any] | None
    maps: Maps | None
    config_text: str
    config: dict[str, Any]
    problems: list[str] = field(default_factory=list)
    measured: Measured = field(default_factory=Measured)

    @property
    def steps(self) -> int:
        """Optimiser steps logged so far."""
        return max((int(curve.step_N[-1]) for curve in self.curves.values()), default=0)

    def tokens(self, length: int) -> int | None:
        """Tokens the student was trained on: steps x rows of a batch x T; None where the configuration is missing."""
        data, trainer = self.config.get("data"), self.config.get("trainer")
        rows = data.get("batch_rows") if isinstance(data, dict) else None
        accumulated = (trainer.get("accumulate_grad_batches") if isinstance(trainer, dict) else None) or 1
        if not isinstance(rows, int) or not isinstance(accumulated, int):
            return None
        return self.steps * rows * accumulated * length


def read_run(path: Path) -> Run:
    """Read a run folder; what is not there is left empty, what is damaged is named in `problems`."""
    problems: list[str] = []
    evaluation = None
    if (path / "evaluation.json").is_file():
        try:
            evaluation = read_evaluation(path / "evaluation.json")
        except UserError as error:
            problems.append(str(error))
    maps = None
    if (path / "attention_maps.npz").is_file():
        try:
            maps = read_maps(path / "attention_maps.npz")
        except UNREADABLE as error:
            problems.append(f"{path / 'attention_maps.npz'} cannot be read ({error}): evaluate again")
    curves: dict[str, Curve] = {}
    if (path / "metrics.csv").is_file():
        try:
            curves = read_curves(path / "metrics.csv")
        except (KeyError, ValueError, TypeError, csv.Error) as error:
            problems.append(f"{path / 'metrics.csv'} cannot be read ({error!r}): was it edited?")
    config_file = path / "config.yaml"
    config_text = ""
    if config_file.is_file():
        with open(config_file, encoding="utf-8", errors="replace") as file:
            config_text = file.read(MOST_CONFIG)
    measured = read_measured(path, problems)
    return Run(path, curves, evaluation, maps, config_text, _parse_yaml(config_text), problems, measured)


def _parse_yaml(text: str) -> dict[str, Any]:
    import yaml

    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_curves(path: Path) -> dict[str, Curve]:
    """Metrics of a CSV whose columns are `step` and metrics, empty where one was not logged at that step."""
    points: dict[str, list[tuple[float, float]]] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            step = float(row.pop("step"))
            if not 0 <= step < 1 << 53:
                raise ValueError(f"step {step}")
            for name, value in row.items():
                if name and value:
                    points.setdefault(name, []).append((step, float(value)))
    curves = {}
    for name, pairs in points.items():
        step_N, value_N = np.array(sorted(pairs)).T
        curves[name] = Curve(step_N, value_N)
    return curves


def read_maps(path: Path) -> Maps:
    """Read the arrays that `student/evaluate.py` documents.

    Raises:
        ValueError, KeyError, OSError, BadZipFile: they are not those, or larger than `MOST_MAPS`.
    """
    check_arrays(path)
    with np.load(path, allow_pickle=False) as arrays:
        prefix = "student_block_"
        maps = Maps(
            sequence_id_Q=arrays["sequence_id"],
            length_Q=arrays["length"],
            block=int(arrays["pool_block"]),
            student_blocks=int(arrays["student_blocks"]),
            teacher_QGnn=arrays["teacher"],
            student_Qnn={
                int(name.removeprefix(prefix)): arrays[name]
                for name in sorted(arrays.files, key=lambda name: (len(name), name))
                if name.startswith(prefix)
            },
        )
    Q, n = len(maps.sequence_id_Q), maps.teacher_QGnn.shape[-1]
    groups = maps.teacher_QGnn.shape[1]
    wanted = [(maps.sequence_id_Q, (Q,)), (maps.length_Q, (Q,)), (maps.teacher_QGnn, (Q, groups, n, n))]
    wanted += [(map_Qnn, (Q, n, n)) for map_Qnn in maps.student_Qnn.values()]
    if any(array.shape != shape for array, shape in wanted) or not 0 < maps.student_blocks <= 4096:
        raise ValueError("its arrays have shapes that do not belong together")
    return maps


def check_arrays(path: Path) -> None:
    """Look at the headers of an .npz: NumPy allocates what they say.

    Raises:
        ValueError: the arrays take more than `MOST_MAPS` bytes, or are not of numbers.
    """
    held = 0
    with ZipFile(path) as archive:
        for member in archive.infolist():
            held += member.file_size
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
                if dtype.hasobject or math.prod(shape) * dtype.itemsize > member.file_size or held > MOST_MAPS:
                    raise ValueError(f"{member.filename[:40]} claims {shape} of {dtype}, {held} bytes")


def cache_facts(cache: Cache) -> CacheFacts:
    """Sum up the shards."""
    train, heldout = cache.shards("train"), cache.shards("heldout")
    seconds, hardware, versions = 0.0, set(), {}
    for record in chain(cache.records("train"), cache.records("heldout")):
        seconds += record.seconds
        hardware.add(record.hardware)
        versions = record.versions
    return CacheFacts(
        train_shards=len(train),
        heldout_shards=len(heldout),
        train_tokens=int(train.tokens.sum()),
        heldout_tokens=int(heldout.tokens.sum()),
        bytes=int(train.bytes.sum() + heldout.bytes.sum()),
        seconds=seconds,
        hardware=", ".join(sorted(hardware)),
        versions=versions,
    )


def column_costs(cache: Cache) -> list[tuple[str, float]]:
    """(column, compressed bytes a token) over the first shard of the cache, in stored order; empty without shards."""
    records = cache.shards("train") or cache.shards("heldout")
    if not records:
        return []
    with cache.open(records[0]) as shard:
        facts = column_facts(shard)
    stored = sum(column.compressed_bytes for column in facts)
    costs = [(column.name, column.compressed_bytes / records[0].tokens) for column in facts]
    return [*costs, ("footer", (records[0].bytes - stored) / records[0].tokens)]


def sample_cache(cache: Cache, tokens: int) -> CacheSample:
    """Entropy and tail masses of the positions of some row groups, spread over the training shards.

    Args:
        tokens: about how many positions to read; held-out cross-entropy is read only if there are at most 16 times as
            many held-out tokens.
    """
    spec = cache.spec
    wanted = ["length", "topk_logits", "lse", "log_tail"]
    records = cache.shards("train")
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    if records:
        held = min(records[0].rows, spec.rows_per_group) * spec.length  # tokens of a shard's first row group
        count = min(len(records), max(1, round(tokens / held)))
        chosen = np.linspace(0, len(records) - 1, count).round().astype(int)
        for index in chosen:
            with cache.open(records[index]) as shard:
                parts.append(positions_of(shard.read_group(0, wanted), spec))
    empty = np.zeros((0, len(spec.taus)))
    return CacheSample(
        entropy_N=np.concatenate([entropy_N for entropy_N, _ in parts]) if parts else np.zeros(0),
        tail_NS=np.concatenate([tail_NS for _, tail_NS in parts]) if parts else empty,
        heldout_ce=_heldout_ce(cache, 16 * tokens),
    )


def positions_of(columns: Columns, spec: CacheSpec) -> tuple[np.ndarray, np.ndarray]:
    """Entropy (N,) in nats at tau 1 and tail masses (N, S) of a row group's valid positions."""
    valid_RT = np.arange(spec.length)[None, :] < columns["length"][:, None]
    z_NK = columns["topk_logits"][valid_RT].astype(np.float64)
    tail_NS = columns["log_tail"][valid_RT].astype(np.float64)
    lse_N = columns["lse"][valid_RT].astype(np.float64)
    log_p_NK = z_NK - lse_N[:, None]
    log_r_N = tail_NS[:, spec.taus.index(1.0)] - lse_N
    r_N = np.exp(log_r_N)
    with np.errstate(invalid="ignore"):
        entropy_N = -(np.exp(log_p_NK) * log_p_NK).sum(1) - np.where(r_N > 0, r_N * log_r_N, 0.0)
    mass_NS = np.empty_like(tail_NS)
    for s, tau in enumerate(spec.taus):
        scaled_NK = z_NK / tau
        top_N = scaled_NK.max(1)
        kept_N = top_N + np.log(np.exp(scaled_NK - top_N[:, None]).sum(1))
        mass_NS[:, s] = np.exp(tail_NS[:, s] - np.logaddexp(kept_N, tail_NS[:, s]))
    return entropy_N, mass_NS


def _heldout_ce(cache: Cache, most_tokens: int) -> float | None:
    if cache.shards("heldout").tokens.sum() > most_tokens:
        return None
    total, count = 0.0, 0
    for columns in cache.groups("heldout", ["target_logit", "lse"]):
        nats_RT = columns["lse"].astype(np.float64) - columns["target_logit"]
        total += float(np.nansum(nats_RT))
        count += int(np.isfinite(nats_RT).sum())
    return total / count if count else None
