"""The arithmetic of `python -m pipeline estimate`: bytes of a token, speed of teachers and of training.

Every figure carries where it comes from: measured (and on what), given, or scaled from a measurement by a rule that is
stated. The measurements are the files of benchmarks/results.

Legend: P parameters without embedding and head, V vocabulary, D width, T tokens of a row, K top-k ids, n = T/b.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import UserError
from pipeline.schema import CacheSpec

H200_TFLOPS = 989.0
"""Dense bfloat16 peak of the H200 and the H100 SXM, from their data sheets."""
GPU_MEMORY_GB = {"H200": 141.0, "H100": 80.0}
"""Of the cards that rates were measured on, from their data sheets."""
OTHER_MEMORY_GB = 80.0
"""Taken where a rate names none of them."""
VERIFY_RATE, VERIFY_K = 280_000, 64
"""Tokens per second of one core that `verify` checks, and ids a token where that was measured (docs/cache.md)."""
RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
"""Where the measurements are in the repository."""
HIDDEN_BYTES = 2098 / 1536
"""Of one stored hidden value: measured at D = 1536, window 1 (docs/log.md)."""
HIDDEN_RATE, WRITERS = 18_000 * 1536, 3
"""Hidden values a second that one shard's writer encodes (README, Limits), and shards written at one time."""
JSON_BYTES = 800
"""Of a shard's JSON."""
STUDENT_PARAMETERS = 84_175_968
"""Trained ones of six blocks at D = 1536; they grow with the square of the width."""
STUDENT_WIDTH, STUDENT_BLOCKS = 1536, 6
READERS = (1.0, 1.35, 1.81, 2.43, 3.22, 3.4)
"""Ranks that read a row group, on 1, 2, 4, 8, 16, 32 and more ranks: the order of training played through with 32 rows
a rank, groups of 64 rows, a window of 16 (docs/scale.md)."""


@dataclass(frozen=True)
class Figure:
    """One number of an estimate; None where it cannot be known."""

    value: float | int | str | None
    unit: str
    source: str


@dataclass(frozen=True)
class TeacherShape:
    """What of a teacher decides bytes and speed.

    Attributes:
        body: parameters of the layers alone, without embedding and head.
        layers: 0 where they are not known: attention's own work is then left out.
        attention_width: heads times head width.
    """

    name: str
    body: float
    vocab_size: int
    width: int
    layers: int
    attention_width: int
    tied: bool = False

    @property
    def parameters(self) -> float:
        return self.body + self.vocab_size * self.width * (1 if self.tied else 2)

    def flop(self, length: int) -> float:
        """Of one token's prefill, head left out: 2 P, and causal attention over T/2 keys on average."""
        return 2 * self.body + 4 * (length / 2) * self.attention_width * self.layers

    @classmethod
    def of_config(cls, name: str, config: dict[str, Any]) -> TeacherShape:
        """From the fields of a Hugging Face config.json of a dense, gated Transformer.

        Raises:
            KeyError: a field is missing.
        """
        width, layers, heads = (config[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
        head = config.get("head_dim") or width // heads
        kv_heads = config.get("num_key_value_heads") or heads
        layer = 2 * width * head * (heads + kv_heads) + 3 * width * config["intermediate_size"]
        tied = bool(config.get("tie_word_embeddings", False))
        return cls(name, float(layer * layers), config["vocab_size"], width, layers, heads * head, tied)


def _shape(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocab, "tie_word_embeddings": tied,
    }  # fmt: skip


KNOWN = {
    "smollm2-135m": _shape(576, 1536, 30, 9, 3, 49_152, True),
    "qwen2.5-0.5b": _shape(896, 4864, 24, 14, 2, 151_936, True),
    "qwen2.5-1.5b": _shape(1536, 8960, 28, 12, 2, 151_936, True),
    "qwen2.5-7b": _shape(3584, 18_944, 28, 28, 4, 152_064, False),
    "llama-3.1-8b": _shape(4096, 14_336, 32, 32, 8, 128_256, False),
    "llama-3.1-70b": _shape(8192, 28_672, 80, 64, 8, 128_256, False),
}
"""Shapes of published teachers, by the last part of their names in lower case."""


def read_results(folder: Path, name: str) -> dict[str, Any]:
    """One file of benchmarks/results.

    Raises:
        UserError: it is not there, or no JSON with rows.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        beside = " (by default benchmarks/results beside the package pipeline is read)" if folder == RESULTS else ""
        raise UserError(
            f"{path} is missing{beside}: run `python -m benchmarks.{name}`, or name the folder that has it with "
            "--results"
        )
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        record["rows"][0]
    except (ValueError, KeyError, IndexError, TypeError):
        raise UserError(f"{path} holds no measurements: run `python -m benchmarks.{name}` again") from None
    return record


def raw_bytes(spec: CacheSpec) -> dict[str, float]:
    """Uncompressed bytes a token of every fixed-size column, from the schema."""
    return {
        name: math.prod(shape) * spec.value_type(name).bit_width / 8 / spec.length
        for name, shape in spec.shapes().items()
    }


def column_bytes(spec: CacheSpec, storage: dict[str, Any]) -> dict[str, Figure]:
    """Bytes a token of every column as stored.

    Args:
        spec: the cache's shape.
        storage: the content of storage.json.
    """
    rows = [row for row in storage["rows"] if row["layout"] == "ours"]
    ks = np.array([row["K"] for row in rows])
    measured = {name: np.array([row["columns"][name] for row in rows]) for name in rows[0]["columns"]}
    on, raw = storage["spec"], raw_bytes(spec)
    nearest = int(np.abs(np.log(ks / spec.k)).argmin())
    where = f"measured: storage.json, {storage['teacher']}, V={on['vocab_size']}"

    def of_k(name: str) -> float:
        """Bytes of one id or logit between the measured K, the outermost beyond them; times K."""
        return float(np.interp(math.log(spec.k), np.log(ks), measured[name] / ks)) * spec.k

    exact = f"K={spec.k}" if spec.k in ks else f"scaled to K={spec.k}"
    bits = math.log2(spec.vocab_size) / math.log2(on["vocab_size"])
    scaled = "" if spec.vocab_size == on["vocab_size"] else f", times log2 V: {bits:.3f}"
    found: dict[str, Figure] = {}
    for name, whole in raw.items():
        if name == "topk_ids":
            found[name] = _bytes(min(of_k(name) * bits, whole), f"{where}, {exact}{scaled}")
        elif name == "topk_logits":
            found[name] = _bytes(of_k(name), f"{where}, {exact}")
        elif name == "log_tail":
            each = float(measured[name][nearest]) / len(on["taus"])
            found[name] = _bytes(each * len(spec.taus), f"{where}, {len(spec.taus)} temperatures")
        elif name == "attn_map":
            share = float(measured[name][nearest]) / _map_bytes(on)
            found[name] = _bytes(whole * share, f"{where}: {share:.2f} of float16")
        elif name == "hidden":
            share = HIDDEN_BYTES / 4
            found[name] = _bytes(whole * share, f"measured: docs/log.md, D=1536, window 1: {share:.2f} of float32")
        elif name in measured:
            found[name] = _bytes(float(measured[name][nearest]), where)
        else:
            found[name] = _bytes(whole, "not measured: uncompressed, from the schema")
    row = sum(float(measured[name][nearest]) for name in ("sequence_id", "length", "next_id", "doc_ids"))
    found["ids of rows"] = _bytes(row * on["length"] / spec.length, where)
    return found


def _bytes(value: float, source: str) -> Figure:
    return Figure(value, "B/token", source)


def _map_bytes(spec: dict[str, Any]) -> float:
    blocks: int = spec["length"] // spec["block"]
    return float(2 * spec["groups"] * blocks * blocks / spec["length"])


def teacher_rate(
    shape: TeacherShape, spec: CacheSpec, dump: dict[str, Any], peak_tflops: float
) -> tuple[Figure, Figure, Figure, str]:
    """Tokens per second of one GPU: bare prefill, its share of the peak, our share of bare with these signals.

    A teacher that was not measured is read at the share of peak of the measured one nearest in size, and keeps of that
    what we kept there. Text to committed shards against capture alone is what it was for the nearest where both were
    measured.

    Args:
        dump: the content of dump_throughput.json.
        peak_tflops: dense bfloat16 peak of the GPU it shall run on.

    Returns:
        The three figures, and the name of the GPU that was measured.
    """
    case = "hidden" if spec.window else "all" if spec.block else "topk"
    length = dump["settings"]["length"]
    # Shares are of the bare prefill of their own run: a file may hold cases that another card measured.
    shares: dict[str, dict[str, float]] = {}
    bares: dict[str, dict[str, Any]] = {}
    for row in dump["rows"]:
        if row.get("share"):
            shares.setdefault(row["shape"], {}).setdefault(row["case"], row["share"])
        if row["case"] == "bare":
            bares.setdefault(row["shape"], row)
    usable = [name for name in bares if name in KNOWN and shares.get(name, {}).keys() & SIGNALS]
    if not usable:
        raise UserError(
            "dump_throughput.json has no shape with the cases bare and topk or all: give --teacher_tokens_per_s, or "
            "run `python -m benchmarks.dump_throughput` again"
        )
    shapes = {name: TeacherShape.of_config(name, KNOWN[name]) for name in usable}
    near = min(usable, key=lambda name: abs(math.log(shapes[name].body / shape.body)))
    here, bare = shares[near], bares[near]["tokens_per_s"]
    share_of_peak = bare * shapes[near].flop(length) / (H200_TFLOPS * 1e12)
    taken = case if case in here else "all" if "all" in here else "topk"
    end_to_end, ends = 1.0, "text to shards not measured"
    whole = [name for name in usable if shares[name].keys() >= {"committed", "all"}]
    if whole:  # a small teacher waits for the tokeniser, a large one does not
        name = min(whole, key=lambda name: abs(math.log(shapes[name].body / shape.body)))
        end_to_end = shares[name]["committed"] / shares[name]["all"]
        ends = f"text to committed shards {end_to_end:.3f} of that, {name}"
    device = str(bares[near].get("device", dump["device"]))
    where = f"{near}, T={length}, {device}, dump_throughput.json"
    same = near == shape.name and spec.length == length and peak_tflops == H200_TFLOPS
    rate = bare if same else share_of_peak * peak_tflops * 1e12 / shape.flop(spec.length)
    how = "measured" if same else "scaled: 2 P FLOP a token and attention's, at the share of peak below"
    return (
        Figure(rate, "tokens/s", f"{how}: {where}"),
        Figure(
            share_of_peak,
            f"of {peak_tflops:g} TFLOP/s",
            f"measured: {where} (peak {H200_TFLOPS:g}, data sheet)" + _gap(shape, shapes[near]),
        ),
        Figure(here[taken] * end_to_end, "of bare", f"measured: case {taken}, {where}; {ends}"),
        device,
    )


SIGNALS = {"topk", "all", "hidden"}


def card_memory(device: str) -> tuple[float, str]:
    """Gigabytes of the card that a rate names, and where that is from.

    Args:
        device: its name as measured, empty where none was.
    """
    for card, memory in GPU_MEMORY_GB.items():
        if card in device:
            return memory, f"{card}, which the rate was measured on"
    return OTHER_MEMORY_GB, "taken: the rate names no card; --gpu_memory_gb says it"


def verify_rate(k: int) -> Figure:
    """Tokens per second of one core, every byte and number; the numbers a token grow with K, as their time does."""
    how = "measured" if k == VERIFY_K else f"scaled by {VERIFY_K}/{k} ids a token from what was measured"
    where = f"{VERIFY_RATE:,} tokens/s at K={VERIFY_K}, without hidden states, docs/cache.md"
    return Figure(VERIFY_RATE * VERIFY_K / k, "tokens/s", f"{how}: {where}")


def encoding_rate(spec: CacheSpec) -> Figure | None:
    """Tokens per second that the writers of one engine can encode, where hidden states decide it."""
    if not spec.window:
        return None
    rate = WRITERS * HIDDEN_RATE * spec.window / spec.width
    return Figure(rate, "tokens/s", f"README, Limits: 18,000 tokens/s a shard at D=1536, window 1; {WRITERS} shards")


def _gap(shape: TeacherShape, near: TeacherShape) -> str:
    ratio = shape.body / near.body
    if 0.5 <= ratio <= 2:
        return ""
    return f"; the teacher has {ratio:.2g} times its parameters: not measured so far away"


def readers(ranks: int) -> float:
    """Ranks that read a row group, on average."""
    return float(np.interp(math.log2(ranks), range(len(READERS)), READERS))


def student_flop(width: int, blocks: int, vocab_size: int) -> float:
    """Of one trained token: 6 FLOP for each trained parameter, 4 V D for the frozen head."""
    parameters = STUDENT_PARAMETERS * (width / STUDENT_WIDTH) ** 2 * blocks / STUDENT_BLOCKS
    return 6 * parameters + 4 * vocab_size * width


def student_rate(shape: TeacherShape, blocks: int, length: int, train: dict[str, Any] | None, peak: float) -> Figure:
    """Tokens per second of one GPU in training, scaled by FLOPs from the student that was measured.

    Args:
        train: the content of train_throughput.json, None where there is none.
    """
    rows = [row for row in (train or {"rows": []})["rows"] if row.get("case") == "shards"]
    if train is None or not rows:
        return Figure(None, "tokens/s", "not measured yet (no train_throughput.json): give --student_tokens_per_s")
    row = min(rows, key=lambda row: (abs(row["length"] - length), -row["tokens_per_s"]))
    vocab = row.get("vocab", 151_936)
    measured = student_flop(row.get("width", STUDENT_WIDTH), row.get("blocks", STUDENT_BLOCKS), vocab)
    scale = measured / student_flop(shape.width, blocks, shape.vocab_size) * peak / H200_TFLOPS
    how = "measured" if abs(scale - 1) < 1e-6 else f"scaled by {scale:.3f} (6 P + 4 V D FLOP a token, peak)"
    where = (
        f"preset {row.get('preset')}, {row.get('batch')} x {row['length']}, {row.get('device', train['device'])}, "
        "train_throughput.json"
    )
    return Figure(row["tokens_per_s"] * scale, "tokens/s", f"{how}: {where}")
