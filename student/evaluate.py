"""`python -m student.evaluate`: a student on a cache's held-out shards, with no teacher in memory.

    python -m student.evaluate --run runs/demo --cache caches/demo
    python -m student.evaluate --run runs/demo --cache caches/other-text --out other-text

Writes RUN/evaluation.json and RUN/attention_maps.npz (`map_file.py`) and prints two tables: the figures, and those by
position in the context. With --out NAME the files are evaluation-NAME.json and attention_maps-NAME.npz, so that a run
can be evaluated on the held-out rows of several caches of its teacher. `evaluate` is the same for programs.

Legend: B rows, T tokens, N positions, D width, V vocabulary.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.cache import Cache
from pipeline.commit import commit_json
from pipeline.config import parse_into
from pipeline.errors import UserError, run_command
from pipeline.prefetch import ahead
from student.data.batch import Batch
from student.data.loader import SplitLoader
from student.evaluation.device import Precision, batch_rows, chunk_rows, in_precision, pick_device
from student.evaluation.hugging_face import CausalLM, Dtype, load_causal_lm
from student.evaluation.map_file import MapCollector
from student.evaluation.metrics import NAMES, Positions, Sums, full_kl, of_student, unigram_log_probabilities
from student.model import DistilXLSTM
from student.runs.checkpoint import RunRecord, load_student
from student.runs.identity import Teaching, require_same_teacher

BATCHES_AHEAD = 2
OUT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class EvaluateOptions:
    """What to evaluate and on what."""

    run: str
    """Run folder of the student."""
    cache: str
    """Cache whose held-out shards are read; its training shards give the unigram."""
    checkpoint: str = "last"
    """last, best, or a path."""
    out: str | None = None
    """Write evaluation-OUT.json and attention_maps-OUT.npz instead: for another cache, or another checkpoint."""
    batch_rows: int | None = None
    """Rows in memory at a time; null: 8 on a CPU, 32,768 tokens' worth on a GPU."""
    max_rows: int | None = None
    """Evaluate the first so many held-out rows; null: all."""
    unigram_tokens: int = 20_000_000
    """Training tokens that the unigram is counted on, from the first shard on."""
    maps: int = 4
    """Held-out rows whose attention maps are written; 0 writes none."""
    full_kl: bool = False
    """Load the teacher with transformers and measure the KL over the whole vocabulary too."""
    teacher: str | None = None
    """Folder or hub name of the teacher for --full_kl; null: where the cache's dump read it."""
    teacher_dtype: Dtype = "float32"
    """Of the teacher's weights for --full_kl. bfloat16 halves its memory; KLs below some 1e-3 nats are then noise."""
    precision: Precision = "32-true"
    """Of the student: 32-true, or bf16-mixed as in training, which is faster on a GPU."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, or cuda:N."""


class FullTeacher(Protocol):
    """The teacher itself, for the KL over the whole vocabulary: `CausalLM`, or what is called like it."""

    vocab_size: int

    def hidden(self, input_ids_BT: Tensor) -> Tensor:
        """Hidden states (B, T, D)."""

    def logits(self, h_ND: Tensor) -> Tensor:
        """float32 logits (N, V)."""


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    description = "Evaluate a student on the held-out shards of a cache."
    options = parse_into(EvaluateOptions, "python -m student.evaluate", description, "--config", arguments)
    figures = evaluate(options)
    print(table(figures))
    speed = figures["targets"] / figures["seconds"]
    print(f"{speed:,.0f} targets/s; written to {files_of(options)[0]}")
    return 0


def evaluate(options: EvaluateOptions, teacher: FullTeacher | None = None) -> dict[str, Any]:
    """Evaluate, write both files into the run folder, and return what evaluation.json holds.

    May be called as often as one likes in a process. A teacher that --full_kl loads stays loaded for the next call.

    Args:
        options: what to evaluate and on what.
        teacher: for `full_kl`, one that is loaded already, on the device of the options.

    Raises:
        UserError: no such run or cache, of different teachers, no held-out shard, or (full_kl) no teacher to load.
    """
    if options.max_rows is not None and options.max_rows < 1:
        raise UserError(f"--max_rows must be 1 or more, found {options.max_rows}")
    json_file, maps_file = files_of(options)
    run, cache = Path(options.run), Cache(options.cache)
    record = RunRecord.read(run)
    require_same_teacher(Teaching.of(cache), record.teaching(run), "Name a cache of the run's teacher")
    if not cache.shards("heldout"):
        raise UserError(f"{cache.path} has no held-out shards: dump some (the dump's held-out units), or name another")
    device = pick_device(options.device)
    rows_at_once = batch_rows(options.batch_rows, device, cache.spec.length)
    student, folder = load_student(run, options.checkpoint)
    # A frozen head in bfloat16 would be widened anew for every chunk.
    student = student.float().to(device)
    counts_V, counted = count_tokens(cache, options.unigram_tokens)
    bytes_V = torch.tensor([len(b) for b in folder.token_bytes()])
    sums = Sums(unigram_log_probabilities(counts_V), bytes_V)
    if options.full_kl:
        teacher = teacher or load_teacher(options, cache, device)
        if teacher.vocab_size < cache.spec.vocab_size:
            raise UserError(
                f"--full_kl: the teacher has {teacher.vocab_size} ids, fewer than the {cache.spec.vocab_size} of "
                f"{cache.path}: it is another teacher; name the cache's with --teacher"
            )
    maps = MapCollector(cache.spec.block if options.maps else 0, options.maps)
    rows, begun = 0, time.perf_counter()
    for batch in heldout(cache, rows_at_once, options.max_rows, device.type == "cuda", options.maps > 0):
        rows += len(batch.length_B)
        moved = batch.to(device, non_blocking=True)
        measure(student, moved, sums, maps, teacher if options.full_kl else None, options.precision)
    if sums.targets == 0:
        raise UserError(f"{cache.path}: its held-out rows have no targets; dump longer rows")
    seconds = time.perf_counter() - begun  # the sums were read, so a GPU is done
    content = {
        **sums.result(),
        "by_position": sums.by_position(),
        "rows": rows,
        "unigram": f"add-one smoothed over {cache.spec.vocab_size} ids, counted on {counted} training tokens",
        "run": str(run),
        "checkpoint": options.checkpoint,
        "cache": str(cache.path),
        "compat_id": record.compat_id,
        "data_id": cache.manifest.data_id,
        "precision": options.precision,
        "seconds": seconds,
        "trainable_parameters": student.trainable_parameters(),
    }
    maps.write(maps_file, student.config.blocks)
    commit_json(json_file, content)
    return content


def files_of(options: EvaluateOptions) -> tuple[Path, Path]:
    """The JSON and the maps file that an evaluation writes.

    Raises:
        UserError: --out is no plain name.
    """
    if options.out is not None and not OUT_NAME.fullmatch(options.out):
        raise UserError(
            f"--out {options.out!r}: it becomes part of a file's name; use letters, digits, '.', '_' and '-', at most "
            "64, a letter or digit first"
        )
    end = f"-{options.out}" if options.out else ""
    return Path(options.run) / f"evaluation{end}.json", Path(options.run) / f"attention_maps{end}.npz"


def heldout(
    cache: Cache, rows_at_once: int, max_rows: int | None, pin: bool = False, maps: bool = True
) -> Iterator[Batch]:
    """Held-out batches, at most `max_rows` rows, read ahead; in pinned memory where they go to a GPU."""

    def make() -> Iterator[Batch]:
        left = max_rows if max_rows is not None else sys.maxsize
        for batch in SplitLoader([cache], "heldout", rows_at_once, optional=("attn_map",) if maps else ()):
            batch = batch if len(batch.length_B) <= left else first_rows(batch, left)
            yield batch.pin_memory() if pin else batch
            left -= len(batch.length_B)
            if left <= 0:
                return

    return ahead(make, BATCHES_AHEAD)


def first_rows(batch: Batch, rows: int) -> Batch:
    """The first rows of a batch."""
    values: dict[str, Any] = {k: v[:rows] if isinstance(v, Tensor) else v for k, v in vars(batch).items()}
    return Batch(**{**values, "tokens": int(values["length_B"].sum())})


def count_tokens(cache: Cache, limit: int) -> tuple[Tensor, int]:
    """Counts (V,) of the training shards' valid tokens, stopping after the row group in which `limit` is reached."""
    counts_V = np.zeros(cache.spec.vocab_size, dtype=np.int64)
    counted = 0
    for columns in cache.groups("train", ["input_ids", "length"]):
        valid_RT = np.arange(cache.spec.length)[None, :] < columns["length"][:, None]
        counts_V += np.bincount(columns["input_ids"][valid_RT], minlength=len(counts_V))
        counted += int(valid_RT.sum())
        if counted >= limit:
            break
    return torch.from_numpy(counts_V), counted


@torch.no_grad()
def measure(
    student: DistilXLSTM,
    batch: Batch,
    sums: Sums,
    maps: MapCollector,
    teacher: FullTeacher | None = None,
    precision: Precision = "32-true",
) -> None:
    """Add one batch, on the student's device, to the sums; logits exist for a few positions at a time."""
    positions = Positions.of(batch)
    sums.add_positions(positions)
    device = batch.input_ids_BT.device
    teacher_ND = None if teacher is None else teacher.hidden(batch.input_ids_BT).flatten(0, 1)[positions.index_N]
    with in_precision(precision, device):
        output = student(batch.input_ids_BT, map_block=maps.block if maps.left else 0)
        h_ND = output.h_BTD.flatten(0, 1)[positions.index_N]
        vocabulary = student.facts.vocab_size
        step = chunk_rows(device, vocabulary)
        parts: list[dict[str, Tensor]] = []
        for start in range(0, h_ND.shape[0], step):
            rows = slice(start, start + step)
            logits_NV = student.logits(h_ND[rows])
            parts.append(of_student(logits_NV, positions, rows))
            if teacher is not None and teacher_ND is not None:
                parts[-1]["kl_full"] = full_kl(teacher.logits(teacher_ND[rows])[:, :vocabulary], logits_NV)
    if parts:
        sums.add(positions, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    maps.add(batch, output.maps)


def load_teacher(options: EvaluateOptions, cache: Cache, device: torch.device) -> CausalLM:
    """The teacher through transformers.

    Raises:
        UserError: it is not where the manifest says and --teacher names none, or see `load_causal_lm`.
    """
    source = options.teacher or cache.manifest.teacher_path
    if options.teacher is None and not Path(source).is_dir():  # a stranger's manifest must not choose a download
        raise UserError(
            f"--full_kl: the manifest's teacher {source!r} is not here: name its folder or hub id with --teacher"
        )
    return load_causal_lm(source, options.teacher_dtype, str(device))


def table(figures: dict[str, Any]) -> str:
    """The tables for the terminal."""
    lines = [f"held-out: {figures['rows']} rows, {figures['targets']} targets, {figures['target_bytes']} bytes", ""]
    lines.append(f"{'':10}{'cross-entropy':>15}{'perplexity':>13}{'bits per byte':>15}")
    for name in NAMES:
        ce, ppl, bpb = (figures[f"{name}_{k}"] for k in ("cross_entropy", "perplexity", "bits_per_byte"))
        lines.append(f"{name:10}{ce:15.4f}{ppl:13.2f}{bpb:15.4f}")
    lines += ["", f"KL_(K+1) to the teacher, tau 1   {figures['kl_k1']:.4f} nats"]
    if "kl_full" in figures:
        lines.append(f"KL over the whole vocabulary     {figures['kl_full']:.4f} nats")
    lines.append(f"top-1 agreement with the teacher {100 * figures['top1_agreement']:.1f}%")
    lines += [f"unigram: {figures['unigram']}", "", *position_lines(figures["by_position"])]
    return "\n".join(lines)


def position_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The figures by position in the context, in nats per target."""
    columns = [("student", "student_cross_entropy"), ("teacher", "teacher_cross_entropy"), ("KL_(K+1)", "kl_k1")]
    columns += [("KL", "kl_full")] if rows and "kl_full" in rows[0] else []
    lines = [f"{'position':>12}{'targets':>10}" + "".join(f"{title:>10}" for title, _ in columns)]
    for row in rows:
        place = str(row["first"]) if row["first"] == row["last"] else f"{row['first']}-{row['last']}"
        lines.append(f"{place:>12}{row['targets']:>10}" + "".join(f"{row[key]:10.4f}" for _, key in columns))
    return lines


if __name__ == "__main__":
    sys.exit(run_command(main))
