"""A causal language model of a Hugging Face folder, as two functions: hidden states of rows, and logits of some.

Logits over a whole vocabulary are by far the largest thing a model returns, and an evaluation needs few of them at a
time. `hidden` gives what the model's head multiplies; `logits` lets the model's own forward pass go from there, so that
scales and soft caps are applied as the model does, whatever they are.

Legend: B rows, T tokens, N positions in any order, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.errors import UserError, one_line

Dtype = Literal["float32", "bfloat16"]


class CausalLM:
    """A loaded model.

    Args:
        model: a `transformers` causal language model, or a module that is called like one.
        source: where it is from, for messages.
        device: where it is.
    """

    def __init__(self, model: Any, source: str, device: torch.device) -> None:
        self.model, self.source, self.device = model, source, device
        config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
        self.vocab_size = int(config.vocab_size)
        self.max_length: int | None = getattr(config, "max_position_embeddings", None)
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        self._head = head if isinstance(head, torch.nn.Module) and self._calls(head) else None

    @torch.no_grad()
    def hidden(self, input_ids_BT: Tensor) -> Tensor:
        """What the head multiplies, (B, T, D); the logits themselves where the forward pass calls no head module."""
        if self._head is None:
            logits_BTV: Tensor = self.model(input_ids_BT, use_cache=False).logits
            return logits_BTV
        seen: list[Tensor] = []

        def note(h_BTD: Tensor) -> Tensor:
            seen.append(h_BTD)
            return h_BTD[:, -1:]  # one position's logits, which nobody reads

        with self._before_head(note):
            self.model(input_ids_BT, use_cache=False)
        return seen[0]

    @torch.no_grad()
    def logits(self, h_ND: Tensor) -> Tensor:
        """float32 logits (N, V) of hidden states, scaled and capped as the model does."""
        if self._head is None:
            return h_ND.float()
        with (
            self._before_head(lambda _: h_ND.to(self.model.dtype)[None]),
            torch.autocast(h_ND.device.type, enabled=False),
        ):
            # The pass over one token is only there to call the head and what follows it.
            any_11 = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
            logits_NV: Tensor = self.model(any_11, use_cache=False).logits[0].float()
        return logits_NV

    @contextmanager
    def _before_head(self, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        assert self._head is not None
        handle = self._head.register_forward_pre_hook(lambda _, inputs: (change(inputs[0]), *inputs[1:]))
        try:
            yield
        finally:
            handle.remove()

    def _calls(self, head: torch.nn.Module) -> bool:
        """Does the forward pass call this module on hidden states of every position?"""
        seen: list[tuple[int, ...]] = []
        handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[:-1])))
        try:
            with torch.no_grad():
                self.model(torch.zeros(1, 2, dtype=torch.int64, device=self.device), use_cache=False)
        finally:
            handle.remove()
        return seen == [(1, 2)]


@lru_cache(maxsize=1)
def load_causal_lm(
    source: str,
    dtype: Dtype = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
    option: str = "--teacher",
) -> CausalLM:
    """A model of a folder or hub id, in evaluation mode; the last one stays loaded for the next call.

    Safetensors only: other weights are pickles.

    Args:
        source: folder or hub id.
        dtype: of the weights.
        device: where to put it, as `torch.device` reads it.
        trust_remote_code: run Python code that comes with the model.
        option: the option that named it, for messages.

    Raises:
        UserError: `transformers` is missing, or there is no such model, or it wants code of its own to be run.
    """
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        raise UserError(f"{option} needs the package transformers: install it, or leave {option} out") from None
    logging.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        told = one_line(error)
        if "trust_remote_code" in told and not trust_remote_code:
            raise UserError(
                f"{option} {source}: the model brings Python code of its own: read it, then add --trust_remote_code"
            ) from None
        raise UserError(f"{option}: no model at {source!r} ({told[:200]}): name its folder with {option}") from None
    return CausalLM(model.to(device).eval(), source, torch.device(device))
