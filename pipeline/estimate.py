"""`python -m pipeline estimate`: what a dump and a training cost, before anything is spent."""

from __future__ import annotations

import json
import math
import shutil
import textwrap
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from pipeline.costs import (
    JSON_BYTES,
    Figure,
    card_memory,
    column_bytes,
    encoding_rate,
    raw_bytes,
    read_results,
    readers,
    student_rate,
    teacher_rate,
    verify_rate,
)
from pipeline.errors import UserError
from pipeline.estimate_plan import Options, Plan, planned

DESCRIPTION = (
    "Say what a dump, and the training of a student from it, take: tokens, bytes, files, GPU hours and cost, each with "
    "where the figure comes from: measured and on what, given, or scaled by a rule. Starts nothing and reads no model."
)
SHARD_BYTES = 4e9
"""What a shard should not be larger than."""


def estimate(options: Options) -> tuple[dict[str, dict[str, Figure]], list[str]]:
    """Sections of named figures, and notes.

    Raises:
        UserError: see `planned`, `read_results`; or an option is out of range.
    """
    for field in (
        "gpus", "tp", "gpu_memory_gb", "gpu_tflops", "teacher_tokens_per_s", "student_tokens_per_s", "gpu_hour_cost",
    ):  # fmt: skip
        value = getattr(options, field)
        least = 0 if field == "gpu_hour_cost" else 1e-9
        if value is not None and not least <= value < math.inf:
            raise UserError(f"--{field} {value:g}: must be {'0 or more' if not least else 'above 0'}")
    plan = planned(options)
    storage = read_results(options.results, "storage")
    columns = column_bytes(plan.spec, storage)
    footer = _footer(storage)
    per_token = sum(float(figure.value or 0) for figure in columns.values())
    shard_bytes = per_token * plan.tokens_per_shard + footer * max(1, plan.tokens_per_shard // plan.spec.group_tokens)
    checking = verify_rate(plan.spec.k)
    total = shard_bytes * plan.all_shards + JSON_BYTES * plan.all_shards
    sections = {"what": _what(plan)}
    sections["bytes of a token"] = {
        **columns,
        "footer and JSON": Figure(
            (shard_bytes + JSON_BYTES) / plan.tokens_per_shard - per_token,
            "B/token",
            "measured: storage.json, a record",
        ),
        "all": Figure(total / plan.all_tokens, "B/token", "sum"),
        "uncompressed": Figure(sum(raw_bytes(plan.spec).values()), "B/token", "schema"),
    }
    sections["disk"] = {
        "bytes": Figure(round(total), "B", "bytes of a token x tokens"),
        "a shard": Figure(round(shard_bytes), "B", "bytes of a token x tokens of a shard"),
        "files": Figure(2 * plan.all_shards, "files", "a .parquet and a .json a shard, and some 10 more"),
        "records": Figure(JSON_BYTES * plan.all_shards, "B", f"{JSON_BYTES} B a shard's JSON; truth, read at `index`"),
        "index": _index(plan, options.results),
        "verify": Figure(
            plan.all_tokens / float(checking.value or 0) / 3600, "core h", f"every byte and number; {checking.source}"
        ),
    }
    notes = []
    if shard_bytes > SHARD_BYTES:
        notes.append(f"a shard has {shard_bytes / 1e9:.1f} GB, more than 4: lower tokens_per_shard")
    if plan.all_shards > 1_000_000:
        notes.append(f"{plan.all_shards:,} shards in one folder: raise tokens_per_shard, or make several caches")
    sections["stage one"] = _stage_one(options, plan, per_token, notes)
    sections["stage two"] = _stage_two(options, plan, per_token, storage)
    sections["both stages"] = _both(sections["stage one"], sections["stage two"])
    if options.gpu_hour_cost is None:
        notes.append("no cost: give --gpu_hour_cost")
    return sections, notes


def _footer(storage: dict[str, Any]) -> float:
    """Bytes of a shard's footer, for each row group."""
    row = next(row for row in storage["rows"] if row["layout"] == "ours")
    return float(row["columns"]["footer"]) * float(storage["tokens"])


def _index(plan: Plan, results: Path) -> Figure:
    if (results / "many_shards.json").is_file():
        rows = [row for row in read_results(results, "many_shards")["rows"] if row.get("index_bytes")]
        if rows:
            row = max(rows, key=lambda row: row["shards"])
            each = row["index_bytes"] / row["shards"]
            source = f"measured: {each:.0f} B a shard at {row['shards']:,}, many_shards.json"
            return Figure(round(each * plan.all_shards), "B", source)
    return Figure(None, "B", "not measured (no many_shards.json)")


def _what(plan: Plan) -> dict[str, Figure]:
    of, shape = plan.source, plan.teacher
    text = max(plan.corpus["range_bytes"], plan.tokens_per_shard * plan.corpus["bytes_per_token"])
    rule = f"{plan.corpus['bytes_per_token']:g} B a token, at least {plan.corpus['range_bytes']:,} a shard (corpus)"
    return {
        "teacher": Figure(shape.name, "", of["teacher"]),
        "parameters": Figure(round(shape.parameters), "", f"{round(shape.body):,} without embedding and head"),
        "training tokens": Figure(plan.train_tokens, "tokens", f"shards x {plan.tokens_per_shard:,}"),
        "training shards": Figure(plan.train_shards, "shards", of["shards"]),
        "held-out shards": Figure(plan.heldout_shards, "shards", of["heldout_shards"]),
        "rows": Figure(plan.all_tokens // plan.spec.length, "rows", f"T={plan.spec.length}, {of['length']}"),
        "text": Figure(round(text * plan.all_shards), "B", rule),
    }


def _stage_one(options: Options, plan: Plan, per_token: float, notes: list[str]) -> dict[str, Figure]:
    shape = plan.teacher
    found: dict[str, Figure] = {}
    device = ""
    if options.teacher_tokens_per_s is None:
        dump = read_results(options.results, "dump_throughput")
        bare, peak, ours, device = teacher_rate(shape, plan.spec, dump, options.gpu_tflops)
        found = {"bare prefill, a GPU": bare, "share of peak": peak, "our share": ours}
        rate = Figure(float(bare.value or 0) * float(ours.value or 0), "tokens/s", "bare x our share")
    else:
        rate = Figure(options.teacher_tokens_per_s, "tokens/s", "given: --teacher_tokens_per_s")
    gb, memory = 2 * shape.parameters / 1e9, options.gpu_memory_gb
    where = "given: --gpu_memory_gb"
    if memory is None:
        memory, where = card_memory(device)
    needed = 2 ** math.ceil(math.log2(max(1, math.ceil(gb * 1.1 / memory))))
    tp = options.tp or needed
    if gb * 1.1 / tp > memory:
        notes.append(f"{gb:.0f} GB of weights do not fit {tp} GPUs of {memory:g} GB: --tp {needed}")
    if options.gpus < tp:
        notes.append(f"one teacher needs {tp} GPUs, --gpus is {options.gpus}: GPU hours hold, the time does not")
    if tp > 1:
        notes.append(f"{tp} GPUs a teacher count as {tp} times one: what they lose to each other was not measured")
    limit = encoding_rate(plan.spec)
    if limit is not None and float(limit.value or 0) < tp * float(rate.value or 0):
        found["encoding, a teacher"] = limit
        rate = Figure(float(limit.value or 0) / tp, "tokens/s", "encoding hidden states sets the pace")
    each = float(rate.value or 0)
    fits = f"{gb:.0f} GB of bfloat16 weights and a tenth, {memory:g} GB a GPU ({where})"
    found |= {"dump, a GPU": rate, "GPUs a teacher": Figure(tp, "", "given: --tp" if options.tp else fits)}
    return found | _spent(options, plan.all_tokens, each, plan.all_tokens, per_token, "written")


def _spent(
    options: Options, tokens: int, rate: float, tokens_once: int, per_token: float, verb: str, times: float = 1.0
) -> dict[str, Figure]:
    """GPU hours, time, storage throughput and cost of so many tokens at so many a second on each GPU.

    Args:
        times: how often a byte is read or written.
    """
    hours = tokens / rate / 3600
    source = f"{tokens:,} tokens / rate" if tokens == tokens_once else f"{tokens_once:,} tokens x epochs / rate"
    cost = options.gpu_hour_cost
    moved = f"rate x {options.gpus} GPUs x bytes of a token"
    if times != 1:
        moved += f" x {times:.3g} ranks that read a row group (played through, docs/scale.md)"
    return {
        "GPU hours": Figure(hours, "h", source + "; start-up is not in it"),
        "time": Figure(hours / options.gpus, "h", f"on {options.gpus} GPUs (--gpus), taken to scale"),
        f"bytes {verb}": Figure(rate * options.gpus * per_token * times, "B/s", moved),
        "cost": Figure(
            None if cost is None else hours * cost, "", "--gpu_hour_cost" + ("" if cost is None else f" {cost:g}")
        ),
    }


def _stage_two(options: Options, plan: Plan, per_token: float, storage: dict[str, Any]) -> dict[str, Figure]:
    if options.student_tokens_per_s is None:
        there = (options.results / "train_throughput.json").is_file()
        train = read_results(options.results, "train_throughput") if there else None
        rate = student_rate(plan.teacher, plan.blocks, plan.spec.length, train, options.gpu_tflops)
    else:
        rate = Figure(options.student_tokens_per_s, "tokens/s", "given: --student_tokens_per_s")
    found = {
        "blocks": Figure(plan.blocks, "", plan.source["blocks"]),
        "epochs": Figure(plan.epochs, "", plan.source["epochs"]),
        "training, a GPU": rate,
    }
    if rate.value is None:
        return found
    each = float(rate.value)
    times = readers(options.gpus)
    found |= _spent(options, plan.train_tokens * plan.epochs, each, plan.train_tokens, per_token, "read", times)
    rows = [row for row in storage["rows"] if row["layout"] == "ours"]
    row = min(rows, key=lambda row: abs(math.log(row["K"] / plan.spec.k)))
    cores = each * options.gpus * times / (1e3 * row["read"])
    where = f"measured: storage.json, K={row['K']}: {row['read']:g} thousand tokens/s of a core, without hidden states"
    return found | {"cores that decode": Figure(cores, "cores", where)}


def _both(one: dict[str, Figure], two: dict[str, Figure]) -> dict[str, Figure]:
    """Sums of what both stages take; None where one of them cannot be known."""

    def total(name: str, source: str) -> Figure:
        parts = [stage[name].value if name in stage else None for stage in (one, two)]
        known = [float(part) for part in parts if part is not None]
        return Figure(sum(known) if len(known) == 2 else None, one[name].unit, source)

    return {
        "GPU hours": total("GPU hours", "stage one + stage two"),
        "time": total("time", "one after the other, on the same GPUs"),
        "cost": total("cost", one["cost"].source),
    }


def run(options: Options) -> int:
    """Print the estimate."""
    sections, notes = estimate(options)
    if options.json:
        plain = {title: {name: asdict(figure) for name, figure in rows.items()} for title, rows in sections.items()}
        given = {f.name: getattr(options, f.name) for f in fields(options)}
        print(json.dumps({"options": given, **plain, "notes": notes}, indent=1, default=str))
        return 0
    width = shutil.get_terminal_size((120, 24)).columns
    for title, rows in sections.items():
        print(f"{title}")
        for name, figure in rows.items():
            head = f"  {name:<20}{shown(figure):>22}  "
            lines = textwrap.wrap(figure.source, max(30, width - len(head))) or [""]
            print(head + lines[0])
            for line in lines[1:]:
                print(" " * len(head) + line)
        print()
    for note in notes:
        print(f"note: {note}")
    return 0


def shown(figure: Figure) -> str:
    """A figure for people: decimal prefixes for bytes, four digits for what is no whole number."""
    value, unit = figure.value, figure.unit
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if unit in ("B", "B/s"):
        for prefix in ("", "k", "M", "G", "T", "P"):
            if abs(value) < 1000 or prefix == "P":
                return f"{value:.4g} {prefix}{unit}"
            value /= 1000
    number = f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{number} {unit}".rstrip()
