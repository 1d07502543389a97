"""Small random teachers, packed rows, and what Hugging Face says about them in eager float32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from teacher_dump.model_layers import depth_groups
from teacher_dump.rows import CapturedRow, CaptureSpec, PackedRow

VOCAB, LAYERS = 517, 3
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": LAYERS,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128,
    "initializer_range": 0.12, "bos_token_id": None, "eos_token_id": 0,
}  # fmt: skip
"""Of every teacher here: grouped-query attention, a vocabulary of odd size."""


def make_teacher(path: Path, *, head_scale: float = 1.0, tied: bool = False) -> Path:
    """A random Llama: 3 layers, grouped-query attention, a vocabulary of odd size, saved as a Hugging Face folder.

    Args:
        head_scale: factor of the head's weights; large ones give peaked distributions.
        tied: the head is the embedding.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(11)
    config = LlamaConfig(**SHAPE, tie_word_embeddings=tied)
    model = LlamaForCausalLM(config).float()
    if not tied:
        model.lm_head.weight.data.mul_(head_scale)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(path)
    return path


def make_gemma(path: Path) -> Path:
    """A random Gemma 2: a window of 24 tokens in its first and third layer, soft caps that bend scores and logits, no
    head but the embedding."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(12)
    config = Gemma2Config(
        **SHAPE,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        sliding_window=24,
        attn_logit_softcapping=1.0,
        final_logit_softcapping=5.0,
        pad_token_id=0,
    )
    Gemma2ForCausalLM(config).float().save_pretrained(path)
    return path


def packed_rows(lengths: list[int], vocab: int, seed: int = 0) -> list[PackedRow]:
    """Random rows, each cut from two documents with id 0 between them; the last one has no next token."""
    generator = np.random.default_rng(seed)
    rows = []
    for row, length in enumerate(lengths):
        input_ids_L = generator.integers(1, vocab, length).astype(np.int32)
        cut = length // 3
        input_ids_L[cut] = 0
        segment_ids_L = (np.arange(length) > cut).astype(np.int32)
        next_id = -1 if row == len(lengths) - 1 else int(generator.integers(vocab))
        rows.append(PackedRow(row, input_ids_L, next_id, segment_ids_L, (f"{row}/a", f"{row}/b")))
    return rows


@dataclass
class Reference:
    """One row by Hugging Face, float64 from float32 logits, attention and hidden states."""

    logits_LV: Tensor
    lse_L: Tensor
    target_logit_L: Tensor
    attn_map_Gnn: Tensor | None
    hidden_LD: Tensor  # mean over the outputs of blocks 1..L, the last normed


def hugging_face(
    model: Path, rows: list[PackedRow], length: int, block: int, groups: int, dtype: torch.dtype = torch.float32
) -> list[Reference]:
    """Run the rows one by one through `attn_implementation="eager"`."""
    from transformers import AutoModelForCausalLM

    teacher = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="eager").eval()
    references = []
    for row in rows:
        ids_1L = torch.from_numpy(row.input_ids_L.astype(np.int64))[None]
        with torch.inference_mode():
            out = teacher(ids_1L, output_attentions=True, output_hidden_states=True)
        logits_LV = out.logits[0].double()
        targets_L = torch.cat([ids_1L[0, 1:], torch.tensor([row.next_id])])
        target_logit_L = logits_LV.gather(1, targets_L.clamp_min(0)[:, None]).squeeze(1)
        attention = torch.stack([a[0].double().mean(0) for a in out.attentions])  # layers, L, L
        references.append(
            Reference(
                logits_LV=logits_LV,
                lse_L=logits_LV.logsumexp(-1),
                target_logit_L=target_logit_L.masked_fill(targets_L < 0, torch.nan),
                attn_map_Gnn=_pooled(attention, length, block, groups) if block else None,
                hidden_LD=torch.stack([h[0].double() for h in out.hidden_states[1:]]).mean(0),
            )
        )
    return references


def _pooled(attention_ALL: Tensor, length: int, block: int, groups: int) -> Tensor:
    """P_j[I, J] as DESIGN writes it, by padding A to the full length and averaging over valid queries."""
    valid = attention_ALL.shape[1]
    n = length // block
    padded = torch.nn.functional.pad(attention_ALL, (0, length - valid, 0, length - valid))
    sums = padded.view(-1, n, block, n, block).sum((2, 4))
    counts = (valid - torch.arange(n) * block).clamp(1, block)
    per_layer = sums / counts[:, None]
    return torch.stack([per_layer[list(g)].mean(0) for g in depth_groups(len(attention_ALL), groups)])


def log_tails(reference: Reference, topk_ids_LK: np.ndarray, taus: tuple[float, ...]) -> Tensor:
    """log sum over the ids outside the given top k of exp(z / tau), in float64."""
    ids_LK = torch.from_numpy(topk_ids_LK.astype(np.int64))
    rest_LV = reference.logits_LV.scatter(1, ids_LK, -torch.inf)
    return torch.stack([(rest_LV / tau).logsumexp(-1) for tau in taus], dim=-1)


def assert_parity(got: CapturedRow, want: Reference, spec: CaptureSpec, scale: float = 1.0) -> None:
    """Everything captured within `scale` times 3e-4 + 1e-5 |x| of Hugging Face, ids equal where logits are apart."""

    def close(name: str, ours: np.ndarray, theirs: Tensor, more: float = 0.0) -> None:
        theirs = theirs.numpy()
        bound = scale * (3e-4 + 1e-5 * np.abs(theirs)) + more * np.abs(theirs)
        finite = np.isfinite(theirs)
        assert ours.shape == theirs.shape, (name, ours.shape, theirs.shape)
        assert (np.isfinite(ours) == finite).all(), name
        worst = np.max((np.abs(ours - theirs) - bound)[finite], initial=-1.0)
        assert worst <= 0, f"{name} is off by {worst} more than its tolerance"

    ids_LK = torch.from_numpy(got.topk_ids_LK.astype(np.int64))
    best = want.logits_LV.sort(dim=-1, descending=True, stable=True)
    # Same rank, same logit; where an id differs, the two logits must be equal within the tolerance.
    close("topk_logits", got.topk_logits_LK, best.values[:, : spec.k])
    close("logits of topk_ids", want.logits_LV.gather(1, ids_LK).numpy(), best.values[:, : spec.k])
    close("lse", got.lse_L, want.lse_L)
    close("log_tail", got.log_tail_LR, log_tails(want, got.topk_ids_LK, spec.taus))
    close("target_logit", got.target_logit_L, want.target_logit_L)
    if spec.block:
        assert want.attn_map_Gnn is not None and got.attn_map_Gnn is not None
        close("attn_map", got.attn_map_Gnn, want.attn_map_Gnn)
    if spec.window:
        assert got.hidden_WD is not None
        chunks = want.hidden_LD.split(spec.window)
        pooled = torch.stack([chunk.mean(0) for chunk in chunks])
        close("hidden", got.hidden_WD[: len(pooled)], pooled, more=2.0**-8)  # half a bfloat16 step, once rounded
        assert not got.hidden_WD[len(pooled) :].any()
