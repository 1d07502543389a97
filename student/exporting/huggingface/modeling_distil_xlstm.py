"""Distil-xLSTM for transformers: a teacher's embedding -> xLSTM blocks -> final norm -> the teacher's head.

Needs torch and transformers, nothing else. After Distil-xLSTM (arXiv 2503.18565). The blocks are in
`blocks_distil_xlstm.py` and `transformer_blocks_distil_xlstm.py`; here are the model around them and the cache that
`generate` carries from token to token.

Padding, wherever the attention mask has zeros, is as if it were not there.

Legend: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .blocks_distil_xlstm import (
    MLSTM,
    SLSTM,
    BlockDiagonalLinear,
    CausalConvolution,
    GatedFeedForward,
    MLSTMBlock,
    SLSTMBlock,
    State,
)
from .configuration_distil_xlstm import DistilXLSTMConfig
from .transformer_blocks_distil_xlstm import FORGET_BIAS, INPUT_BIAS, TransformerBlock, TransformerMixer

BLOCKS: dict[str, type[GradientCheckpointingLayer]] = {
    "mlstm": MLSTMBlock,
    "slstm": SLSTMBlock,
    "transformer_mlstm": TransformerBlock,
}
"""Kinds of blocks by their name in `config.block_types`. Each is made of a configuration and called as
(x_BTD, state, keep_BT) -> (x_BTD, state)."""


class DistilXLSTMCache(Cache):
    """The states of all blocks after the tokens read so far. Its size never grows."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.states: list[State] = []
        self.tokens_read = 0

    def nbytes(self) -> int:
        """Memory of all states."""
        return sum(value.nbytes for state in self.states for value in state.values())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.tokens_read

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # none

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("a recurrent state cannot forget its last tokens: read the text again up to there")

    def reset(self) -> None:
        self.states, self.tokens_read = [], 0

    def batch_select_indices(self, indices: Tensor) -> None:
        self.states = [{k: v.index_select(0, indices.to(v.device)) for k, v in s.items()} for s in self.states]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.states = [{k: v.repeat_interleave(repeats, 0) for k, v in s.items()} for s in self.states]

    def __len__(self) -> int:
        return len(self.states)

    def __repr__(self) -> str:
        return f"DistilXLSTMCache({self.tokens_read} tokens read, {self.nbytes()} bytes)"


class ScaledEmbedding(nn.Embedding):
    """An embedding whose vectors are multiplied by a constant."""

    def __init__(self, size: int, width: int, scale: float, padding_idx: int | None = None) -> None:
        super().__init__(size, width, padding_idx)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.scale


class DistilXLSTMPreTrainedModel(PreTrainedModel):
    """What transformers must know of the architecture."""

    config_class = DistilXLSTMConfig
    config: DistilXLSTMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MLSTMBlock", "SLSTMBlock", "TransformerBlock"]
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initial values of a model that is trained from nothing, near those of the `xlstm` package."""
        width, blocks = self.config.hidden_size, max(1, self.config.num_hidden_layers)
        if isinstance(module, nn.Linear | nn.Embedding | BlockDiagonalLinear):
            init.normal_(module.weight, std=math.sqrt(2 / (5 * width)))
        elif isinstance(module, CausalConvolution):
            bound = module.weight.shape[1] ** -0.5
            init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, GatedFeedForward | MLSTM):  # after the projections it holds
            init.normal_(module.down_proj.weight, std=2 / blocks / math.sqrt(width))
        if isinstance(module, MLSTM):
            init.zeros_(module.i_gate.weight)
            init.normal_(module.i_gate.bias, std=0.1)
            init.zeros_(module.f_gate.weight)
            init.copy_(module.f_gate.bias, torch.linspace(3.0, 6.0, module.heads))  # short memories to long ones
        elif isinstance(module, SLSTM):
            bias_H4d = torch.zeros_like(module.bias).unflatten(1, (4, -1))
            bias_H4d[:, 1] = 3.0  # of the forget gate
            init.copy_(module.bias, bias_H4d.flatten(1))
        elif isinstance(module, TransformerMixer):
            init.normal_(module.o_proj.weight, std=2 / blocks / math.sqrt(width))
            for gate, bias in ((module.i_gate, INPUT_BIAS), (module.f_gate, FORGET_BIAS)):
                init.zeros_(gate.weight)
                init.constant_(gate.bias, bias)
            init.zeros_(module.out_gate.weight)
            if module.with_sum:
                for feature_map in (module.q_map, module.k_map):
                    init.copy_(feature_map, module.first_map().expand_as(feature_map))
            else:
                init.ones_(module.head_norm)


class DistilXLSTMModel(DistilXLSTMPreTrainedModel):
    """Embedding, blocks and final norm: hidden states, without the head."""

    def __init__(self, config: DistilXLSTMConfig) -> None:
        super().__init__(config)
        unknown = [kind for kind in config.block_types if kind not in BLOCKS]
        if unknown:
            raise ValueError(f"config.block_types has {unknown[0]!r}; this code knows {', '.join(BLOCKS)}")
        self.embed_tokens = ScaledEmbedding(config.vocab_size, config.hidden_size, config.embedding_scale)
        self.blocks = nn.ModuleList([BLOCKS[kind](config) for kind in config.block_types])
        self.norm: nn.Module
        if config.final_norm == "rmsnorm":
            self.norm = nn.RMSNorm(config.hidden_size, eps=config.final_norm_eps)
        else:
            self.norm = nn.LayerNorm(config.hidden_size, eps=config.final_norm_eps, bias=False)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: DistilXLSTMCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Read tokens, from an empty state or from a cache's.

        Args:
            input_ids: (B, T) token ids; or `inputs_embeds` (B, T, D), which are not scaled any more.
            attention_mask: (B, T) or longer, its last T columns count: 0 for padding, which may be anywhere. What is
                returned at padded positions means nothing.
            past_key_values: states to go on from; it holds those after the last token when the call returns.
            use_cache: keep the states; by default unless training.
            output_hidden_states: return what every block was given, and the result, too.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("name either input_ids or inputs_embeds")
        x_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if past_key_values is not None and not isinstance(past_key_values, DistilXLSTMCache):
            raise ValueError(f"past_key_values is a {type(past_key_values).__name__}: this model needs its own cache")
        use_cache = use_cache if use_cache is not None else self.config.use_cache and not self.training
        cache = DistilXLSTMCache() if past_key_values is None else past_key_values
        padding = Padding.of(attention_mask, x_BTD)
        if padding is not None:
            x_BTD = padding.to_the_left(x_BTD)
        keep_BT = None if padding is None else padding.keep_BT
        before: list[State | None] = list(cache.states) or [None] * len(self.blocks)
        after: list[State] = []
        seen: list[Any] = []
        for block, state in zip(self.blocks, before, strict=True):
            seen.append(x_BTD)
            x_BTD, state = block(x_BTD, state, keep_BT)
            after.append(state)
        seen.append(self.norm(x_BTD))
        if use_cache:
            cache.states = after
            cache.tokens_read += x_BTD.shape[1]
        if padding is not None:
            seen = [padding.back(h_BTD) for h_BTD in seen]

        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=seen[-1],
            past_key_values=cache if use_cache else None,
            hidden_states=tuple(seen) if output_hidden_states else None,
        )


class Padding:
    """Rows of a batch moved so that all padding is on the left, and back. Inside, recurrences then end at real tokens.

    Args:
        keep_BT: True for tokens, False for padding.
    """

    def __init__(self, keep_BT: Tensor) -> None:
        self.order_BT = keep_BT.long().argsort(stable=True, dim=1)
        self.keep_BT = keep_BT.gather(1, self.order_BT)

    @staticmethod
    def of(attention_mask: Tensor | None, x_BTD: Tensor) -> Padding | None:
        """The padding that a mask says, None where it says there is none."""
        if attention_mask is None:
            return None
        if attention_mask.dim() != 2 or attention_mask.shape[1] < x_BTD.shape[1]:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, not (rows, {x_BTD.shape[1]} or more tokens)"
            )
        keep_BT = attention_mask[:, -x_BTD.shape[1] :].to(x_BTD.device).bool()
        return None if bool(keep_BT.all()) else Padding(keep_BT)

    def to_the_left(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.gather(1, self.order_BT[..., None].expand_as(x_BTD))

    def back(self, x_BTD: Tensor) -> Tensor:
        return torch.empty_like(x_BTD).scatter(1, self.order_BT[..., None].expand_as(x_BTD), x_BTD)


class DistilXLSTMForCausalLM(DistilXLSTMPreTrainedModel, GenerationMixin):
    """The student with its head: logits, loss and text."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DistilXLSTMConfig) -> None:
        super().__init__(config)
        self.model = DistilXLSTMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # generate() then leaves it to the model, which makes a `DistilXLSTMCache`

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: DistilXLSTMCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V) in float32; arguments as `DistilXLSTMModel.forward`, and:

        Args:
            labels: (B, T) ids to predict, shifted here: pass `input_ids` with -100 where there is nothing to predict. A
                token that padding comes before is not predicted: there is nothing to predict it from.
            logits_to_keep: logits of so many last positions, 0: of all; or of the positions it lists.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.config.logit_scale * self.lm_head(outputs.last_hidden_state[:, kept]).float()
        cap = self.config.logit_soft_cap
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            if attention_mask is not None:
                from_padding_BT = attention_mask[:, -labels.shape[1] :].roll(1, 1).to(labels.device) == 0
                labels = labels.masked_fill(from_padding_BT, -100)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
