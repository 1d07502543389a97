"""On a GPU: blocks in few passes, compiled, against the package's forward under the same autocast and in float64."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from helpers_student import toy_teacher
from torch import Tensor, nn
from xlstm import mLSTMBlock, sLSTMBlock

from student.blocks import compiled
from student.blocks.implicit_attention import pooled_implicit_attention
from student.blocks.mlstm import capturing
from student.model import DistilXLSTM, StudentConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(900),  # everything is compiled at its first use
]
BLOCKS = {"slstm": 0, "mlstm": 1}


def run(block: nn.Module, x_BTD: Tensor, upstream_BTD: Tensor, ours: bool, map_block: int) -> dict[str, Tensor]:
    """Output, maps and all gradients, by name, in float64 on the CPU."""
    x_BTD = x_BTD.clone().requires_grad_()
    block.zero_grad()
    package = mLSTMBlock if isinstance(block, mLSTMBlock) else sLSTMBlock
    forward = block if ours else lambda x: package.forward(block, x)
    found = {}
    if package is mLSTMBlock and map_block:
        with capturing(block) as captured:
            y_BTD = forward(x_BTD)
        maps = pooled_implicit_attention(*captured[0].attention_inputs(), map_block)
        found["maps"] = maps
        loss = (maps * torch.linspace(-1, 1, maps.numel(), device=maps.device).view(maps.shape)).sum()
    else:
        y_BTD = forward(x_BTD)
        loss = torch.zeros((), device=x_BTD.device)
    (loss + (y_BTD * upstream_BTD).sum()).backward()
    found |= {"y": y_BTD, "x": x_BTD.grad} | {name: p.grad for name, p in block.named_parameters()}
    return {name: value.detach().cpu().double() for name, value in found.items()}


@pytest.mark.parametrize("kind", sorted(BLOCKS))
@pytest.mark.parametrize(("batch", "length", "map_block"), [(4, 128, 64), (3, 200, 50), (1, 65, 0)])
def test_a_compiled_block_is_as_near_to_float64_as_the_package(
    kind: str, batch: int, length: int, map_block: int
) -> None:
    distances: dict[str, list[tuple[float, float]]] = {}  # from float64, of each block: ours, the package's
    for seed in range(6):
        torch.manual_seed(seed)
        model = DistilXLSTM(StudentConfig(blocks=2, heads=4), *toy_teacher(width=256), max_length=128)
        single = model.stack.blocks[BLOCKS[kind]]
        with torch.no_grad():
            for parameter in single.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        x_BTD, upstream_BTD = torch.randn(2, batch, length, 256).unbind(0)
        exact = run(copy.deepcopy(single).double(), x_BTD.double(), upstream_BTD.double(), False, map_block)
        single.cuda()
        with warnings.catch_warnings(), torch.autocast("cuda", dtype=torch.bfloat16):
            warnings.filterwarnings("error", message="torch.compile failed")
            package, found = (run(single, x_BTD.cuda(), upstream_BTD.cuda(), ours, map_block) for ours in (False, True))
        for name, want in exact.items():
            ours, theirs = (float((values[name] - want).norm() / (want.norm() + 1e-9)) for values in (found, package))
            distances.setdefault(name, []).append((ours, theirs))
    assert not compiled._failure
    for name, pairs in distances.items():
        ratios = torch.tensor([math.log((ours + 1e-4) / (theirs + 1e-4)) for ours, theirs in pairs])
        scatter = float(ratios.std()) / len(pairs) ** 0.5
        assert sorted(theirs for _, theirs in pairs)[len(pairs) // 2] < 0.2, f"{name}: says nothing: {pairs}"
        assert float(ratios.mean()) <= math.log(1.05) + 3 * scatter, f"{name}: ours and the package's: {pairs}"
