"""What the capture's kernels cost on a GPU, against what the chip allows and against plain torch, in one run.

    python -m benchmarks.kernels

The floors come from rates measured in the same run: a device-to-device copy for bytes, a large bfloat16 product for
FLOPs. `floor_bytes_us` is what must be read and written once at the one, `floor_flops_us` the least arithmetic at the
other, `floor_us` the larger of the two. What is no product of matrices (the head's exponentials, sums) cannot reach the
second rate: there it is a bound and no aim. `plain` is what one would write without the kernel. `us_per_token` of the
head is its search, `whole_us` all that a dump keeps of it: the target's logit and the logsumexp too. Logits are random,
peaked in the order of ids (Zipf), and, with --teacher, a real model's on real text.

Legend: N positions, V ids, K top-k, T tokens of a row, H heads, E head width, D width.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measured import RESULTS, device_name, table, write_results
from teacher_dump.kernels.head_topk import head_topk
from teacher_dump.kernels.head_topk_triton import local_top_k
from teacher_dump.kernels.pooled_attention_reference import AttentionShape
from teacher_dump.kernels.pooled_attention_triton import add_pooled_attention, row_lse
from teacher_dump.kernels.pooled_hidden_triton import add_window_sums

TAUS = (1.0, 1.2, 1.5, 2.0)
POSITIONS = 4096
TEXT = Path("README.md")  # benchmarks run from the repository's root
TOKENS, ROWS = 2048, 8


def microseconds(work: Callable[[], object]) -> float:
    """Median time of one call on the device."""
    from triton.testing import do_bench

    return float(do_bench(work, return_mode="median")) * 1000


@dataclass(frozen=True)
class Rates:
    """Bytes and FLOPs per microsecond that this device reaches."""

    bytes: float
    flops: float


@dataclass(frozen=True)
class Least:
    """Bytes and FLOPs of a token that a kernel cannot do without."""

    bytes: float
    flops: float


def head_least(vocab: int, k: int, bytes_of_logit: int, taus: int) -> Least:
    """Logits are read once, an id and a logit of each of the top k and the tails written; of each logit a comparison,
    and for each temperature an exponential (as one FLOP) and a sum."""
    return Least(vocab * bytes_of_logit + 8 * k + 4 * taus, vocab * (1 + 2 * taus))


def attention_least(heads: int, kv_heads: int, width: int, tokens: int, block: int, lse_given: bool) -> Least:
    """bfloat16 queries and keys of a row of `tokens` are read once, and its float32 map read and written, as is the
    logsumexp if it is given; half of a causal q k^T, and as much again to find the logsumexp."""
    maps = 8 * (tokens // block) ** 2 / tokens
    times = 1 if lse_given else 2
    return Least(2 * width * (heads + kv_heads) + 4 * heads * lse_given + maps, times * heads * width * tokens)


def hidden_least(width: int, window: int) -> Least:
    """Two bfloat16 parts are read, and of each window its float32 sums read and written; each part is added once."""
    return Least(4 * width + 8 * width / window, 2 * width)


def rates() -> Rates:
    source = torch.empty(1 << 30, dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / microseconds(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return Rates(copied, 2 * 8192**3 / microseconds(lambda: a @ b))


def plain_head(logits_NV: Tensor, k: int) -> tuple[Tensor, ...]:
    """torch.topk, and a logsumexp of the rest at every temperature, on float32 copies of a few rows at a time."""
    parts = []
    for part_NV in logits_NV.split(512):
        z_NV = part_NV.float()
        values_NK, ids_NK = z_NV.topk(k)
        z_NV.scatter_(1, ids_NK, -torch.inf)
        parts.append((values_NK, ids_NK, torch.stack([(z_NV / tau).logsumexp(-1) for tau in TAUS], -1)))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def plain_attention(q_NHE: Tensor, k_NHkvE: Tensor, block: int) -> Tensor:
    """Scores, softmax and pooling of whole T x T maps, a row at a time."""
    maps = []
    for row in range(ROWS):
        at = slice(row * TOKENS, (row + 1) * TOKENS)
        k_HTE = k_NHkvE[at].transpose(0, 1).repeat_interleave(q_NHE.shape[1] // k_NHkvE.shape[1], 0)
        scores = torch.matmul(q_NHE[at].transpose(0, 1), k_HTE.transpose(1, 2)) * q_NHE.shape[2] ** -0.5
        future = torch.ones(TOKENS, TOKENS, dtype=torch.bool, device="cuda").triu(1)
        weights = scores.masked_fill(future, -torch.inf).float().softmax(-1).mean(0)
        maps.append(torch.nn.functional.avg_pool2d(weights[None], block)[0] * block)
    return torch.stack(maps)


def logits_kinds(vocab: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator("cuda").manual_seed(0)
    noise_NV = torch.randn(POSITIONS, vocab, device="cuda", generator=generator)
    yield "random", (3 * noise_NV).to(dtype)
    zipf_V = -1.5 * torch.arange(1, vocab + 1, device="cuda").float().log()
    yield "zipf", (2 * noise_NV + zipf_V).to(dtype)


def real_logits(teacher: Path, text: str) -> Tensor:
    """A model's bfloat16 logits at `POSITIONS` positions of running text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(teacher)(text, return_tensors="pt").input_ids[:, :POSITIONS]
    model: Any = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.bfloat16)
    model = model.to("cuda").eval()
    with torch.inference_mode():
        parts = [model(part.cuda()).logits[0] for part in ids.split(1024, dim=1)]
    return torch.cat(parts).contiguous()


def head_row(shape: str, logits_NV: Tensor, k: int, rate: Rates) -> dict[str, Any]:
    rows, vocab = logits_NV.shape
    targets_N = torch.arange(rows, device=logits_NV.device) % vocab
    ours = microseconds(lambda: local_top_k(logits_NV, k, TAUS)) / rows
    whole = microseconds(lambda: head_topk(logits_NV, targets_N, k, TAUS)) / rows
    plain = microseconds(lambda: plain_head(logits_NV, k)) / rows
    least = head_least(vocab, k, logits_NV.element_size(), len(TAUS))
    row = line("head_topk", f"{shape}, V={vocab}, K={k}, {str(logits_NV.dtype)[6:]}", ours, least, rate, plain)
    return {**row, "whole_us": whole}


def attention_rows(heads: int, kv_heads: int, width: int, rate: Rates) -> Iterator[dict[str, Any]]:
    tokens = ROWS * TOKENS
    q_NHE = torch.randn(tokens, heads, width, device="cuda", dtype=torch.bfloat16)
    k_NHkvE = torch.randn(tokens, kv_heads, width, device="cuda", dtype=torch.bfloat16)
    starts = torch.arange(0, tokens + 1, TOKENS, dtype=torch.int32, device="cuda")
    pooled = torch.zeros(ROWS, TOKENS // 64, TOKENS // 64, device="cuda")
    shape = AttentionShape(width**-0.5)
    lse_HN = row_lse(q_NHE, k_NHkvE, starts, TOKENS, shape)
    plain = microseconds(lambda: plain_attention(q_NHE, k_NHkvE, 64)) / tokens
    name = f"H={heads}, Hkv={kv_heads}, E={width}, T={TOKENS}, b=64"
    for label, lse in (("lse given", lse_HN), ("lse computed", None)):

        def pool(lse: Tensor | None = lse) -> None:
            add_pooled_attention(pooled, q_NHE, k_NHkvE, starts, TOKENS, lse, shape, 64, 1.0)

        least = attention_least(heads, kv_heads, width, TOKENS, 64, lse is not None)
        yield line("pooled_attention, a layer", f"{name}, {label}", microseconds(pool) / tokens, least, rate, plain)


def hidden_row(width: int, window: int, rate: Rates) -> dict[str, Any]:
    tokens = ROWS * TOKENS
    parts = [torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    starts = torch.arange(0, tokens + 1, TOKENS, dtype=torch.int32, device="cuda")
    sums_BWD = torch.zeros(ROWS, TOKENS // window, width, device="cuda")
    running_ND = torch.zeros(tokens, width, device="cuda")
    ours = microseconds(lambda: add_window_sums(sums_BWD, parts, starts, window)) / tokens
    plain = microseconds(lambda: running_ND.add_(parts[0]).add_(parts[1])) / tokens
    least = hidden_least(width, window)
    return line("pooled_hidden, a layer", f"D={width}, w={window}", ours, least, rate, plain)


def line(kernel: str, shape: str, ours: float, least: Least, rate: Rates, plain: float) -> dict[str, Any]:
    """What is written of one kernel, in microseconds a token."""
    bytes_us, flops_us = least.bytes / rate.bytes, least.flops / rate.flops
    floor = max(bytes_us, flops_us)
    return {
        "kernel": kernel,
        "shape": shape,
        "us_per_token": ours,
        "floor_bytes_us": bytes_us,
        "floor_flops_us": flops_us,
        "floor_us": floor,
        "times_floor": ours / floor,
        "plain_us": plain,
        "plain_over_ours": plain / ours,
    }


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--teacher", type=Path, help="Hugging Face folder whose logits are searched too")
    options.add_argument("--text", type=Path, default=TEXT, help="a text file of some 20 kB for it to read")
    options.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON")
    return options


def main(words: list[str] | None = None) -> None:
    options = parser()
    arguments = options.parse_args(words)
    if not torch.cuda.is_available():
        options.error("no CUDA device: the kernels run on a GPU only")
    rate = rates()
    rows = []
    for vocab, k, dtype in (
        (151936, 64, torch.bfloat16), (151936, 256, torch.bfloat16), (151936, 64, torch.float32),
        (128256, 64, torch.bfloat16), (49152, 64, torch.bfloat16),
    ):  # fmt: skip
        rows += [head_row(kind, logits_NV, k, rate) for kind, logits_NV in logits_kinds(vocab, dtype)]
    if arguments.teacher is not None:
        text = arguments.text.read_text(encoding="utf-8")
        rows.append(head_row("real", real_logits(arguments.teacher, text), 64, rate))
    for heads, kv_heads, width in ((12, 2, 128), (32, 8, 128), (9, 3, 64), (16, 8, 256), (32, 32, 96)):
        rows += attention_rows(heads, kv_heads, width, rate)
    rows += [hidden_row(1536, window, rate) for window in (1, 64)]
    print(table(rows))
    measured = {"copy_tb_per_s": rate.bytes / 1e6, "matmul_tflop_per_s": rate.flops / 1e6}
    path = write_results("kernels", rows, device=device_name(), folder=arguments.results, rates=measured)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
