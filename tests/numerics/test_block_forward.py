"""Blocks in few passes against the package's own forward: exactly in float64, no further off under autocast."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Iterator

import pytest
import torch
from helpers_student import toy_teacher
from torch import Tensor, nn
from xlstm import mLSTMBlock, sLSTMBlock

from student.blocks import block_forward, compiled
from student.blocks.block_forward import mlstm_block, slstm_block
from student.blocks.compiled import Compiled
from student.blocks.implicit_attention import pooled_implicit_attention
from student.blocks.mlstm import capturing
from student.model import DistilXLSTM, StudentConfig

KINDS = ["slstm", "mlstm"]
SHAPES = [(1, 1), (3, 2), (2, 7), (3, 65)]


def block_of(kind: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A block of width 64 whose every parameter is away from its initial value."""
    torch.manual_seed(seed)  # the same block in every dtype
    config = StudentConfig(blocks=2, heads=2, mlstm_qkv_blocksize=16)
    model = DistilXLSTM(config, *toy_teacher(width=64), max_length=128)
    block = model.stack.blocks[KINDS.index(kind)].to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return block


def inputs_of(batch: int, length: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """x and an upstream gradient."""
    generator = torch.Generator().manual_seed(batch * length)
    x, upstream = (torch.randn(batch, length, 64, generator=generator, dtype=torch.float64) for _ in range(2))
    return x.to(dtype), upstream.to(dtype)


def run(block: nn.Module, x_BTD: Tensor, upstream_BTD: Tensor, ours: bool, map_block: int = 0) -> dict[str, Tensor]:
    """Output, maps and all gradients, by name, in float64."""
    x_BTD = x_BTD.clone().requires_grad_()
    block.zero_grad()
    found = {}
    with capturing(block) if map_block else warnings.catch_warnings() as captured:
        if ours:
            y_BTD = (mlstm_block if isinstance(block, mLSTMBlock) else slstm_block)(block, x_BTD)
        else:
            y_BTD = (mLSTMBlock if isinstance(block, mLSTMBlock) else sLSTMBlock).forward(block, x_BTD)
    loss = (y_BTD * upstream_BTD).sum()
    if map_block:
        maps = pooled_implicit_attention(*captured[0].attention_inputs(), map_block)
        found["maps"] = maps.detach().double()
        loss = loss + (maps * torch.linspace(-1, 1, maps.numel(), device=maps.device).view(maps.shape)).sum()
    loss.backward()
    found |= {"y": y_BTD.detach().double(), "x": x_BTD.grad.double()}
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == parameter.dtype, name
        found[name] = parameter.grad.double().clone()
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch", "length"), SHAPES)
def test_in_float64_it_is_the_packages_block(kind: str, batch: int, length: int) -> None:
    block, inputs = block_of(kind), inputs_of(batch, length)
    expected = run(block, *inputs, ours=False)
    for name, got in run(block, *inputs, ours=True).items():
        torch.testing.assert_close(got, expected[name], rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_captured_inputs_carry_gradients_as_the_packages_do() -> None:
    block, inputs = block_of("mlstm"), inputs_of(3, 12)
    expected = run(block, *inputs, ours=False, map_block=4)
    found = run(block, *inputs, ours=True, map_block=4)
    for name, got in found.items():
        torch.testing.assert_close(got, expected[name], rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch", "length"), [(3, 7), (5, 67)])
def test_under_autocast_it_is_as_near_to_float64_as_the_package(kind: str, batch: int, length: int) -> None:
    """Over several blocks together: of one block, roundings put now the one nearer and now the other."""
    distances: dict[str, list[tuple[float, float]]] = {}  # from float64, of each block: ours, the package's
    for seed in range(8):
        exact = run(block_of(kind, seed=seed), *inputs_of(batch, length), ours=False)
        block, inputs = block_of(kind, torch.float32, seed), inputs_of(batch, length, torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            package, found = (run(block, *inputs, ours=ours) for ours in (False, True))
        for name, want in exact.items():
            ours, theirs = (float((values[name] - want).norm() / (want.norm() + 1e-9)) for values in (found, package))
            distances.setdefault(name, []).append((ours, theirs))
    for name, pairs in distances.items():
        ratios = torch.tensor([math.log((ours + 1e-4) / (theirs + 1e-4)) for ours, theirs in pairs])
        scatter = float(ratios.std()) / len(pairs) ** 0.5
        assert sorted(theirs for _, theirs in pairs)[len(pairs) // 2] < 0.2, f"{name}: says nothing: {pairs}"
        assert float(ratios.mean()) <= math.log(1.05) + 3 * scatter, f"{name}: ours and the package's: {pairs}"


@pytest.mark.parametrize("kind", KINDS)
def test_the_residual_stays_float32(kind: str) -> None:
    block, (x_BTD, _) = block_of(kind, torch.float32), inputs_of(2, 7, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_BTD = (mlstm_block if kind == "mlstm" else slstm_block)(block, x_BTD)
    assert y_BTD.dtype == torch.float32


@pytest.fixture
def compiled_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compiled, "DEVICES", {"cpu", "cuda"})
    monkeypatch.setattr(compiled, "_failure", [])
    yield
    torch._dynamo.reset()


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="the compiler of a CPU needs g++")
@pytest.mark.usefixtures("compiled_on_cpu")
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_it_is_the_same(kind: str) -> None:
    """Under the CPU's compiler, which fails where the GPU's would: at what it cannot take as one graph."""
    block, inputs = block_of(kind), inputs_of(2, 7)
    expected = run(block, *inputs, ours=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = run(block, *inputs, ours=True)
    assert not compiled._failure
    for name, got in found.items():
        torch.testing.assert_close(got, expected[name], rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.usefixtures("compiled_on_cpu")
def test_shapes_beyond_the_limit_share_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "STATIC_SHAPES", 2)
    function = Compiled(lambda x: x.sin() + 1)
    for rows in range(3, 9):
        x = torch.linspace(0, 1, rows)
        torch.testing.assert_close(function(x), x.sin() + 1)
    assert sorted(function._seen.values()) == [False] * 4 + [True] * 2


@pytest.mark.usefixtures("compiled_on_cpu")
def test_without_a_compiler_the_plain_function_is_called_after_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: object) -> None:
        raise RuntimeError("no C compiler")

    function = Compiled(lambda x: x + 1)
    monkeypatch.setattr(function, "_static", no_compiler)
    with pytest.warns(RuntimeWarning, match="no C compiler"):
        assert function(torch.zeros(2)).tolist() == [1, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert function(torch.zeros(3)).tolist() == [1, 1, 1]


@pytest.mark.usefixtures("compiled_on_cpu")
def test_code_is_another_where_products_are_rounded_in_another_way() -> None:
    function = Compiled(lambda x: x + 1)
    function(torch.zeros(2))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high" if before == "highest" else "highest")
        function(torch.zeros(2))
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(function._seen) == 2


@pytest.mark.usefixtures("compiled_on_cpu")
def test_nothing_is_compiled_where_there_are_too_many_shapes() -> None:
    function = Compiled(lambda x: x + 1)
    with pytest.raises(KeyError), compiled.uncompiled():
        assert function(torch.zeros(2)).tolist() == [1, 1]
        raise KeyError
    assert not function._seen and "cpu" in compiled.DEVICES


def test_a_cpu_keeps_the_packages_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training on a CPU goes on bit for bit from checkpoints of before."""
    for name in ("mlstm_block", "slstm_block"):
        monkeypatch.setattr(block_forward, name, lambda *_: pytest.fail("not the package's"))
    model = DistilXLSTM(StudentConfig(blocks=2, heads=2), *toy_teacher(width=64), max_length=128)
    model(torch.zeros(1, 4, dtype=torch.int64))
