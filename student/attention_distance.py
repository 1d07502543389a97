"""`python -m student.attention_distance`: how much of the teacher's attention a student has learned.

    python -m student.attention_distance --run runs/demo --cache caches/demo

On held-out rows, at every depth group of the cache: the distance (`map_distances.py`) from the teacher's pooled maps to
the implicit attention of the student's mLSTM blocks at that depth, and to what does not know the text or has not
learned (`attention_baselines.py`, and students of the same shape with fresh weights). All with the first key block,
where attention parks (`keep`), and without it (`drop`). Writes RUN/attention_distance.json and
RUN/attention_distance.png.

Legend: B rows of the cache, G depth groups, n = T/b blocks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch
from torch import Tensor

from pipeline.cache import Cache
from pipeline.commit import commit_bytes, commit_json
from pipeline.config import parse_into
from pipeline.errors import UserError, run_command
from student.evaluation.attention_baselines import (
    Fitted,
    fit,
    own_block_map,
    previous_block_map,
    recency_map,
    uniform_map,
)
from student.evaluation.device import Precision, batch_rows, in_precision, pick_device
from student.evaluation.map_distances import (
    DISTANCES,
    SINKS,
    compared_rows,
    distance,
    group_weights,
    student_shares,
    teacher_shares,
)
from student.losses.attention import Sinks, prepare_map
from student.model import DistilXLSTM
from student.runs.checkpoint import RunRecord, load_student
from student.runs.identity import Teaching, require_same_teacher

COLUMNS = ("student", "untrained", "mean_teacher_map", "recency", "uniform", "own_block", "previous_block")
"""Whose distances are reported, in the order of the table."""


@dataclass(frozen=True)
class AttentionDistanceOptions:
    """Which student, and on which rows."""

    run: str
    """Run folder of the student."""
    cache: str
    """Cache with attention maps: its held-out rows are compared, its training rows fit the baselines."""
    checkpoint: str = "last"
    """last, best, or a path."""
    batch_rows: int | None = None
    """Rows in memory at a time; null: 8 on a CPU, 32,768 tokens' worth on a GPU."""
    max_rows: int | None = None
    """Compare on the first so many held-out rows; null: all."""
    fit_rows: int = 256
    """Training rows that the recency and the teacher's mean map are fitted on, from the first shard on."""
    untrained: int = 3
    """Students with fresh weights to compare with, one a seed."""
    precision: Precision = "32-true"
    """32-true, or bf16-mixed as in training."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, or cuda:N."""


@dataclass(frozen=True)
class Rows:
    """Held-out rows: what the students read, and the teacher's maps of it."""

    input_ids_BT: Tensor
    length_B: Tensor
    attn_map_BGnn: Tensor


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    description = "Measure how much of the teacher's attention a student's mLSTM blocks have learned."
    prog = "python -m student.attention_distance"
    options = parse_into(AttentionDistanceOptions, prog, description, "--config", arguments)
    content = attention_distance(options)
    print(table(content))
    print(f"written to {Path(options.run) / 'attention_distance.json'} and .png")
    return 0


def attention_distance(options: AttentionDistanceOptions) -> dict[str, Any]:
    """Measure, write both files into the run folder, and return what attention_distance.json holds.

    Raises:
        UserError: no such run or cache, of different teachers, no attention maps, no mLSTM block, or no rows.
    """
    for name in ("fit_rows", "untrained"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be 1 or more, found {getattr(options, name)}")
    if options.max_rows is not None and options.max_rows < 1:
        raise UserError(f"--max_rows must be 1 or more, found {options.max_rows}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("the picture needs the package matplotlib: install it (pip install matplotlib)") from None
    run, cache = Path(options.run), Cache(options.cache)
    record = RunRecord.read(run)
    require_same_teacher(Teaching.of(cache), record.teaching(run), "Name a cache of the run's teacher")
    block, blocks = cache.spec.block, cache.spec.blocks if cache.spec.block else 0
    if blocks < 3:
        found = f"maps of {blocks} blocks" if block else "no attention maps"
        raise UserError(f"{cache.path} has {found}: dump one whose rows have 3 blocks or more (--block, --length)")
    for split, meaning in (("heldout", "held-out shards to compare on"), ("train", "training shards to fit on")):
        if not cache.shards(split):
            raise UserError(f"{cache.path} has no {meaning}: dump some, or name another cache")
    student, teacher = load_student(run, options.checkpoint)
    if not student.mlstm_blocks:
        raise UserError(
            f"{run}: none of the student's {student.config.blocks} blocks is an mLSTM, and only these have an implicit "
            "attention: there is nothing to compare"
        )
    device = pick_device(options.device)
    rows_at_once = batch_rows(options.batch_rows, device, cache.spec.length)
    fitted = fit(((rows.attn_map_BGnn, rows.length_B) for rows in read(cache, "train", options.fit_rows, 32)), block)
    tensors = teacher.tensors()
    models = {"student": student.float().to(device)}
    for seed in range(options.untrained):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh = DistilXLSTM(record.student, teacher.facts, tensors, record.max_length)
        models[f"untrained {seed}"] = fresh.float().eval().to(device)
    weights = group_weights(student.mlstm_blocks, student.config.blocks, cache.spec.groups)
    comparison = Comparison(fitted, weights, block, blocks)
    for rows in read(cache, "heldout", options.max_rows or sys.maxsize, rows_at_once):
        comparison.add(rows, {name: maps_of(model, rows, block, options.precision) for name, model in models.items()})
    content = {
        **comparison.result(),
        "fitted_rows": fitted.rows,
        "tokens_per_block": block,
        "untrained_seeds": options.untrained,
        "run": str(run),
        "checkpoint": options.checkpoint,
        "cache": str(cache.path),
        "compat_id": record.compat_id,
        "data_id": cache.manifest.data_id,
    }
    commit_bytes(run / "attention_distance.png", comparison.picture())
    commit_json(run / "attention_distance.json", content)
    return content


def read(cache: Cache, split: str, most: int, batch_rows: int) -> Iterator[Rows]:
    """The first `most` rows of a split, only the columns that are needed."""
    for columns in cache.groups(split, ["input_ids", "length", "attn_map"]):
        count = min(most, len(columns["length"]))
        for first in range(0, count, batch_rows):
            part = slice(first, min(first + batch_rows, count))
            ids, lengths, maps = (columns[name][part] for name in ("input_ids", "length", "attn_map"))
            yield Rows(
                torch.from_numpy(ids.astype("int64")),
                torch.from_numpy(lengths.astype("int64")),
                torch.from_numpy(maps.astype("float32")),
            )
        most -= count
        if most <= 0:
            return


@torch.no_grad()
def maps_of(model: DistilXLSTM, rows: Rows, block: int, precision: Precision) -> dict[int, Tensor]:
    """Pooled implicit attention of every mLSTM block, on the CPU in float32."""
    device = model.head_VD.device
    with in_precision(precision, device):
        maps = model(rows.input_ids_BT.to(device), map_block=block).maps
    return {index: map_Bnn.float().cpu() for index, map_Bnn in maps.items()}


class Comparison:
    """Sums of distances over held-out rows.

    Args:
        fitted: the baselines that were fitted.
        weights: of every depth group, the student's mLSTM blocks at its depth.
        block: b.
        blocks: n.
    """

    def __init__(self, fitted: Fitted, weights: list[dict[int, float]], block: int, blocks: int) -> None:
        self.fitted, self.weights, self.block, self.blocks = fitted, weights, block, blocks
        self.sums: dict[tuple[int, Sinks, str, str], float] = {}  # group, sinks, distance, whose
        self.count: dict[tuple[int, Sinks], int] = {}
        self.rows = 0
        self._shown: list[dict[str, Tensor]] = []

    def add(self, rows: Rows, maps: dict[str, dict[int, Tensor]]) -> None:
        """Compare a few rows; `maps` has those of the student and of the untrained ones by name."""
        for sinks in SINKS:
            teacher_BGnn = teacher_shares(rows.attn_map_BGnn, sinks)
            compared_BGn = compared_rows(teacher_BGnn, rows.length_B, self.block, sinks)
            for group, weights in enumerate(self.weights):
                key = (group, sinks)
                self.count[key] = self.count.get(key, 0) + int(compared_BGn[:, group].sum())
                own = {n: student_shares(m, weights, sinks) for n, m in maps.items()} if weights else {}
                for name in DISTANCES:
                    for whose, map_nn in {**own, **self.baselines(group, sinks, name)}.items():
                        away_Bn = distance(name, teacher_BGnn[:, group], map_nn)
                        total = float(torch.where(compared_BGn[:, group], away_Bn, 0.0).double().sum())
                        at = (group, sinks, name, whose)
                        self.sums[at] = self.sums.get(at, 0.0) + total
                if self.rows == 0 and sinks == "keep":
                    shown = {whose: map_Bnn[0] for whose, map_Bnn in own.items()}
                    baselines = self.baselines(group, sinks, "jensen_shannon")
                    self._shown.append({"teacher": teacher_BGnn[0, group], **shown, **baselines})
        self.rows += len(rows.length_B)

    def baselines(self, group: int, sinks: Sinks, name: str) -> dict[str, Tensor]:
        """The maps (n, n) that do not look at the text, prepared; the recency is the best for this distance."""
        n, b = self.blocks, self.block
        raw = {
            "recency": recency_map(self.fitted.half_life[name, sinks][group], n, b),
            "uniform": uniform_map(n, b),
            "own_block": own_block_map(n),
            "previous_block": previous_block_map(n),
        }
        prepared = {whose: prepare_map(map_nn, "signed", sinks, normalise_rows=True) for whose, map_nn in raw.items()}
        return {"mean_teacher_map": self.fitted.mean_map[sinks][group], **prepared}

    def result(self) -> dict[str, Any]:
        """Mean distances by depth group, and their means over the groups that have an mLSTM block.

        Raises:
            UserError: no held-out row has a block to compare.
        """
        if not all(self.count.get((0, sinks)) for sinks in SINKS):
            raise UserError(
                f"no held-out row has three blocks of {self.block} valid tokens: there is nothing to compare; name a "
                "cache of longer rows"
            )
        groups = len(self.weights)
        depth = []
        for group, weights in enumerate(self.weights):
            entry: dict[str, Any] = {"from": group / groups, "to": (group + 1) / groups}
            entry["mlstm_blocks"] = {str(block): weight for block, weight in weights.items()}
            for sinks in SINKS:
                found = {name: self._means(group, sinks, name) for name in DISTANCES}
                half_life = {name: self.fitted.half_life[name, sinks][group] for name in DISTANCES}
                entry[sinks] = {**found, "recency_half_life": half_life, "compared": self.count[group, sinks]}
            depth.append(entry)
        covered = [entry for entry in depth if entry["mlstm_blocks"]]
        mean = {
            sinks: {name: {w: fmean(e[sinks][name][w] for e in covered) for w in COLUMNS} for name in DISTANCES}
            for sinks in SINKS
        }
        return {"depth": depth, "mean": mean, "rows": self.rows}

    def _means(self, group: int, sinks: Sinks, name: str) -> dict[str, float]:
        count = max(1, self.count[group, sinks])
        means = {w: total / count for (g, s, d, w), total in self.sums.items() if (g, s, d) == (group, sinks, name)}
        fresh = [means.pop(whose) for whose in list(means) if whose.startswith("untrained ")]
        if fresh:
            means |= {"untrained": fmean(fresh), "untrained_deviation": pstdev(fresh)}
        return means

    def picture(self) -> bytes:
        """The first held-out row: teacher, student and others side by side, a row a depth group."""
        from pipeline.report.distance_picture import distance_picture

        columns = {
            "teacher": "teacher",
            "student": "student",
            "untrained 0": "untrained student",
            "mean_teacher_map": "teacher's mean map",
            "recency": "recency",
        }
        groups = len(self.weights)
        rows, notes = [], []
        for group, shown in enumerate(self._shown):
            means = self._means(group, "keep", "jensen_shannon")
            means["untrained 0"] = self.sums.get((group, "keep", "jensen_shannon", "untrained 0"), 0.0) / max(
                1, self.count[group, "keep"]
            )
            rows.append([shown[key].numpy() if key in shown else None for key in columns])
            notes.append([None if key == "teacher" or key not in shown else means[key] for key in columns])
        titles = [f"depth {100 * g // groups}–{100 * (g + 1) // groups}%" for g in range(groups)]
        return distance_picture(list(columns.values()), titles, rows, notes)


def table(content: dict[str, Any]) -> str:
    """A table with and one without the first key block."""
    heads = [("untrained", "untrained"), ("mean_teacher_map", "mean map"), ("recency", "recency")]
    heads = [
        ("student", "student"),
        *heads,
        ("uniform", "uniform"),
        ("own_block", "own"),
        ("previous_block", "previous"),
    ]
    titles = {"keep": "with the first key block", "drop": "without it"}
    held = f"held-out: {content['rows']} rows in blocks of {content['tokens_per_block']} tokens"
    fitted = f"mean map and recency are fitted to {content['fitted_rows']} training rows"
    lines = [f"{held}; how far from the teacher's maps (0: the same,", f"1: nothing in common); {fitted}"]
    for sinks in SINKS:
        lines += ["", f"Jensen-Shannon divergence in bits, {titles[sinks]}"]
        lines.append(f"{'depth':16}" + "".join(f"{title:>11}" for _, title in heads))
        groups = len(content["depth"])
        for group, entry in enumerate(content["depth"]):
            place = f"{100 * group // groups}–{100 * (group + 1) // groups}%"
            lines.append(f"{place:16}" + _cells(entry[sinks]["jensen_shannon"], heads))
        for name, title in (("jensen_shannon", "mean"), ("total_variation", "total variation")):
            lines.append(f"{title:16}" + _cells(content["mean"][sinks][name], heads))
    if any(not entry["mlstm_blocks"] for entry in content["depth"]):
        lines += ["", "–: no mLSTM block at this depth; means are over the others"]
    return "\n".join(lines)


def _cells(means: dict[str, float], heads: list[tuple[str, str]]) -> str:
    return "".join(f"{means[key]:11.4f}" if key in means else f"{'–':>11}" for key, _ in heads)


if __name__ == "__main__":
    sys.exit(run_command(main))
