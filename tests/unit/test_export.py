"""The exported folder: loaded where nothing of this project is, its card, and what is refused."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers_cache import write_toy_cache
from helpers_export import write_toy_run
from helpers_student import save_checkpoint
from helpers_transformer import student_of
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file

from pipeline.commit import commit_json, file_sha256, read_json
from pipeline.errors import UserError, run_command
from pipeline.licences import in_folder
from student.evaluate import EvaluateOptions, evaluate
from student.export import CODE, HERE, ExportOptions, export, main
from student.generate import encode_prompt, generate
from student.model import StudentConfig
from student.runs.checkpoint import load_student

PROMPTS = ["the history of science is", "the"]
ISOLATED = """
import json, sys
OURS = ("student", "pipeline", "teacher_dump", "xlstm", "mlstm_kernels", "lightning")
sys.modules.update(dict.fromkeys(OURS))  # importing one of them fails, as if it were not installed
import torch
from safetensors.torch import save_file
torch.set_num_threads(1)
snippet, target = sys.argv[1:]
exec(open(snippet).read())
ids = torch.arange(2 * 100).view(2, 100) * 7 % 61
with torch.no_grad():
    logits = model(ids).logits
model.save_pretrained(target + "/again")
tokenizer.save_pretrained(target + "/again")
again = AutoModelForCausalLM.from_pretrained(target + "/again", trust_remote_code=True)
assert torch.equal(again(ids).logits, logits), "save_pretrained does not give the same model"
half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
save_file({"logits": logits, "half": half(ids).logits.detach()}, target + "/logits.safetensors")
from transformers import AutoModel
json.dump({
    "prompts": [tokenizer(text).input_ids for text in PROMPTS],
    "greedy": [model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=15, do_sample=False)[0].tolist()
               for text in PROMPTS],
    "batch": texts.tolist(),
    "class": type(model).__module__,
    "base": type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__,
    "imported": [name for name, module in sys.modules.items() if module is not None and name.split(".")[0] in OURS],
    "path": sys.path,
}, open(target + "/found.json", "w"))
""".replace("PROMPTS", repr(PROMPTS))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose evaluation is there."""
    run = write_toy_run(tmp_path_factory.mktemp("exported"), tied=False)
    evaluate(EvaluateOptions(str(run), str(run.parent / "cache"), maps=0))
    return run


@pytest.fixture(scope="module")
def folder(run: Path) -> Path:
    return export(ExportOptions(run, run.parent / "out")).folder


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """Front matter and text of a card."""
    _, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


def isolated(code: str, cwd: Path, home: Path, *arguments: str) -> None:
    """Run code where neither this project nor the user's own settings are."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", code, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("kind", ["xlstm", "transformer"])
def test_the_folder_works_where_nothing_of_this_project_is(kind: str, run: Path, folder: Path, tmp_path: Path) -> None:
    """The card's own lines load it; logits, texts and tokens are those of the student."""
    if kind == "transformer":
        run = write_toy_run(tmp_path, student_of())
        folder = export(ExportOptions(run, tmp_path / "out")).folder
    snippet = re.search(r"```python\n(.*?)```", card_of(folder)[1], re.DOTALL)
    assert snippet is not None
    (tmp_path / "snippet.py").write_text(snippet[1])
    isolated(ISOLATED, folder, tmp_path, str(tmp_path / "snippet.py"), str(tmp_path))
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["imported"] == [] and found["class"].startswith("transformers_modules.")
    assert found["base"] == "DistilXLSTMModel"

    student, teacher = load_student(run)
    ids_BT = torch.arange(2 * 100).view(2, 100) * 7 % 61
    with torch.no_grad():
        expected_BTV = student.logits(student(ids_BT).h_BTD)
    tensors = load_file(tmp_path / "logits.safetensors")
    assert float((tensors["logits"] - expected_BTV).abs().max() / expected_BTV.abs().max()) < 1e-5
    assert float((tensors["half"] - expected_BTV).norm() / expected_BTV.norm()) < 0.03
    stops = {teacher.facts.separator_id, teacher.facts.eos_id}
    for prompt, tokens, greedy in zip(PROMPTS, found["prompts"], found["greedy"], strict=True):
        assert tokens == encode_prompt(prompt, teacher)
        text = list(generate(student, tokens, max_new_tokens=15, temperature=0, stop_ids=stops - {None}))  # type: ignore[arg-type]
        assert [i for i in greedy[len(tokens) :] if i not in stops] == text
    code = {path.name for path in (tmp_path / "again").glob("*.py")}
    assert code == set(CODE), "save_pretrained must take the code along"


def test_the_code_is_copied_as_it_is_and_needs_only_torch_and_transformers(folder: Path) -> None:
    assert {path.name for path in HERE.glob("*.py")} == {*CODE, "__init__.py"}
    for name in CODE:
        assert (folder / name).read_bytes() == (HERE / name).read_bytes()
        roots = set()
        for node in ast.walk(ast.parse((folder / name).read_text())):
            if isinstance(node, ast.Import):
                roots |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0 or f"{node.module}.py" in CODE
                roots |= {(node.module or "").split(".")[0]} if node.level == 0 else set()
        assert roots <= {"torch", "transformers"} | sys.stdlib_module_names, name


def test_files_say_what_they_must(folder: Path, run: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_distil_xlstm.DistilXLSTMForCausalLM"
    assert config["model_type"] == "distil_xlstm" and config["block_types"] == ["slstm", "mlstm"]
    assert config["eos_token_id"] == [0, 2] and config["trained_length"] == 64 and not config["tie_word_embeddings"]
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": None, "eos_token_id": [0, 2], "pad_token_id": 2}
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"} and "lm_head.weight" in file.keys()  # noqa: SIM118 - no dictionary
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert "Apache License" in (folder / "LICENSE").read_text()
    assert not list(folder.glob(".*"))


def test_the_card_tells_what_was_measured(folder: Path, run: Path) -> None:
    front, text = card_of(folder)
    ModelCard.load(folder / "README.md")  # as the hub's library reads it
    assert front["license"] == "unknown" and front["library_name"] == "transformers" and "base_model" not in front
    figures = read_json(run / "evaluation.json")
    for name in ("student", "teacher", "unigram"):
        keys = ("cross_entropy", "perplexity", "bits_per_byte")
        assert f"| {name} | " + " | ".join(f"{figures[f'{name}_{key}']:,.4f}" for key in keys) + " |" in text
    assert f"{figures['targets']:,} tokens" in text and f"{figures['kl_k1']:.4f}" in text
    for words in (
        "toy words",
        "7 optimiser steps",
        "8 training rows",
        "alpha\\_start 0.8",
        "mlstm_kernels",
        "Apache-2.0",
    ):
        assert words in text, words


def test_the_card_tells_of_further_evaluations_and_of_zero_shot_tasks(run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run, tmp_path / "run"))
    figures = {**read_json(run / "evaluation.json"), "student_perplexity": 1234.5, "kl_full": 0.25}
    commit_json(run / "evaluation-novels.json", figures)
    found = {"acc": 0.625, "acc_stderr": 0.015, "acc_norm": 0.5, "acc_norm_stderr": 0.016}
    model = {"source": "x", "checkpoint": "last", "tasks": {"piqa": found}}
    task = {"documents": 1000, "chance": 0.5, "measure": "acc"}
    content = {"limit": 1000, "package": "tasks==1", "tasks": {"piqa": task}, "models": {"student": model}}
    commit_json(run / "zero_shot.json", content)
    _, text = card_of(export(ExportOptions(run, tmp_path / "out")).folder)
    assert text.count("which no training row contains") == 1 and text.count("\n| student |") == 2
    assert "1,234.5000" in text and "evaluation `novels`" in text and "over the whole vocabulary, nats: 0.2500" in text
    assert "| piqa | acc | 1,000 | 62.5 ± 1.5 | 50.0 |" in text
    (run / "evaluation.json").unlink()
    commit_json(run / "zero_shot.json", {**content, "models": {"student": {**model, "checkpoint": "best"}}})
    _, text = card_of(export(ExportOptions(run, tmp_path / "out")).folder)
    assert "Not measured yet" not in text and "evaluation `novels`" in text and "piqa" not in text
    (run / "evaluation-novels.json").write_text("{")
    with pytest.raises(UserError, match=r"evaluation-novels\.json"):
        export(ExportOptions(run, tmp_path / "out"))


def test_tied_weights_are_stored_once_and_bfloat16_takes_half(tmp_path: Path) -> None:
    run = write_toy_run(tmp_path, StudentConfig(blocks=2, heads=4, final_norm="teacher"))
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        done = export(ExportOptions(run, tmp_path / dtype, dtype=dtype))  # type: ignore[arg-type]
        sizes[dtype] = done.bytes
        with safe_open(done.folder / "model.safetensors", "pt") as file:
            names = list(file.keys())
            assert "lm_head.weight" not in names
            kinds = {file.get_tensor(name).dtype for name in names}
        config = json.loads((done.folder / "config.json").read_text())
        assert kinds == {getattr(torch, dtype)} and config["dtype"] == dtype and config["final_norm"] == "rmsnorm"
        assert done.typical_deviation < done.deviation < (1e-5 if dtype == "float32" else 0.2)
    assert sizes["bfloat16"] < 0.55 * sizes["float32"]


def test_figures_of_another_checkpoint_are_not_shown(run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run, tmp_path / "run"))
    checkpoint = run / "checkpoints" / "last.ckpt"
    os.utime(checkpoint)  # the run went on
    os.utime(run / "evaluation.json", (1, 1))
    _, text = card_of(export(ExportOptions(run, tmp_path / "out")).folder)
    assert "went on after its evaluation" in text and "| student |" not in text
    shutil.copy(checkpoint, run / "checkpoints" / "best.ckpt")
    _, text = card_of(export(ExportOptions(run, tmp_path / "out", checkpoint="best")).folder)
    assert "evaluated with another checkpoint than `best`" in text
    (run / "evaluation.json").unlink()
    _, text = card_of(export(ExportOptions(run, tmp_path / "out")).folder)
    assert "Not measured yet" in text


def test_the_card_tells_that_blocks_began_with_the_teachers_weights(tmp_path: Path) -> None:
    run = write_toy_run(tmp_path, student_of(blocks=3))
    options = ExportOptions(run, tmp_path / "out")
    _, text = card_of(export(options).folder)
    assert "3 xLSTM blocks (all transformer_mlstm)" in text and "Blocks began" not in text
    assert "derived from the teacher's outputs on" in text
    commit_json(run / "from_teacher.json", {"layers": [0, 2, 3], "align_tokens": 2560, "teacher": "/home/me/x"})
    _, text = card_of(export(options).folder)
    assert "weights of the teacher's layers 0, 2, 3 (the first is 0); then each was taught" in text
    assert "on 2,560 tokens" in text and "derived from the teacher's weights, and" in text and "/home" not in text
    commit_json(run / "from_teacher.json", {"layers": [0, 2, 3], "align_tokens": 0})
    _, text = card_of(export(options).folder)
    assert "layers 0, 2, 3 (the first is 0)." in text
    for layers, tokens in (("<b>", 1), ([None] * 3, 1), ([0] * 3, "1"), ([0] * 3, None), ([0], 1)):  # a stranger's
        commit_json(run / "from_teacher.json", {"layers": layers, "align_tokens": tokens})
        assert "Blocks began" not in card_of(export(options).folder)[1]


def test_licences_are_told_with_where_they_were_read(run: Path, tmp_path: Path) -> None:
    options = ExportOptions(run, tmp_path / "out", teacher_licence="Apache-2.0", corpus_licence="cc-by-sa-3.0, gfdl")
    front, text = card_of(export(options).folder)
    assert front["license"] == "apache-2.0" and "cc-by-sa-3.0 / gfdl" in text
    with pytest.raises(UserError, match="licence 'my own!'"):
        export(ExportOptions(run, tmp_path / "out", teacher_licence="my own!"))
    model = tmp_path / "model"
    model.mkdir()
    assert in_folder(model) is None
    (model / "LICENSE").write_text("\n      Apache License\n   Version 2.0, January 2004\n")
    assert str(in_folder(model)) == "apache-2.0"
    (model / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\ntext\n")
    assert str(in_folder(model)) == "mit"
    (model / "README.md").write_text("no front matter\nlicense: mit\n")
    (model / "LICENSE").write_text("All rights reserved.")
    assert str(in_folder(model)) == "other"


def test_a_teachers_licence_file_travels(run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run, tmp_path / "run"))
    teacher, text = run / "teacher", b"MIT License\n\nCopyright (c) Somebody\n"
    (teacher / "LICENSE").write_bytes(text)
    record = read_json(teacher / "teacher.json")
    record["files"]["LICENSE"] = {"bytes": len(text), "sha256": file_sha256(teacher / "LICENSE")}
    commit_json(teacher / "teacher.json", record)
    folder = export(ExportOptions(run, tmp_path / "out")).folder
    assert (folder / "LICENSE.teacher").read_bytes() == text and card_of(folder)[0]["license"] == "mit"


def test_an_interrupted_export_is_none_and_the_next_one_ends_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    export(ExportOptions(run, out))
    (out / "LICENSE.teacher").write_text("of an earlier one")

    def full(path: Path, tensors: dict[str, Any]) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("student.export.write_weights", full)
        with pytest.raises(OSError, match="No space left"):
            export(ExportOptions(run, out))
    assert not (out / "config.json").exists() and not list(out.glob("*.tmp"))
    export(ExportOptions(run, out))
    assert (out / "config.json").is_file() and not (out / "LICENSE.teacher").exists()


def test_weights_that_are_not_finite_are_refused(run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run, tmp_path / "run"))
    path = run / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    content["state_dict"]["model.final_norm.weight"][0] = torch.nan
    save_checkpoint(content, path)
    with pytest.raises(UserError, match="differ from the student's by nan .* nothing was written"):
        export(ExportOptions(run, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_the_student_itself_rounds_off_is_allowed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where activations are large, float32 leaves more than usual, of the student as of what is exported."""
    monkeypatch.setattr("student.exporting.weights.MOST_DEVIATION", 0.0)
    done = export(ExportOptions(run, tmp_path / "out"))
    assert 0 < done.deviation < 1e-5
    monkeypatch.setattr("student.exporting.weights.rounding", lambda student: done.deviation / 100)
    with pytest.raises(UserError, match="differ from the student's by"):
        export(ExportOptions(run, tmp_path / "again"))


def test_a_strangers_names_stay_text(run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run, tmp_path / "a <b>run | [x](y)"))
    (run / "teacher" / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": "evil.E"}}))
    record = read_json(run / "teacher" / "teacher.json")
    path = run / "teacher" / "tokenizer_config.json"
    record["files"][path.name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    record["facts"]["name"] = "x\n---\nlicense: mit\n---\n# y"
    commit_json(run / "teacher" / "teacher.json", record)
    folder = export(ExportOptions(run, tmp_path / "out")).folder
    front, text = card_of(folder)
    assert front["license"] == "unknown" and "\\<b\\>run" in text and "\n# y" not in text
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert "auto_map" not in tokenizer and tokenizer["pad_token"] == "<|endoftext|>"


def failure(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert run_command(lambda: main(arguments)) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and text.startswith("error: ")
    return text


def test_what_cannot_be_exported_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--run", str(run)]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("not yours")
    assert "holds other files" in failure([*given, "--out", str(tmp_path / "notes")], capsys)
    assert "is a file" in failure([*given, "--out", str(tmp_path / "notes" / "mine.txt")], capsys)
    out = ["--out", str(tmp_path / "out")]
    assert "no checkpoint 'best'" in failure([*given, *out, "--checkpoint", "best"], capsys)
    assert "does not exist" in failure(["--run", str(tmp_path / "none"), *out], capsys)
    assert "is no cache" in failure([*given, *out, "--cache", str(tmp_path)], capsys)
    other = write_toy_cache(tmp_path / "other", units=1, heldout_units=0, rows=1, seed=5)
    assert "Name a cache of the run's teacher" in failure([*given, *out, "--cache", str(other)], capsys)
    assert "dtype" in failure([*given, *out, "--dtype", "int4"], capsys)
    assert not (tmp_path / "out").exists() and (tmp_path / "notes" / "mine.txt").is_file()


def test_the_command_says_what_it_wrote(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--run", str(run), "--out", str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    text = capsys.readouterr().out
    assert "parameters as bfloat16" in text and "trust_remote_code=True" in text
