"""`python -m student.evaluate`: a student on a cache's held-out shards, with no teacher in memory.

    python -m student.evaluate --run runs/demo --cache caches/demo

Writes RUN/evaluation.json and RUN/attention_maps.npz and prints one table. The arrays of attention_maps.npz, for the
first few held-out rows S (numbers only, no pickle):

    sequence_id      (S,) int64
    length           (S,) int64, valid tokens
    pool_block       () int64, tokens b of a block
    student_blocks   () int64, blocks N of the student, sLSTM included
    teacher          (S, G, n, n) float32, the cache's `attn_map`
    student_block_i  (S, n, n) float32, implicit attention of mLSTM block i, signed, pooled the same way

Legend: B rows, T tokens, N positions, D width, V vocabulary, G depth groups, n = T/b blocks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.cache import Cache
from pipeline.commit import commit_file, commit_json
from pipeline.config import parse_into
from pipeline.errors import UserError, run_command
from student.batch import Batch
from student.checkpoint import RunRecord, load_student
from student.data import SplitLoader
from student.identity import Teaching, require_same_teacher
from student.metrics import NAMES, Positions, Sums, unigram_log_probabilities
from student.model import DistilXLSTM

CHUNK_ROWS = 256


@dataclass(frozen=True)
class EvaluateOptions:
    """What to evaluate and on what."""

    run: str
    """Run folder of the student."""
    cache: str
    """Cache whose held-out shards are read; its training shards give the unigram."""
    checkpoint: str = "last"
    """last, best, or a path."""
    batch_rows: int = 8
    """Rows in memory at a time."""
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


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    description = "Evaluate a student on the held-out shards of a cache."
    options = parse_into(EvaluateOptions, "python -m student.evaluate", description, "--config", arguments)
    figures = evaluate(options)
    print(table(figures))
    print(f"written to {Path(options.run) / 'evaluation.json'}")
    return 0


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Evaluate, write both files into the run folder, and return what evaluation.json holds.

    Raises:
        UserError: no such run or cache, of different teachers, no held-out shard, or (full_kl) no teacher to load.
    """
    if options.batch_rows < 1 or (options.max_rows is not None and options.max_rows < 1):
        raise UserError("--batch_rows and --max_rows must be 1 or more")
    run, cache = Path(options.run), Cache(options.cache)
    record = RunRecord.read(run)
    require_same_teacher(Teaching.of(cache), record.teaching(run), "Name a cache of the run's teacher")
    if not cache.shards("heldout"):
        raise UserError(f"{cache.path} has no held-out shards: dump some (the dump's held-out units), or name another")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student, teacher = load_student(run, options.checkpoint)
    student = student.to(device)
    counts_V, counted = count_tokens(cache, options.unigram_tokens)
    bytes_V = torch.tensor([len(b) for b in teacher.token_bytes()])
    sums = Sums(unigram_log_probabilities(counts_V), bytes_V)
    teacher_logits = load_teacher(options, cache, device) if options.full_kl else None
    maps = MapCollector(cache.spec.block if options.maps else 0, options.maps)
    rows = 0
    for batch in heldout(cache, options):
        rows += len(batch.length_B)
        measure(student, batch.to(device), sums, maps, teacher_logits)
    if sums.targets == 0:
        raise UserError(f"{cache.path}: its held-out rows have no targets; dump longer rows")
    content = {
        **sums.result(),
        "rows": rows,
        "unigram": f"add-one smoothed over {cache.spec.vocab_size} ids, counted on {counted} training tokens",
        "run": str(run),
        "checkpoint": options.checkpoint,
        "cache": str(cache.path),
        "compat_id": record.compat_id,
        "data_id": cache.manifest.data_id,
        "trainable_parameters": student.trainable_parameters(),
    }
    maps.write(run / "attention_maps.npz", student.config.blocks)
    commit_json(run / "evaluation.json", content)
    return content


def heldout(cache: Cache, options: EvaluateOptions) -> Iterator[Batch]:
    """Held-out batches, at most `max_rows` rows."""
    left = options.max_rows if options.max_rows is not None else sys.maxsize
    wanted = ("attn_map",) if options.maps else ()
    for batch in SplitLoader([cache], "heldout", options.batch_rows, optional=wanted):
        if left <= 0:
            return
        yield batch if len(batch.length_B) <= left else first_rows(batch, left)
        left -= len(batch.length_B)


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


class MapCollector:
    """Gathers the maps of the first rows and writes them."""

    def __init__(self, block: int, rows: int) -> None:
        self.block, self.left = block, rows if block else 0
        self.parts: dict[str, list[np.ndarray]] = {}

    def add(self, batch: Batch, maps: dict[int, Tensor]) -> None:
        if not self.left or batch.attn_map_BGnn is None:
            return
        arrays = {"sequence_id": batch.sequence_id_B, "length": batch.length_B, "teacher": batch.attn_map_BGnn}
        arrays |= {f"student_block_{i}": value.float() for i, value in maps.items()}
        for name, value in arrays.items():
            self.parts.setdefault(name, []).append(value[: self.left].cpu().numpy())
        self.left -= min(self.left, len(batch.length_B))

    def write(self, path: Path, blocks: int) -> None:
        """Commit the file; an older one goes where there is nothing to write, for it shows another student."""
        if not self.parts:
            path.unlink(missing_ok=True)
            return
        arrays: dict[str, Any] = {name: np.concatenate(parts) for name, parts in self.parts.items()}
        arrays |= {"pool_block": np.int64(self.block), "student_blocks": np.int64(blocks)}

        def save(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                np.savez_compressed(file, **arrays)

        commit_file(path, save)


@torch.no_grad()
def measure(
    student: DistilXLSTM,
    batch: Batch,
    sums: Sums,
    maps: MapCollector,
    teacher_logits: Callable[[Tensor], Tensor] | None,
) -> None:
    """Add one batch to the sums; logits exist for CHUNK_ROWS positions at a time."""
    output = student(batch.input_ids_BT, map_block=maps.block if maps.left else 0)
    maps.add(batch, output.maps)
    positions = Positions.of(batch)
    sums.add_positions(positions)
    h_ND = output.h_BTD.flatten(0, 1)[positions.index_N]
    for start in range(0, h_ND.shape[0], CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        sums.add_logits(student.logits(h_ND[rows]), positions, rows)
    if teacher_logits is None:
        return
    keep_BT = torch.isfinite(batch.target_logit_BT)
    for row in range(len(batch.length_B)):
        at_T = keep_BT[row].nonzero().squeeze(1)
        full_TV = teacher_logits(batch.input_ids_BT[row : row + 1])
        for part_t in at_T.split(CHUNK_ROWS):
            sums.add_full_kl(full_TV[part_t], student.logits(output.h_BTD[row, part_t]))


def load_teacher(options: EvaluateOptions, cache: Cache, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The teacher through transformers in float32: ids (1, T) -> logits (T, V)."""
    source = options.teacher or cache.manifest.teacher_path
    if options.teacher is None and not Path(source).is_dir():  # a stranger's manifest must not choose a download
        raise UserError(
            f"--full_kl: the manifest's teacher {source!r} is not here: name its folder or hub id with --teacher"
        )
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        raise UserError("--full_kl needs the package transformers: install it, or leave --full_kl out") from None
    logging.disable_progress_bar()
    try:
        # Safetensors only: other weights are pickles.
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--full_kl: no teacher at {source!r} ({reason}): name its folder with --teacher") from None
    model = model.to(device).eval()
    vocabulary = cache.spec.vocab_size
    if model.config.get_text_config().vocab_size < vocabulary:
        raise UserError(f"--full_kl: {source!r} has fewer than the cache's {vocabulary} ids: it is another teacher")
    return lambda input_ids_1T: model(input_ids_1T).logits[0, :, :vocabulary]


def table(figures: dict[str, Any]) -> str:
    """One table for the terminal."""
    lines = [f"held-out: {figures['rows']} rows, {figures['targets']} targets, {figures['target_bytes']} bytes", ""]
    lines.append(f"{'':10}{'cross-entropy':>15}{'perplexity':>13}{'bits per byte':>15}")
    for name in NAMES:
        ce, ppl, bpb = (figures[f"{name}_{k}"] for k in ("cross_entropy", "perplexity", "bits_per_byte"))
        lines.append(f"{name:10}{ce:15.4f}{ppl:13.2f}{bpb:15.4f}")
    lines += ["", f"KL_(K+1) to the teacher, tau 1   {figures['kl_k1']:.4f} nats"]
    if "kl_full" in figures:
        lines.append(f"KL over the whole vocabulary     {figures['kl_full']:.4f} nats")
    lines.append(f"top-1 agreement with the teacher {100 * figures['top1_agreement']:.1f}%")
    lines.append(f"unigram: {figures['unigram']}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main))
