"""The settings of a dump: what manifests/dumps/*.yaml and the command line may say."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.config import Place
from pipeline.errors import UserError
from pipeline.schema import MOST_GROUPS, SCHEMA_MAJOR, CacheSpec
from pipeline.teacher_folder import TeacherFacts
from teacher_dump.corpus import CorpusConfig
from teacher_dump.engine import EngineOptions, default_rows_per_step
from teacher_dump.rows import CaptureSpec


@dataclass(frozen=True)
class DumpConfig:
    """A dump: a teacher, a corpus, and what is kept of every position."""

    corpus: CorpusConfig
    """the text: a file of manifests/corpora, or its fields"""
    cache: Place
    """folder the cache is written to; an existing one of the same settings is continued"""
    teacher: str = "embedded:smollm2-135m"
    """a hub id, a local Hugging Face folder, or embedded:smollm2-135m"""
    shards: int = 64
    """training shards the cache shall have; those that are there are kept"""
    units: str = ""
    """FIRST:END, to write only training shards FIRST to END - 1 of `shards` in this run, as a task of a job array does;
    held-out shards belong to the run that begins with 0; empty: all"""
    heldout_shards: int = 1
    """held-out shards for evaluation, from documents that no training shard contains"""
    tokens_per_shard: int = 1_048_576
    """tokens of one shard; a multiple of `length`"""
    length: int = 2048
    """T, tokens of one row: the context of teacher and student"""
    packing: Literal["stream", "document"] = "stream"
    """stream: documents joined by the separator and cut at T; document: one document a row, padded"""
    separator: str | None = None
    """token that joins documents; by default <|endoftext|> where the tokenizer has it, else its
    end-of-sequence token"""
    k: int = 64
    """K, ids and logits kept per position"""
    taus: tuple[float, ...] = (1.0, 1.2, 1.5, 2.0)
    """temperatures at which the mass outside the top k is kept; must contain 1"""
    block: int = 64
    """b, tokens of a pooling block of the attention maps; 0 leaves the maps out"""
    groups: int = 6
    """G, depth groups the layers' attention maps are averaged in"""
    window: int = 0
    """w, tokens of a window of pooled hidden states (the paper's Frobenius term needs them); 0 leaves them out"""
    tail_samples: int = 0
    """M, ids drawn from outside the top k per position; 0 leaves them out"""
    seed: int = 0
    """seed of the tail draws"""
    gpus: int = 0
    """GPUs of this machine to use, engine.tensor_parallel of them an engine, a process each; without a GPU so many
    engines share the cores; 0: one engine"""
    ray: str = ""
    """run on a Ray cluster: its address (host:port); auto for the one that RAY_ADDRESS names or that this machine is
    part of (where there is none, Ray is started here); local to start Ray here; empty: without Ray"""
    engine: EngineOptions = field(default_factory=EngineOptions)
    """how vLLM runs the teacher"""
    data: Path = Path("data")
    """folder of the embedded teacher and corpus"""

    @property
    def rows_per_shard(self) -> int:
        return self.tokens_per_shard // self.length

    def unit_range(self) -> range:
        """The training units this run shall write.

        Raises:
            UserError: `units` is no range within `shards`.
        """
        if not self.units:
            return range(self.shards)
        match = re.fullmatch(r"(\d*):(\d*)", self.units)
        if match is None:
            raise UserError(f"--units {self.units}: must be FIRST:END, such as 0:64")
        first, end = int(match[1] or 0), int(match[2] or self.shards)
        if not first < end <= self.shards:
            raise UserError(f"--units {self.units}: must be a part of 0:{self.shards} (--shards), and not empty")
        return range(first, end)

    def check(self, facts: TeacherFacts) -> None:
        """Refuse settings that cannot work.

        Raises:
            UserError: names the option, what was found and what is allowed.
        """
        for name in ("shards", "k", "length", "tokens_per_shard", "groups"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("heldout_shards", "block", "window", "tail_samples"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} {getattr(self, name)}: must not be negative")
        if self.k > facts.vocab_size:
            raise UserError(f"--k {self.k}: the teacher's vocabulary has only {facts.vocab_size} ids")
        if self.tokens_per_shard % self.length:
            raise UserError(f"--tokens_per_shard {self.tokens_per_shard}: must be a multiple of --length {self.length}")
        for name in ("block", "window"):
            size = getattr(self, name)
            if size and self.length % size:
                raise UserError(f"--length {self.length}: must be a multiple of --{name} {size} (or set --{name} 0)")
        if self.block and self.groups > facts.layers:
            raise UserError(f"--groups {self.groups}: the teacher has only {facts.layers} layers")
        usable = all(0 < tau < math.inf for tau in self.taus) and len(set(self.taus)) == len(self.taus)
        if 1.0 not in self.taus or not usable:
            raise UserError(f"--taus {list(self.taus)}: must be different positive temperatures, 1 among them")
        if list(self.taus) != sorted(self.taus):
            raise UserError(f"--taus {list(self.taus)}: must be in ascending order")
        if self.tail_samples and self.k == facts.vocab_size:
            raise UserError(f"--tail_samples {self.tail_samples}: with --k {self.k} there is no tail to draw from")
        self.unit_range()
        spec = self.spec(facts)
        problem = spec.problem()
        if problem is not None:
            raise UserError(f"--{problem[0]} {problem[1]}")
        if self.rows_per_shard > MOST_GROUPS * spec.rows_per_group:
            most = MOST_GROUPS * spec.rows_per_group * self.length
            raise UserError(
                f"--tokens_per_shard {self.tokens_per_shard}: a shard has at most {most}; ask for more shards"
            )
        if not 0.0 <= self.corpus.heldout_fraction < 1.0:
            raise UserError(f"--corpus.heldout_fraction {self.corpus.heldout_fraction}: must be in [0, 1)")
        if not 0.0 < self.corpus.bytes_per_token < math.inf:
            raise UserError(f"--corpus.bytes_per_token {self.corpus.bytes_per_token}: must be a positive number")
        for name in ("range_bytes", "max_document_bytes"):
            if getattr(self.corpus, name) < 1:
                raise UserError(f"--corpus.{name} {getattr(self.corpus, name)}: must be at least 1")

    def capture(self) -> CaptureSpec:
        return CaptureSpec(self.k, self.taus, self.block, self.groups, self.window, self.tail_samples, self.seed)

    def spec(self, facts: TeacherFacts) -> CacheSpec:
        return CacheSpec(
            length=self.length,
            vocab_size=facts.vocab_size,
            k=self.k,
            taus=self.taus,
            block=self.block,
            groups=self.groups if self.block else 0,
            window=self.window,
            width=facts.width,
            tail_samples=self.tail_samples,
            packing=self.packing,
        )

    def compat_fields(self, facts: TeacherFacts) -> dict[str, Any]:
        """What cache, student and checkpoint must share; the engine's options are resolved ones."""
        head_dtype = self.engine.dtype if self.engine.head_dtype == "auto" else self.engine.head_dtype
        return {
            "teacher": facts.teacher_sha256,
            "tokenizer": facts.tokenizer_sha256,
            "vocab_size": facts.vocab_size,
            "head_dtype": head_dtype,
            "logit_scale": facts.logit_scale,
            "soft_cap": facts.soft_cap,
            "schema_major": SCHEMA_MAJOR,
        }

    def data_fields(self, facts: TeacherFacts, corpus_id: str) -> dict[str, Any]:
        """What decides the rows. The corpus's place is not among it, nor the number of shards, nor the document length
        at which a dump stops: raising that goes on with the same cache."""
        corpus = asdict(self.corpus)
        for name in ("source", "hub_config", "hub_split", "hub_revision", "max_document_bytes"):
            del corpus[name]
        return {
            "corpus": corpus_id,
            **{f"corpus.{name}": value for name, value in corpus.items()},
            "tokens_per_shard": self.tokens_per_shard,
            "separator_id": facts.separator_id,
            **self.spec(facts).to_record(),
            "seed": self.seed if self.tail_samples else 0,
            "dtype": self.engine.dtype,
            "rows_per_step": self.engine.rows_per_step,
        }


def resolve_engine(options: EngineOptions, length: int, stored: str) -> EngineOptions:
    """Replace what is left to choose by what it comes to here, so that identities say it.

    Args:
        length: T.
        stored: dtype of the teacher's weights on disk.
    """
    dtype = options.dtype if options.dtype != "auto" else ("bfloat16" if stored == "float32" else stored)
    rows = options.rows_per_step or default_rows_per_step(length)
    return replace(options, dtype=dtype, rows_per_step=rows)  # type: ignore[arg-type]


def to_plain(config: DumpConfig) -> dict[str, Any]:
    """The resolved configuration as JSON values."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return value if value is None or isinstance(value, int | float | str) else str(value)

    result: dict[str, Any] = plain(asdict(config))
    return result
