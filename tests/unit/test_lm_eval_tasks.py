"""Task files for lm-evaluation-harness: what they ask is what `student.zero_shot` asks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from pipeline.errors import UserError
from scripts import lm_eval_tasks
from student.evaluation.zero_shot_tasks import TASKS, Document

CHOICE = Document((("Two and two?\nAnswer:", " four"), ("Two and two?\nAnswer:", " five")), 0)
WORD = Document((("The cat sat on the", " mat"),), 0)
PAIR = Document((("Ann saw Bea because Ann", " looked."), ("Ann saw Bea because Bea", " looked.")), 1)


@pytest.fixture
def documents(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {name: WORD if task.asks_for_word else CHOICE for name, task in TASKS.items()} | {"winogrande": PAIR}
    monkeypatch.setattr(lm_eval_tasks, "load_documents", lambda data, name, limit: [found[name]] * (limit or 3))


@pytest.mark.usefixtures("documents")
def test_tasks_name_the_lines_that_they_ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "Ä text.", "id": 3}\n')
    out = tmp_path / "tasks"
    assert lm_eval_tasks.main(["--out", str(out), "--limit", "2", "--texts", str(texts)]) == 0
    said = capsys.readouterr().out.split()
    names = said[1].split(",")
    assert set(names) == {f"distil_{name}" for name in [*TASKS, "text"] if name != "winogrande"}
    lines = {}
    for name in names:
        task = yaml.safe_load((out / f"{name}.yaml").read_text())
        path = Path(task["dataset_kwargs"]["data_files"]["test"])
        assert task["task"] == name and path.is_absolute() and path.parent == out.resolve()
        lines[name] = [json.loads(line) for line in path.read_text().splitlines()]
        fields = [task[field] for field in ("doc_to_text", "doc_to_choice", "doc_to_target") if task.get(field)]
        assert all(field.strip("{}") in line for field in fields for line in lines[name])
    assert lines["distil_lambada"] == [{"query": "The cat sat on the", "word": " mat"}] * 2
    assert lines["distil_sciq"][0] == {"query": "Two and two?\nAnswer:", "choices": [" four", " five"], "gold": 0}
    assert lines["distil_text"] == [{"text": "Ä text."}]


@pytest.mark.usefixtures("documents")
def test_what_cannot_be_asked_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--limit must be 1 or more, found 0"):
        lm_eval_tasks.main(["--out", str(tmp_path), "--limit", "0"])
    with pytest.raises(UserError, match=r"--texts .*none\.jsonl is no file"):
        lm_eval_tasks.main(["--out", str(tmp_path), "--texts", str(tmp_path / "none.jsonl")])
    (tmp_path / "texts.jsonl").write_text('{"text": "one"}\n{"words": "two"}\n')
    with pytest.raises(UserError, match=r"texts\.jsonl, line 2: must be an object with a \"text\""):
        lm_eval_tasks.main(["--out", str(tmp_path), "--texts", str(tmp_path / "texts.jsonl")])
