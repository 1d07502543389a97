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
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import UserError
from teacher_dump.kernels.head_topk import HeadRows, VocabShard, head_topk
from teacher_dump.kernels.pooled_attention import pooled_attention
from teacher_dump.kernels.pooled_hidden import pooled_hidden
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
        self._capture.finished.clear()


@dataclass
class _Step:
    """A step between `execute_model` and `sample_tokens`."""

    requests: dict[str, Any]  # request id -> vLLM's NewRequestData
    starts: list[int] | None = None
    maps_BGnn: Tensor | None = None
    hidden_sum_ND: Tensor | None = None


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
        self.finished: deque[tuple[CapturedStep, torch.cuda.Event | None]] = deque()
        self.step: _Step | None = None
        model_config = worker.vllm_config.model_config
        self.tensor_parallel = worker.vllm_config.parallel_config.tensor_parallel_size
        self.rank = worker.rank
        self.head = head_owner(self.model)
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
        starts = [0, *accumulate(len(prompt) for prompt in prompts)]
        if step.starts is not None and step.starts != starts:
            raise RuntimeError(f"the attention layers saw rows at {step.starts}, the step ends with them at {starts}")
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
            "attn_map": step.maps_BGnn,
        }
        if step.maps_BGnn is not None and self.tensor_parallel > 1:
            tensors["attn_map"] = self._gather(step.maps_BGnn).mean(0)
        if self.spec.window:
            sums_ND = hidden_ND.float() if step.hidden_sum_ND is None else step.hidden_sum_ND[: starts[-1]]
            if step.hidden_sum_ND is not None:
                sums_ND += hidden_ND
            mean_ND = sums_ND / self.facts.layers
            windows = -(-self.length // self.spec.window)
            tensors["hidden"] = pooled_hidden(mean_ND, starts, self.spec.window, windows)
        if self.rank == 0:
            arrays, copied = _to_host({name: x for name, x in tensors.items() if x is not None})
            self.finished.append((CapturedStep([e["row"] for e in extras], starts, arrays), copied))

    def _to_device(self, parts: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts)).to(self.runner.device, non_blocking=True)

    def _head_rows(self, hidden_ND: Tensor, targets_N: Tensor, identities: dict[str, Tensor]) -> HeadRows:
        step = _HEAD_ROWS.get(hidden_ND.device.type, 1024)
        parts = []
        for first in range(0, hidden_ND.shape[0], step):
            at = slice(first, first + step)
            with _own_vocabulary(self.head, self.shard):
                logits_NV = self.model.compute_logits(hidden_ND[at])
            parts.append(
                head_topk(
                    logits_NV,
                    targets_N[at],
                    self.spec.k,
                    self.spec.taus,
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
        step, copied = self.finished.popleft()
        if copied is not None:
            copied.synchronize()
        return step

    # Tensor parallelism

    def _gather(self, x: Tensor) -> Tensor:
        from vllm.distributed import get_tp_group

        # torch's own collective: vLLM's shared-memory one on a CPU knows no integers.
        everyone = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.tensor_parallel)]
        torch.distributed.all_gather(everyone, x.contiguous(), group=get_tp_group().device_group)
        return torch.stack(everyone)

    def _vocab_shard(self) -> VocabShard:
        return VocabShard(int(self.head.lm_head.shard_indices.org_vocab_start_index), self._gather)

    # Seam B

    def _wrap_attention(self, layers: list[tuple[str, Any]]) -> None:
        groups = depth_groups(len(layers), self.spec.groups)
        for depth, (_, layer) in enumerate(layers):
            group = next(g for g, members in enumerate(groups) if depth in members)
            self._wrap_layer(layer, group, len(groups[group]))

    def _wrap_layer(self, layer: Any, group: int, members: int) -> None:
        impl, forward = layer.impl, layer.impl.forward
        block, blocks = self.spec.block, -(-self.length // self.spec.block)

        def captured(layer: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            step, metadata = self.step, kwargs.get("attn_metadata", args[1] if len(args) > 1 else None)
            if step is not None and metadata is not None:
                rows = len(step.requests)
                if step.starts is None:  # one wait for the device a step, at its first layer
                    step.starts = metadata.query_start_loc[: rows + 1].tolist()
                    shape = (rows, self.spec.groups, blocks, blocks)
                    step.maps_BGnn = torch.zeros(shape, dtype=torch.float32, device=query.device)
                assert step.maps_BGnn is not None
                q_NHE = query.view(query.shape[0], layer.num_heads, layer.head_size)
                k_NHkvE = key.view(key.shape[0], layer.num_kv_heads, layer.head_size)
                pooled_Bnn = pooled_attention(q_NHE, k_NHkvE, step.starts, attention_shape(layer), block, blocks)
                step.maps_BGnn[:, group].add_(pooled_Bnn, alpha=1 / members)
            return forward(layer, query, key, value, *args, **kwargs)

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
            parts = [x for x in (output if isinstance(output, tuple) else (output,)) if isinstance(x, Tensor)]
            if step.hidden_sum_ND is None:
                step.hidden_sum_ND = torch.zeros(parts[0].shape, dtype=torch.float32, device=parts[0].device)
            for part in parts:  # vLLM's blocks return (what the MLP added, the residual stream before it)
                step.hidden_sum_ND += part

        for layer in layers[:-1]:
            layer.register_forward_hook(after)


@contextmanager
def _own_vocabulary(head: Any, shard: VocabShard | None) -> Iterator[None]:
    """Under tensor parallelism, let `compute_logits` return this rank's columns instead of gathering all of V.

    Everything else a model does to its logits (scale, soft cap, its own code) acts on each logit alone.
    """
    if shard is None:
        yield
        return
    processor = head.logits_processor
    vocabulary = processor.org_vocab_size
    processor._gather_logits = lambda logits: logits
    processor.org_vocab_size = head.lm_head.shard_indices.num_org_elements
    try:
        yield
    finally:
        del processor._gather_logits
        processor.org_vocab_size = vocabulary


def _to_host(tensors: dict[str, Tensor]) -> tuple[dict[str, np.ndarray], torch.cuda.Event | None]:
    """Start the copies to pinned memory; the arrays are valid once the event, where there is one, has passed."""
    if all(x.device.type == "cpu" for x in tensors.values()):
        return {name: x.numpy() for name, x in tensors.items()}, None
    arrays = {}
    for name, x in tensors.items():
        pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        arrays[name] = pinned.copy_(x, non_blocking=True).numpy()
    copied = torch.cuda.Event()
    copied.record()
    return arrays, copied
