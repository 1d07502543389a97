"""Known answers of the embedded teacher: what a right conversion tokenises, predicts and writes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import UserError

# Several spaces before a number come out as one token only if digits are split off before anything else.
KNOWN_TEXT = "In 1969, Apollo   11  landed on\n\tthe Moon; it wasn't the café's 3rd tab<|endoftext|>The end"
# fmt: off
KNOWN_IDS = (
    788, 216, 33, 41, 38, 41, 28, 17600, 333, 33, 33, 216, 16176, 335, 198, 197, 1195, 8872, 43, 357, 5603, 982, 260,
    37366, 506, 216, 35, 7212, 10147, 0, 504, 1112,
)
# fmt: on
PROMPT = "In mathematics, a prime number is"
PROMPT_TOP5 = ((253, 26.3808), (4355, 25.2404), (6392, 24.6198), (805, 23.9957), (354, 23.9093))
LOGIT_TOLERANCE = 0.02
"""bfloat16 weights, float32 arithmetic: other CPUs and PyTorch versions differ by 1e-4."""
CONTINUATION = " a positive integer greater than 1 that has no positive integer divisors other than"
"""Greedy; the best and the second best token are 0.96 or more apart at every step."""
CONTINUATION_TOKENS = 16


def check_teacher(folder: Path) -> None:
    """Load the folder as any user would, with `transformers` in float32, and compare with the known answers.

    Raises:
        UserError: one of them differs; says which, and what came instead.
    """
    import torch

    with quiet_transformers():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
    _expect(folder, "token ids", tokenizer(KNOWN_TEXT)["input_ids"], list(KNOWN_IDS))
    _expect(folder, "text from ids", tokenizer.decode(list(KNOWN_IDS)), KNOWN_TEXT)
    ids = tokenizer(PROMPT)["input_ids"]
    with torch.inference_mode():
        logits_V = model(torch.tensor([ids])).logits[0, -1]
        top = torch.topk(logits_V, len(PROMPT_TOP5))
        for _ in range(CONTINUATION_TOKENS):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    _expect(folder, "most likely ids", top.indices.tolist(), [i for i, _ in PROMPT_TOP5])
    error = max(abs(found - known) for found, (_, known) in zip(top.values.tolist(), PROMPT_TOP5, strict=True))
    if error > LOGIT_TOLERANCE:
        raise UserError(f"{folder}: logits differ from the known ones by {error:.3g}: the conversion is wrong here")
    _expect(folder, "continuation", tokenizer.decode(ids), PROMPT + CONTINUATION)


def _expect(folder: Path, what: str, found: object, known: object) -> None:
    if found != known:
        raise UserError(
            f"{folder}: the converted teacher's {what} are {found!r}, known are {known!r}: check that the "
            f"installed torch, "
            "transformers and tokenizers are the pinned ones (make setup)"
        )


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No warnings or progress bars of `transformers` on the terminal while this lasts."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
