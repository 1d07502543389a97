"""scripts/setup.py, the lock files and the Makefile: what a fresh machine meets first."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[2]
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}


def load_setup() -> Any:
    spec = importlib.util.spec_from_file_location("setup_script", REPOSITORY / "scripts" / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup = load_setup()


def test_an_old_python_can_read_it() -> None:
    source = (REPOSITORY / "scripts" / "setup.py").read_text()
    tree = ast.parse(source, feature_version=(3, 8))
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert imported <= set(sys.stdlib_module_names)


def executable(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def test_a_supported_python_is_used_itself() -> None:
    assert setup.pick_python(("/opt/python", (3, 12, "3.12.9"))) == ("/opt/python", "3.12.9")


@pytest.mark.parametrize("version", [(3, 8, "3.8.18"), (3, 10, "3.10.1"), (3, 14, "3.14.0")])
def test_another_python_looks_for_the_newest_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: tuple[int, int, str]
) -> None:
    executable(tmp_path / "bin", "python3.11", "echo 3 11 3.11.2")
    executable(tmp_path / "bin", "python3.12", "echo 3 12 3.12.1")
    executable(tmp_path / "bin", "python3.13", "echo no such version >&2; exit 127")  # a shim without its interpreter
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert setup.pick_python(("/usr/bin/python3", version)) == (str(tmp_path / "bin" / "python3.12"), "3.12.1")


def test_no_supported_python_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(setup.SetupError, match=r"^Python 3.9.2 is not supported and no python3.11, .* install one"):
        setup.pick_python(("/usr/bin/python3", (3, 9, "3.9.2")))


def test_missing_venv_module_names_the_debian_package(tmp_path: Path) -> None:
    body = 'case "$2" in *ensurepip*) exit 1;; *) echo 3 12 3.12.1;; esac'
    executable(tmp_path / "bin", "python3.12", body)
    with pytest.raises(setup.SetupError, match=r"python3-venv \(or python3.12-venv\)"):
        setup.check_venv_modules(str(tmp_path / "bin" / "python3.12"))
    setup.check_venv_modules(sys.executable)


@pytest.mark.parametrize(("system", "machine"), [("Darwin", "arm64"), ("Windows", "AMD64"), ("Linux", "riscv64")])
def test_other_machines_are_refused(system: str, machine: str) -> None:
    setup.check_machine("Linux", "x86_64")
    setup.check_machine("Linux", "aarch64")
    with pytest.raises(setup.SetupError, match=f"{system} on {machine}"):
        setup.check_machine(system, machine)


def test_a_full_disk_is_found_before_pip_starts(tmp_path: Path) -> None:
    setup.check_disk(tmp_path, "cpu", free=7e9)
    with pytest.raises(setup.SetupError, match=r"only 5.0 GB are free .* CPU .* need 6 GB"):
        setup.check_disk(tmp_path, "cpu", free=5e9)
    with pytest.raises(setup.SetupError, match="CUDA .* need 20 GB"):
        setup.check_disk(tmp_path, "cuda", free=7e9)


def test_a_compiler_is_needed_on_a_gpu_only() -> None:
    setup.check_compiler("cpu", which=lambda name: None)
    setup.check_compiler("cuda", which=lambda name: name if name.startswith("clang") else None)
    with pytest.raises(setup.SetupError, match=r"no g\+\+ was found .* packages g\+\+ and python3-dev"):
        setup.check_compiler("cuda", which=lambda name: name if name == "gcc" else None)


@pytest.mark.parametrize(
    ("wanted", "machine", "driver", "expected"),
    [
        ("", "x86_64", None, "cpu"),
        ("", "x86_64", "580.95.05", "cuda"),
        ("", "x86_64", "", "cuda"),
        ("auto", "aarch64", None, "cpu"),
        ("cpu", "x86_64", "580.95.05", "cpu"),
        ("cuda", "x86_64", None, "cuda"),
        ("", "x86_64", "535.1", "the NVIDIA driver here is 535.1, but CUDA 13 needs 580"),
        ("cuda", "aarch64", "580.1", "pinned for x86_64"),
        ("tpu", "x86_64", None, "DEVICE is 'tpu'"),
    ],
)
def test_device(wanted: str, machine: str, driver: str | None, expected: str) -> None:
    if expected in ("cpu", "cuda"):
        assert setup.pick_device(wanted, machine, driver) == expected
    else:
        with pytest.raises(setup.SetupError, match=re.escape(expected)):
            setup.pick_device(wanted, machine, driver)


@pytest.fixture
def paths(tmp_path: Path) -> Any:
    """A repository with lock files and nothing installed."""
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements" / "cpu.txt").write_text("# lock\nsix==1.17.0\ntorch==2.13.0+cpu\n")
    for name in ("cuda.txt", "cuda-constraints.txt"):
        (tmp_path / "requirements" / name).write_text("vllm==0.26.0\n")
    return setup.Paths(tmp_path)


class Commands:
    """Stands where commands are run; makes what `python -m venv` makes, and fails where told."""

    def __init__(self, paths: Any, failing: str = "", absent: str = "") -> None:
        self.paths, self.failing, self.absent, self.said = paths, failing, absent, list[str]()

    def run(self, what: str, command: list[Any], remedy: str, allowed_to_fail: bool = False) -> bool:
        self.said.append(what)
        assert self.paths.unfinished.exists() and not self.paths.stamp.exists()
        if "venv" in map(str, command):
            (self.paths.venv / "bin").mkdir()
            (self.paths.venv / "lib" / "python3.11" / "site-packages").mkdir(parents=True)
            self.paths.python.symlink_to(sys.executable)
        if what == self.absent and allowed_to_fail:
            return False
        if self.failing and self.failing in what:
            raise setup.SetupError(what)
        return True


def install(paths: Any, monkeypatch: pytest.MonkeyPatch, version: str = "3.11.7", **faults: str) -> list[str]:
    commands = Commands(paths, **faults)
    monkeypatch.setattr(setup, "Steps", lambda log: commands)
    setup.install(paths, "cpu", sys.executable, version)
    return commands.said


def test_a_finished_set_up_is_current_until_something_changes(paths: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not setup.is_current(paths, setup.read_stamp(paths), "")
    steps = install(paths, monkeypatch)
    assert [step.split()[0] for step in steps] == ["virtual", "torch==2.13.0+cpu", "2", "import"]
    stamp = setup.read_stamp(paths)
    assert setup.is_current(paths, stamp, "") and setup.is_current(paths, stamp, "cpu")
    assert not setup.is_current(paths, stamp, "cuda")
    (site,) = paths.venv.glob("lib/*/site-packages/distil_xlstm.pth")
    assert site.read_text() == f"{paths.root}\n"
    lock = paths.root / "requirements" / "cpu.txt"
    lock.write_text(lock.read_text().replace("1.17.0", "1.18.0"))
    assert not setup.is_current(paths, stamp, "")
    kept = paths.venv / "kept"
    kept.touch()
    assert not install(paths, monkeypatch)[0].startswith("virtual")  # the environment is renewed in place
    assert kept.exists() and setup.is_current(paths, setup.read_stamp(paths), "")
    assert install(paths, monkeypatch, version="3.12.1")[0] == "virtual environment, Python 3.12.1"
    assert not kept.exists()


@pytest.mark.parametrize("failing", ["virtual", "packages of", "import"])
def test_an_interrupted_set_up_is_begun_anew(paths: Any, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    with pytest.raises(setup.SetupError):
        install(paths, monkeypatch, failing=failing)
    assert setup.read_stamp(paths) is None
    half = paths.venv / "half-installed"
    half.touch()
    assert install(paths, monkeypatch)[0].startswith("virtual")
    assert not half.exists() and setup.is_current(paths, setup.read_stamp(paths), "")


def test_a_moved_repository_or_a_lost_interpreter_is_not_current(paths: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install(paths, monkeypatch)
    stamp = json.loads(paths.stamp.read_text())
    assert not setup.is_current(paths, {**stamp, "folder": "/elsewhere"}, "")
    paths.python.unlink()
    paths.python.symlink_to("/nowhere/python3")
    assert setup.read_stamp(paths) is None


def test_torch_comes_from_its_own_index_where_pip_has_none(paths: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = install(paths, monkeypatch, absent="torch==2.13.0+cpu")
    assert steps[1:3] == ["torch==2.13.0+cpu", "torch==2.13.0+cpu from PyTorch's index"]


def test_a_failing_step_shows_the_end_of_its_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = setup.Steps(tmp_path / "log")
    assert steps.run("fine", ["true"], "")
    assert not steps.run("optional", ["false"], "", allowed_to_fail=True)
    body = "for i in $(seq 30); do echo line $i; done; echo 'ERROR: no network' >&2; exit 1"
    with pytest.raises(setup.SetupError, match=r"^packages failed: check the network \(everything"):
        steps.run("packages", ["sh", "-c", body], "check the network")
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1].strip() == "ERROR: no network"
    assert len(shown) <= 16 and "line 1" not in [line.strip() for line in shown]
    with pytest.raises(setup.SetupError, match="ended by signal 9"):
        steps.run("killed", ["sh", "-c", "kill -9 $$"], "check the network")


def lock_names() -> dict[str, Requirement]:
    lines = (REPOSITORY / "requirements" / "cpu.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def test_the_lock_pins_everything_and_nothing_of_cuda() -> None:
    locked = lock_names()
    assert all(re.fullmatch(r"==[^*]+", str(requirement.specifier)) for requirement in locked.values())
    assert not LEFT_OUT & set(locked)
    assert not [name for name in locked if name.startswith(("nvidia", "cuda", "flashinfer"))]


def test_the_lock_is_closed() -> None:
    """What a locked package needs is locked in a version that it accepts, for the packages installed here."""
    locked, problems, seen = lock_names(), [], 0
    for name in locked:
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        seen += 1
        for need in map(Requirement, needs):
            other = canonicalize_name(need.name)
            if (need.marker and not need.marker.evaluate({"extra": ""})) or other in LEFT_OUT:
                continue
            pinned = str(locked[other].specifier).removeprefix("==") if other in locked else None
            if pinned is None or not need.specifier.contains(pinned, prereleases=True):
                problems.append(f"{name} needs {need}, locked is {pinned}")
    assert problems == []
    assert seen > 20


def test_the_project_needs_nothing_that_is_not_locked() -> None:
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    locked = lock_names()
    for need in map(Requirement, sum(groups, [])):
        name = canonicalize_name(need.name)
        if name not in ("distil-xlstm", "vllm", "ray", "gcsfs"):  # set-up does not install these
            assert name in locked, f"{need} is in pyproject.toml but not in requirements/cpu.txt"
            assert need.specifier.contains(str(locked[name].specifier).removeprefix("=="))


def make(*arguments: str, folder: Path = REPOSITORY) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        ["make", "--no-print-directory", *arguments], cwd=folder, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_is_the_default_target_and_lists_every_other() -> None:
    shown = make()
    assert shown == make("help")
    targets = re.search(r"^\.PHONY: (.*)$", (REPOSITORY / "Makefile").read_text(), re.M)
    assert targets is not None
    for target in set(targets[1].split()) - {"ready", "first-dump"}:
        assert re.search(rf"^  {target} +\w", shown, re.M), target


@pytest.mark.parametrize("prompt", ['it\'s "quoted"', "costs $HOME and $(id)", "`id` \\ \u00fc #"])
def test_a_prompt_reaches_the_command_as_it_was_typed(prompt: str) -> None:
    assert prompt in make("help", f"PROMPT={prompt}")


def test_training_dumps_first_only_into_the_default_cache() -> None:
    default = make("-n", "train-student", "DUMP=demo")
    assert "test -e caches/demo/manifest.json ||" in default and "--cache caches/demo" in default
    assert "dump" not in make("-n", "train-student", "CACHE=elsewhere/mine")


def test_a_run_of_another_cache_is_another_run(tmp_path: Path) -> None:
    """The demo's run is not what a student of a further cache would go on with."""
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    runs = [
        make("-n", "train-student", f"CACHE=caches/{name}", folder=tmp_path).split("--run ")[1].split()[0]
        for name in ("demo", "embedded", "mine")
    ]
    assert runs == ["runs/demo", "runs/demo-embedded", "runs/demo-mine"]


def test_what_reads_takes_the_demo_while_there_is_nothing_else(tmp_path: Path) -> None:
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    (tmp_path / "caches" / "demo").mkdir(parents=True)
    line = make("-n", "eval", folder=tmp_path)
    assert "--run runs/demo --cache caches/demo" in line
    assert "--cache caches/embedded" in make("-n", "dump-teacher", folder=tmp_path)
    (tmp_path / "caches" / "embedded").mkdir()
    assert "--run runs/demo-embedded --cache caches/embedded" in make("-n", "eval", folder=tmp_path)


def test_gpus_and_their_division_reach_the_dump() -> None:
    line = make("-n", "dump-teacher", "GPUS=4", "TP=2", "SHARDS=7").splitlines()[-1]
    assert "--shards 7" in line and "--gpus 4 --engine.tensor_parallel 2" in line
    line = make("-n", "dump-teacher").splitlines()[-1]
    assert "--shards" not in line  # the manifest's
    assert "--gpus" not in line and "tensor_parallel" not in line
