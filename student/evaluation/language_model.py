"""What a score needs of a language model, whoever computes it: a student of a run, or a Hugging Face folder.

Legend: B rows, T tokens, N positions in any order, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from pipeline.errors import UserError, one_line
from student.evaluation.hugging_face import Dtype, load_causal_lm
from student.runs.checkpoint import load_student


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model as functions.

    Attributes:
        hidden: token ids (B, T) -> hidden states (B, T, D) after the final norm. What stands at t must not depend on
            later tokens: rows are padded on the right.
        logits: (N, D) -> float32 (N, V).
        encode: text -> token ids, nothing put before or after it.
        vocab_size: V.
        start_id: what stands before a text that has no context.
        device: where ids go.
        max_length: longest row it reads; None: any.
        parameters: all of them, the embedding once.
    """

    hidden: Callable[[Tensor], Tensor]
    logits: Callable[[Tensor], Tensor]
    encode: Callable[[str], list[int]]
    vocab_size: int
    start_id: int
    device: torch.device
    max_length: int | None = None
    parameters: int = 0


def student_of(run: Path, checkpoint: str, device: torch.device) -> LanguageModel:
    """The student of a run folder.

    Raises:
        UserError: see `load_student`; or its teacher folder has no tokenizer.
    """
    model, teacher = load_student(run, checkpoint)
    facts = teacher.facts
    encode = text_encoder(teacher.path, facts.vocab_size)
    model = model.float().to(device)
    start_id = facts.separator_id if facts.bos_id is None else facts.bos_id
    parameters = model.trainable_parameters() + sum(buffer.numel() for buffer in model.buffers())
    return LanguageModel(
        lambda ids_BT: model(ids_BT).h_BTD, model.logits, encode, facts.vocab_size, start_id, device, None, parameters
    )


def hugging_face(
    source: str, option: str, device: torch.device, dtype: Dtype = "float32", trust_remote_code: bool = False
) -> LanguageModel:
    """A model of a Hugging Face folder with a fast tokenizer.

    Raises:
        UserError: no such folder, no tokenizer in it, or see `load_causal_lm`.
    """
    if not Path(source).is_dir():
        raise UserError(f"{option} {source}: there is no such folder; name a Hugging Face folder on this machine")
    model = load_causal_lm(source, dtype, str(device), trust_remote_code, option)
    encode = text_encoder(Path(source), model.vocab_size)
    config = model.model.config
    ids = [getattr(config, f"{name}_token_id", None) for name in ("bos", "eos")]
    firsts = [i[0] if isinstance(i, list | tuple) and i else i for i in ids]
    start_id = next((i for i in firsts if isinstance(i, int)), 0)
    parameters = sum(p.numel() for p in model.model.parameters())
    return LanguageModel(
        model.hidden, model.logits, encode, model.vocab_size, start_id, device, model.max_length, parameters
    )


def text_encoder(folder: Path, vocab_size: int) -> Callable[[str], list[int]]:
    """Text to token ids by a folder's tokenizer.json, special tokens neither added nor left out.

    Raises:
        UserError: the file is missing or damaged; and from the function, where it gives ids outside the vocabulary.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: a fast tokenizer is needed; restore the folder")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UserError(f"{path} is damaged ({one_line(error)[:200]}): restore the folder") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        if max(ids, default=0) >= vocab_size:
            raise UserError(
                f"{path} gives id {max(ids)}, but the model's vocabulary has {vocab_size}: the tokenizer belongs to "
                "another model; restore the folder"
            )
        return ids

    return encode
