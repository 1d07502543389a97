"""Token after token: a prompt in one parallel pass, then the recurrence; on a GPU a step is one launch of a CUDA graph.

A step of one row is some hundred small kernels, which cost the host many times what they cost the GPU.

Legend: B rows, T tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from student.blocks.state import StudentState
from student.model import DistilXLSTM

WARM_UPS = 2
"""Steps before one is recorded: what is compiled or allocated at a first call must be so by then."""


def recorded(advance: Callable[[], Tensor], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A CUDA graph of what a function does to tensors that stay where they are, and where its result will lie.

    Raises:
        RuntimeError: something in it cannot be recorded.
    """
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            advance()
    torch.cuda.current_stream(device).wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        result = advance()
    return graph, result


class Decoder:
    """A student that reads and is asked for the next token.

    Args:
        model: in evaluation mode, in float32 as `student.generate` has it.
        graphs: record the step as a CUDA graph; on a CPU nothing is recorded.

    Attributes:
        state: after what was read; None before a prompt.
        graph: of a step; None before the first one, and where steps are not recorded.

    `prefill` comes first, then `step` as often as one likes. Logits are valid until the next step.
    """

    def __init__(self, model: DistilXLSTM, graphs: bool = True) -> None:
        self.model = model
        self.state: StudentState | None = None
        self._graphs = graphs and model.head_VD.is_cuda
        self.graph: torch.cuda.CUDAGraph | None = None
        self.ids_B = self._logits_BV = torch.empty(0)

    @torch.inference_mode()
    def prefill(self, ids_BT: Tensor) -> Tensor:
        """Read a prompt from an empty state: the logits (B, V) after its last token."""
        h_BD, self.state = self.model.prefill(ids_BT)
        self.graph = None
        return self.model.logits(h_BD)

    @torch.inference_mode()
    def repeat(self, rows: int) -> None:
        """Go on with so many copies of the one row that was read."""
        assert self.state is not None
        self.state = self.state.repeated(rows)
        self.graph = None

    @torch.inference_mode()
    def step(self, ids_B: Tensor) -> Tensor:
        """Read one token a row: the logits (B, V) after it."""
        if self.graph is None and self._graphs:
            self._record(len(ids_B))
        if self.graph is None:
            assert self.state is not None
            h_BD, self.state = self.model.step(ids_B, self.state)
            return self.model.logits(h_BD)
        self.ids_B.copy_(ids_B)
        self.graph.replay()
        return self._logits_BV

    def _record(self, rows: int) -> None:
        """Record a step that reads `ids_B` and the state where they lie and leaves the next state there."""
        assert self.state is not None
        device = self.model.head_VD.device
        self.ids_B = torch.zeros(rows, dtype=torch.int64, device=device)
        # Copies: a state's tensors may share memory with each other or with what the caller holds.
        self.state = self.state.changed(lambda _, t: t.clone())
        before = [t.clone() for t in self.state.tensors()]
        try:
            self.graph, self._logits_BV = recorded(self.advance, device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            warnings.warn(f"a step cannot be recorded as a CUDA graph ({reason})", RuntimeWarning, stacklevel=3)
            self._graphs = False
        for kept, now in zip(before, self.state.tensors(), strict=True):
            now.copy_(kept)

    def advance(self) -> Tensor:
        """A step whose next state is written where the present one lies."""
        assert self.state is not None
        h_BD, after = self.model.step(self.ids_B, self.state)
        logits_BV = self.model.logits(h_BD)
        for into, source in zip(self.state.tensors(), after.tensors(), strict=True):
            into.copy_(source)
        return logits_BV
