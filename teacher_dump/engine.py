"""The teacher in vLLM: packed rows in, captured rows out, as a stream.

Pure prefill: one request a row, one token asked for and thrown away, whole prompts only. A step of the engine is a
function of (unit, step): `rows_per_step` rows in order, never rows of two units, so the same unit gives the same rows
whoever else works.

Legend: T sequence length of the cache, L tokens of one row.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.errors import UserError
from teacher_dump.kv_memory import kv_cache_bytes
from teacher_dump.model_config import read_config
from teacher_dump.rows import CapturedRow, CaptureSpec, PackedRow
from teacher_dump.vllm_process import StartLog, keep_freed_pages, prepare_process, shut_down, sockets_of

if TYPE_CHECKING:
    from teacher_dump.capture import CapturedStep, ModelFacts

_CPU_TOKENS, _GPU_TOKENS = 2048, 32768
"""Tokens of a step where `rows_per_step` leaves the choice: enough to fill the device's matrix units."""
STEPS_TO_SETTLE = 4
"""At most two steps are under way; each may take a call to start and one to end."""


@dataclass(frozen=True)
class EngineOptions:
    """How the teacher runs; `dtype` and `head_dtype` change the rounding of what it says, nothing else does."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Of weights and activations; auto takes the checkpoint's, bfloat16 where that is float32."""
    head_dtype: Literal["auto", "float32"] = "auto"
    """Of the logits; auto is the dtype of the activations."""
    tensor_parallel: int = 1
    """Devices one teacher is spread over."""
    gpu_memory_utilization: float = 0.9
    """Part of the device's memory that must be free when the teacher starts (GPU only)."""
    rows_per_step: int = 0
    """Sequences of one engine step; 0 fills a step with 32768 tokens on a GPU, 2048 on a CPU."""
    load_format: Literal["auto", "dummy"] = "auto"
    """dummy: random weights of the shape config.json gives, for measuring speed without a checkpoint."""
    enforce_eager: bool = True
    """Run without torch.compile: within 2% of it in prefill, and starts at once. Pooled hidden states need it."""
    quiet: bool = True
    """Keep vLLM's and transformers' notes and progress bars off the terminal; what failed is always shown."""


def default_rows_per_step(length: int, on_gpu: bool | None = None) -> int:
    """Sequences of T tokens that fill an engine step of a GPU or of a CPU; None: of this machine's."""
    if on_gpu is None:
        import torch

        on_gpu = torch.cuda.is_available()
    return max(1, (_GPU_TOKENS if on_gpu else _CPU_TOKENS) // length)


class TeacherEngineError(UserError):
    """The engine died; the text names it and what it said. Rows not yet yielded are lost, committed files are not."""


class TeacherEngine:
    """A teacher ready to read rows.

    Args:
        model: a Hugging Face folder.
        length: T; no row may be longer.
        capture: what to keep of every row.
        options: how to run.

    Attributes:
        rows_per_step: sequences of one engine step.
        vocab_size: V, the columns of the teacher's head.
        width: D.
        layers: decoder layers.
        head_dtype: dtype the logits are computed in, such as "bfloat16".
        logit_scale, soft_cap: as vLLM applies them, cap first, then scale; the captured logits have both.
        on_cpu: whether vLLM runs on a CPU.

    Raises:
        UserError: the folder, the options or the spec do not fit; names which, and the remedy.
        TeacherEngineError: vLLM could not start for another reason.
    """

    _alive = 0
    """Engines of this process: vLLM's process groups are shared and go with the last one."""

    def __init__(self, model: Path, *, length: int, capture: CaptureSpec, options: EngineOptions) -> None:
        self.model, self.length, self.capture, self.options = Path(model), length, capture, options
        config = read_config(self.model / "config.json")
        self._check(config)
        prepare_process(options.quiet)
        self._engine: Any = None
        self._sockets: list[Any] = []
        self._log = StartLog(options.quiet)
        try:
            with self._log:
                facts = self._start(config)
                if not (self.on_cpu or isinstance(facts, str)):
                    self._warm_up()
        except Exception as error:
            self.close()
            raise self._explained(error, f"vLLM could not start the teacher {self.model}") from error
        if isinstance(facts, str):
            self.close()
            raise UserError(facts)
        self.vocab_size: int = facts.vocab_size
        self.width: int = facts.width
        self.layers: int = facts.layers
        self.head_dtype: str = facts.head_dtype
        self.logit_scale: float = facts.logit_scale
        self.soft_cap: float | None = facts.soft_cap

    def _check(self, config: dict[str, Any]) -> None:
        spec, positions = self.capture, config.get("max_position_embeddings")
        for name, size in (("block", spec.block), ("window", spec.window)):
            if size and self.length % size:
                raise UserError(f"{name}: {size} does not divide the sequence length {self.length}: choose a divisor")
        parts, heads = self.options.tensor_parallel, config.get("num_attention_heads")
        if heads and heads % parts:
            divisors = [n for n in range(1, heads + 1) if heads % n == 0]
            raise UserError(
                f"engine.tensor_parallel: {parts} does not divide the {heads} attention heads of {self.model}: "
                f"choose one of {divisors}"
            )
        if spec.window and not self.options.enforce_eager:
            raise UserError("enforce_eager: false, but pooled hidden states (window > 0) need it: set it to true")
        if positions and self.length > positions and not config.get("rope_scaling"):
            raise UserError(f"length: {self.length} is more than the {positions} positions of {self.model}: lower it")

    def _start(self, config: dict[str, Any]) -> ModelFacts | str:
        from vllm import EngineArgs, LLMEngine
        from vllm.platforms import current_platform

        self.on_cpu: bool = current_platform.is_cpu()
        options, length = self.options, self.length
        if self.on_cpu:
            keep_freed_pages()
            if options.tensor_parallel > 1:  # else vLLM wants a NUMA node for every rank
                os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        self.rows_per_step: int = options.rows_per_step or default_rows_per_step(length)
        arguments: dict[str, Any] = {
            "model": str(self.model),
            "skip_tokenizer_init": True,
            "dtype": options.dtype,
            "load_format": options.load_format,
            "tensor_parallel_size": options.tensor_parallel,
            # Within a placement group of Ray vLLM would otherwise make Ray actors of its ranks.
            "distributed_executor_backend": "mp" if options.tensor_parallel > 1 else None,
            # vLLM's own is for messages smaller than any of ours, and takes a process or two to try out.
            "disable_custom_all_reduce": True,
            "gpu_memory_utilization": options.gpu_memory_utilization,
            "enforce_eager": options.enforce_eager,
            "enable_prefix_caching": False,
            "enable_chunked_prefill": False,
            "max_model_len": length + 1,
            "max_num_seqs": 2 * self.rows_per_step,
            "max_num_batched_tokens": max(length + 1, self.rows_per_step * length),
            "worker_extension_cls": "teacher_dump.capture.CaptureWorkerExtension",
            "generation_config": "vllm",
            "disable_log_stats": True,
            # On a GPU the next step is launched while one runs. Keys and values get the room of two steps, so that the
            # rest of the memory is the capture's.
            "async_scheduling": not self.on_cpu,
            "disable_cascade_attn": True,
            "kv_cache_memory_bytes": kv_cache_bytes(config, length, self.rows_per_step, options.tensor_parallel),
            "use_tqdm_on_load": not options.quiet,
        }
        if options.head_dtype != "auto":
            arguments["hf_overrides"] = {"head_dtype": options.head_dtype}
        if not options.enforce_eager:
            arguments["compilation_config"] = {"cudagraph_mode": "NONE"}
        known = {field.name for field in fields(EngineArgs)}
        self._engine = LLMEngine.from_engine_args(EngineArgs(**{k: v for k, v in arguments.items() if k in known}))
        TeacherEngine._alive += 1
        self._sockets = sockets_of(self._engine)
        return self._engine.collective_rpc("capture_install", args=(self.capture, length))[0]

    def _warm_up(self) -> None:
        """Two steps of the largest size: kernels are compiled and memory is taken before the first shard needs them."""
        count = 2 * self.rows_per_step
        ids_RT = np.arange(count * self.length, dtype=np.int64).reshape(count, self.length) % 1000
        nothing = np.zeros(self.length, dtype=np.int32)
        rows = [PackedRow(row, ids_RT[row].astype(np.int32), 0, nothing, ()) for row in range(count)]
        for _ in self.stream(0, rows):
            pass

    def stream(self, unit: int, rows: Iterable[PackedRow]) -> Iterator[CapturedRow]:
        """The captured rows of one unit, in order; see `stream_units`."""
        for _, row in self.stream_units([(unit, rows)]):
            yield row

    def stream_units(self, units: Iterable[tuple[int, Iterable[PackedRow]]]) -> Iterator[tuple[int, CapturedRow]]:
        """Units and their captured rows, in order.

        A step is launched before the rows of the one before it are handed out, across units too: `units` and their rows
        are read at most two steps ahead of the consumer. A GPU always has the next step's work queued, and copies to
        the host beside it.

        Raises:
            UserError: the teacher's logits are not finite; names the row.
            TeacherEngineError: the engine died.
            ValueError: a row is empty or longer than T, or the engine is closed.
        """
        if self._engine is None:
            raise ValueError("the engine is closed")
        waiting: tuple[int, list[PackedRow]] | None = None
        try:
            for step in self._steps(units):
                self._launch(*step)
                if waiting:
                    yield from self._collect(*waiting)
                waiting = step
            if waiting:
                self._drain(*waiting)
                yield from self._collect(*waiting)
        finally:
            if self._engine is not None and waiting and not self._settle():
                self.close()
            if self._engine is not None:
                self._engine.collective_rpc("capture_forget")

    def _steps(self, units: Iterable[tuple[int, Iterable[PackedRow]]]) -> Iterator[tuple[int, list[PackedRow]]]:
        for unit, rows in units:
            source = iter(rows)
            while step := list(islice(source, self.rows_per_step)):
                yield unit, step

    def _launch(self, unit: int, step: list[PackedRow]) -> None:
        """Start one step; a CPU ends it too, a GPU ends the one before. What was captured waits in the worker."""
        from vllm import SamplingParams

        for row in step:
            if not 0 < row.length <= self.length:
                raise ValueError(f"row {row.row} of unit {unit} has {row.length} tokens, T is {self.length}")
        try:
            for row in step:
                sequence_id = (unit << 32) + row.row
                extra = {"row": row.row, "next_id": int(row.next_id), "sequence_id": sequence_id}
                params = SamplingParams(
                    max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False, extra_args=extra
                )
                self._engine.add_request(str(sequence_id), _prompt(row.input_ids_L.tolist()), params)
            self._engine.step()
        except Exception as error:
            raise self._died(error, unit, step) from error

    def _drain(self, unit: int, step: list[PackedRow]) -> None:
        """End every step that was started."""
        try:
            while self._engine.has_unfinished_requests():
                self._engine.step()
        except Exception as error:
            raise self._died(error, unit, step) from error

    def _settle(self) -> bool:
        """End what was started when nobody wants it any more; False if vLLM cannot: an interruption within its step
        leaves requests that never finish."""
        with contextlib.suppress(Exception):  # what ends the stream is told already
            for _ in range(STEPS_TO_SETTLE):
                if not self._engine.has_unfinished_requests():
                    return True
                self._engine.step()
            return not self._engine.has_unfinished_requests()
        return False

    def _died(self, error: Exception, unit: int, step: list[PackedRow]) -> Exception:
        self.close()
        return self._explained(error, f"the teacher {self.model} died in vLLM at row {step[0].row} of unit {unit}")

    def _collect(self, unit: int, step: list[PackedRow]) -> Iterator[tuple[int, CapturedRow]]:
        """The rows of the oldest step not handed out yet."""
        taken: CapturedStep | None = self._engine.collective_rpc("capture_take")[0]
        rows = {row.row: row for row in step}
        if taken is None or sorted(taken.rows) != sorted(rows):
            raise TeacherEngineError(
                f"vLLM ran rows {taken.rows if taken else []} of unit {unit} as one step, not {list(rows)}: the "
                "teacher's keys and values need more memory than was reserved; lower engine.rows_per_step"
            )
        finite_N = np.isfinite(taken.arrays["lse"])
        spans = {row: slice(*taken.starts[at : at + 2]) for at, row in enumerate(taken.rows)}
        for row in step:
            if not finite_N[spans[row.row]].all():
                raise UserError(
                    f"the teacher's logits are not finite in row {row.row} of unit {unit}: its dtype overflows or its "
                    "weights are damaged; try dtype: bfloat16 or float32"
                )
            yield unit, _row_of(taken, taken.rows.index(row.row), spans[row.row], row)

    def _explained(self, error: Exception, what: str) -> Exception:
        """The exception to raise instead: a sentence that names the engine and the first line of what it said."""
        if isinstance(error, UserError):
            return error
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = " ".join(lines[: 3 if "validation error" in (lines or [""])[0] else 1])  # pydantic's first is a heading
        text = f"{what}: {type(error).__name__}: {said.rstrip('.')}"
        if "Free memory" in said:
            return UserError(
                f"{text}: free the device's memory, or lower engine.gpu_memory_utilization "
                f"(now {self.options.gpu_memory_utilization})"
            )
        if _is_out_of_memory(error, said):
            return UserError(
                f"{text}: free the device's memory, or lower engine.rows_per_step (now {self._rows()}), which needs a "
                "cache of its own (CACHE=..., --cache): the rows of a step are part of what a cache is"
            )
        noted = self._log.tail()
        return TeacherEngineError(f"{text}\nvLLM's last words:\n{noted}" if noted else text)

    def _rows(self) -> int:
        return self.options.rows_per_step or default_rows_per_step(self.length)

    def close(self) -> None:
        """Stop the engine and free its memory; the object is of no use afterwards."""
        engine, self._engine = self._engine, None
        if engine is not None:
            TeacherEngine._alive -= 1
            with self._log:
                shut_down(engine, self._sockets)
                del engine
                if not TeacherEngine._alive:
                    from vllm.distributed import cleanup_dist_env_and_memory

                    cleanup_dist_env_and_memory()
        gc.collect()

    def __enter__(self) -> TeacherEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _prompt(ids: list[int]) -> Any:
    """Token ids as this version of vLLM takes them; older ones know the raw dictionary only."""
    import vllm.inputs

    make = getattr(vllm.inputs, "tokens_input", None)
    return make(ids) if make else {"prompt_token_ids": ids}


def _row_of(step: CapturedStep, at: int, span: slice, packed: PackedRow) -> CapturedRow:
    arrays = step.arrays

    def of_tokens(name: str) -> np.ndarray | None:
        return arrays[name][span] if name in arrays else None

    def of_row(name: str) -> np.ndarray | None:
        return arrays[name][at] if name in arrays else None

    return CapturedRow(
        packed=packed,
        topk_ids_LK=arrays["topk_ids"][span],
        topk_logits_LK=arrays["topk_logits"][span],
        target_logit_L=arrays["target_logit"][span],
        lse_L=arrays["lse"][span],
        log_tail_LR=arrays["log_tail"][span],
        attn_map_Gnn=of_row("attn_map"),
        hidden_WD=of_row("hidden"),
        tail_ids_LM=of_tokens("tail_ids"),
        tail_logits_LM=of_tokens("tail_logits"),
    )


def _is_out_of_memory(error: Exception, said: str) -> bool:
    """Whether a device's memory, or the machine's, was not enough."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    phrases = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory", "bad_alloc")
    return bool(kinds & {"OutOfMemoryError", "MemoryError"}) or any(phrase in said.lower() for phrase in phrases)
