"""The student: its shape, its frozen parts, its parallel and recurrent forms, and its cells against the package's."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator

import pytest
import torch
from helpers_student import toy_teacher
from torch import Tensor
from xlstm import sLSTMBlock, sLSTMLayerConfig
from xlstm.blocks.mlstm.backends import parallel_stabilized_simple
from xlstm.blocks.slstm.cell import sLSTMCell_cuda, sLSTMCell_vanilla

from pipeline.errors import UserError
from student.blocks import mlstm
from student.blocks.implicit_attention import dense_implicit_attention, pool_dense
from student.blocks.mlstm import mlstm_chunkwise
from student.blocks.slstm import ScanCell, cuda_layout, vanilla_layout
from student.model import DistilXLSTM, StudentConfig

SMALL = StudentConfig(blocks=4, heads=4)


@pytest.fixture
def model() -> Iterator[DistilXLSTM]:
    yield build(SMALL)


def build(config: StudentConfig, seed: int = 0, **facts: object) -> DistilXLSTM:
    """A student with every parameter moved off its initial value, where whole gates and R are zero."""
    torch.manual_seed(seed)
    model = DistilXLSTM(config, *toy_teacher(**facts), max_length=64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_the_default_shape_is_the_papers() -> None:
    """84.2 M trainable parameters at the teacher's width 1536, mLSTM heads of 192, sLSTM heads of 96."""
    facts, _ = toy_teacher(vocab_size=8, width=1536)
    with torch.device("meta"):
        empty = torch.empty(8, 1536)
        model = DistilXLSTM(
            StudentConfig(), facts, {"embedding_VD": empty, "head_VD": empty, "norm_D": torch.empty(1536)}, 512
        )
    assert model.trainable_parameters() == 84_175_968
    assert model.config.slstm_blocks() == (0, 2, 4) and model.mlstm_blocks == (1, 3, 5)
    assert model.stack.blocks[1].xlstm.config._inner_embedding_dim // 16 == 192
    assert model.stack.blocks[0].xlstm.slstm_cell.head_dim == 96


@pytest.mark.parametrize("slstm_at", [(), (0, 1, 2, 3), (3,)])
def test_any_placement_of_slstm_blocks_can_be_built(slstm_at: tuple[int, ...]) -> None:
    model = build(StudentConfig(blocks=4, heads=4, slstm_at=slstm_at))
    kinds = tuple(i for i, block in enumerate(model.stack.blocks) if isinstance(block, sLSTMBlock))
    assert kinds == slstm_at
    out = model(tokens(2, 16), map_block=4)
    assert out.h_BTD.shape == (2, 16, 64)
    assert sorted(out.maps) == [i for i in range(4) if i not in slstm_at]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (StudentConfig(heads=7), "student.heads=7 does not divide the teacher's width 64"),
        (StudentConfig(heads=64), "student.heads=64"),
        (StudentConfig(mlstm_qkv_blocksize=48), "student.mlstm_qkv_blocksize=48 .* inner width 128"),
        (StudentConfig(blocks=3, slstm_at=(0, 3)), r"student.slstm_at names blocks \[3\], but blocks=3"),
        (StudentConfig(blocks=0), "blocks=0"),
    ],
)
def test_a_shape_that_cannot_be_built_is_named(config: StudentConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DistilXLSTM(config, *toy_teacher(), max_length=64)


def test_tensors_of_another_teacher_are_refused() -> None:
    facts, _ = toy_teacher(vocab_size=97)
    _, tensors = toy_teacher(vocab_size=98)
    with pytest.raises(UserError, match=r"\(98, 64\) but teacher.json says \(97, 64\)"):
        DistilXLSTM(SMALL, facts, tensors, max_length=64)


@pytest.mark.parametrize("tied", [True, False])
def test_the_teachers_tensors_are_frozen_and_stored_nowhere(tied: bool) -> None:
    model = build(SMALL, tied=tied)
    assert not [name for name in model.state_dict() if name.endswith("_VD")]
    assert not any(p.shape == (97, 64) for p in model.parameters())
    frozen = {name: buffer.clone() for name, buffer in model.named_buffers()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.logits(model(tokens(2, 8)).h_BTD.flatten(0, 1)).logsumexp(-1).sum().backward()
    optimizer.step()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, frozen[name]) and not buffer.requires_grad
    moved = copy.deepcopy(model).double()
    assert (moved.head_VD.data_ptr() == moved.embedding_VD.data_ptr()) == tied


def test_every_parameter_receives_a_gradient() -> None:
    model = build(SMALL)
    out = model(tokens(2, 16), map_block=4)
    (out.h_BTD.square().sum() + sum(m.square().sum() for m in out.maps.values())).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_scale_cap_and_embedding_scale_are_the_teachers() -> None:
    facts, tensors = toy_teacher(logit_scale=0.25, soft_cap=3.0, embedding_scale=8.0)
    model = DistilXLSTM(SMALL, facts, tensors, max_length=64)
    ids = tokens(1, 5)
    torch.testing.assert_close(model.embed(ids), 8.0 * tensors["embedding_VD"][ids])
    h_ND = torch.randn(5, 64)
    expected = 3.0 * torch.tanh(0.25 * (h_ND @ tensors["head_VD"].T) / 3.0)
    torch.testing.assert_close(model.logits(h_ND), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.logits(h_ND), model.logits(h_ND.clone()))
        assert model.logits(h_ND).dtype == torch.float32


def test_the_teachers_norm_is_the_start_of_the_final_norm() -> None:
    facts, tensors = toy_teacher(norm_offset=1.0, norm_eps=1e-3)
    model = DistilXLSTM(StudentConfig(heads=4, final_norm="teacher"), facts, tensors, max_length=64)
    x = torch.randn(3, 64)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * (tensors["norm_D"] + 1)
    torch.testing.assert_close(model.final_norm(x), expected)
    assert model.final_norm.weight.requires_grad


def test_later_tokens_change_nothing_before_them(model: DistilXLSTM) -> None:
    ids = tokens(2, 70)
    changed = ids.clone()
    changed[:, 40:] = tokens(2, 30, seed=1)
    with torch.no_grad():
        # Not to the bit: a chunk's stabiliser is the maximum over all of it.
        torch.testing.assert_close(model(ids).h_BTD[:, :40], model(changed).h_BTD[:, :40], atol=1e-4, rtol=0)


# In float64 what is left is the package's epsilon, which its two forms add at different scales.
@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-6)])
def test_step_and_parallel_form_agree(model: DistilXLSTM, dtype: torch.dtype, tolerance: float) -> None:
    model.to(dtype)
    ids = tokens(2, 70)  # more than one chunk of the mLSTM
    parallel = model(ids).h_BTD
    state = model.initial_state(2)
    size = state.bytes()
    for t in range(ids.shape[1]):
        h_BD, state = model.step(ids[:, t], state)
        torch.testing.assert_close(h_BD, parallel[:, t], atol=tolerance, rtol=tolerance)
        assert state.bytes() == size


@torch.no_grad()
@pytest.mark.parametrize("prompt", [1, 2, 3, 40, 64])
def test_prefill_hands_over_to_step(model: DistilXLSTM, prompt: int) -> None:
    ids = tokens(2, 70)
    parallel = model(ids).h_BTD
    h_BD, state = model.prefill(ids[:, :prompt])
    assert state.bytes() == model.initial_state(2).bytes()
    torch.testing.assert_close(h_BD, parallel[:, prompt - 1], atol=1e-4, rtol=1e-4)
    for t in range(prompt, 70):
        h_BD, state = model.step(ids[:, t], state)
        torch.testing.assert_close(h_BD, parallel[:, t], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_step_leaves_the_state_it_was_given_as_it_was(model: DistilXLSTM) -> None:
    _, state = model.prefill(tokens(1, 9))
    first, _ = model.step(torch.tensor([5]), state)
    model.step(torch.tensor([6]), state)
    again, _ = model.step(torch.tensor([5]), state)
    assert torch.equal(first, again)


def test_maps_are_the_blocks_own_attention(model: DistilXLSTM) -> None:
    ids = tokens(2, 32)
    assert model(ids).maps == {}
    out = model(ids, map_block=8)
    assert sorted(out.maps) == [1, 3] and out.maps[1].shape == (2, 4, 4) and out.maps[1].dtype == torch.float32
    torch.testing.assert_close(out.h_BTD, model(ids).h_BTD)
    # The same from the block's input, by the package's own projections.
    block, layer = model.stack.blocks[1], model.stack.blocks[1].xlstm
    x = model.stack.blocks[0](model.embed(ids))
    inner = layer.proj_up(block.xlstm_norm(x)).chunk(2, -1)[0]
    conv = layer.conv_act_fn(layer.conv1d(inner))
    q, k, v = layer.q_proj(conv), layer.k_proj(conv), layer.v_proj(inner)
    cell = layer.mlstm_cell
    gates = [gate(torch.cat([q, k, v], -1)).transpose(1, 2) for gate in (cell.igate, cell.fgate)]
    q, k = (x.view(2, 32, 4, -1).transpose(1, 2) for x in (q, k))
    expected = pool_dense(dense_implicit_attention(q, k, *gates), 8).mean(1)
    torch.testing.assert_close(out.maps[1], expected, atol=1e-5, rtol=1e-4)


def test_capturing_keeps_nothing_of_the_graph(model: DistilXLSTM, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[mlstm.CellInputs]] = []
    original = mlstm.CellInputs

    def recording(*values: Tensor) -> mlstm.CellInputs:
        inputs = original(*values)
        made.append(weakref.ref(inputs))
        return inputs

    monkeypatch.setattr(mlstm, "CellInputs", recording)
    out = model(tokens(2, 16), map_block=4)
    assert len(made) == len(out.maps) == 2
    model(tokens(2, 16))
    assert len(made) == 2, "captured without being asked"
    assert [ref() for ref in made] == [None, None]


def test_a_length_that_does_not_pool_is_refused(model: DistilXLSTM) -> None:
    with pytest.raises(ValueError, match="T=10"):
        model(tokens(1, 10), map_block=4)


def test_memory_does_not_grow_with_max_length() -> None:
    sizes = {
        length: sum(b.numel() for b in DistilXLSTM(SMALL, *toy_teacher(), max_length=length).buffers())
        for length in (64, 8192)
    }
    assert sizes[64] == sizes[8192]


# The mLSTM cell.


@pytest.mark.parametrize(("length", "chunk"), [(1, 8), (7, 8), (8, 8), (40, 8), (45, 16), (33, 1)])
@pytest.mark.parametrize("forget_bias", [-3.0, 3.0])
def test_chunkwise_mlstm_equals_the_packages_dense_form(length: int, chunk: int, forget_bias: float) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    igate, fgate = (torch.randn(2, 3, length, generator=generator, dtype=torch.float64) for _ in range(2))
    inputs = [x.requires_grad_() for x in (q, k, v, 2 * igate, fgate + forget_bias)]
    gates = [gate[..., None] for gate in inputs[3:]]
    torch.testing.assert_close(
        mlstm_chunkwise(*inputs, chunk=chunk), parallel_stabilized_simple(*inputs[:3], *gates), atol=1e-12, rtol=1e-10
    )
    # Without epsilon: the package lets a gradient of its size through the stabiliser, which should have none.
    ours = mlstm_chunkwise(*inputs, chunk=chunk, eps=0.0)
    theirs = parallel_stabilized_simple(*inputs[:3], *gates, eps=0.0)
    weight = torch.randn(ours.shape, generator=generator, dtype=ours.dtype)
    for got, expected in zip(
        torch.autograd.grad((ours * weight).sum(), inputs),
        torch.autograd.grad((theirs * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize(("length", "padded"), [(9, 16), (40, 64), (64, 64), (100, 128), (128, 128), (300, 384)])
@pytest.mark.parametrize("limit", [12, 65_535, 2])
def test_the_kernel_gets_lengths_it_takes_and_no_more_than_one_launch_holds(
    monkeypatch: pytest.MonkeyPatch, length: int, padded: int, limit: int
) -> None:
    """5 rows of 3 heads, a chunk of 128 tokens each: with a limit of 12, four rows a launch or fewer."""
    package = pytest.importorskip("mlstm_kernels.torch.chunkwise.triton_xl_chunk")
    launches: list[torch.Size] = []

    def kernel(*inputs: Tensor, chunk_size: int, eps: float, autocast_kernel_dtype: torch.dtype) -> Tensor:
        rows, heads, tokens, _ = inputs[0].shape
        assert tokens == padded and rows * heads * -(-tokens // chunk_size) <= limit
        launches.append(inputs[0].shape)
        return mlstm_chunkwise(*inputs, eps=eps)

    monkeypatch.setattr(package, "mlstm_chunkwise__xl_chunk", kernel)
    monkeypatch.setattr(mlstm, "LAUNCH_LIMIT", limit)
    inputs = [torch.randn(5, 3, length, 8) for _ in range(3)] + [torch.randn(5, 3, length) for _ in range(2)]
    torch.testing.assert_close(mlstm._mlstm_kernel(*inputs), mlstm_chunkwise(*inputs))
    chunks = -(-padded // 128)
    assert len(launches) == (0 if limit < 3 * chunks else -(-5 // (limit // (3 * chunks))))


# The sLSTM cell.


def cells(heads: int, width: int, dtype: torch.dtype) -> tuple[sLSTMCell_vanilla, ScanCell]:
    torch.manual_seed(0)
    config = sLSTMLayerConfig(num_heads=heads, embedding_dim=heads * width, backend="vanilla")
    package, ours = sLSTMCell_vanilla(config), ScanCell(config)
    with torch.no_grad():
        package._recurrent_kernel_.normal_(std=0.5)
        package._bias_.add_(torch.randn_like(package._bias_))
    ours.load_state_dict(package.state_dict())
    return package.to(dtype), ours.to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("length", [1, 2, 37])
def test_the_scan_equals_the_packages_vanilla_cell(dtype: torch.dtype, tolerance: float, length: int) -> None:
    results = []
    for cell in cells(heads=4, width=6, dtype=dtype):
        torch.manual_seed(1)
        x = torch.randn(3, length, 4 * 24, dtype=dtype, requires_grad=True)
        y, state = cell(x)
        (y * torch.randn(y.shape, dtype=dtype)).sum().backward()
        _, c, n, m = state
        # c and n are scaled by exp(-m), m itself is free while nothing has been forgotten.
        memory = torch.stack((c / n, n.log() + m))
        results.append((y, memory, x.grad, cell._recurrent_kernel_.grad, cell._bias_.grad))
    for expected, got in zip(*results, strict=True):
        scale = expected.abs().max().item() + 1e-30
        torch.testing.assert_close(got, expected, atol=tolerance * scale, rtol=0)


def test_the_scan_goes_on_from_the_packages_state() -> None:
    package, ours = cells(heads=4, width=6, dtype=torch.float64)
    x = torch.randn(2, 20, 96, dtype=torch.float64)
    whole, _ = package(x)
    _, state = package(x[:, :11])
    rest, _ = ours(x[:, 11:], state)
    torch.testing.assert_close(rest, whole[:, :, 11:])


def test_parameters_move_between_the_packages_two_layouts() -> None:
    """The layouts are the package's own formulas (`_recurrent_kernel_ext2int`, `_bias_ext2int` of its two cells)."""
    heads, width = 3, 5
    package, _ = cells(heads, width, torch.float32)
    config = sLSTMLayerConfig(num_heads=heads, embedding_dim=heads * width, backend="cuda")
    cuda = sLSTMCell_cuda(config, skip_backend_init=True)
    # The layout both cells share: (H, d in, 4, d out) and (H, 4, d).
    kernel, bias = package.recurrent_kernel.clone(), package.bias.clone()
    expected = cuda._recurrent_kernel_ext2int(kernel), cuda._bias_ext2int(bias)
    converted = cuda_layout(package._recurrent_kernel_, package._bias_, heads)
    for got, want, shape in zip(converted, expected, cuda.state_dict().values(), strict=True):
        assert torch.equal(got, want) and got.shape == shape.shape
    back = vanilla_layout(*converted, heads)
    assert torch.equal(back[0], package._recurrent_kernel_) and torch.equal(back[1], package._bias_)
    assert not torch.equal(converted[1], package._bias_)


def test_a_checkpoint_has_the_vanilla_cells_layout(model: DistilXLSTM) -> None:
    name = "stack.blocks.0.xlstm.slstm_cell"
    assert model.state_dict()[f"{name}._recurrent_kernel_"].shape == (4, 4 * 16, 16)
    other = build(SMALL, seed=1)
    other.load_state_dict(model.state_dict())
    ids = tokens(1, 12)
    torch.testing.assert_close(other(ids).h_BTD, model(ids).h_BTD)


def test_bfloat16_autocast_trains_near_float32(model: DistilXLSTM) -> None:
    ids = tokens(2, 64)
    exact = model(ids, map_block=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(ids, map_block=8)
    assert all(m.dtype == torch.float32 for m in rounded.maps.values())
    error = (rounded.h_BTD.float() - exact.h_BTD).norm() / exact.h_BTD.norm()
    assert 1e-5 < error < 0.05
    rounded.h_BTD.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
