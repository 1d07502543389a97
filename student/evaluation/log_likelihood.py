"""How likely a language model finds given continuations of given contexts, many at a time.

Context and continuation are tokenised as lm-evaluation-harness does: the whole text at once, then the tokens of the
context alone are cut off, spaces at its end counted to the continuation. Rows are padded on the right, which no causal
model sees, sorted by length, and read in batches of about equally many tokens; logits are computed at the positions of
continuations only. Requests that differ in their last token alone are read once.

Legend: B rows, T tokens, N positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import UserError
from student.evaluation.device import chunk_rows
from student.evaluation.language_model import LanguageModel

PAD = 0
"""What stands to the right of a row: any id does, no position before it sees it."""


@dataclass(frozen=True)
class Scored:
    """One continuation.

    Attributes:
        nats: log-probability of its tokens given the context, at most 0.
        greedy: is each of its tokens the likeliest one?
        tokens: how many they are.
    """

    nats: float
    greedy: bool
    tokens: int


@dataclass(frozen=True)
class Request:
    """Tokens to read, and those to be predicted from position `first` on."""

    read: tuple[int, ...]
    first: int
    targets: tuple[int, ...]


def encode_pair(encode: Callable[[str], list[int]], context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of a context and of its continuation; the last token is the continuation's, whatever it is."""
    whole = encode(context + continuation)
    of_context = encode(context.rstrip())[: max(0, len(whole) - 1)]
    return of_context, whole[len(of_context) :]


def as_request(model: LanguageModel, context: str, continuation: str, start: Sequence[int] = ()) -> Request:
    """Tokenise, put `start` before it, and cut from the left what the model cannot read.

    Raises:
        UserError: the continuation has no token, or more than the model reads.
    """
    before, targets = encode_pair(model.encode, context, continuation)
    if not targets or len(targets) > (model.max_length or len(targets)):
        raise UserError(
            f"the continuation {continuation[:80]!r} has {len(targets)} tokens; the model reads 1 to "
            f"{model.max_length or 'any number'}: it cannot be asked this task"
        )
    before = [*start, *before] or [model.start_id]
    read = [*before, *targets][:-1]
    cut = 0 if model.max_length is None else max(0, len(read) - model.max_length)
    return Request(tuple(read[cut:]), len(read) - cut - len(targets), tuple(targets))


def log_likelihoods(
    model: LanguageModel, requests: Sequence[Request], batch_tokens: int
) -> Iterator[tuple[int, Scored]]:
    """(index of the request, its score), longest requests first, as batches are done.

    Args:
        batch_tokens: tokens of a batch, padding included; one row at least.
    """
    by_read: dict[tuple[int, ...], list[int]] = {}
    for index, request in enumerate(requests):
        by_read.setdefault(request.read, []).append(index)
    rows = sorted(by_read, key=len, reverse=True)
    start = 0
    while start < len(rows):
        length = padded_length(len(rows[start]), model.device)
        batch = rows[start : start + max(1, batch_tokens // length)]
        start += len(batch)
        indices = [[(row, index) for index in by_read[read]] for row, read in enumerate(batch)]
        pairs = [pair for of_row in indices for pair in of_row]
        ids_BT = torch.full((len(batch), length), PAD, dtype=torch.int64)
        for row, read in enumerate(batch):
            ids_BT[row, : len(read)] = torch.tensor(read)
        scores = _score(model, ids_BT, [(row, requests[index]) for row, index in pairs])
        yield from zip((index for _, index in pairs), scores, strict=True)


def padded_length(length: int, device: torch.device) -> int:
    """Tokens of a batch whose longest row has `length`. Few different ones on a GPU: kernels are compiled by shape."""
    if device.type == "cpu":
        return length
    power = max(32, 1 << (length - 1).bit_length())
    return power * 3 // 4 if length <= power * 3 // 4 and power > 32 else power


@torch.no_grad()
def _score(model: LanguageModel, ids_BT: Tensor, asked: list[tuple[int, Request]]) -> list[Scored]:
    """Scores of (row, request) pairs of one batch."""
    length = ids_BT.shape[1]
    at = [row * length + request.first + i for row, request in asked for i in range(len(request.targets))]
    at_N = torch.tensor(at, device=model.device)
    target_N = torch.tensor([t for _, request in asked for t in request.targets], device=model.device)
    h_ND = model.hidden(ids_BT.to(model.device)).flatten(0, 1)
    nats, greedy = [], []
    step = chunk_rows(model.device, model.vocab_size)
    for at_n, target_n in zip(at_N.split(step), target_N.split(step), strict=True):
        logits_nV = model.logits(h_ND[at_n])
        of_target_n = logits_nV.gather(1, target_n[:, None]).squeeze(1)
        nats.append(of_target_n - logits_nV.logsumexp(-1))
        greedy.append(logits_nV.argmax(-1) == target_n)
    nats_N, greedy_N = torch.cat(nats).double().cpu(), torch.cat(greedy).cpu()
    sizes = [len(request.targets) for _, request in asked]
    parts = zip(nats_N.split(sizes), greedy_N.split(sizes), sizes, strict=True)
    return [Scored(float(n.sum()), bool(g.all()), size) for n, g, size in parts]
