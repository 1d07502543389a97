"""What the capture's kernels cost on a GPU, against what the chip allows and against plain torch, in one run.

    python -m benchmarks.kernels

The floors come from rates measured in the same run: a device-to-device copy for bytes, a large bfloat16 product for
FLOPs. `floor` is a kernel's bytes or FLOPs at those rates; `plain` is what one would write without the kernel. Logits
are random, peaked in the order of ids (Zipf), and, with --teacher and --text, a real model's on real text.

Legend: N positions, V ids, K top-k, T tokens of a row, H heads, E head width, D width.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measured import RESULTS, device_name, table, write_results
from teacher_dump.kernels.head_topk_triton import local_top_k
from teacher_dump.kernels.pooled_attention_reference import AttentionShape
from teacher_dump.kernels.pooled_attention_triton import add_pooled_attention, row_lse
from teacher_dump.kernels.pooled_hidden_triton import add_window_sums

TAUS = (1.0, 1.2, 1.5, 2.0)
POSITIONS = 4096
TOKENS, ROWS = 2048, 8


def microseconds(work: Callable[[], object]) -> float:
    """Median time of one call on the device."""
    from triton.testing import do_bench

    return float(do_bench(work, return_mode="median")) * 1000


def rates() -> tuple[float, float]:
    """Bytes and FLOPs per microsecond that this device reaches."""
    source = torch.empty(1 << 30, dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / microseconds(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return copied, 2 * 8192**3 / microseconds(lambda: a @ b)


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


def head_row(shape: str, logits_NV: Tensor, k: int, bytes_rate: float) -> dict[str, Any]:
    rows, vocab = logits_NV.shape
    ours = microseconds(lambda: local_top_k(logits_NV, k, TAUS)) / rows
    plain = microseconds(lambda: plain_head(logits_NV, k)) / rows
    floor = vocab * logits_NV.element_size() / bytes_rate
    return line("head_topk", f"{shape}, V={vocab}, K={k}, {str(logits_NV.dtype)[6:]}", ours, floor, plain)


def attention_rows(heads: int, kv_heads: int, width: int, flops_rate: float) -> Iterator[dict[str, Any]]:
    tokens = ROWS * TOKENS
    q_NHE = torch.randn(tokens, heads, width, device="cuda", dtype=torch.bfloat16)
    k_NHkvE = torch.randn(tokens, kv_heads, width, device="cuda", dtype=torch.bfloat16)
    starts = torch.arange(0, tokens + 1, TOKENS, dtype=torch.int32, device="cuda")
    pooled = torch.zeros(ROWS, TOKENS // 64, TOKENS // 64, device="cuda")
    shape = AttentionShape(width**-0.5)
    lse_HN = row_lse(q_NHE, k_NHkvE, starts, TOKENS, shape)
    floor = heads * width * TOKENS / flops_rate  # half of a causal q k^T
    plain = microseconds(lambda: plain_attention(q_NHE, k_NHkvE, 64)) / tokens
    name = f"H={heads}, Hkv={kv_heads}, E={width}, T={TOKENS}, b=64"
    for label, lse in (("lse given", lse_HN), ("lse computed", None)):

        def pool(lse: Tensor | None = lse) -> None:
            add_pooled_attention(pooled, q_NHE, k_NHkvE, starts, TOKENS, lse, shape, 64, 1.0)

        times = 1 if lse is not None else 2
        yield line("pooled_attention, a layer", f"{name}, {label}", microseconds(pool) / tokens, times * floor, plain)


def hidden_row(width: int, window: int, bytes_rate: float) -> dict[str, Any]:
    tokens = ROWS * TOKENS
    parts = [torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    starts = torch.arange(0, tokens + 1, TOKENS, dtype=torch.int32, device="cuda")
    sums_BWD = torch.zeros(ROWS, TOKENS // window, width, device="cuda")
    running_ND = torch.zeros(tokens, width, device="cuda")
    ours = microseconds(lambda: add_window_sums(sums_BWD, parts, starts, window)) / tokens
    plain = microseconds(lambda: running_ND.add_(parts[0]).add_(parts[1])) / tokens
    floor = (4 * width + 8 * width / window) / bytes_rate
    return line("pooled_hidden, a layer", f"D={width}, w={window}", ours, floor, plain)


def line(kernel: str, shape: str, ours: float, floor: float, plain: float) -> dict[str, Any]:
    return {
        "kernel": kernel,
        "shape": shape,
        "us_per_token": ours,
        "floor_us": floor,
        "times_floor": ours / floor,
        "plain_us": plain,
        "plain_over_ours": plain / ours,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, help="Hugging Face folder whose logits are searched too")
    parser.add_argument("--text", type=Path, help="a text file of some 20 kB for it to read")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: the kernels run on a GPU only")
    if (arguments.teacher is None) != (arguments.text is None):
        parser.error("--teacher and --text go together")
    bytes_rate, flops_rate = rates()
    rows = []
    for vocab, k, dtype in (
        (151936, 64, torch.bfloat16), (151936, 256, torch.bfloat16), (151936, 64, torch.float32),
        (128256, 64, torch.bfloat16), (49152, 64, torch.bfloat16),
    ):  # fmt: skip
        rows += [head_row(kind, logits_NV, k, bytes_rate) for kind, logits_NV in logits_kinds(vocab, dtype)]
    if arguments.teacher is not None:
        text = arguments.text.read_text(encoding="utf-8")
        rows.append(head_row("real", real_logits(arguments.teacher, text), 64, bytes_rate))
    for heads, kv_heads, width in ((12, 2, 128), (32, 8, 128), (9, 3, 64), (16, 8, 256), (32, 32, 96)):
        rows += attention_rows(heads, kv_heads, width, flops_rate)
    rows += [hidden_row(1536, window, bytes_rate) for window in (1, 64)]
    print(table(rows))
    measured = {"copy_tb_per_s": bytes_rate / 1e6, "matmul_tflop_per_s": flops_rate / 1e6}
    path = write_results("kernels", rows, device=device_name(), folder=arguments.results, rates=measured)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
