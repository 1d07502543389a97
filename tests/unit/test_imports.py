"""Imports go one way, teacher_dump -> pipeline <- student, and each stage runs where only its own packages are."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
STAGES = {"teacher_dump", "student"}
FORBIDDEN = {"pipeline": STAGES, "teacher_dump": {"student"}, "student": {"teacher_dump"}}
HEAVY = {"pipeline": {"vllm", "lightning", "xlstm", "transformers"}, "teacher_dump": {"lightning", "xlstm"}}


def sources(package: str) -> list[Path]:
    found = sorted((REPOSITORY / package).rglob("*.py"))
    assert len(found) > 5, f"no sources of {package} were found"
    return found


def imported(path: Path) -> set[str]:
    """Top-level names that a source imports anywhere, inside functions and by `import_module("...")` too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if path.parent.name == "huggingface" and node.level == 1:
                continue  # exported code finds its neighbours only so; tests/unit/test_export.py looks at its imports
            assert node.level == 0, f"{path}: relative imports hide where a module comes from"
            names.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            names |= {str(a.value).split(".")[0] for a in node.args if isinstance(a, ast.Constant)}
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_stages_do_not_import_each_other(package: str) -> None:
    for path in sources(package):
        wrong = imported(path) & (FORBIDDEN[package] | HEAVY.get(package, set()))
        assert not wrong, f"{path.relative_to(REPOSITORY)} imports {sorted(wrong)}"


def test_the_search_sees_every_form_of_import(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text(
        "import student.data.loader\nfrom pipeline import cache\nimport importlib\n"
        "def f():\n    from vllm.config import x\n    importlib.import_module('xlstm.blocks')\n"
    )
    assert imported(path) == {"student", "pipeline", "importlib", "vllm", "xlstm"}


def run_without(blocked: list[str], code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process in which importing any of `blocked` fails, as if it were not installed."""
    block = "".join(f"sys.modules[{name!r}] = None\n" for name in blocked)
    command = [sys.executable, "-c", f"import sys\n{block}{code}"]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)


TEACHERS_OWN = ["vllm", "teacher_dump"]
STUDENTS_OWN = ["lightning", "xlstm", "mlstm_kernels", "student"]


def test_student_side_runs_without_vllm() -> None:
    modules = "student.data.loader, student.losses.fused, pipeline.cache, pipeline.verify"
    done = run_without(TEACHERS_OWN, f"import {modules}")
    assert done.returncode == 0, done.stderr


def test_teacher_side_runs_without_lightning_up_to_the_engine(tmp_path: Path) -> None:
    """Even vLLM is imported only when the engine starts; then its absence is told."""
    config = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 9}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code = (
        "import teacher_dump.dump, teacher_dump.__main__\n"
        "from pathlib import Path\n"
        "from teacher_dump.engine import EngineOptions, TeacherEngine\n"
        "from teacher_dump.rows import CaptureSpec\n"
        "print('imported')\n"
        "try:\n"
        f"    TeacherEngine(Path({str(tmp_path)!r}), length=8, capture=CaptureSpec(2, (1.0,), 0, 0), "
        "options=EngineOptions())\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    done = run_without([*STUDENTS_OWN, "vllm"], code)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "imported" and "vllm" in lines[1].lower(), done.stdout


def test_pipeline_runs_without_either_stage() -> None:
    code = (
        "import pipeline.cache, pipeline.claim, pipeline.config, pipeline.prefetch, pipeline.verify, pipeline.__main__"
    )
    done = run_without([*TEACHERS_OWN, *STUDENTS_OWN, "transformers", "datasets", "zstandard"], code)
    assert done.returncode == 0, done.stderr


def test_looking_at_a_cache_starts_without_torch() -> None:
    done = run_without(["torch"], "import pipeline.cache, pipeline.verify")
    assert done.returncode == 0, done.stderr


def test_blocking_works() -> None:
    assert "ModuleNotFoundError" in run_without(["pyarrow"], "import pipeline.cache").stderr
