"""Which files the runner of a GPU's tests starts, and which of them alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import gpu_tests


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path, str]]:
    """What would have been started, each with its name, file and -k."""
    tests: list[tuple[str, Path, str]] = []

    def start(name: str, path: Path, wanted: str, logs: Path) -> str:
        tests.append((name, path, wanted))
        return name

    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setattr(gpu_tests, "start", start)
    monkeypatch.setattr(gpu_tests, "passed", lambda test, seconds: True)
    return tests


def test_all_files_that_use_a_gpu(started: list[tuple[str, Path, str]], tmp_path: Path) -> None:
    assert gpu_tests.main(["--logs", str(tmp_path)]) == 0
    paths = [path for _, path, _ in started]
    assert set(Path("tests/gpu").glob("test_*.py")) | set(Path("tests/numerics").glob("test_*_triton.py")) <= set(paths)
    assert Path("tests/numerics/test_pooled_hidden.py") in paths
    assert Path("tests/numerics/test_losses.py") not in paths
    assert len(paths) == len(set(paths)) and paths[-1].stem == "test_dump_on_gpu"  # what starts vLLM comes last


def test_files_by_name(started: list[tuple[str, Path, str]], tmp_path: Path) -> None:
    names = ["dump_on_gpu", "kernels", "head_topk_triton:soft_cap"]
    assert gpu_tests.main([*names, "--logs", str(tmp_path)]) == 0
    assert started == [
        ("kernels", Path("tests/gpu/test_kernels.py"), ""),
        ("head_topk_triton:soft_cap", Path("tests/numerics/test_head_topk_triton.py"), "soft_cap"),
        ("dump_on_gpu", Path("tests/gpu/test_dump_on_gpu.py"), ""),
    ]


def test_an_unknown_name_is_told(
    started: list[tuple[str, Path, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        gpu_tests.main(["losses", "--logs", str(tmp_path)])
    assert not started and "losses: no such file of tests: choose from " in capsys.readouterr().err
