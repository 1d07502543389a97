"""Measurements of `decode` on one model, in a process of its own.

    python -m benchmarks.decode_case '{"cases": [{"model": "student", "context": 1024, "batch": 1}]}'

Legend: B rows, T tokens of the prompt, V vocabulary.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.meters import peak_gb, pick_device, reset_peak, seconds_of
from benchmarks.processes import given_case, report
from benchmarks.random_cache import random_facts, random_tensors
from benchmarks.train_baselines import random_teacher_model
from benchmarks.train_step import Case as TrainCase
from student.decoding import Decoder, recorded
from student.model import DistilXLSTM


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        model: student or transformer, each a CUDA graph a step; or either with `_eager` behind it.
        context: tokens of the prompt.
        batch: rows that are continued at once.
        steps, warmup: tokens a row that are timed, and those before them.
        preset: the student's shape, a file in manifests/students.
        width, vocab, teacher_layers: of the teacher, whose shape the Transformer has; Qwen2.5-1.5B's.
        heads, blocks: of the student, 0: the preset's.
    """

    model: str
    context: int
    batch: int
    steps: int = 64
    warmup: int = 8
    preset: str = "fast"
    width: int = 1536
    vocab: int = 151_936
    teacher_layers: int = 28
    heads: int = 0
    blocks: int = 0

    @property
    def graphs(self) -> bool:
        """Whether a step is recorded as a CUDA graph."""
        return not self.model.endswith("_eager")

    def shape(self) -> TrainCase:
        return TrainCase(
            "decode", self.batch, self.context, self.preset, width=self.width, vocab=self.vocab,
            teacher_layers=self.teacher_layers, heads=self.heads, blocks=self.blocks,
        )  # fmt: skip


class StudentDecoder:
    """The student as `student.generate` runs it: float32, prompt in one parallel pass, then the recurrence, a step a
    CUDA graph unless `case.graphs` is false."""

    def __init__(self, case: Case, device: torch.device) -> None:
        torch.manual_seed(0)
        facts, tensors = random_facts(case.vocab, case.width), random_tensors(case.vocab, case.width, device)
        model = DistilXLSTM(case.shape().student(), facts, tensors, case.context).float().to(device).eval()
        self.decoder = Decoder(model, case.graphs)

    def prefill(self, ids_1T: Tensor) -> Tensor:
        return self.decoder.prefill(ids_1T).argmax(-1)

    def repeat(self, rows: int, steps: int) -> None:
        """Give the state to so many rows, which are then asked for so many tokens."""
        self.decoder.repeat(rows)

    def step(self, ids_B: Tensor) -> Tensor:
        return self.decoder.step(ids_B).argmax(-1)

    @property
    def graph(self) -> torch.cuda.CUDAGraph | None:
        return self.decoder.graph

    def state_bytes(self) -> int:
        assert self.decoder.state is not None
        return self.decoder.state.bytes()

    def forget(self) -> None:
        """Give back what was kept of a text."""
        self.decoder.state = self.decoder.graph = None


class TransformerDecoder:
    """A Transformer of the teacher's shape: bfloat16, scaled_dot_product_attention. Eager with the cache that
    `generate` uses by default, else with the one of a fixed length and a step a CUDA graph."""

    def __init__(self, case: Case, device: torch.device) -> None:
        torch.manual_seed(0)
        self.graphs, self.device = case.graphs, device
        self.model = random_teacher_model(case.shape(), device)
        self.cache: Any = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.context = 0

    def prefill(self, ids_1T: Tensor) -> Tensor:
        from transformers import DynamicCache

        self.forget()
        self.cache = DynamicCache(config=self.model.config)
        return self.step_many(ids_1T)

    def forget(self) -> None:
        """Give back what was kept of a text."""
        self.cache = self.graph = None

    def step_many(self, ids_BT: Tensor) -> Tensor:
        found = self.model(input_ids=ids_BT, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        next_B: Tensor = found.logits[:, -1].argmax(-1)
        return next_B

    def repeat(self, rows: int, steps: int) -> None:
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys.repeat(rows, 1, 1, 1), layer.values.repeat(rows, 1, 1, 1)
        if self.graphs:
            self._fix(rows, steps)

    def _fix(self, rows: int, steps: int) -> None:
        """Go on with a cache of a fixed length whose tensors stay where they are, and record a step on a GPU."""
        from transformers import StaticCache

        self.context = self.cache.get_seq_length()
        read, self.cache = self.cache, StaticCache(self.model.config, self.context + steps)
        for layer, before in zip(self.cache.layers, read.layers, strict=True):
            layer.lazy_initialization(before.keys, before.values)
            layer.keys[:, :, : self.context], layer.values[:, :, : self.context] = before.keys, before.values
            before.keys = before.values = None
        self.ids_B = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self.position_11 = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        self._rewind()
        if self.device.type == "cuda":
            self.graph, self.next_B = recorded(self._advance, self.device)
            self._rewind()

    def _rewind(self) -> None:
        self.position_11.fill_(self.context)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.context)

    def _advance(self) -> Tensor:
        # With a mask, `transformers` copies the whole cache for each head that shares a key, in every layer and step.
        # Without one the few slots that are not written yet are read as well: the ids are others, the cost is not.
        mask = {"full_attention": None} if self.device.type == "cuda" else None
        found = self.model(
            input_ids=self.ids_B[:, None], past_key_values=self.cache, use_cache=True, logits_to_keep=1,
            position_ids=self.position_11, attention_mask=mask,
        )  # fmt: skip
        self.position_11.add_(1)
        next_B: Tensor = found.logits[:, -1].argmax(-1)
        return next_B

    def step(self, ids_B: Tensor) -> Tensor:
        if not self.graphs:
            return self.step_many(ids_B[:, None])
        self.ids_B.copy_(ids_B)
        if self.graph is None:
            return self._advance()
        self.graph.replay()
        return self.next_B

    def state_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for layer in self.cache.layers for t in (layer.keys, layer.values))


AnyDecoder = StudentDecoder | TransformerDecoder


def decoder_of(case: Case, device: torch.device) -> AnyDecoder:
    """The case's model, with random weights."""
    return (StudentDecoder if case.model.startswith("student") else TransformerDecoder)(case, device)


@torch.inference_mode()
def measure(case: Case, decoder: AnyDecoder, seen: Callable[[Tensor], object] = lambda ids_B: None) -> dict[str, Any]:
    """Prefill one row, give its state to all rows, then time the steps.

    Rows of one prompt cost what rows of different ones do, for no operation depends on what the numbers are.

    Args:
        decoder: `decoder_of` this case, or of another one of the same model.
        seen: is given the ids of every step, the prompt's own continuation first.
    """
    device = pick_device()
    generator = torch.Generator(device).manual_seed(0)
    prompt_1T = torch.randint(case.vocab, (1, case.context), generator=generator, device=device)
    first: list[Tensor] = []
    # Twice: the first one compiles kernels for this length.
    prefill = seconds_of(lambda: first.append(decoder.prefill(prompt_1T)), 1, device, warmup=1)
    decoder.repeat(case.batch, case.warmup + case.steps)
    ids_B = first[-1].repeat(case.batch)
    seen(ids_B)

    def step() -> None:
        nonlocal ids_B
        ids_B = decoder.step(ids_B)
        seen(ids_B)

    for _ in range(case.warmup):
        step()
    reset_peak(device)
    seconds = seconds_of(step, case.steps, device)
    return {
        "tokens_per_s": case.steps * case.batch / seconds,
        "ms_per_step": seconds / case.steps * 1e3,
        "prefill_tokens_per_s": case.context / prefill,
        "state_gb": decoder.state_bytes() / 1e9,
        "graph": decoder.graph is not None,
        **peak_gb(device),
    }


def measure_all(cases: list[Case]) -> Iterator[dict[str, Any]]:
    """Of cases that have a model in common, one after another; what does not fit is told as `skipped`."""
    device = pick_device()
    decoder = decoder_of(cases[0], device)
    for case in cases:
        try:
            found = measure(case, decoder)
        except torch.OutOfMemoryError as error:
            found = {"skipped": f"out of memory: {str(error).splitlines()[0]}"}
        decoder.forget()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        yield found


def main() -> None:
    for found in measure_all([Case(**case) for case in given_case()["cases"]]):
        report(found)


if __name__ == "__main__":
    main()
