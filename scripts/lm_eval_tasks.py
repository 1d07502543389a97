"""Task files for lm-evaluation-harness out of the zero-shot documents that `student.zero_shot` asks, and of a text.

    python -m scripts.lm_eval_tasks --out tasks --limit 1000 --texts heldout.jsonl

Writes OUT/distil_TASK.yaml and .jsonl for LAMBADA and every task of choices, and distil_text.* (bits per byte) of a
file of lines {"text": ...}, if one is named. Tasks whose answers have contexts of their own (WinoGrande) are left out.
docs/export.md says how to run them on an exported student.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.commit import commit_bytes
from pipeline.config import parse_into
from pipeline.errors import UserError, run_command
from student.evaluation.zero_shot_tasks import TASKS, Document, load_documents

CHOICES = {
    "output_type": "multiple_choice",
    "doc_to_text": "query",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
WORD = {
    "output_type": "loglikelihood",
    "doc_to_text": "query",
    "doc_to_target": "word",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
}
TEXT = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "bits_per_byte"}],
}


@dataclass(frozen=True)
class TaskOptions:
    """Write task files for lm-evaluation-harness."""

    out: Path
    """Folder for them: what lm_eval's --include_path takes."""
    limit: int | None = None
    """Take the first so many documents of each task; null: all."""
    texts: Path | None = None
    """A file of lines {"text": ...} whose bits per byte are a task too."""
    data: Path = Path("data")
    """Folder of prepared data: the documents are kept in its folder zero_shot."""


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    description = "Write task files for lm-evaluation-harness."
    options = parse_into(TaskOptions, "python -m scripts.lm_eval_tasks", description, "--config", arguments)
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit must be 1 or more, found {options.limit}")
    if options.texts is not None and not options.texts.is_file():
        raise UserError(f'--texts {options.texts} is no file: name one of lines {{"text": ...}}')
    options.out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, task in TASKS.items():
        lines = [line_of(document) for document in load_documents(options.data, name, options.limit)]
        if None in lines:
            continue
        write(options.out, f"distil_{name}", WORD if task.asks_for_word else CHOICES, lines)
        written.append(f"distil_{name}")
    if options.texts is not None:
        write(options.out, "distil_text", TEXT, texts_of(options.texts))
        written.append("distil_text")
    print(f"--tasks {','.join(written)} --include_path {options.out}")
    return 0


def texts_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of texts.

    Raises:
        UserError: a line is no JSON object with a text.
    """
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            lines.append({"text": str(json.loads(line)["text"])})
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f'--texts {path}, line {number}: must be an object with a "text", found {line[:60]!r}'
            ) from None
    return lines


def line_of(document: Document) -> dict[str, Any] | None:
    """A document as a line of a task's file; None where its answers have contexts of their own."""
    contexts = {context for context, _ in document.requests}
    if len(contexts) > 1:
        return None
    answers = [answer for _, answer in document.requests]
    line: dict[str, Any] = {"query": contexts.pop()}
    return line | ({"word": answers[0]} if len(answers) == 1 else {"choices": answers, "gold": document.gold})


def write(out: Path, name: str, kind: dict[str, Any], lines: Iterable[dict[str, Any] | None]) -> None:
    """OUT/NAME.jsonl, and OUT/NAME.yaml that asks for it."""
    data = (out / f"{name}.jsonl").resolve()
    commit_bytes(data, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    commit_bytes(out / f"{name}.yaml", yaml.safe_dump({**task, "test_split": "test", **kind}, sort_keys=False).encode())


if __name__ == "__main__":
    sys.exit(run_command(main))
