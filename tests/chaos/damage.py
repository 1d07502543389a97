"""Files cut short and bits flipped: does a reader ever return wrong rows, and does `verify` notice?

A reader may raise `UserError` or return what was written; anything else breaks the promise. `verify` must report every
changed byte. Beside it: how often plain pandas returns wrong rows for the same damage to a shard.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers_cache import write_toy_cache

from chaos.figure import Figure
from chaos.forked import CRASH, in_children
from pipeline import schema
from pipeline.cache import Cache
from pipeline.errors import UserError
from pipeline.verify import verify_cache
from student.runs.seal import check_seal, seal

SHARD = "shard-00001.parquet"
TEACHER_FILES = ("teacher/head.safetensors", "teacher/token_bytes.parquet", "teacher/config.json")
JSON_FILES = ("shard-00001.json", "manifest.json", "plan.json", "teacher/teacher.json")
CHECKPOINT = "last.ckpt"
FLIPS = {"pages": 1200, "footer": 1200, "json": 600, "teacher": 300, "checkpoint": 300}
CUTS = {"shard": 200, "json": 100, "checkpoint": 50}


@dataclass(frozen=True)
class Harm:
    """One file with one thing wrong: a flipped bit, or (bit -1) nothing left from `at` on."""

    file: str
    kind: str
    at: int
    bit: int

    def apply(self, data: bytes) -> bytes:
        if self.bit < 0:
            return data[: self.at]
        changed = bytearray(data)
        changed[self.at] ^= 1 << self.bit
        return bytes(changed)


def run(seed: int, small: bool) -> list[Figure]:
    share = 0.05 if small else 1.0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        cache = make_cache(folder / "cache")
        checkpoint = make_checkpoint(folder / CHECKPOINT)
        harms = choose(cache, checkpoint, seed, share)
        of_cache = [harm for harm in harms if harm.file != CHECKPOINT]
        figures = [
            *cache_figures(cache, of_cache),
            checkpoint_figure(checkpoint, [harm for harm in harms if harm.file == CHECKPOINT]),
            pandas_figure(cache, [harm for harm in of_cache if harm.file == SHARD and harm.bit >= 0]),
        ]
    return figures


def make_cache(path: Path) -> Path:
    """Two training shards and a held-out one, every optional column, two row groups a shard."""
    former, schema.ROW_GROUP_TOKENS = schema.ROW_GROUP_TOKENS, 128
    try:
        return write_toy_cache(path, units=2, rows=4, length=64, window=16, tail_samples=2)
    finally:
        schema.ROW_GROUP_TOKENS = former


def make_checkpoint(path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    state = {f"model.{name}": torch.randn(64, 48, generator=generator) for name in "abc"}
    torch.save({"global_step": 7, "state_dict": state}, path)
    seal(path)
    return path


def choose(cache: Path, checkpoint: Path, seed: int, share: float) -> list[Harm]:
    rng = random.Random(seed)
    shard = (cache / SHARD).read_bytes()
    footer = len(shard) - 8 - int.from_bytes(shard[-8:-4], "little")
    size = {name: (cache / name).stat().st_size for name in JSON_FILES + TEACHER_FILES} | {
        CHECKPOINT: checkpoint.stat().st_size
    }

    def times(count: int) -> range:
        return range(max(4, round(count * share)))

    def bit() -> int:
        return rng.randrange(8)

    harms = [Harm(SHARD, "flip in pages", rng.randrange(footer), bit()) for _ in times(FLIPS["pages"])]
    harms += [Harm(SHARD, "flip in footer", rng.randrange(footer, len(shard)), bit()) for _ in times(FLIPS["footer"])]
    for number in times(FLIPS["json"]):
        name = JSON_FILES[number % len(JSON_FILES)]
        harms.append(Harm(name, "flip in JSON", rng.randrange(size[name]), bit()))
    for number in times(FLIPS["teacher"]):
        name = TEACHER_FILES[number % len(TEACHER_FILES)]
        harms.append(Harm(name, "flip in teacher files", rng.randrange(size[name]), bit()))
    harms += [Harm(SHARD, "cut shard", rng.randrange(len(shard)), -1) for _ in times(CUTS["shard"])]
    for number in times(CUTS["json"]):
        name = JSON_FILES[number % len(JSON_FILES)]
        harms.append(Harm(name, "cut JSON", rng.randrange(size[name]), -1))
    for kind, low in (("flip in checkpoint", 0), ("cut checkpoint", -1)):
        for _ in times(FLIPS["checkpoint"] if low == 0 else CUTS["checkpoint"]):
            harms.append(Harm(CHECKPOINT, kind, rng.randrange(size[CHECKPOINT]), bit() if low == 0 else -1))
    return harms


def read_all(cache: Path) -> dict[str, Any]:
    """Everything a trainer reads: every column of every row, the teacher's tensors and bytes."""
    opened = Cache(cache)
    teacher = opened.teacher
    found: dict[str, Any] = {f"teacher {name}": tensor.numpy() for name, tensor in teacher.tensors().items()}
    found |= {"token bytes": teacher.token_bytes(), "config": [teacher.config()]}
    for split in ("train", "heldout"):
        for record in opened.shards(split):
            with opened.open(record) as shard:
                for group in range(shard.row_groups):
                    for name, values in shard.read_group(group).items():
                        found[f"{record.name} {group} {name}"] = values
    return found


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        a[name] == b[name] if isinstance(a[name], list) else np.array_equal(a[name], b[name], equal_nan=True)
        for name in a
    )


def cache_figures(cache: Path, harms: list[Harm]) -> list[Figure]:
    """One figure for readers, one for `verify`."""
    whole = read_all(cache)
    work = cache.with_name("work")
    shutil.copytree(cache, work)

    def trial(harm: Harm) -> tuple[str, bool]:
        good = (cache / harm.file).read_bytes()
        (work / harm.file).write_bytes(harm.apply(good))
        try:
            try:
                outcome = "identical rows" if same(whole, read_all(work)) else "WRONG ROWS"
            except UserError:
                outcome = "refused"
            except BaseException as error:
                outcome = f"{type(error).__name__}: {error}"
            try:
                flagged = bool(verify_cache(work).problems)
            except UserError:
                flagged = True
            return outcome, flagged
        finally:
            (work / harm.file).write_bytes(good)

    outcomes: dict[str, dict[str, int]] = {}
    failures, unnoticed, worst = 0, 0, []
    for harm, answer in in_children(harms, trial):
        outcome, flagged = answer if answer != CRASH else (CRASH, False)
        kinds = outcomes.setdefault(harm.kind, {})
        kinds[outcome] = kinds.get(outcome, 0) + 1
        failures += outcome not in ("refused", "identical rows")
        unnoticed += not flagged
        if outcome not in ("refused", "identical rows") or not flagged:
            worst.append(f"{harm}: {outcome}, {'noticed' if flagged else 'not noticed'} by verify")
    facts: dict[str, Any] = {
        kind: ", ".join(f"{n} {what}" for what, n in sorted(found.items())) for kind, found in outcomes.items()
    }
    if worst:
        facts["failures"] = worst[:10]
    return [
        Figure("damage", "readers of a damaged cache raise or return identical rows", len(harms), failures, facts),
        Figure("damage", "verify reports the damage", len(harms), unnoticed),
    ]


def checkpoint_figure(path: Path, harms: list[Harm]) -> Figure:
    """Damaged checkpoints: refused by their seal. Beside it, what torch alone makes of them."""
    good = path.read_bytes()
    whole = torch.load(path, weights_only=True)
    other = path.with_name("damaged.ckpt")

    def trial(harm: Harm) -> tuple[bool, str]:
        other.write_bytes(harm.apply(good))
        try:
            check_seal(other)
            refused = False
        except UserError:
            refused = True
        try:
            found = torch.load(other, weights_only=True)
            equal = found["global_step"] == whole["global_step"] and all(
                torch.equal(found["state_dict"][name], tensor) for name, tensor in whole["state_dict"].items()
            )
            return refused, "loads the same" if equal else "loads something else in silence"
        except Exception:
            return refused, "raises"

    plain: dict[str, int] = {}
    accepted = 0
    for _, answer in in_children(harms, trial):
        refused, alone = answer if answer != CRASH else (False, CRASH)
        accepted += not refused
        plain[alone] = plain.get(alone, 0) + 1
    return Figure("damage", "damaged checkpoints are refused", len(harms), accepted, {"torch.load alone": plain})


def pandas_figure(cache: Path, harms: list[Harm]) -> Figure:
    """What `pandas.read_parquet` makes of the same flipped bits; no promise of ours."""
    import pandas

    good = (cache / SHARD).read_bytes()
    whole = pandas.read_parquet(cache / SHARD)
    other = cache.with_name("pandas.parquet")

    def trial(harm: Harm) -> str:
        other.write_bytes(harm.apply(good))
        try:
            found = pandas.read_parquet(other)
        except Exception:
            return "raises"
        if list(found.columns) != list(whole.columns) or len(found) != len(whole):
            return "wrong rows in silence"
        equal = all(
            np.array_equal(np.asarray(a), np.asarray(b), equal_nan=np.asarray(a).dtype.kind == "f")
            for name in whole.columns
            for a, b in zip(whole[name], found[name], strict=True)
        )
        return "identical rows" if equal else "wrong rows in silence"

    counts: dict[str, dict[str, int]] = {}
    for harm, outcome in in_children(harms, trial):
        kinds = counts.setdefault(harm.kind, {})
        kinds[outcome] = kinds.get(outcome, 0) + 1
    facts = {}
    for kind, found in counts.items():
        silent = found.get("wrong rows in silence", 0)
        told = ", ".join(f"{n} {what}" for what, n in sorted(found.items()))
        facts[kind] = f"{told}: {silent / sum(found.values()):.0%} undetected"
    return Figure("damage", "for comparison: the same flipped bits read by pandas", len(harms), 0, facts)
