"""One measurement of `dump_throughput`, in a process of its own so that each starts with an empty GPU.

    python -m benchmarks.throughput_case '{"case": "topk", "model": "...", ...}'

prints one line of JSON: tokens_per_s, memory_gb, tokens, seconds.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.host_times import HostTimes, host_times
from benchmarks.measured import file_system, usable_cores
from benchmarks.processes import given_case, report
from teacher_dump.engine import EngineOptions, TeacherEngine
from teacher_dump.rows import CaptureSpec, PackedRow

TAUS = (1.0, 1.2, 1.5, 2.0)


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        case: bare, flat, topk, all, hidden or committed.
        model: a Hugging Face folder; with `dummy`, its config.json is enough.
        tokens: tokens measured, after two steps of warm-up.
        cache, text: of the case `committed`: where the cache is written, and a corpus of .jsonl.zst or .jsonl.
        profile: file for a table of kernels by their time, of the case `committed` one of the host's time.
    """

    case: str
    model: str
    tokens: int
    length: int = 2048
    k: int = 64
    block: int = 64
    groups: int = 6
    window: int = 64
    rows_per_step: int = 0
    dummy: bool = True
    tokens_per_shard: int = 1_048_576
    cache: str = ""
    text: str = ""
    profile: str = ""

    def spec(self) -> CaptureSpec:
        block = self.block if self.case in ("all", "hidden", "committed") else 0
        return CaptureSpec(self.k, TAUS, block, self.groups, self.window if self.case == "hidden" else 0)

    def options(self) -> EngineOptions:
        return EngineOptions(rows_per_step=self.rows_per_step, load_format="dummy" if self.dummy else "auto")


def vocabulary(model: str) -> int:
    return int(json.loads((Path(model) / "config.json").read_text())["vocab_size"])


def random_rows(case: Case) -> Iterator[PackedRow]:
    generator = np.random.default_rng(0)
    vocab, nothing = vocabulary(case.model), np.zeros(case.length, dtype=np.int32)
    for row in range(case.tokens // case.length):
        yield PackedRow(row, generator.integers(0, vocab, case.length, dtype=np.int32), 0, nothing, ("0",))


def text_rows(case: Case) -> Iterator[PackedRow]:
    """Running text, tokenised and packed as a dump does it."""
    from teacher_dump.corpus import CorpusConfig
    from teacher_dump.packing import PackingCount, pack
    from teacher_dump.plan import open_plan
    from teacher_dump.teacher import load_tokenizer

    tokenizer = load_tokenizer(Path(case.model))
    corpus = CorpusConfig(source=case.text)
    plan = open_plan(Path(case.cache or "no-cache"), corpus, case.tokens, Path("data"))

    def encode(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]

    documents = plan.documents(corpus, plan.unit(0, "train"))
    rows = case.tokens // case.length
    return pack(documents, encode, packing="stream", length=case.length, rows=rows, separator=0, count=PackingCount())


def rows_of(case: Case) -> list[PackedRow]:
    """Random ids for random weights, text for real ones."""
    return list(random_rows(case) if case.dummy else text_rows(case))


def through_engine(case: Case) -> dict[str, Any]:
    """Captured rows as far as the host's memory; nothing is written."""
    with TeacherEngine(Path(case.model), length=case.length, capture=case.spec(), options=case.options()) as engine:
        rows = rows_of(case)
        with profiled(case.profile):
            started = time.perf_counter()
            for _ in engine.stream(0, rows):
                pass
            seconds = time.perf_counter() - started
        return {"seconds": seconds, "tokens": len(rows) * case.length, **memory()}


def through_vllm(case: Case) -> dict[str, Any]:
    """vLLM itself, with the memory for keys and values that ours gives it: prefill alone, or with prompt_logprobs."""
    from vllm import LLM, SamplingParams

    from teacher_dump.engine import default_rows_per_step
    from teacher_dump.kv_memory import kv_cache_bytes
    from teacher_dump.model_config import read_config

    rows_per_step = case.rows_per_step or default_rows_per_step(case.length)
    flat = case.case == "flat"
    arguments: dict[str, Any] = {"max_logprobs": case.k} if flat else {}
    llm = LLM(
        case.model,
        load_format="dummy" if case.dummy else "auto",
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        enable_chunked_prefill=False,
        max_model_len=case.length + 1,
        max_num_seqs=2 * rows_per_step,
        max_num_batched_tokens=rows_per_step * case.length,
        kv_cache_memory_bytes=kv_cache_bytes(read_config(Path(case.model) / "config.json"), case.length, rows_per_step),
        **arguments,
    )
    asked: dict[str, Any] = {"prompt_logprobs": case.k, "flat_logprobs": True} if flat else {}
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False, **asked)
    prompts: list[Any] = [{"prompt_token_ids": row.input_ids_L.tolist()} for row in rows_of(case)]
    llm.generate(prompts[: 2 * rows_per_step], params, use_tqdm=False)
    with profiled(case.profile):
        started = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "tokens": len(prompts) * case.length, **memory()}


def often_enough(text: Path, folder: Path, shards: int, tokens_per_shard: int) -> str:
    """A glob of links to a text, as many as give that many shards: the embedded corpus is too small for some."""
    from teacher_dump.corpus import CorpusConfig
    from teacher_dump.plan import open_plan

    folder.mkdir(parents=True)
    for copy in range(1000):
        (folder / f"{copy:03d}-{text.name}").symlink_to(text.resolve())
        corpus = CorpusConfig(source=f"{folder}/*")
        if open_plan(Path("no-cache"), corpus, tokens_per_shard, Path("data")).train_units >= shards:
            return corpus.source
    raise ValueError(f"{text} is too small a text for {shards} shards of {tokens_per_shard} tokens")


def committed(case: Case) -> dict[str, Any]:
    """A dump as a user runs it, from text to committed shards; the clock starts when the engine is ready.

    `cores` and `file_system` of the cache are what it depends on besides the GPU.
    """
    from teacher_dump.corpus import CorpusConfig
    from teacher_dump.pending import wanted_units
    from teacher_dump.settings import DumpConfig
    from teacher_dump.shard_loop import take_shards
    from teacher_dump.work import prepare

    shards = max(1, case.tokens // case.tokens_per_shard)
    links = Path(f"{case.cache}-text")
    config = DumpConfig(
        corpus=CorpusConfig(source=often_enough(Path(case.text), links, shards, case.tokens_per_shard)),
        cache=Path(case.cache),
        teacher=case.model,
        shards=shards,
        heldout_shards=0,
        tokens_per_shard=case.tokens_per_shard,
        length=case.length,
        k=case.k,
        taus=TAUS,
        block=case.block,
        groups=case.groups,
        engine=replace(case.options(), load_format="auto"),
    )
    work = prepare(config)
    with host_times() if case.profile else nullcontext() as times:
        report = _Clock(times)
        take_shards(work, wanted_units(work), report)
        seconds = time.perf_counter() - report.started
    if times is not None:
        Path(case.profile).write_text(times.table(seconds, report.tokens), encoding="utf-8")
    size = sum(path.stat().st_size for path in Path(case.cache).glob("shard-*"))
    host = {"cores": usable_cores(), "file_system": file_system(Path(case.cache))}
    return {"seconds": seconds, "tokens": report.tokens, "bytes_per_token": size / report.tokens, **host, **memory()}


class _Clock:
    """The report of a dump: when the engine was ready, and how many tokens were committed."""

    def __init__(self, times: HostTimes | None) -> None:
        self.started, self.tokens, self._times = 0.0, 0, times

    def ready(self) -> None:
        if self._times is not None:
            self._times.begin()
        self.started = time.perf_counter()

    def committed(self, record: Any) -> None:
        self.tokens += record.tokens

    def __getattr__(self, name: str) -> Any:
        return lambda *args: None


def memory() -> dict[str, float]:
    import torch

    return {"memory_gb": torch.cuda.max_memory_reserved() / 1e9 if torch.cuda.is_available() else 0.0}


class profiled:  # noqa: N801 - reads as a statement
    """Writes the kernels by their time to a file, where one is named."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.profiler: Any = None

    def __enter__(self) -> None:
        if self.path:
            from torch.profiler import ProfilerActivity, profile

            self.profiler = profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU])
            self.profiler.__enter__()

    def __exit__(self, *exc_info: object) -> None:
        if self.profiler is not None:
            import torch

            torch.cuda.synchronize()
            self.profiler.__exit__(None, None, None)
            kernels = self.profiler.key_averages()
            text = kernels.table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=60)
            Path(self.path).write_text(text)


def import_vllm() -> None:
    """Now, which takes long; the cases import it where they use it."""
    from teacher_dump.vllm_process import prepare_process

    os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"  # it is compiled at its first use, and not what is measured
    prepare_process(quiet=True)
    from vllm import LLM  # noqa: F401


def main() -> None:
    import_vllm()
    case = Case(**given_case())
    measure = {"bare": through_vllm, "flat": through_vllm, "committed": committed}.get(case.case, through_engine)
    found = measure(case)
    report({**found, "tokens_per_s": found["tokens"] / found["seconds"]})


if __name__ == "__main__":
    main()
