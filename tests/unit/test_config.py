"""Command lines: a manifest, dotted overrides, and complaints of one sentence."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from pipeline.config import parse_into
from pipeline.errors import UserError, run_command
from student.evaluate import EvaluateOptions
from teacher_dump.corpus import CorpusConfig
from teacher_dump.settings import DumpConfig

REPOSITORY = Path(__file__).resolve().parents[2]


def parse(*arguments: str) -> DumpConfig:
    return parse_into(DumpConfig, "python -m teacher_dump", "Dump.", "--manifest", list(arguments))


@pytest.fixture
def manifests(tmp_path: Path) -> Path:
    """A tree like manifests/: the dump names its corpus by a path relative to itself."""
    (tmp_path / "corpora").mkdir()
    (tmp_path / "dumps").mkdir()
    (tmp_path / "corpora" / "toy.yaml").write_text("source: toy.jsonl\ntext_field: body\nheldout_fraction: 0.25\n")
    (tmp_path / "dumps" / "toy.yaml").write_text(
        "corpus: ../corpora/toy.yaml\ncache: caches/toy\nshards: 3\ntaus: [1, 1.5]\nengine:\n  dtype: float32\n"
    )
    (tmp_path / "dumps" / "other.yaml").write_text("cache: x\n")
    return tmp_path / "dumps"


def test_manifest_with_a_nested_corpus_file(manifests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    config = parse("--manifest", str(manifests / "toy.yaml"))
    assert config.corpus == CorpusConfig(source="toy.jsonl", text_field="body", heldout_fraction=0.25)
    assert (config.shards, config.taus, config.engine.dtype) == (3, (1.0, 1.5), "float32")
    assert config.cache == Path("caches/toy"), "relative to where the command runs, not to the manifest"
    assert config.k == 64, "what the manifest does not say is the default"


def test_dotted_overrides(manifests: Path) -> None:
    overrides = "--shards=7 --corpus.text_field content --taus [1.0,2.0] --engine.rows_per_step 4 --packing document"
    config = parse("--manifest", str(manifests / "toy.yaml"), *overrides.split())
    assert (config.shards, config.corpus.text_field, config.taus) == (7, "content", (1.0, 2.0))
    assert (config.corpus.source, config.engine.rows_per_step, config.packing) == ("toy.jsonl", 4, "document")


def test_a_switch_needs_no_value() -> None:
    """As README and Makefile write it: `ARGS=--full_kl`."""
    words = ["--run", "r", "--cache", "c"]
    for given, wanted in (([], False), (["--full_kl"], True), (["--full_kl", "--maps", "1"], True)):
        assert parse_into(EvaluateOptions, "p", "d", "--config", [*given, *words]).full_kl is wanted
        assert parse_into(EvaluateOptions, "p", "d", "--config", [*words, *given]).full_kl is wanted
    assert parse_into(EvaluateOptions, "p", "d", "--config", [*words, "--full_kl", "false"]).full_kl is False


@pytest.mark.parametrize("form", [["--manifest", "{}/nope.yaml"], ["--manifest={}/nope.yaml"]])
def test_missing_manifest_lists_the_known_ones(form: list[str], manifests: Path) -> None:
    with pytest.raises(UserError, match=r"nope\.yaml: there is no such file: known there are other, toy$"):
        parse(*(word.format(manifests) for word in form))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--kk", "3"], "--kk"),
        (["--k", "many"], '"k"'),
        (["--packing", "loose"], "packing"),
        (["--corpus.colour", "red"], "colour"),
        (["--taus", "[1, two]"], "taus"),
        (["--corpus", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_bad_option_is_one_sentence_that_names_it(arguments: list[str], said: str, manifests: Path) -> None:
    with pytest.raises(UserError) as raised:
        parse("--manifest", str(manifests / "toy.yaml"), *arguments)
    assert said in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "line", ["speed: 9\n", "k: [\n", "- a list\n", "corpus: 5\n", "corpus: ../corpora/nope.yaml\n"]
)
def test_bad_manifest_is_one_sentence(line: str, manifests: Path) -> None:
    path = manifests / "bad.yaml"
    path.write_text("cache: x\n" * (not line.startswith("-")) + line)
    with pytest.raises(UserError) as raised:
        parse("--manifest", str(path))
    assert "\n" not in str(raised.value)


def test_what_has_no_default_is_required() -> None:
    with pytest.raises(UserError, match=r"corpus\.source.*cache"):
        parse()


def options(kind: Any, prefix: str = "") -> list[str]:
    """Dotted names of every option, nested ones too."""
    hints = get_type_hints(kind)
    found: list[str] = []
    for field in fields(kind):
        nested = is_dataclass(hints[field.name])
        found += options(hints[field.name], f"{prefix}{field.name}.") if nested else [prefix + field.name]
    return found


def test_help_shows_type_default_and_meaning_of_every_option(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    assert stopped.value.code == 0
    text = re.sub(r"\s+", " ", capsys.readouterr().out.split("options:", 1)[1])
    listed = options(DumpConfig)
    assert {"k", "taus", "corpus.source", "corpus.range_bytes", "engine.dtype", "data"} <= set(listed)
    for name in listed:
        value = r"(?:[A-Z_]+|\[ITEM,\.\.\.\]|\{[^}]*\})"
        entry = re.search(
            rf"--{re.escape(name)} {value} (.{{10,}}?) \((required, )?type: [^:]+?(, default: .+?)?\)", text
        )
        assert entry, f"--{name}: type or meaning is not shown"
        assert "--" not in entry[1], f"--{name} has no meaning"
        assert entry[2] or entry[3], f"--{name} shows no default"


def test_manifests_in_the_repository_are_read() -> None:
    found = sorted((REPOSITORY / "manifests" / "dumps").glob("*.yaml"))
    assert {"demo", "embedded"} <= {path.stem for path in found}
    for path in found:
        assert parse("--manifest", str(path)).corpus.source


def test_user_errors_become_a_line_and_a_status(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> Any:
        def body() -> None:
            raise error

        return body

    assert run_command(lambda: None) == 0
    assert run_command(lambda: 3) == 3
    assert run_command(fail(UserError("--k 0: must be at least 1"))) == 2
    assert capsys.readouterr().err == "error: --k 0: must be at least 1\n"
    assert run_command(fail(OSError(28, "No space left on device", "/caches/a"))) == 2
    assert "No space left on device (/caches/a)" in capsys.readouterr().err
    assert run_command(fail(KeyboardInterrupt())) == 130
    with pytest.raises(ZeroDivisionError):
        run_command(fail(ZeroDivisionError()))


READER_LEAVES = """
import sys
from pipeline.errors import run_command

def body():
    if sys.argv[1] == "prints":
        for n in range(100_000):
            print("line", n)
    raise BrokenPipeError(32, "Broken pipe", "a worker's pipe")

sys.exit(run_command(body))
"""


@pytest.mark.parametrize(("does", "status"), [("prints", 0), ("fails", 2)])
def test_a_reader_that_stops_early_is_no_error(does: str, status: int) -> None:
    """`command | head -1`; another pipe that breaks is an error as before."""
    process = subprocess.Popen(
        [sys.executable, "-c", READER_LEAVES, does], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    if does == "prints":
        assert process.stdout.readline() == "line 0\n"
        process.stdout.close()
    said = process.stderr.read()
    assert process.wait(60) == status
    assert said == "" if status == 0 else "a worker's pipe" in said
