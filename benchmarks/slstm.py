"""The sLSTM's recurrence on a GPU: our kernel beside the `xlstm` package's own, forward and backward, in one run.

    python -m benchmarks.slstm

At the widths of the presets `fast` (24 heads of 64) and `paper` (16 of 96), in bfloat16 as they train; `generation` is
one token of 64 rows. The package's kernel is compiled at its first use and wants nvcc and ninja; without them it is
left out, and the row says so.

Legend: B rows, T tokens a row, H heads, d head width, G = 4·H·d gates.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels import microseconds
from benchmarks.measured import RESULTS, Row, device_name, table, write_results
from student.blocks.slstm import ScanCell
from student.blocks.slstm_triton import slstm_recurrence

HEADS = {"fast": (24, 64), "paper": (16, 96)}
SHAPES = ((64, 512), (16, 2048))


def cell_of(heads: int, width: int) -> ScanCell:
    from xlstm import sLSTMLayerConfig

    config = sLSTMLayerConfig(embedding_dim=heads * width, num_heads=heads, backend="vanilla")
    return ScanCell(config).cuda()


def inputs(batch: int, length: int, heads: int, width: int) -> tuple[Tensor, Tensor]:
    """x_BTG in bfloat16, and an empty state (4, B, H·d)."""
    generator = torch.Generator("cuda").manual_seed(0)
    x_BTG = torch.randn(batch, length, 4 * heads * width, device="cuda", generator=generator).bfloat16()
    return x_BTG.requires_grad_(), torch.zeros(4, batch, heads * width, device="cuda")


def ours(cell: ScanCell, x_BTG: Tensor, state: Tensor) -> Tensor:
    return slstm_recurrence(x_BTG, cell._recurrent_kernel_, cell._bias_.flatten(), state)[0]


def packages(cell: ScanCell, x_BTG: Tensor, state: Tensor) -> Tensor:
    heads, width = cell.config.num_heads, cell.config.head_dim
    x_TB4Hd = x_BTG.view(*x_BTG.shape[:2], 4, heads, width).transpose(0, 1)
    with torch.autocast("cuda", torch.bfloat16):
        return cell._cuda_kernel(x_TB4Hd, state)[0]


def forward_backward(cell: ScanCell, form: Callable[..., Tensor], x_BTG: Tensor, state: Tensor) -> None:
    y = form(cell, x_BTG, state)
    torch.autograd.grad(y.float().sum(), [x_BTG, *cell.parameters()])


def measure(preset: str, batch: int, length: int) -> list[Row]:
    heads, width = HEADS[preset]
    cell, (x_BTG, state) = cell_of(heads, width), inputs(batch, length, heads, width)
    rows: list[Row] = []
    for name, form in (("ours", ours), ("package, cuda", packages)):
        row: Row = {"preset": preset, "kernel": name, "heads": heads, "width": width, "batch": batch, "length": length}
        try:
            found = microseconds(partial(forward_backward, cell, form, x_BTG, state))
            row["us_per_token"] = found / (batch * length)
        except Exception as error:  # of a compiler, or of what it needs
            row["skipped"] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        rows.append(row)
    if "us_per_token" in rows[0] and "us_per_token" in rows[1]:
        rows[0]["times_faster"] = rows[1]["us_per_token"] / rows[0]["us_per_token"]
    return rows


def step(preset: str, batch: int = 64) -> Row:
    heads, width = HEADS[preset]
    cell, (x_BTG, state) = cell_of(heads, width), inputs(batch, 1, heads, width)
    with torch.no_grad():
        found = microseconds(lambda: cell(x_BTG[:, 0:1], state.clone()))
    return {
        "preset": preset, "kernel": "ours, generation", "heads": heads, "width": width, "batch": batch, "length": 1,
        "us_per_token": found / batch,
    }  # fmt: skip


def main(words: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON")
    arguments = options.parse_args(words)
    if not torch.cuda.is_available():
        options.error("no CUDA device: the kernels run on a GPU only")
    rows: list[dict[str, Any]] = []
    for preset in HEADS:
        for batch, length in SHAPES:
            rows += measure(preset, batch, length)
        rows.append(step(preset))
    columns = ("preset", "kernel", "heads", "width", "batch", "length", "us_per_token", "times_faster", "skipped")
    print(table(rows, columns))
    print(f"written to {write_results('slstm', rows, device=device_name(), folder=arguments.results)}")


if __name__ == "__main__":
    main()
