"""Which CPUs multiply bfloat16, and what the demo does about those that do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline import bfloat16
from scripts import demo_options

X86 = "processor\t: 0\nmodel name\t: a CPU\nflags\t\t: fpu avx2 avx512f{more}\n\nprocessor\t: 1\nflags\t\t: fpu\n"
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd{more}\nCPU part\t: 0xd0c\n"


@pytest.fixture
def cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(bfloat16, "CPUINFO", tmp_path / "cpuinfo")
    return tmp_path / "cpuinfo"


@pytest.mark.parametrize(
    ("text", "multiplies"),
    [
        (X86.format(more=""), False),
        (X86.format(more=" avx512_bf16 avx512_vnni"), True),
        (X86.format(more=" amx_bf16"), True),
        (X86.format(more=" avx512_vbmi2"), False),
        (ARM.format(more=""), False),
        (ARM.format(more=" i8mm bf16"), True),
        ("no such line\n", True),
    ],
)
def test_flags(text: str, multiplies: bool, cpuinfo: Path) -> None:
    cpuinfo.write_text(text)
    assert bfloat16.cpu_multiplies_bfloat16() is multiplies


def test_where_nothing_is_known(cpuinfo: Path) -> None:
    assert not cpuinfo.exists() and bfloat16.cpu_multiplies_bfloat16()


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("more", ["", " avx512_bf16"])
def test_the_demo(gpu: bool, more: str, cpuinfo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new demo takes what the machine is good at; one that was begun goes on as it is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.chdir(tmp_path)
    cpuinfo.write_text(X86.format(more=more))
    slow = not gpu and not more
    in_float32 = [["--engine.dtype", "float32"], ["--trainer.precision", "32-true"]]
    assert [demo_options.options(step) for step in ("dump", "train")] == (in_float32 if slow else [[], []])
    for dtype, precision, expected in (("float32", "32-true", in_float32), ("bfloat16", "bf16-mixed", [[], []])):
        for folder, name, text in (
            (demo_options.CACHE, "manifest.json", json.dumps({"data": {"dtype": dtype}})),
            (demo_options.RUN, "config.yaml", f"trainer:\n  precision: {precision}\n"),
        ):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        assert [demo_options.options(step) for step in ("dump", "train")] == expected


def test_the_demo_says_so(
    cpuinfo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    cpuinfo.write_text(X86.format(more=""))
    for step, told in (("dump", True), ("train", False)):
        monkeypatch.setattr("sys.argv", ["demo_options", step])
        demo_options.main()
        captured = capsys.readouterr()
        assert captured.out.split() == demo_options.options(step)
        assert ("multiplies no bfloat16" in captured.err) is told
