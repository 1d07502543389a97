"""Generation: sampling, streaming, run folders, and what the command line says when something is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers_cache import write_toy_teacher
from helpers_student import save_checkpoint, toy_teacher

from pipeline.errors import UserError, run_command
from student.generate import encode_prompt, generate, main, sample, stream_text
from student.model import DistilXLSTM, StudentConfig
from student.runs.checkpoint import RunRecord, load_student

CONFIG = StudentConfig(blocks=2, heads=4)


@pytest.fixture(scope="module")
def model() -> DistilXLSTM:
    torch.manual_seed(0)
    return DistilXLSTM(CONFIG, *toy_teacher(tied=False), max_length=32).eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as training leaves it, of an untrained student."""
    run = tmp_path_factory.mktemp("runs") / "toy"
    facts = write_toy_teacher(run / "teacher", 61, 64, 4, 4, tied=True, seed=0)
    RunRecord(CONFIG, "teacher", 32, "compat", facts.width, facts.vocab_size).write(run)
    torch.manual_seed(1)
    tensors = {name: torch.randn(61, 64) for name in ("embedding_VD", "head_VD")} | {"norm_D": torch.ones(64)}
    student = DistilXLSTM(CONFIG, facts, tensors, max_length=32)
    (run / "checkpoints").mkdir()
    state = {f"model.{name}": tensor for name, tensor in student.state_dict().items()}
    save_checkpoint({"state_dict": {**state, "other.weight": torch.zeros(1)}}, run / "checkpoints" / "last.ckpt")
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(trained, tmp_path / "toy"))


def test_greedy_generation_is_the_argmax_of_the_parallel_form(model: DistilXLSTM) -> None:
    text = [5, 6, 7]
    for token in generate(model, [5, 6, 7], max_new_tokens=12, temperature=0):
        with torch.no_grad():
            logits_V = model.logits(model(torch.tensor([text])).h_BTD[0, -1:])[0]
        assert token == int(logits_V.argmax())
        text.append(token)
    assert len(text) == 15


def test_the_seed_decides_the_text(model: DistilXLSTM) -> None:
    texts = [list(generate(model, [3], max_new_tokens=20, temperature=1.0, top_p=1.0, seed=s)) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_stop_id_ends_the_text_and_is_not_part_of_it(model: DistilXLSTM) -> None:
    free = list(generate(model, [3], max_new_tokens=20, temperature=1.0, seed=1))
    stop = free[7]
    assert (
        list(generate(model, [3], max_new_tokens=20, temperature=1.0, seed=1, stop_ids={stop}))
        == free[: free.index(stop)]
    )
    assert list(generate(model, [3], max_new_tokens=0)) == []


def test_sampling_follows_the_softmax_within_the_nucleus() -> None:
    p_V = torch.tensor([0.05, 0.5, 0.3, 0.15])
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor([sample(2 * p_V.log(), 2.0, 0.9, generator) for _ in range(4000)])
    shares = torch.bincount(draws, minlength=4) / 4000
    expected = torch.tensor([0.0, 0.5, 0.3, 0.15]) / 0.95
    torch.testing.assert_close(shares, expected, atol=0.03, rtol=0)
    assert shares[0] == 0
    assert {sample(p_V.log(), 1.0, 1e-6, generator) for _ in range(20)} == {1}


@pytest.mark.parametrize(
    ("token_ids", "options", "message"),
    [
        ([], {}, "at least one token"),
        ([97], {}, "id 97, .* ends at 96"),
        ([1], {"temperature": -1.0}, "temperature"),
        ([1], {"top_p": 0.0}, "top_p"),
    ],
)
def test_bad_arguments_are_refused_before_the_first_token(
    model: DistilXLSTM, token_ids: list[int], options: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, token_ids, **options)


def test_text_streams_without_breaking_characters() -> None:
    token_bytes = [b"a", "é".encode()[:1], "é".encode()[1:], "漢".encode(), b"", b"\xff"]
    pieces = list(stream_text([0, 1, 2, 4, 3, 1], token_bytes))
    assert pieces == ["a", "é", "漢", "\ufffd"]
    assert "".join(stream_text([5, 0], token_bytes)) == "\ufffda"


def test_text_comes_as_soon_as_it_is_complete() -> None:
    drawn = []

    def tokens():
        for token in (0, 0, 0):
            drawn.append(token)
            yield token

    stream = stream_text(tokens(), [b"a"])
    assert next(stream) == "a" and len(drawn) == 1


def test_a_run_folder_is_enough(trained: Path) -> None:
    model, teacher = load_student(trained)
    assert not model.training and model.config == CONFIG and model.max_length == 32
    saved = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, saved[f"model.{name}"]) for name, tensor in model.state_dict().items())
    assert torch.equal(model.embedding_VD, teacher.tensors()["embedding_VD"])
    by_path, _ = load_student(trained, str(trained / "checkpoints" / "last.ckpt"))
    assert torch.equal(by_path.final_norm.weight, model.final_norm.weight)


def test_an_empty_prompt_begins_a_document(trained: Path) -> None:
    _, teacher = load_student(trained)
    assert encode_prompt("", teacher) == [teacher.facts.separator_id]
    assert b"".join(teacher.token_bytes()[i] for i in encode_prompt("the cat", teacher)) == b"the cat"


def test_the_command_line_prints_prompt_and_text(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--run", str(trained), "--prompt", "the cat", "--max_new_tokens", "9", "--device", "cpu"]
    assert run_command(lambda: main(arguments)) == 0
    out, err = capsys.readouterr()
    assert out.startswith("the cat") and len(out) > len("the cat\n") and "tok/s" in err
    main([*arguments, "--echo", "false"])
    assert "the cat" + capsys.readouterr().out == out


def test_the_prompt_can_come_from_the_environment(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEXT", 'the "cat"')
    main(["--run", str(trained), "--prompt_from_env", "TEXT", "--max_new_tokens", "1", "--device", "cpu"])
    assert capsys.readouterr().out.startswith('the "cat"')
    with pytest.raises(UserError, match="NO_SUCH_TEXT"):
        main(["--run", str(trained), "--prompt_from_env", "NO_SUCH_TEXT"])


def test_help_shows_type_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Divides the logits; 0 takes the likeliest token always. (type: float, default: 0.8)" in text


def failure(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert run_command(lambda: main(arguments)) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and text.startswith("error: ")
    return text


def test_what_is_missing_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"run folder {tmp_path}/none does not exist" in failure(["--run", f"{tmp_path}/none"], capsys)
    assert f"{tmp_path}/run.json is missing" in failure(["--run", str(tmp_path)], capsys)
    text = failure(["--run", str(run), "--checkpoint", "best"], capsys)
    assert "no checkpoint 'best'" in text and "checkpoints there: last" in text
    assert "--top_p" in failure(["--run", str(run), "--top_p", "2"], capsys)
    assert "--device" in failure(["--run", str(run), "--device", "abacus"], capsys)
    assert "tempreature" in failure(["--run", str(run), "--tempreature", "1"], capsys)
    (run / "teacher" / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in failure(["--run", str(run), "--prompt", "x"], capsys)


def test_a_damaged_checkpoint_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "checkpoints" / "last.ckpt"
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"no checkpoint at all"):
        path.write_bytes(content)
        assert "last.ckpt cannot be read as a checkpoint" in failure(["--run", str(run)], capsys)
    save_checkpoint({"weights": {}}, path)
    assert "last.ckpt cannot be read as a checkpoint" in failure(["--run", str(run)], capsys)


@pytest.mark.parametrize(("vocab_size", "width", "message"), [(61, 32, "width 64, .* width 32"), (70, 64, "61, .* 70")])
def test_another_teachers_folder_is_refused(run: Path, vocab_size: int, width: int, message: str) -> None:
    shutil.rmtree(run / "teacher")
    write_toy_teacher(run / "teacher", vocab_size, width, 4, 4, tied=True, seed=0)
    with pytest.raises(UserError, match=message):
        load_student(run)


def test_a_checkpoint_of_another_shape_is_refused(run: Path) -> None:
    record = RunRecord.read(run)
    RunRecord(StudentConfig(blocks=3, heads=4), record.teacher, 32, "compat").write(run)
    with pytest.raises(UserError, match=r"does not hold the student .*run.json describes \(\d+ parameters differ"):
        load_student(run)


def test_a_record_keeps_its_tuples_and_refuses_damage(tmp_path: Path) -> None:
    record = RunRecord(StudentConfig(slstm_at=(1, 3)), "teacher", 32, "compat", 64, 61)
    record.write(tmp_path)
    assert RunRecord.read(tmp_path) == record
    path = tmp_path / "run.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "max_length": 33}))
    with pytest.raises(UserError, match="run.json does not match the digest"):
        RunRecord.read(tmp_path)
