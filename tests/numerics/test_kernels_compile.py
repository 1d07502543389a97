"""The kernels as a Hopper GPU would get them, compiled where there is none.

Triton's interpreter, which the other tests use on a CPU, takes what the compiler refuses: arguments that are 1, and
more shared memory than an SM has. Here a driver that only names the target stands in for the GPU, and nothing is run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED_MEMORY = 227 * 1024

HOPPER = """
import json, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

class Hopper:
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device=None: 0
    get_active_torch_device = lambda self: torch.device("cpu")

driver.set_active(Hopper())
used, variants, launch = {}, {}, jit.JITFunction.run
def compile_only(self, *args, grid, warmup, **kwargs):
    kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
    used[self.fn.__name__] = max(kernel.metadata.shared, used.get(self.fn.__name__, 0))
    variants.setdefault(self.fn.__name__, set()).add(kernel.hash)
    return kernel
jit.JITFunction.run = compile_only
"""

STUDENT = """
from student.blocks.implicit_attention_triton import pooled_by_kernels
from student.losses.fused_triton import kd_rows_
from student.blocks.slstm_triton import slstm_recurrence

batch, heads, width = (int(word) for word in sys.argv[1:4])
dtype = getattr(torch, sys.argv[4])
x_BTG = torch.zeros(batch, 8, 4 * heads * width, dtype=dtype, requires_grad=True)
R_Hgd = torch.zeros(heads, 4 * width, width)
y_BTHd, _ = slstm_recurrence(x_BTG, R_Hgd, torch.zeros(4 * heads * width), torch.zeros(4, batch, heads * width))
y_BTHd.float().sum().backward()
qk = [torch.zeros(batch, heads, 128, 2 * width, dtype=dtype, requires_grad=True) for _ in range(2)]
block = 64 if dtype is torch.float32 else 128
pooled_by_kernels(*qk, *torch.zeros(2, batch, heads, 128).unbind(0), block).sum().backward()
teacher = torch.zeros(batch, 64, dtype=torch.int32), torch.zeros(batch, 64), torch.zeros(batch)
draws = torch.zeros(batch, 48, dtype=torch.int32), torch.zeros(batch, 48), torch.zeros(batch)
for weight_kl, divergence in ((0.8, "tail"), (0.8, "renormalised"), (0.8, "sampled"), (0.0, "tail")):
    rows = torch.zeros(batch, 1000, dtype=dtype), torch.zeros(batch, dtype=torch.int64), *teacher
    kd_rows_(*rows, 0.2, weight_kl, 1.5, True, 1.0, None, divergence, draws)
print(json.dumps(used))
"""

TEACHER = """
from teacher_dump.kernels.head_topk_triton import local_top_k
from teacher_dump.kernels.logits_triton import shaped_logits
from teacher_dump.kernels.pooled_attention_reference import AttentionShape
from teacher_dump.kernels.pooled_attention_triton import add_pooled_attention
from teacher_dump.kernels.pooled_hidden_triton import add_window_sums

for tokens in (48, 33, 1):
    local_top_k(torch.zeros(tokens, 4096, dtype=torch.bfloat16), 8, (1.0,), 30.0)
    shaped_logits(torch.zeros(tokens, 1, dtype=torch.bfloat16), 30.0, 1.0)
    starts = torch.tensor([0, tokens], dtype=torch.int32)
    qkv_NHE = torch.zeros(tokens, 8, 64, dtype=torch.bfloat16)
    q_NHE, k_NHE = qkv_NHE[:, :4], qkv_NHE[:, 4:6]
    add_pooled_attention(torch.zeros(1, 1, 1), q_NHE, k_NHE, starts, tokens, None, AttentionShape(0.1), 64, 1.0)
    add_window_sums(torch.zeros(1, 4, 64), [qkv_NHE[:, 0]] * 2, starts, 16)
print(json.dumps({name: len(found) for name, found in variants.items()}))
"""


def compiled(code: str, *words: str) -> dict[str, int]:
    """What `code` prints when nothing is interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", HOPPER + code, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    printed: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return printed


@pytest.mark.parametrize(
    ("batch", "heads", "width", "dtype"),
    [(1, 24, 64, "bfloat16"), (64, 16, 96, "bfloat16"), (1, 24, 64, "float32")],
    ids=["one row", "the paper's heads", "float32"],
)
def test_kernels_compile_and_fit(batch: int, heads: int, width: int, dtype: str) -> None:
    used = compiled(STUDENT, str(batch), str(heads), str(width), dtype)
    pooled = {"_key_sums", "_pool", "_pool_backward", "_keys_backward"}
    assert used.keys() == {"_forward", "_backward", "_kd_rows"} | pooled
    assert max(used.values()) <= SHARED_MEMORY, used


def test_the_teachers_kernels_are_compiled_once_for_all_lengths() -> None:
    """Steps of 48 tokens, of 33 and of 1: a dump would stop to compile wherever the last digits of N change."""
    variants = compiled(TEACHER)
    head = {"_sum_blocks", "_select", "_search", "_shape"}
    assert variants == dict.fromkeys(head | {"_row_lse", "_pool", "_add_windows"}, 1)
