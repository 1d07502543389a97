"""Configuration of a Distil-xLSTM student for transformers; `modeling_distil_xlstm.py` is the model."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig


class DistilXLSTMConfig(PreTrainedConfig):
    """The shape of a student, and what it takes from its teacher.

    Attributes:
        vocab_size, hidden_size: V and D, the teacher's.
        block_types: kind of every block, first to last: `slstm`, `mlstm`, `transformer_mlstm`.
        num_heads: heads of every cell.
        mlstm_size: inner width of an mLSTM block.
        qkv_block_size: channels that share one block of an mLSTM's block-diagonal q, k and v projections.
        conv_kernel: tokens that the causal convolution before the gates sees.
        feedforward_size: inner width of the feed-forward after an sLSTM, or of a transformer_mlstm block.
        num_kv_heads, head_size, qkv_bias: of a transformer_mlstm block: heads of keys and values, channels of a head,
            whether the q, k and v projections have biases. 0: as many as heads; width / heads.
        feature_map: there, `softmax` or `none`.
        rotary_base: there, base of the rotary positions; 0: none.
        block_norm_eps: there, of its norms.
        final_norm, final_norm_eps: `layernorm` or `rmsnorm`, of what the head multiplies.
        embedding_scale: multiplies embeddings of token ids.
        logit_scale, logit_soft_cap: logits are `scale * (h @ head)`, then `cap * tanh(logits / cap)` if there is a cap.
        chunk_size: tokens that an mLSTM reads at once; decides speed and memory, not the result.
        trained_length: tokens of the rows it was trained on. Not a limit: the state has the same size after any text.
    """

    model_type = "distil_xlstm"

    vocab_size: int = 49152
    hidden_size: int = 576
    block_types: list[str] | tuple[str, ...] = ("slstm", "mlstm")
    num_heads: int = 9
    mlstm_size: int = 1152
    qkv_block_size: int = 32
    conv_kernel: int = 4
    feedforward_size: int = 1024
    num_kv_heads: int = 0
    head_size: int = 0
    qkv_bias: bool = False
    feature_map: str = "softmax"
    rotary_base: float = 0.0
    block_norm_eps: float = 1e-5
    final_norm: str = "layernorm"
    final_norm_eps: float = 1e-5
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_soft_cap: float | None = None
    chunk_size: int = 64
    trained_length: int | None = None
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.block_types = list(self.block_types)
        self.num_kv_heads = self.num_kv_heads or self.num_heads
        self.head_size = self.head_size or self.hidden_size // self.num_heads
        super().__post_init__(**kwargs)

    @property
    def num_hidden_layers(self) -> int:
        """Number of blocks, under the name that tools ask for."""
        return len(self.block_types)
