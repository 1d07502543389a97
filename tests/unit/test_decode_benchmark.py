"""The benchmark of generation at toy sizes: its steps are those of generation, and a row comes of every case."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import decode, decode_case
from benchmarks.processes import in_own_process, reports_of, spare_processes
from student.generate import generate

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("batch", [1, 3])
def test_the_students_steps_continue_as_generation_does(batch: int) -> None:
    case = decode_case.Case("student", 20, batch, steps=5, warmup=2, **decode.SMALL)
    seen: list[torch.Tensor] = []
    decoder = decode_case.StudentDecoder(case, torch.device("cpu"))
    found = decode_case.measure(case, decoder, seen.append)
    prompt = torch.randint(160, (1, 20), generator=torch.Generator().manual_seed(0))[0].tolist()
    expected = list(generate(decoder.decoder.model, prompt, max_new_tokens=8, temperature=0))
    assert torch.stack(seen).tolist() == [[token] * batch for token in expected]
    decoder.prefill(torch.tensor([prompt]))
    assert found["state_gb"] == pytest.approx(batch * decoder.state_bytes() / 1e9)
    assert found["tokens_per_s"] == pytest.approx(1000 * batch / found["ms_per_step"])


@pytest.mark.parametrize("name", ["transformer", "transformer_eager"])
def test_the_transformers_steps_continue_as_a_whole_pass_does(name: str) -> None:
    case = decode_case.Case(name, 20, 3, steps=5, warmup=2, **decode.SMALL)
    seen: list[torch.Tensor] = []
    decoder = decode_case.TransformerDecoder(case, torch.device("cpu"))
    decode_case.measure(replace(case, context=7, batch=2), decoder)  # what was read before is of no matter
    found = decode_case.measure(case, decoder, seen.append)
    ids = torch.stack(seen, 1)
    prompt = torch.randint(160, (1, 20), generator=torch.Generator().manual_seed(0)).repeat(3, 1)
    with torch.inference_mode():
        logits = decoder.model(torch.cat([prompt, ids], 1)).logits[:, 19:-1]
    chosen = logits.gather(-1, ids[..., None]).squeeze(-1)
    assert bool((chosen >= logits.amax(-1) - 0.05).all())  # bfloat16 has ties
    positions = 20 + 7
    assert found["state_gb"] == pytest.approx(3 * positions * 2 * 32 * 2 / 1e9)  # keys and values, one head, bfloat16


def test_what_does_not_fit_is_a_row_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large(case: decode_case.Case, decoder: Any) -> dict[str, Any]:
        if case.context == 9:
            raise torch.OutOfMemoryError("Tried to allocate 120 GiB\nand more")
        return {"tokens_per_s": 1.0}

    monkeypatch.setattr(decode_case, "measure", too_large)
    cases = [{"model": "transformer", "context": context, "batch": 64, **decode.SMALL} for context in (9, 8)]
    monkeypatch.setattr("sys.argv", ["decode_case", json.dumps({"cases": cases})])
    decode_case.main()
    lines = capsys.readouterr().out.split()
    found = [json.loads(line) for line in " ".join(lines).split("measured: ")[1:]]
    assert found == [{"skipped": "out of memory: Tried to allocate 120 GiB"}, {"tokens_per_s": 1.0}]
    monkeypatch.setattr(decode, "reports_of", lambda *_: iter(found))
    words = f"--small --results {tmp_path} --models transformer --contexts 9 8 --batches 64".split()
    assert decode.main(words) == 0
    row, other = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert row["skipped"].startswith("out of memory") and "tokens_per_s" not in row
    assert other["context"] == 8 and other["tokens_per_s"] == 1.0
    assert "out of memory" in capsys.readouterr().out


def offer(name: str, text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that processes of a benchmark find, beside the repository's."""
    (folder / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(REPOSITORY)]))


def test_reports_come_while_the_process_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "import json, sys, time\n"
        "from benchmarks.processes import report\n"
        "report({'step': 1}); report({'step': 2})\n"
        "print('and then', flush=True)\n"
        "case = json.loads(sys.argv[1])\n"
        "time.sleep(case['seconds'])\n"
        "sys.exit(case['status'])\n"
    )
    offer("reporting", text, tmp_path, monkeypatch)
    assert [found["step"] for found in reports_of("reporting", {"seconds": 0, "status": 0})] == [1, 2]
    running = reports_of("reporting", {"seconds": 1000, "status": 0})
    assert next(running)["step"] == 1
    running.close()
    failing = reports_of("reporting", {"seconds": 0, "status": 3})
    assert [next(failing)["step"], next(failing)["step"]] == [1, 2]
    with pytest.raises(RuntimeError, match="failed:\n(.|\n)*and then"):
        next(failing)
    late = reports_of("reporting", {"seconds": 1000, "status": 0}, timeout=3)
    with pytest.raises(RuntimeError, match="took more than 3 s"):
        list(late)
    assert in_own_process("reporting", {"seconds": 0, "status": 3}) == {"step": 1}


def test_a_spare_process_has_imported_before_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "import os, sys, pathlib\n"
        "pathlib.Path(__file__).with_suffix(f'.{os.getpid()}').touch()\n"
        "from benchmarks.processes import given_case, report\n"
        "report({**given_case(), 'pid': os.getpid(), 'words': sys.argv[1:]})\n"
    )
    offer("sparing", text, tmp_path, monkeypatch)

    def started() -> set[int]:
        return {int(path.suffix[1:]) for path in tmp_path.glob("sparing.*") if path.suffix != ".py"}

    with spare_processes():
        first = in_own_process("sparing", {"n": 1})["pid"]
        while len(started()) < 2:
            time.sleep(0.05)
        (spare,) = started() - {first}
        second = in_own_process("sparing", {"n": 2}, timeout=60)
        assert (second["n"], second["pid"], second["words"]) == (2, spare, ['{"n": 2}'])
        while len(started()) < 3:
            time.sleep(0.05)
        (last,) = started() - {first, spare}
    assert not Path(f"/proc/{last}").exists()
    assert in_own_process("sparing", {"n": 3})["n"] == 3
    assert len(started()) == 4
