"""Text from a trained student: `python -m student.generate --run runs/NAME --prompt "…"`.

The prompt is read in one parallel pass, every further token by one step of the recurrence: the memory a token costs
does not depend on how many came before it.

Legend: V vocabulary.
"""

from __future__ import annotations

import codecs
import os
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from pipeline.config import parse_into
from pipeline.errors import UserError, one_line, run_command
from pipeline.teacher_folder import TeacherFolder
from student.decoding import Decoder
from student.evaluation.device import pick_device
from student.model import DistilXLSTM
from student.runs.checkpoint import load_student


@dataclass(frozen=True)
class GenerateOptions:
    """Continue a prompt with a trained student."""

    run: Path
    """Run folder of the student."""
    prompt: str = ""
    """Text to continue; empty: start a new document."""
    prompt_from_env: str | None = None
    """Take the prompt from this environment variable instead, where a shell's quoting would spoil it."""
    checkpoint: str = "last"
    """last, best, or the path of a checkpoint."""
    max_new_tokens: int = 128
    """Most tokens to generate; it ends sooner where the student ends the document."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token always."""
    top_p: float = 0.95
    """Sample from the fewest tokens whose probabilities reach this sum."""
    seed: int = 0
    """Seed of the draws: the same seed gives the same text on the same device."""
    echo: bool = True
    """Print the prompt before its continuation."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, or cuda:N."""


def generate(
    model: DistilXLSTM,
    token_ids: Sequence[int],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    stop_ids: Collection[int] = (),
) -> Iterator[int]:
    """Continue `token_ids`, yielding token ids one by one as they are drawn.

    Args:
        model: the student, in evaluation mode.
        token_ids: the prompt, at least one token.
        max_new_tokens: most tokens to yield.
        temperature: divides the logits; 0 takes the likeliest token always.
        top_p: sample from the fewest tokens whose probabilities reach this sum, 0 < top_p <= 1.
        seed: of the draws.
        stop_ids: ids that end the text; they are not yielded.

    Raises:
        ValueError: an empty prompt, an id outside the vocabulary, or a value out of its range.
    """
    if not token_ids:
        raise ValueError("the prompt needs at least one token")
    outside = [i for i in token_ids if not 0 <= i < model.facts.vocab_size]
    if outside:
        raise ValueError(
            f"the prompt has id {outside[0]}, the student's vocabulary ends at {model.facts.vocab_size - 1}"
        )
    if max_new_tokens < 0 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"max_new_tokens and temperature must be >= 0 and top_p in (0, 1], found {max_new_tokens}, {temperature}, "
            f"{top_p}"
        )
    return _generate(model, token_ids, max_new_tokens, temperature, top_p, seed, frozenset(stop_ids))


@torch.inference_mode()
def _generate(
    model: DistilXLSTM,
    token_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    stop_ids: frozenset[int],
) -> Iterator[int]:
    device = model.head_VD.device
    generator = torch.Generator(device).manual_seed(seed)
    decoder = Decoder(model)
    logits_BV = decoder.prefill(torch.tensor([list(token_ids)], device=device))
    for count in range(max_new_tokens):
        token = sample(logits_BV[0], temperature, top_p, generator)
        if token in stop_ids:
            return
        yield token
        if count + 1 < max_new_tokens:
            logits_BV = decoder.step(torch.tensor([token], device=device))


def sample(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Draw one id from softmax(logits / temperature), cut to its nucleus (Holtzman et al., arXiv 1904.09751)."""
    if temperature == 0:
        return int(logits_V.argmax())
    p_V, ids_V = torch.softmax(logits_V / temperature, 0).sort(descending=True)
    # An id stays where those before it do not reach top_p yet; the first one always does.
    p_V = p_V.masked_fill(p_V.cumsum(0) - p_V >= top_p, 0)
    return int(ids_V[torch.multinomial(p_V, 1, generator=generator)])


def stream_text(token_ids: Iterable[int], token_bytes: Sequence[bytes]) -> Iterator[str]:
    """Text as it becomes complete: a character whose bytes are spread over tokens comes with its last one."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in token_ids:
        if text := decoder.decode(token_bytes[token]):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


def encode_prompt(prompt: str, teacher: TeacherFolder) -> list[int]:
    """Token ids of a prompt by the teacher's tokenizer; an empty one is the token that separates documents.

    Raises:
        UserError: the teacher folder has no tokenizer, or that of another vocabulary.
    """
    path = teacher.path / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: restore the run's teacher folder from its cache")
    start = teacher.facts.separator_id if teacher.facts.bos_id is None else teacher.facts.bos_id
    if not prompt:
        return [start]
    try:
        ids: list[int] = Tokenizer.from_file(str(path)).encode(prompt, add_special_tokens=False).ids
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UserError(f"{path} is damaged ({one_line(error)[:200]}): restore the run's teacher folder") from None
    if max(ids, default=0) >= teacher.facts.vocab_size:
        raise UserError(
            f"{path} gives id {max(ids)}, but the student's vocabulary has {teacher.facts.vocab_size}: the tokenizer "
            "belongs to another teacher; restore the run's teacher folder"
        )
    return ids or [start]


def check_options(options: GenerateOptions) -> None:
    """Raise `UserError` for an option out of its range."""
    for name, holds, wanted in (
        ("max_new_tokens", options.max_new_tokens >= 0, "0 or more"),
        ("temperature", options.temperature >= 0, "0 or more"),
        ("top_p", 0 < options.top_p <= 1, "above 0 and at most 1"),
    ):
        if not holds:
            raise UserError(f"--{name} must be {wanted}, found {getattr(options, name)}")


def read_prompt(options: GenerateOptions) -> str:
    """The prompt, from the option or the environment variable that `prompt_from_env` names."""
    if options.prompt_from_env is None:
        return options.prompt
    if options.prompt_from_env not in os.environ:
        raise UserError(f"--prompt_from_env names {options.prompt_from_env}, which is not set in the environment")
    return os.environ[options.prompt_from_env]


def main(arguments: list[str] | None = None) -> None:
    """The command line: prints the text to stdout, speed to stderr."""
    options = parse_into(
        GenerateOptions,
        prog="python -m student.generate",
        description="Continue a prompt with a trained student; memory does not grow with the length of the text.",
        file_option="--config",
        arguments=arguments,
    )
    check_options(options)
    prompt = read_prompt(options)
    device = pick_device(options.device)
    model, teacher = load_student(options.run, options.checkpoint)
    # float32 throughout: a frozen head in bfloat16 would be widened anew for every token.
    model.float().to(device)
    facts = teacher.facts
    token_ids = generate(
        model,
        encode_prompt(prompt, teacher),
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        stop_ids={i for i in (facts.separator_id, facts.eos_id) if i is not None},
    )
    if options.echo:
        print(prompt, end="", flush=True)
    count, start = 0, time.perf_counter()

    def counted() -> Iterator[int]:
        nonlocal count
        for token in token_ids:
            count += 1
            yield token

    for text in stream_text(counted(), teacher.token_bytes()):
        print(text, end="", flush=True)
    print(flush=True)
    seconds = time.perf_counter() - start
    print(f"{count} tokens in {seconds:.1f} s ({count / max(seconds, 1e-9):.1f} tok/s)", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_command(main))
