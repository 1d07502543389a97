"""The benchmark of the capture's kernels, what of it needs no GPU: floors, options, which text is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import __main__ as every
from benchmarks import kernels, train_throughput
from benchmarks.kernels import Least, Rates, attention_least, head_least, hidden_least, line

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_floor_is_the_larger_of_bytes_and_flops() -> None:
    rate = Rates(bytes=2.0, flops=100.0)
    row = line("x", "y", 4.0, Least(bytes=4, flops=50), rate, 8.0)
    assert (row["floor_bytes_us"], row["floor_flops_us"], row["floor_us"]) == (2.0, 0.5, 2.0)
    assert (row["times_floor"], row["plain_over_ours"]) == (2.0, 2.0)
    assert line("x", "y", 4.0, Least(bytes=4, flops=500), rate, 8.0)["floor_us"] == 5.0


def test_what_each_kernel_cannot_do_without() -> None:
    assert head_least(1000, 8, 2, 4) == Least(2000 + 8 * 8 + 16, 9000)
    # T=128, b=64: 2 x 2 numbers of a map, read and written for 128 tokens.
    given, computed = (attention_least(4, 2, 16, 128, 64, lse) for lse in (True, False))
    assert given == Least(2 * 16 * 6 + 16 + 8 * 4 / 128, 4 * 16 * 128)
    assert computed == Least(given.bytes - 16, 2 * given.flops)
    assert hidden_least(32, 1) == Least(4 * 32 + 8 * 32, 64) and hidden_least(32, 64).bytes == 4 * 32 + 4


def test_a_teacher_reads_the_readme_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = kernels.parser().parse_args(["--teacher", "x"])
    text = (REPOSITORY / arguments.text).read_text(encoding="utf-8")
    assert len(text) > 5 * kernels.POSITIONS
    monkeypatch.setattr(kernels.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        kernels.main([])
    assert stopped.value.code == 2


def test_every_benchmark_is_called_with_options_that_it_has() -> None:
    assert every.commands_of(False, True) == {"storage": []}
    with_teacher, without = (every.commands_of(True, teacher) for teacher in (True, False))
    assert with_teacher["kernels"] == ["--teacher", "data/smollm2-135m"] and without["kernels"] == []
    assert list(without) == ["storage", "kernels", "dump_throughput", "train_throughput", "slstm", "decode"]
    assert kernels.parser().parse_args(with_teacher["kernels"]).teacher == every.TEACHER
    assert train_throughput.parser().parse_args(with_teacher["train_throughput"]).presets == ["fast", "paper"]
