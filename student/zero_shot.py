"""`python -m student.zero_shot`: what a student knows without having been taught a task.

    python -m student.zero_shot --run runs/demo --teacher data/smollm2-135m --limit 200
    python -m student.zero_shot --model exported/demo --out zero_shot.json

LAMBADA, HellaSwag, PIQA, ARC-Easy, SciQ, WinoGrande and BoolQ (`zero_shot_tasks.py`), no examples before the question.
The model answers with the continuation that it finds likeliest (`acc`), or likeliest per character (`acc_norm`); in
LAMBADA the last word counts as known where each of its tokens is the likeliest one. Writes RUN/zero_shot.json:

    {"limit": ..., "tasks": {TASK: {"documents", "chance", "measure"}},
     "models": {"student": {"source", "tasks": {TASK: {"acc", "acc_stderr", "acc_norm", ...}}}, "teacher": ...}}
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.commit import commit_json
from pipeline.config import parse_into
from pipeline.errors import UserError, run_command
from student.blocks.compiled import uncompiled
from student.evaluation.device import in_precision, pick_device
from student.evaluation.language_model import LanguageModel, hugging_face, student_of
from student.evaluation.log_likelihood import Scored, as_request, log_likelihoods
from student.evaluation.zero_shot_tasks import SOURCE, TASKS, Document, Task, load_documents

BATCH_TOKENS = {"cpu": 2048, "cuda": 65_536}


@dataclass(frozen=True)
class ZeroShotOptions:
    """Which models to ask, and what."""

    run: str | None = None
    """Run folder of a student."""
    checkpoint: str = "last"
    """last, best, or a path."""
    teacher: str | None = None
    """Hugging Face folder of the teacher, for its own figures beside the student's."""
    model: str | None = None
    """Any other Hugging Face folder of a causal language model with a fast tokenizer: an exported student, a rival."""
    tasks: str = ",".join(TASKS)
    """Which to ask, with commas between."""
    limit: int | None = None
    """Ask the first so many documents of each task; null: all."""
    batch_tokens: int | None = None
    """Tokens of a batch; null: 2,048 on a CPU, 65,536 on a GPU."""
    precision: Literal["32-true", "bf16-mixed", "bf16-true"] = "32-true"
    """32-true; bf16-mixed: products in bfloat16; bf16-true: weights too, of Hugging Face folders only."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, or cuda:N."""
    bos: bool = False
    """Put the model's first special token before every text: some (Gemma, Llama 3) were trained so."""
    trust_remote_code: bool = False
    """Run Python code that comes with --model or --teacher. Read it first."""
    data: str = "data"
    """Folder of prepared data: the tasks are kept in its folder zero_shot."""
    out: str | None = None
    """File to write; null: zero_shot.json in the run folder."""


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    description = "Ask a student (and its teacher, or any model) questions it was not trained for."
    options = parse_into(ZeroShotOptions, "python -m student.zero_shot", description, "--config", arguments)
    content = zero_shot(options, say=lambda line: print(line, file=sys.stderr, flush=True))
    print(table(content))
    print(f"written to {output_of(options)}")
    return 0


def zero_shot(options: ZeroShotOptions, say: Any = lambda line: None) -> dict[str, Any]:
    """Ask every named model every task, write the file, and return what it holds.

    Args:
        options: which models and tasks.
        say: is told one line after every task.

    Raises:
        UserError: an option is wrong, there is no such model, or the tasks' package could not be fetched.
    """
    check_options(options)
    output, device = output_of(options), pick_device(options.device)
    documents = {name: load_documents(Path(options.data), name, options.limit) for name in options.tasks.split(",")}
    batch_tokens = options.batch_tokens or BATCH_TOKENS.get(device.type, BATCH_TOKENS["cuda"])
    models: dict[str, Any] = {}
    for role, source in (("student", options.run), ("teacher", options.teacher), ("model", options.model)):
        if source is None:
            continue
        if role == "student":
            model = student_of(Path(source), options.checkpoint, device)
        else:
            dtype: Literal["float32", "bfloat16"] = "bfloat16" if options.precision == "bf16-true" else "float32"
            model = hugging_face(source, f"--{role}", device, dtype, options.trust_remote_code)
        models[role] = {"source": source, "parameters": model.parameters, "tasks": {}}
        if role == "student":
            models[role]["checkpoint"] = options.checkpoint
        for name, asked in documents.items():
            begun = time.monotonic()
            mixed = options.precision == "bf16-mixed"
            with in_precision("bf16-mixed" if mixed else "32-true", device), uncompiled():
                figures = figures_of(TASKS[name], asked, ask(model, asked, batch_tokens, options.bos))
            models[role]["tasks"][name] = figures
            say(f"{role}: {TASKS[name].title}, {len(asked)} documents in {time.monotonic() - begun:.0f} s")
    tasks = {
        name: {"documents": len(asked), "chance": chance_of(TASKS[name], asked), "measure": measure_of(TASKS[name])}
        for name, asked in documents.items()
    }
    content = {
        "limit": options.limit,
        "package": SOURCE.requirement,
        "precision": options.precision,
        "bos": options.bos,
        "tasks": tasks,
        "models": models,
    }
    commit_json(output, content)
    return content


def check_options(options: ZeroShotOptions) -> None:
    """Raise `UserError` for options that do not go together or are out of range."""
    if options.run is None and options.teacher is None and options.model is None:
        raise UserError("name a model: --run RUN, --teacher FOLDER or --model FOLDER")
    unknown = [name for name in options.tasks.split(",") if name not in TASKS]
    if unknown:
        raise UserError(f"--tasks {options.tasks}: there is no task {unknown[0]!r}; known are {', '.join(TASKS)}")
    for name in ("limit", "batch_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be 1 or more, found {value}")
    if options.precision == "bf16-true" and options.run is not None:
        raise UserError(
            "--precision bf16-true is for Hugging Face folders: a student keeps float32 weights; bf16-mixed"
        )


def output_of(options: ZeroShotOptions) -> Path:
    """The file to write.

    Raises:
        UserError: there is no run whose folder could hold it, and none was named.
    """
    if options.out is not None:
        return Path(options.out)
    if options.run is None:
        raise UserError("name the file to write with --out: without --run there is no run folder to keep it")
    return Path(options.run) / "zero_shot.json"


def ask(model: LanguageModel, documents: Sequence[Document], batch_tokens: int, bos: bool) -> list[list[Scored]]:
    """The scores of every document's answers."""
    start = (model.start_id,) if bos else ()
    places, requests = [], []
    for number, document in enumerate(documents):
        for context, continuation in document.requests:
            places.append(number)
            requests.append(as_request(model, context, continuation, start))
    scored: list[Scored | None] = [None] * len(requests)
    for index, score in log_likelihoods(model, requests, batch_tokens):
        scored[index] = score
    answers: list[list[Scored]] = [[] for _ in documents]
    for number, found in zip(places, scored, strict=True):
        assert found is not None
        answers[number].append(found)
    return answers


def measure_of(task: Task) -> str:
    """The measure that the task is known by."""
    return "acc_norm" if task.by_length else "acc"


def chance_of(task: Task, documents: Sequence[Document]) -> float | None:
    """Accuracy of guessing; None where there is nothing to choose from."""
    if task.asks_for_word:
        return None
    return sum(1 / len(document.requests) for document in documents) / len(documents)


def figures_of(task: Task, documents: Sequence[Document], answers: Sequence[Sequence[Scored]]) -> dict[str, float]:
    """Accuracies with their standard errors; for LAMBADA accuracy and perplexity of the last word.

    `acc_norm` divides log-probabilities by the characters of the answer, the space before it left out.
    """
    if task.asks_for_word:
        nats = [-scored.nats for (scored,) in answers]
        mean, error = mean_and_error(nats)
        perplexity = math.exp(min(mean, 700.0))
        figures = {"perplexity": perplexity, "perplexity_stderr": perplexity * error}
        return {**with_error("acc", [float(scored.greedy) for (scored,) in answers]), **figures}
    right, right_by_length = [], []
    for document, scores in zip(documents, answers, strict=True):
        nats = [scored.nats for scored in scores]
        sizes = [max(1, len(continuation.removeprefix(" "))) for _, continuation in document.requests]
        by_length = [value / size for value, size in zip(nats, sizes, strict=True)]
        right.append(float(first_largest(nats) == document.gold))
        right_by_length.append(float(first_largest(by_length) == document.gold))
    return {**with_error("acc", right), **with_error("acc_norm", right_by_length)}


def first_largest(values: Sequence[float]) -> int:
    """Index of the largest value, the first among equals."""
    return max(range(len(values)), key=lambda i: values[i])


def with_error(name: str, values: Sequence[float]) -> dict[str, float]:
    """A mean and its standard error under `name` and `name`_stderr."""
    mean, error = mean_and_error(values)
    return {name: mean, f"{name}_stderr": error}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and its standard error s / sqrt(n) from the sample's own deviation s; 0 for a single value."""
    n = len(values)
    mean = sum(values) / n
    variance = sum((value - mean) ** 2 for value in values) / max(1, n - 1)
    return mean, math.sqrt(variance / n)


def table(content: dict[str, Any]) -> str:
    """One table: a line a task and measure, a column a model."""
    models = content["models"]
    lines = [f"{'':22}{'documents':>10}{'chance':>9}" + "".join(f"{role:>18}" for role in models)]
    for name, task in content["tasks"].items():
        others = ["acc", "perplexity"] if TASKS[name].asks_for_word else ["acc", "acc_norm"]
        measures = [task["measure"], *(measure for measure in others if measure != task["measure"])]
        for number, measure in enumerate(measures):
            cells = [models[role]["tasks"][name] for role in models]
            chance = "" if task["chance"] is None or number else f"{100 * task['chance']:.1f}%"
            title = f"{TASKS[name].title if number == 0 else '':12}{measure:10}"
            documents = f"{task['documents']:,}" if number == 0 else ""
            values = "".join(f"{cell_text(cell, measure):>18}" for cell in cells)
            lines.append(f"{title}{documents:>10}{chance:>9}{values}")
    choosing = [name for name, task in content["tasks"].items() if task["chance"] is not None]
    if len(choosing) > 1:
        chance = sum(content["tasks"][name]["chance"] for name in choosing) / len(choosing)
        means = [mean_of(models[role]["tasks"], content["tasks"], choosing) for role in models]
        lines.append(f"{'mean of the choices':32}{100 * chance:8.1f}%" + "".join(f"{100 * m:17.1f}%" for m in means))
    if content["limit"] is not None:
        lines.append(f"the first {content['limit']} documents of each task only")
    return "\n".join(lines)


def cell_text(figures: dict[str, float], measure: str) -> str:
    """A figure and its standard error."""
    value, error = figures[measure], figures[f"{measure}_stderr"]
    if measure == "perplexity":
        return f"{value:,.1f} ± {error:,.1f}"
    return f"{100 * value:.1f}% ± {100 * error:.1f}"


def mean_of(figures: dict[str, dict[str, float]], tasks: dict[str, Any], names: Sequence[str]) -> float:
    """Mean of the accuracies that the tasks are known by."""
    return sum(figures[name][tasks[name]["measure"]] for name in names) / len(names)


if __name__ == "__main__":
    sys.exit(run_command(main))
