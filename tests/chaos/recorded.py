"""A real dump without the teacher's cost: rows recorded once are replayed by an object in the engine's place.

Everything else is the code a user runs: plan, corpus, packing, claims, writers' threads, commits, manifest, teacher
folder. The rows come from the real vLLM (`record`), or, for the small set, from a head and an attention without layers
between them, through the same kernels. A row that was not recorded cannot be replayed: the engine refuses it.

Legend: T sequence length, L tokens of a row, K top-k ids, V vocabulary, D width, H heads, E head width.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas  # noqa: F401 - Arrow imports it at first use
import torch
from helpers_dump import byte_tokenizer, dump, dump_command, write_toy_corpus, write_toy_teacher
from safetensors.torch import save_file

from chaos.children import Child
from pipeline.cache import Cache
from pipeline.config import parse_into
from pipeline.shard import Columns
from teacher_dump import shard_loop
from teacher_dump.dump import DumpResult, run_dump
from teacher_dump.kernels.head_topk import head_topk
from teacher_dump.kernels.pooled_attention_reference import AttentionShape, pooled_attention
from teacher_dump.rows import CapturedRow, PackedRow
from teacher_dump.settings import DumpConfig

Rows = dict[str, Columns]
"""Shard name -> its columns."""
ROWS_PER_SHARD, LENGTH, ROWS_PER_STEP = 4, 64, 2
OPTIONS = ["--tokens_per_shard", str(ROWS_PER_SHARD * LENGTH), "--tail_samples", "2"]
OPTIONS += ["--engine.rows_per_step", str(ROWS_PER_STEP)]


@dataclass(frozen=True)
class Stage:
    """Where trials take place.

    Attributes:
        folder: teacher, corpus, trials' caches.
        config: of the dump; its cache is the undisturbed one.
        rows: of the undisturbed cache.
        recording: what the teacher said of a row, by its sequence id and tokens.
        seconds: an undisturbed dump takes.
        pace: seconds of an engine step, so that a dump's time is not all start and end.
        change: called in the process of each dump before it begins: breaks the protocol on purpose (`mutations.py`).
    """

    folder: Path
    config: DumpConfig
    rows: Rows
    recording: dict[tuple[int, bytes], dict[str, np.ndarray]]
    seconds: float = 0.0
    pace: float = 0.004
    change: Callable[[], None] | None = None

    @property
    def shards(self) -> int:
        return self.config.shards + self.config.heldout_shards

    @property
    def tokens(self) -> int:
        """That the whole cache needs."""
        return sum(int(columns["length"].sum()) for columns in self.rows.values())

    def cache(self, name: str) -> Path:
        """A folder of that name without anything in it."""
        path = self.folder / "trials" / name
        shutil.rmtree(path, ignore_errors=True)
        path.parent.mkdir(exist_ok=True)
        return path

    def at(self, cache: Path, **change: Any) -> DumpConfig:
        """The dump into another cache."""
        return replace(self.config, cache=cache, **change)


class Replay:
    """Stands where a `TeacherEngine` stands: gives recorded rows, in the engine's order and as far ahead.

    Every row the teacher reads is noted in `log`, which a kill cannot take back.
    """

    on_cpu = True
    rows_per_step = ROWS_PER_STEP

    def __init__(self, stage: Stage, log: Path | None) -> None:
        self.stage = stage
        self._log = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def stream_units(self, units: Iterable[tuple[int, Iterable[PackedRow]]]) -> Iterator[tuple[int, CapturedRow]]:
        waiting: list[tuple[int, CapturedRow]] = []
        for unit, rows in units:
            source = iter(rows)
            while step := list(islice(source, self.rows_per_step)):
                self.step()
                os.write(self._log, b"".join(b"%d %d\n" % (unit, row.length) for row in step))
                ready, waiting = waiting, [(unit, self.captured(unit, row)) for row in step]
                yield from ready
        yield from waiting

    def step(self) -> None:
        time.sleep(self.stage.pace)

    def captured(self, unit: int, row: PackedRow) -> CapturedRow:
        said = self.stage.recording.get(((unit << 32) + row.row, row.input_ids_L.tobytes()))
        if said is None:
            raise AssertionError(f"row {row.row} of unit {unit} is not the one the teacher read when it was recorded")
        return CapturedRow(row, **said)

    def close(self) -> None:
        os.close(self._log)


class SmallTeacher(Replay):
    """Computes rows instead of replaying them: the head's logits of a running mean of embeddings, and its attention."""

    def __init__(self, stage: Stage, log: Path | None) -> None:
        super().__init__(stage, log)
        from safetensors.torch import load_file

        tensors = load_file(str(Path(stage.config.teacher) / "model.safetensors"))
        self.embedding_VD, self.head_VD = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]

    def captured(self, unit: int, row: PackedRow) -> CapturedRow:
        config = self.stage.config
        ids_L = torch.from_numpy(row.input_ids_L.astype(np.int64))
        hidden_LD = self.embedding_VD[ids_L].cumsum(0) / (1 + torch.arange(row.length)).sqrt()[:, None]
        head = head_topk(
            hidden_LD @ self.head_VD.T,
            torch.cat([ids_L[1:], torch.tensor([row.next_id])]),
            config.k,
            config.taus,
            tail_samples=config.tail_samples,
            seed=config.seed,
            sequence_ids_N=torch.full((row.length,), (unit << 32) + row.row),
            positions_N=torch.arange(row.length),
        )
        heads_LHE = hidden_LD.view(row.length, 4, -1)
        maps = [
            pooled_attention(heads_LHE, heads_LHE, [0, row.length], AttentionShape(scale), config.block, LENGTH // 16)[
                0
            ]
            for scale in np.linspace(0.05, 0.2, config.groups)
        ]
        windows_WwD = hidden_LD.view(-1, config.window, hidden_LD.shape[1])
        assert head.tail_ids_NM is not None and head.tail_logits_NM is not None
        return CapturedRow(
            row,
            topk_ids_LK=head.ids_NK.numpy(),
            topk_logits_LK=head.logits_NK.numpy(),
            target_logit_L=head.target_logit_N.numpy(),
            lse_L=head.lse_N.numpy(),
            log_tail_LR=head.log_tail_NR.numpy(),
            attn_map_Gnn=torch.stack(maps).numpy(),
            hidden_WD=windows_WwD.mean(1).bfloat16().float().numpy(),
            tail_ids_LM=head.tail_ids_NM.numpy(),
            tail_logits_LM=head.tail_logits_NM.numpy(),
        )


def run_recorded(
    stage: Stage, cache: Path, log: Path | None = None, kind: type[Replay] = Replay, **change: Any
) -> DumpResult:
    """The dump command's body with `kind` in the engine's place; for a child, since the place is not given back."""
    if stage.change is not None:
        stage.change()
    shard_loop.start_engine = lambda work: kind(stage, log)  # type: ignore[assignment, arg-type, return-value]
    return run_dump(stage.at(cache, **change))


def rows_of(cache: Path) -> Rows:
    """Every column of every committed shard."""
    opened, found = Cache(cache), {}
    for split in ("train", "heldout"):
        for record in opened.shards(split):
            with opened.open(record) as shard:
                groups = [shard.read_group(group) for group in range(shard.row_groups)]
            found[record.name] = {
                name: sum((list(group[name]) for group in groups), [])
                if name == "doc_ids"
                else np.concatenate([group[name] for group in groups])
                for name in groups[0]
            }
    return found


def recording_of(rows: Rows) -> dict[tuple[int, bytes], dict[str, np.ndarray]]:
    """What the teacher said, of every row."""
    names = {
        "topk_ids": "topk_ids_LK",
        "topk_logits": "topk_logits_LK",
        "target_logit": "target_logit_L",
        "lse": "lse_L",
        "log_tail": "log_tail_LR",
        "attn_map": "attn_map_Gnn",
        "hidden": "hidden_WD",
        "tail_ids": "tail_ids_LM",
        "tail_logits": "tail_logits_LM",
    }
    found = {}
    for columns in rows.values():
        for row, number in enumerate(columns["sequence_id"]):
            key = int(number), columns["input_ids"][row].astype(np.int32).tobytes()
            found[key] = {names[name]: columns[name][row] for name in names}
    return found


def write_small_teacher(path: Path) -> Path:
    """A Hugging Face folder with embedding, norm and head, and nothing between them."""
    torch.manual_seed(7)
    path.mkdir(parents=True)
    sizes = {"model.embed_tokens.weight": (263, 32), "model.norm.weight": (32,), "lm_head.weight": (263, 32)}
    save_file({name: torch.randn(size) for name, size in sizes.items()}, str(path / "model.safetensors"))
    (path / "model.safetensors").chmod(0o644)  # for a trial as another user
    config = {"vocab_size": 263, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    (path / "config.json").write_text(json.dumps({**config, "model_type": "llama", "eos_token_id": 256}))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    byte_tokenizer().save(str(path / "tokenizer.json"))
    return path


def make_stage(folder: Path, small: bool, shards: int = 7) -> Stage:
    """Teacher, corpus, recorded rows and the undisturbed cache; `small` does without vLLM."""
    teacher = folder / "teacher"
    Child(lambda: bool((write_small_teacher if small else write_toy_teacher)(teacher))).result()
    corpus = write_toy_corpus(folder / "corpus.jsonl", documents=400)
    first = folder / "recorded"
    words = dump_command(teacher, corpus, first, shards, *OPTIONS)
    config = parse_into(DumpConfig, "chaos", "", "--manifest", words[3:])
    stage = Stage(folder, config, {}, {})
    if small:
        Child(lambda: run_recorded(stage, first, kind=SmallTeacher)).result()
    else:
        done = dump(teacher, corpus, first, shards, *OPTIONS)
        assert done.returncode == 0, done.stderr
    rows = Child(lambda: rows_of(first)).result()
    stage = replace(stage, rows=rows, recording=recording_of(rows), config=stage.at(folder / "undisturbed"))
    times = []
    for _ in range(5):  # the last is kept
        shutil.rmtree(stage.config.cache, ignore_errors=True)
        times.append(Child(lambda: run_recorded(stage, stage.config.cache).seconds).result())
    assert not Child(lambda: differences(stage.rows, rows_of(stage.config.cache))).result(), "replayed rows differ"
    return replace(stage, seconds=sorted(times)[len(times) // 2])


def differences(wanted: Rows, found: Rows, whole: bool = True) -> list[str]:
    """Shards and columns that are not the same to the bit; `whole`: no shard may be missing."""
    said = [f"{name} is missing" for name in sorted(wanted.keys() - found.keys()) if whole]
    said += [f"{name} should not be there" for name in sorted(found.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & found.keys()):
        a, b = wanted[name], found[name]
        if a.keys() != b.keys():
            said.append(f"{name} has other columns")
            continue
        said += [f"{name} column {column} differs" for column in a if not _same(a[column], b[column])]
    return said


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list):
        return bool(a == b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
