"""What an estimate is of: a dump's manifest, a student's, and the options that stand in their place.

`pipeline` cannot import the stages: it reads their YAML files, with their defaults repeated here.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.costs import H200_TFLOPS, KNOWN, RESULTS, STUDENT_BLOCKS, TeacherShape
from pipeline.errors import UserError, one_line
from pipeline.schema import CacheSpec

DUMP_DEFAULTS: dict[str, Any] = {
    "teacher": "embedded:smollm2-135m",
    "shards": 64,
    "heldout_shards": 1,
    "tokens_per_shard": 1_048_576,
    "length": 2048,
    "packing": "stream",
    "k": 64,
    "taus": (1.0, 1.2, 1.5, 2.0),
    "block": 64,
    "groups": 6,
    "window": 0,
    "tail_samples": 0,
}
"""What a dump takes where its manifest says nothing; a test compares them with stage one's own."""
CORPUS_DEFAULTS = {"bytes_per_token": 6.0, "range_bytes": 262_144}
DUMP_FIELDS = {*DUMP_DEFAULTS, "corpus", "cache", "separator", "seed", "gpus", "ray", "units", "engine", "data"}
POSITIVE = ("tokens", "shards", "tokens_per_shard", "length", "k", "groups")
OVERRIDES = (
    "teacher", "shards", "heldout_shards", "tokens_per_shard", "length", "k", "block", "groups", "window",
    "tail_samples",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What is planned; options left out are the manifest's."""

    manifest: str = ""
    """the dump: a file of manifests/dumps"""
    student: str = ""
    """the training: a file of manifests/students; by default six blocks, one epoch"""
    tokens: float | None = None
    """training tokens, instead of `shards`; rounded up to whole shards"""
    shards: int | None = None
    """training shards"""
    heldout_shards: int | None = None
    """held-out shards"""
    tokens_per_shard: int | None = None
    """tokens of one shard"""
    length: int | None = None
    """T, tokens of one row"""
    k: int | None = None
    """K, ids and logits kept per position"""
    block: int | None = None
    """tokens of a pooling block of the attention maps; 0: no maps"""
    groups: int | None = None
    """depth groups of the maps"""
    window: int | None = None
    """tokens of a window of hidden states; 0: none"""
    tail_samples: int | None = None
    """ids drawn from the tail per position"""
    teacher: str | None = None
    """a published teacher (by name), or a folder with its config.json"""
    teacher_params: float | None = None
    """parameters of another teacher, embedding and head included; of a mixture of experts those that are active"""
    vocab_size: int | None = None
    """its vocabulary"""
    width: int | None = None
    """its width"""
    layers: int | None = None
    """its layers, for the work of its attention"""
    gpus: int = 1
    """GPUs that share the work"""
    tp: int | None = None
    """GPUs one teacher is spread over; by default as many as its bfloat16 weights need"""
    gpu_memory_gb: float | None = None
    """memory of a GPU; by default that of the card the measured rate names, else 80"""
    gpu_tflops: float = H200_TFLOPS
    """dense bfloat16 peak of a GPU, in TFLOP/s; rates are scaled by it"""
    teacher_tokens_per_s: float | None = None
    """tokens per second of one GPU in stage one, instead of the measured rate"""
    student_tokens_per_s: float | None = None
    """tokens per second of one GPU in stage two, instead of the measured rate"""
    epochs: int | None = None
    """passes over the cache"""
    gpu_hour_cost: float | None = None
    """price of a GPU hour, in any currency"""
    results: Path = RESULTS
    """folder with the measurements; by default the repository's benchmarks/results, wherever the command runs"""
    json: bool = False
    """print JSON instead of a table"""


@dataclass(frozen=True)
class Plan:
    """A dump and a training as planned: the manifests' values with the options' in their place."""

    spec: CacheSpec
    teacher: TeacherShape
    train_shards: int
    heldout_shards: int
    tokens_per_shard: int
    corpus: dict[str, float]
    blocks: int
    epochs: int
    source: dict[str, str]

    @property
    def train_tokens(self) -> int:
        return self.train_shards * self.tokens_per_shard

    @property
    def all_shards(self) -> int:
        return self.train_shards + self.heldout_shards

    @property
    def all_tokens(self) -> int:
        return self.all_shards * self.tokens_per_shard


def read_yaml(path: Path, option: str) -> dict[str, Any]:
    """A manifest's fields.

    Raises:
        UserError: no such file, or not a YAML mapping.
    """
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise UserError(
            f"{option} {path}: there is no such file" + (f": known there are {', '.join(known)}" if known else "")
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{option} {path} is no YAML ({one_line(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{option} {path} holds no fields: name a file as those of manifests/dumps")
    return content


def planned(options: Options) -> Plan:
    """What the manifests and options ask for.

    Raises:
        UserError: a file or value is missing or wrong; names it.
    """
    if not options.manifest:
        raise UserError("--manifest is missing: name a file of manifests/dumps")
    path = Path(options.manifest)
    given = read_yaml(path, "--manifest")
    unknown = sorted(map(str, given.keys() - DUMP_FIELDS))
    if unknown:
        raise UserError(f"--manifest {path}: {', '.join(unknown)} is no option of a dump")
    values = {**DUMP_DEFAULTS, **{name: given[name] for name in given.keys() & DUMP_DEFAULTS.keys()}}
    source = {name: f"{path}" if name in given else "default of a dump" for name in DUMP_DEFAULTS}
    for name in OVERRIDES:
        if getattr(options, name) is not None:
            values[name], source[name] = getattr(options, name), f"given: --{name}"
    for name in ("shards", "heldout_shards", "tokens_per_shard", "length", "k", "block", "groups", "window"):
        least = 1 if name in POSITIVE else 0
        if type(values[name]) is not int or values[name] < least:
            raise UserError(f"{name} is {values[name]!r} ({source[name]}): must be a whole number, {least} or more")
    if values["tokens_per_shard"] % values["length"]:
        raise UserError(
            f"tokens_per_shard {values['tokens_per_shard']} ({source['tokens_per_shard']}) must be a multiple of "
            f"length {values['length']} ({source['length']})"
        )
    for name in ("block", "window"):
        if values[name] and values["length"] % values[name]:
            raise UserError(
                f"length {values['length']} ({source['length']}) must be a multiple of {name} {values[name]}"
            )
    if options.tokens is not None:
        if not 1 <= options.tokens < math.inf:
            raise UserError(f"--tokens {options.tokens:g}: must be 1 or more")
        if options.shards is not None:
            raise UserError("--tokens and --shards both say how much: leave one of them out")
        values["shards"] = math.ceil(options.tokens / values["tokens_per_shard"])
        source["shards"] = f"given: --tokens, in whole shards of {values['tokens_per_shard']:,}"
    teacher, source["teacher"] = the_teacher(options, str(values["teacher"]), source["teacher"])
    if values["k"] > teacher.vocab_size:
        raise UserError(f"k {values['k']} ({source['k']}): the teacher's vocabulary has only {teacher.vocab_size} ids")
    spec = CacheSpec(
        length=values["length"],
        vocab_size=teacher.vocab_size,
        k=values["k"],
        taus=tuple(values["taus"]),
        block=values["block"],
        groups=values["groups"] if values["block"] else 0,
        window=values["window"],
        width=teacher.width,
        tail_samples=values["tail_samples"],
        packing=values["packing"],
    )
    blocks, epochs = the_training(options, source)
    return Plan(
        spec,
        teacher,
        values["shards"],
        values["heldout_shards"],
        values["tokens_per_shard"],
        the_corpus(given.get("corpus"), path),
        blocks,
        epochs,
        source,
    )


def the_corpus(given: Any, manifest: Path) -> dict[str, float]:
    """How much text a unit is given: fields of the corpus, or of the file that the dump's manifest names."""
    if isinstance(given, str):
        given = read_yaml(manifest.parent / given, f"--manifest {manifest}: corpus")
    fields_of = given if isinstance(given, dict) else {}
    found = {name: fields_of.get(name, default) for name, default in CORPUS_DEFAULTS.items()}
    for name, value in found.items():
        if not isinstance(value, int | float) or not value > 0:
            raise UserError(f"--manifest {manifest}: corpus.{name} is {value!r}: must be a positive number")
    return found


def the_training(options: Options, source: dict[str, str]) -> tuple[int, int]:
    """Blocks and epochs."""
    blocks, epochs = STUDENT_BLOCKS, 1
    source["blocks"] = source["epochs"] = "default"
    if options.student:
        content = read_yaml(Path(options.student), "--student")
        shape = ((content.get("model") or {}).get("student") or {}).get("blocks", blocks)
        passes = (content.get("trainer") or {}).get("max_epochs", epochs)
        for name, value in (("model.student.blocks", shape), ("trainer.max_epochs", passes)):
            if type(value) is not int or value < 1:
                raise UserError(f"--student {options.student}: {name} is {value!r}: must be a whole number, 1 or more")
        blocks, epochs = shape, passes
        source["blocks"] = source["epochs"] = options.student
    if options.epochs is not None:
        if options.epochs < 1:
            raise UserError(f"--epochs {options.epochs}: must be 1 or more")
        epochs, source["epochs"] = options.epochs, "given: --epochs"
    return blocks, epochs


def the_teacher(options: Options, name: str, source: str) -> tuple[TeacherShape, str]:
    """The teacher's shape and where it is from.

    Raises:
        UserError: nothing says its size.
    """
    for option in ("teacher_params", "vocab_size", "width", "layers"):
        value = getattr(options, option)
        if value is not None and not 1 <= value < math.inf:
            raise UserError(f"--{option} {value:g}: must be 1 or more")
    short = name.split(":")[-1].rstrip("/").split("/")[-1].lower()
    config, where = KNOWN.get(short), f"{source}; published shape"
    file = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if file.name == "config.json" and file.is_file():
        config, where = json.loads(file.read_text(encoding="utf-8")), str(file)
    shape = None
    if config is not None:
        try:
            shape = TeacherShape.of_config(short, config)
        except KeyError as error:
            raise UserError(f"{where} lacks {error}: give --teacher_params, --vocab_size and --width instead") from None
    vocab = options.vocab_size or (shape.vocab_size if shape else None)
    width = options.width or (shape.width if shape else None)
    if options.teacher_params is None:
        if shape is None:
            raise UserError(
                f"teacher {name} ({source}): its size is not known here; give --teacher_params, --vocab_size and "
                f"--width, or a folder with its config.json (known are {', '.join(KNOWN)})"
            )
        return shape, where
    if vocab is None or width is None:
        missing = "--vocab_size" if vocab is None else "--width"
        raise UserError(f"--teacher_params {options.teacher_params:g} needs {missing} too: it decides bytes and speed")
    tied = shape.tied if shape else False
    body = options.teacher_params - vocab * width * (1 if tied else 2)
    if body <= 0:
        raise UserError(
            f"--teacher_params {options.teacher_params:g}: embedding and head alone have {vocab * width * 2:,} "
            "(vocabulary times width, twice)"
        )
    layers = options.layers or (shape.layers if shape else 0)
    return TeacherShape(short, body, vocab, width, layers, width, tied), "given: --teacher_params" + (
        "" if layers else " (without --layers attention's own work is left out)"
    )
