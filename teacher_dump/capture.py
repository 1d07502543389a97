"""What runs inside vLLM's worker: two seams that read a step's rows without changing what the engine computes.

Seam A wraps the model runner's `execute_model` and `sample_tokens`: between them lie the hidden states of every
position of the step, after the final norm; they go through the model's own head. Seam B wraps `impl.forward` of the
attention layers, which sees q and k after RoPE. Both of vLLM's model runners are read: V1 (on a CPU), V2 (on a GPU).

The worker receives this module as `worker_extension_cls`; the engine calls `capture_install` once and `capture_take`
after every step.

Legend: N tokens of a step, B rows of a step, K top-k, R temperatures, G depth groups, n pooling blocks, W windows,
D width, M tail samples, V vocabulary, H heads, E head width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import UserError
from teacher_dump.host_copies import Copy, HostCopies
from teacher_dump.kernels.head_topk import HeadRows, VocabShard, head_topk
from teacher_dump.kernels.pooled_attention import StepMaps
from teacher_dump.kernels.pooled_hidden import StepHidden
from teacher_dump.lse_tap import tap_of
from teacher_dump.model_layers import attention_layers, attention_shape, decoder_layers, depth_groups, head_owner
from teacher_dump.rows import CaptureSpec

_HEAD_ROWS = {"cpu": 128, "cuda": 4096}
"""Positions whose logits exist at once."""


@dataclass
class CapturedStep:
    """The rows of one engine step in the order of the batch; arrays cover all tokens of the step, row after row."""

    rows: list[int]
    starts: list[int]  # B + 1 offsets
    arrays: dict[str, np.ndarray]


@dataclass(frozen=True)
class ModelFacts:
    """What the worker knows of the loaded model."""

    vocab_size: int
    width: int
    layers: int
    head_dtype: str
    logit_scale: float
    soft_cap: float | None


class CaptureWorkerExtension:
    """Mixed into vLLM's worker class; called through `collective_rpc`."""

    def capture_install(self, spec: CaptureSpec, length: int) -> ModelFacts | str:
        """Wrap the seams. Returns the model's facts, or the sentence of the `UserError` that forbids the capture.

        A string and not an exception: an exception of a worker process reaches the engine without its type.
        """
        try:
            self._capture = WorkerCapture(self, spec, length)
        except UserError as error:
            return str(error)
        return self._capture.facts

    def capture_take(self) -> CapturedStep | None:
        """The oldest step not taken yet; None where there is none, and on all ranks but the first."""
        return self._capture.take()

    def capture_forget(self) -> None:
        """Drop what was captured and not taken."""
        self._capture.forget()


@dataclass
class _Step:
    """A step between `execute_model` and `sample_tokens`."""

    requests: dict[str, Any]  # request id -> vLLM's NewRequestData
    maps: StepMaps | None = None
    hidden: StepHidden | None = None

    @property
    def longest(self) -> int:
        return max(len(request.prompt_token_ids) for request in self.requests.values())


@dataclass(frozen=True)
class _Finished:
    rows: list[int]
    starts: list[int]
    copy: Copy


class WorkerCapture:
    """The capture of one worker.

    Args:
        worker: vLLM's worker with its model loaded.
        spec: what to capture.
        length: T of the cache.

    Raises:
        UserError: the model's attention or layers cannot be captured, or the spec does not fit the model.
    """

    def __init__(self, worker: Any, spec: CaptureSpec, length: int) -> None:
        self.spec, self.length = spec, length
        self.runner = worker.model_runner
        self.model = self.runner.get_model() if hasattr(self.runner, "get_model") else self.runner.model
        self.finished: deque[_Finished] = deque()
        self.copies = HostCopies(self.runner.device)
        self.step: _Step | None = None
        model_config = worker.vllm_config.model_config
        self.tensor_parallel = worker.vllm_config.parallel_config.tensor_parallel_size
        self.rank = worker.rank
        self.head, self.matrix = head_owner(self.model)
        processor = self.head.logits_processor
        head_dtype = getattr(processor, "head_dtype", None) or model_config.dtype
        self.facts = ModelFacts(
            vocab_size=int(processor.org_vocab_size),
            width=int(model_config.get_hidden_size()),
            layers=int(model_config.hf_text_config.num_hidden_layers),
            head_dtype=str(head_dtype).removeprefix("torch."),
            logit_scale=float(processor.scale),
            soft_cap=processor.soft_cap,
        )
        if spec.k > self.facts.vocab_size:
            raise UserError(f"k: {spec.k} is more than the teacher's vocabulary of {self.facts.vocab_size}: lower k")
        self.shard = self._vocab_shard() if self.tensor_parallel > 1 else None
        context = worker.vllm_config.compilation_config.static_forward_context
        if spec.block:
            self._wrap_attention(attention_layers(context))
        if spec.window:
            self._hook_layers(context, self.facts.layers)
        self._wrap_runner()

    # Seam A

    def _wrap_runner(self) -> None:
        execute, sample = self.runner.execute_model, self.runner.sample_tokens

        def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            self.step = self._open_step(scheduler_output)
            return execute(scheduler_output, *args, **kwargs)

        def sample_tokens(*args: Any, **kwargs: Any) -> Any:
            step, self.step = self.step, None
            state = self.runner.execute_model_state
            if step is None or state is None:
                return sample(*args, **kwargs)
            # V2 keeps the batch in the state, V1 in the runner; both refill their buffers with the next step.
            batch = getattr(state, "input_batch", None) or self.runner.input_batch
            order, hidden_ND = list(batch.req_ids)[: len(step.requests)], state.hidden_states
            output = sample(*args, **kwargs)
            self._close_step(step, order, hidden_ND)
            return output

        self.runner.execute_model, self.runner.sample_tokens = execute_model, sample_tokens

    def _open_step(self, scheduler_output: Any) -> _Step | None:
        new = {request.req_id: request for request in scheduler_output.scheduled_new_reqs}
        if not new:
            return None
        for request_id, request in new.items():
            if scheduler_output.num_scheduled_tokens[request_id] != len(request.prompt_token_ids):
                raise RuntimeError("vLLM split a prompt over steps although chunked prefill is off")
        return _Step(new)

    def _close_step(self, step: _Step, order: list[str], hidden_ND: Tensor) -> None:
        requests = [step.requests[request_id] for request_id in order]
        prompts = [np.asarray(request.prompt_token_ids, dtype=np.int64) for request in requests]
        extras = [request.sampling_params.extra_args for request in requests]
        lengths = [len(prompt) for prompt in prompts]
        starts = [0, *accumulate(lengths)]
        targets = [np.append(p[1:], e["next_id"]) for p, e in zip(prompts, extras, strict=True)]
        hidden_ND = hidden_ND[: starts[-1]]
        identities: dict[str, Tensor] = {}
        if self.spec.tail_samples:
            ids = [np.full(len(p), e["sequence_id"]) for p, e in zip(prompts, extras, strict=True)]
            positions = [np.arange(len(p)) for p in prompts]
            identities = {"sequence_ids_N": self._to_device(ids), "positions_N": self._to_device(positions)}
        head = self._head_rows(hidden_ND, self._to_device(targets), identities)
        tensors: dict[str, Tensor | None] = {
            "topk_ids": head.ids_NK,
            "topk_logits": head.logits_NK,
            "target_logit": head.target_logit_N,
            "lse": head.lse_N,
            "log_tail": head.log_tail_NR,
            "tail_ids": head.tail_ids_NM,
            "tail_logits": head.tail_logits_NM,
        }
        if step.maps is not None:
            maps_BGnn = step.maps.finish()
            tensors["attn_map"] = self._gather(maps_BGnn).mean(0) if self.tensor_parallel > 1 else maps_BGnn
        if self.spec.window:
            hidden = step.hidden or self._step_hidden(len(lengths))  # a model of one layer has no other
            starts_B1 = self._to_device([np.asarray(starts, dtype=np.int32)])
            hidden.add([hidden_ND], starts_B1)
            tensors["hidden"] = hidden.finish(lengths, self.facts.layers)
        if self.rank == 0:
            copy = self.copies.start({name: x for name, x in tensors.items() if x is not None})
            self.finished.append(_Finished([e["row"] for e in extras], starts, copy))

    def _to_device(self, parts: list[np.ndarray]) -> Tensor:
        together = torch.from_numpy(np.concatenate(parts))
        if self.runner.device.type == "cuda":
            together = together.pin_memory()  # or the host waits until the device has read it
        return together.to(self.runner.device, non_blocking=True)

    def _head_rows(self, hidden_ND: Tensor, targets_N: Tensor, identities: dict[str, Tensor]) -> HeadRows:
        step = _HEAD_ROWS.get(hidden_ND.device.type, 1024)
        parts = []
        for first in range(0, hidden_ND.shape[0], step):
            at = slice(first, first + step)
            with _raw_logits(self.head.logits_processor, self.matrix, self.shard):
                logits_NV = self.model.compute_logits(hidden_ND[at])
            parts.append(
                head_topk(
                    logits_NV,
                    targets_N[at],
                    self.spec.k,
                    self.spec.taus,
                    soft_cap=self.facts.soft_cap,
                    scale=self.facts.logit_scale,
                    shard=self.shard,
                    tail_samples=self.spec.tail_samples,
                    seed=self.spec.seed,
                    **{name: x[at] for name, x in identities.items()},
                )
            )
        return HeadRows.joined(parts)

    def take(self) -> CapturedStep | None:
        """Hand over the oldest finished step, waiting for its copies to the host."""
        if not self.finished:
            return None
        step = self.finished.popleft()
        return CapturedStep(step.rows, step.starts, self.copies.take(step.copy))

    def forget(self) -> None:
        while self.finished:
            self.copies.forget(self.finished.popleft().copy)

    # Tensor parallelism

    def _gather(self, x: Tensor) -> Tensor:
        from vllm.distributed import get_tp_group

        # torch's own collective: vLLM's shared-memory one on a CPU knows no integers.
        everyone = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.tensor_parallel)]
        torch.distributed.all_gather(everyone, x.contiguous(), group=get_tp_group().device_group)
        return torch.stack(everyone)

    def _vocab_shard(self) -> VocabShard:
        return VocabShard(int(self.matrix.shard_indices.org_vocab_start_index), self._gather)

    # Seam B

    def _wrap_attention(self, layers: list[tuple[str, Any]]) -> None:
        groups = depth_groups(len(layers), self.spec.groups)
        for depth, (_, layer) in enumerate(layers):
            group = next(g for g, members in enumerate(groups) if depth in members)
            self._wrap_layer(layer, group, len(groups[group]))

    def _wrap_layer(self, layer: Any, group: int, members: int) -> None:
        impl, forward, tap = layer.impl, layer.impl.forward, tap_of(layer.impl)
        block, blocks = self.spec.block, -(-self.length // self.spec.block)

        def captured(layer: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            step, metadata = self.step, kwargs.get("attn_metadata", args[1] if len(args) > 1 else None)
            if step is None or metadata is None:
                return forward(layer, query, key, value, *args, **kwargs)
            rows = len(step.requests)
            if step.maps is None:
                step.maps = StepMaps(rows, step.longest, self.spec.groups, block, blocks, query.device)
            with tap.opened() if tap is not None else nullcontext():
                output = forward(layer, query, key, value, *args, **kwargs)
            q_NHE = query.view(query.shape[0], layer.num_heads, layer.head_size)
            k_NHkvE = key.view(key.shape[0], layer.num_kv_heads, layer.head_size)
            lse_HN = tap.lse_HN if tap is not None else None
            starts_B1 = metadata.query_start_loc[: rows + 1]
            step.maps.add(group, q_NHE, k_NHkvE, starts_B1, lse_HN, attention_shape(layer), 1 / members)
            return output

        impl.forward = captured

    # Hidden states

    def _hook_layers(self, context: dict[str, Any], count: int) -> None:
        """Sum the outputs of all blocks but the last as they come; the last is read after the final norm, in seam A.

        A sum at once, in float32: the next block's fused norm overwrites a block's output.
        """
        layers = decoder_layers(self.model, list(context), count)

        def after(_module: Any, _inputs: Any, output: Any) -> None:
            step = self.step
            if step is None:
                return
            if step.hidden is None:
                step.hidden = self._step_hidden(len(step.requests))
            # vLLM's blocks return (what the MLP added, the residual stream before it)
            parts = [x for x in (output if isinstance(output, tuple) else (output,)) if isinstance(x, Tensor)]
            step.hidden.add(parts, _row_starts(len(step.requests)))

        for layer in layers[:-1]:
            layer.register_forward_hook(after)

    def _step_hidden(self, rows: int) -> StepHidden:
        windows = -(-self.length // self.spec.window)
        return StepHidden(rows, self.spec.window, windows, self.facts.width, self.runner.device)


def _row_starts(rows: int) -> Tensor:
    """int32 (B + 1,) offsets of the rows of the running step, on the device."""
    from vllm.forward_context import get_forward_context

    metadata: Any = get_forward_context().attn_metadata
    starts: Tensor = next(iter(metadata.values())).query_start_loc
    return starts[: rows + 1]


@contextmanager
def _raw_logits(processor: Any, matrix: Any, shard: VocabShard | None) -> Iterator[None]:
    """Let `compute_logits` return what the head's matrix gives: soft cap and scale are then part of the search, which
    spares copies of the size of the logits. Under tensor parallelism, this rank's columns instead of a gathered V.

    What else a model does to its logits acts on each logit alone.
    """
    kept = {name: getattr(processor, name) for name in ("soft_cap", "scale", "org_vocab_size")}
    processor.soft_cap, processor.scale = None, 1.0
    if shard is not None:
        processor._gather_logits = lambda logits: logits
        processor.org_vocab_size = matrix.shard_indices.num_org_elements
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(processor, name, value)
        if shard is not None:
            del processor._gather_logits
