"""The student: the teacher's embedding -> xLSTM blocks -> final norm -> the teacher's head.

Distil-xLSTM (arXiv 2503.18565, section 3): sLSTM and mLSTM blocks in turn, of the teacher's width, between the
teacher's own embedding and language-model head, neither of which is trained or stored again in a checkpoint unless the
configuration says so: a trained one begins as the teacher's and is a float32 parameter like any other. The blocks
are those of the `xlstm` package (arXiv 2405.04517); in `student/blocks`, `mlstm.py` and `slstm.py` say how their cells
are computed here, `block_forward.py` how whole blocks are on a GPU. Or all are mLSTM blocks of the teacher's shape
(`transformer_block.py`), which can begin with its weights.

Legend: B rows, T tokens, N positions in any order, D width, V vocabulary, n = T/b pooling blocks.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from xlstm import (
    FeedForwardConfig,
    mLSTMBlock,
    mLSTMBlockConfig,
    mLSTMLayerConfig,
    sLSTMBlockConfig,
    sLSTMLayerConfig,
    xLSTMBlockStack,
    xLSTMBlockStackConfig,
)
from xlstm.components.ln import LayerNorm

from pipeline.errors import UserError
from pipeline.teacher_folder import TeacherFacts
from student.blocks.block_forward import use_fused_forward
from student.blocks.graphed import Blocks, GraphedBlocks
from student.blocks.mlstm import mlstm_initial_state, mlstm_prefill, use_cell_backend
from student.blocks.slstm import slstm_initial_state, slstm_prefill, use_scan_cell
from student.blocks.state import StudentState
from student.blocks.transformer_block import TransformerBlock, TransformerShape, TransformerStack, check_transformer

VOCABULARY = ("embedding_VD", "untied_head_VD")
"""Names of the embedding and of a head that is not the embedding: buffers where frozen, parameters where trained."""


@dataclass(frozen=True)
class StudentConfig:
    """Shape of the student. The defaults are the paper's: 84.2 M trainable parameters at width 1536."""

    blocks: int = 6
    """Number of xLSTM blocks."""
    heads: int = 16
    """Heads of every cell; divides the teacher's width. Widths of 64 or 128 a head are what GPU kernels like."""
    slstm_at: tuple[int, ...] | None = None
    """Indices of the sLSTM blocks, the others are mLSTM; null: in turn, sLSTM first (0, 2, 4, ...)."""
    mlstm_projection: float = 2.0
    """Inner width of an mLSTM block as a multiple of the width, rounded up to a multiple of 64."""
    mlstm_qkv_blocksize: int = 32
    """Channels that share one block of the block-diagonal q, k and v projections."""
    conv_kernel: int = 4
    """Tokens the causal convolution before the gates sees."""
    slstm_feedforward: float = 1.7
    """Inner width of the feed-forward after an sLSTM as a multiple of the width, rounded up to a multiple of 64."""
    final_norm: Literal["layernorm", "teacher"] = "layernorm"
    """layernorm: the package's LayerNorm, fresh; teacher: an RMSNorm that begins as the teacher's final norm.
    Both are trained."""
    transformer: TransformerShape | None = None
    """Blocks of a Transformer's shape, all mLSTM, in the place of the package's, whose options then have no effect."""
    train_embedding: bool = False
    """Train the embedding too, from the teacher's. A head that the teacher ties to it stays the teacher's, unless it is
    trained as well."""
    train_head: bool = False
    """Train the head too, from the teacher's. Where the teacher ties it to the embedding, it is untied; where both are
    trained they stay one tied parameter."""

    @staticmethod
    def of(values: Any) -> StudentConfig:
        """From the plain values of a JSON or YAML file.

        Raises:
            TypeError: they are no mapping, or have names that no field has.
        """
        if not isinstance(values, dict):
            raise TypeError(f"a student's shape is a mapping, found {type(values).__name__}")
        values = dict(values)
        if values.get("slstm_at") is not None:
            values["slstm_at"] = tuple(values["slstm_at"])
        if values.get("transformer") is not None:
            values["transformer"] = TransformerShape(**values["transformer"])
        return StudentConfig(**values)

    def slstm_blocks(self) -> tuple[int, ...]:
        """Sorted indices of the sLSTM blocks."""
        if self.transformer is not None:
            return ()
        return tuple(range(0, self.blocks, 2)) if self.slstm_at is None else tuple(sorted(set(self.slstm_at)))


@dataclass
class StudentOutput:
    """What a forward pass returns.

    Attributes:
        h_BTD: hidden states after the final norm, what the head multiplies.
        maps: block index -> (B, n, n) float32 pooled implicit attention, mean over heads, signed; mLSTM blocks only.
    """

    h_BTD: Tensor
    maps: dict[int, Tensor] = field(default_factory=dict)


class DistilXLSTM(nn.Module):
    """The student model.

    Args:
        config: its shape.
        facts: what is known of the teacher: width, vocabulary, scales, soft cap.
        tensors: `embedding_VD`, `head_VD`, `norm_D`, as `TeacherFolder.tensors()` gives them.
        max_length: the longest row it is trained on. Recorded, not enforced: a recurrence has no longest input.

    Raises:
        UserError: a value of the configuration does not fit the teacher's width or the number of blocks.
    """

    def __init__(self, config: StudentConfig, facts: TeacherFacts, tensors: dict[str, Tensor], max_length: int) -> None:
        super().__init__()
        check_shape(config, facts.width)
        expected = (facts.vocab_size, facts.width)
        for name in ("embedding_VD", "head_VD"):
            if tuple(tensors[name].shape) != expected:
                raise UserError(
                    f"the teacher's {name} has shape {tuple(tensors[name].shape)} but teacher.json says {expected}: "
                    "the teacher folder is not one teacher's; dump it again"
                )
        self.config = config
        self.facts = facts
        self.max_length = max_length
        self.graphed: GraphedBlocks | None = None
        self.embedding_VD: Tensor
        self.untied_head_VD: Tensor | None
        self._add_vocabulary("embedding_VD", tensors["embedding_VD"], config.train_embedding)
        # One tensor where the two are tied: `to(device)` would make two of a shared one.
        untied = None if stays_tied(config, facts.tied) else tensors["head_VD"]
        self._add_vocabulary("untied_head_VD", untied, config.train_head)
        self.stack: Any  # a module with `blocks`
        if config.transformer is not None:
            self.stack = TransformerStack(config.blocks, facts.width, config.heads, config.transformer, facts.norm_eps)
        else:
            self.stack = xLSTMBlockStack(stack_config(config, facts.width))
            for block in self.stack.blocks:
                (use_cell_backend if isinstance(block, mLSTMBlock) else use_scan_cell)(block)
                use_fused_forward(block)
        self.final_norm: nn.Module
        if config.final_norm == "teacher":
            self.final_norm = nn.RMSNorm(facts.width, eps=facts.norm_eps)
            with torch.no_grad():
                self.final_norm.weight.copy_(tensors["norm_D"].float() + facts.norm_offset)
        else:
            self.final_norm = LayerNorm(ndim=facts.width)

    def _add_vocabulary(self, name: str, value_VD: Tensor | None, trained: bool) -> None:
        if value_VD is None or not trained:
            self.register_buffer(name, None if value_VD is None else value_VD.detach(), persistent=False)
        else:
            # A copy: the teacher's own tensor may be the other one's too.
            self.register_parameter(name, nn.Parameter(value_VD.detach().to(torch.float32, copy=True)))

    @property
    def tied(self) -> bool:
        """Whether head and embedding are one tensor."""
        return self.untied_head_VD is None

    @property
    def head_VD(self) -> Tensor:
        """The head (V, D), the embedding itself where tied; a frozen one in the teacher's dtype."""
        return self.embedding_VD if self.untied_head_VD is None else self.untied_head_VD

    @property
    def unfrozen(self) -> tuple[str, ...]:
        """Which of `embedding` and `head` are trained."""
        return tuple(part for part in ("embedding", "head") if getattr(self.config, f"train_{part}"))

    @property
    def mlstm_blocks(self) -> tuple[int, ...]:
        """Indices of the mLSTM blocks: those with an implicit attention."""
        return tuple(i for i in range(self.config.blocks) if i not in self.config.slstm_blocks())

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embeddings of token ids of any shape, with the teacher's embedding scale; float32 at least."""
        dtype = torch.promote_types(self.embedding_VD.dtype, torch.float32)
        return F.embedding(input_ids, self.embedding_VD).to(dtype) * self.facts.embedding_scale

    def forward(self, input_ids_BT: Tensor, map_block: int = 0) -> StudentOutput:
        """Hidden states of whole rows, each from an empty state.

        Args:
            input_ids_BT: int64 token ids.
            map_block: pooling block b of the implicit attention maps; 0 leaves them out.

        Raises:
            ValueError: T is no multiple of `map_block`.
        """
        x_BTD = self.embed(input_ids_BT)
        if self.training and self.graphed is not None and self.graphed.fits(x_BTD, map_block):
            h_BTD, *maps = self.graphed(x_BTD)
        else:
            h_BTD, *maps = self.blocks(map_block)(x_BTD)
        return StudentOutput(h_BTD, dict(zip(self.mlstm_blocks, maps, strict=False)))

    def blocks(self, map_block: int = 0) -> Blocks:
        """All between embedding and head, as one module; with the maps of all mLSTM blocks unless `map_block` is 0."""
        return Blocks(self.stack.blocks, self.final_norm, self.mlstm_blocks if map_block else (), map_block)

    def logits(self, h_ND: Tensor) -> Tensor:
        """float32 logits (N, V) of hidden states after the final norm: scale, then soft cap, as `TeacherFacts` says."""
        with torch.autocast(h_ND.device.type, enabled=False):
            logits_NV = self.facts.logit_scale * (h_ND.float() @ self.head_VD.float().T)
        cap = self.facts.soft_cap
        return logits_NV if cap is None else cap * torch.tanh(logits_NV / cap)

    def initial_state(self, batch: int) -> StudentState:
        """The empty state of `batch` rows."""
        return StudentState(tuple(_initial_state(block, batch) for block in self.stack.blocks))

    def prefill(self, input_ids_BT: Tensor) -> tuple[Tensor, StudentState]:
        """Read a prompt from an empty state in one parallel pass: h_BD of its last token, and the state after it."""
        x_BTD = self.embed(input_ids_BT)
        states = []
        for block in self.stack.blocks:
            x_BTD, state = _prefill(block, x_BTD)
            states.append(state)
        return self.final_norm(x_BTD[:, -1]), StudentState(tuple(states))

    def step(self, input_ids_B: Tensor, state: StudentState) -> tuple[Tensor, StudentState]:
        """Read one token a row: h_BD after the final norm, and the next state; `state` itself is left as it was."""
        x_B1D = self.embed(input_ids_B[:, None])
        states = []
        for block, before in zip(self.stack.blocks, state.blocks, strict=True):
            if "conv_state" in before:  # which the package's convolution shifts in place
                before = {**before, "conv_state": tuple(t.clone() for t in before["conv_state"])}
            x_B1D, after = block.step(x_B1D, **before)
            states.append(after)
        return self.final_norm(x_B1D[:, 0]), StudentState(tuple(states))

    def trainable_parameters(self) -> int:
        """Number of trained parameters."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


def stays_tied(config: StudentConfig, teacher_ties: bool) -> bool:
    """Whether such a student's head is its embedding: the teacher ties them and both are trained, or neither."""
    return teacher_ties and config.train_embedding == config.train_head


MOST_OF = {"blocks": 1024, "heads": 4096, "conv_kernel": 1024, "mlstm_qkv_blocksize": 1 << 16}
"""Largest whole numbers of a configuration: a run from someone else must not ask for any memory it likes."""
MOST_FACTOR = 64.0


def _check_types(config: StudentConfig) -> None:
    """A configuration may come from the run.json of someone else, which holds whatever it holds."""
    for name, most in MOST_OF.items():
        value = getattr(config, name)
        if type(value) is not int or not -most <= value <= most:
            raise UserError(f"student.{name}={reprlib.repr(value)}: must be a whole number of at most {most}")
    for name in ("mlstm_projection", "slstm_feedforward"):
        value = getattr(config, name)
        if type(value) not in (int, float) or not 0 < value <= MOST_FACTOR:
            raise UserError(f"student.{name}={reprlib.repr(value)}: must be a number above 0, at most {MOST_FACTOR:g}")
    at = config.slstm_at
    if at is not None and not (isinstance(at, list | tuple) and all(type(index) is int for index in at)):
        raise UserError(f"student.slstm_at={reprlib.repr(at)}: must be a list of block numbers")
    for name in ("train_embedding", "train_head"):
        if type(getattr(config, name)) is not bool:
            raise UserError(f"student.{name}={reprlib.repr(getattr(config, name))}: must be true or false")
    if config.final_norm not in ("layernorm", "teacher"):
        raise UserError(f"student.final_norm={reprlib.repr(config.final_norm)}: must be layernorm or teacher")


def check_shape(config: StudentConfig, width: int) -> None:
    """Raise `UserError` naming the field if the configuration cannot be built at this width."""
    _check_types(config)
    if config.transformer is not None:
        check_transformer(config.transformer, config.blocks, config.heads, width)
        return
    if config.blocks < 1 or config.heads < 1 or config.conv_kernel < 2:
        raise UserError(
            f"student needs blocks >= 1, heads >= 1 and conv_kernel >= 2, found blocks={config.blocks}, "
            f"heads={config.heads}, conv_kernel={config.conv_kernel}"
        )
    outside = [i for i in config.slstm_blocks() if not 0 <= i < config.blocks]
    if outside:
        raise UserError(f"student.slstm_at names blocks {outside}, but blocks={config.blocks}: 0..{config.blocks - 1}")
    if width % config.heads or width // config.heads < 2:
        near = [h for h in range(1, width // 2 + 1) if width % h == 0 and config.heads / 2 <= h <= 2 * config.heads]
        raise UserError(
            f"student.heads={config.heads} does not divide the teacher's width {width} into heads of 2 or more; "
            f"choose one of {near}"
        )
    inner = _mlstm_layer_config(config, width)._inner_embedding_dim
    for name, value in (("heads", config.heads), ("mlstm_qkv_blocksize", config.mlstm_qkv_blocksize)):
        if value < 1 or inner % value:
            raise UserError(
                f"student.{name}={value} does not divide the mLSTM's inner width {inner} "
                f"(mlstm_projection={config.mlstm_projection} of width {width}, rounded up to a multiple of 64)"
            )


def _mlstm_layer_config(config: StudentConfig, width: int) -> mLSTMLayerConfig:
    return mLSTMLayerConfig(
        conv1d_kernel_size=config.conv_kernel,
        qkv_proj_blocksize=config.mlstm_qkv_blocksize,
        num_heads=config.heads,
        proj_factor=config.mlstm_projection,
        embedding_dim=width,
    )


def stack_config(
    config: StudentConfig,
    width: int,
    context_length: int = 1,
    slstm_backend: Literal["vanilla", "cuda"] = "vanilla",
) -> xLSTMBlockStackConfig:
    """The package's configuration of the blocks.

    Args:
        context_length: sizes nothing but the package's causal mask, which our cell backend does not use.
        slstm_backend: of the package's own sLSTM cell, which ours takes the place of.
    """
    slstm_at = config.slstm_blocks()
    mlstm = mLSTMBlockConfig(mlstm=_mlstm_layer_config(config, width))
    slstm = sLSTMBlockConfig(
        slstm=sLSTMLayerConfig(
            backend=slstm_backend,
            num_heads=config.heads,
            conv1d_kernel_size=config.conv_kernel,
            bias_init="powerlaw_blockdependent",
        ),
        feedforward=FeedForwardConfig(proj_factor=config.slstm_feedforward, act_fn="gelu", embedding_dim=width),
    )
    return xLSTMBlockStackConfig(
        mlstm_block=mlstm if len(slstm_at) < config.blocks else None,
        slstm_block=slstm if slstm_at else None,
        context_length=context_length,
        num_blocks=config.blocks,
        embedding_dim=width,
        add_post_blocks_norm=False,
        slstm_at=list(slstm_at),
    )


def _initial_state(block: Any, batch: int) -> dict[str, Any]:
    if isinstance(block, TransformerBlock):
        return block.initial_state(batch)
    return (mlstm_initial_state if isinstance(block, mLSTMBlock) else slstm_initial_state)(block, batch)


def _prefill(block: Any, x_BTD: Tensor) -> tuple[Tensor, dict[str, Any]]:
    if isinstance(block, TransformerBlock):
        return block.prefill(x_BTD)
    return (mlstm_prefill if isinstance(block, mLSTMBlock) else slstm_prefill)(block, x_BTD)
