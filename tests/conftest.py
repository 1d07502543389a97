"""What every test runs under: one thread, no tokenizer threads beside it, and the same examples every time."""

from __future__ import annotations

import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch

if not torch.cuda.is_available():  # must stand before Triton is imported: kernels are then run in its interpreter
    os.environ["TRITON_INTERPRET"] = "1"

from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

settings.register_profile(
    "repository",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("repository")
