"""On a GPU: evaluation, log-likelihoods and attention distances say what they say on a CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_cache import toy_tokenizer, write_toy_cache
from helpers_run import write_run
from helpers_teacher import make_teacher

from student.attention_distance import AttentionDistanceOptions, attention_distance
from student.evaluate import EvaluateOptions, evaluate
from student.evaluation.language_model import LanguageModel, hugging_face, student_of
from student.evaluation.log_likelihood import as_request, log_likelihoods
from student.model import StudentConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(900),  # kernels are compiled at their first use
]
SHAPE = StudentConfig(blocks=4, heads=4, final_norm="teacher")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run and its cache; head widths of 64 and 128, which the kernels take."""
    folder = tmp_path_factory.mktemp("gpu")
    cache = write_toy_cache(folder / "cache", units=1, rows=12, length=128, block=16, width=256, vocab_size=200)
    return write_run(folder / "run", cache, SHAPE), cache


@pytest.mark.parametrize(("precision", "nats"), [("32-true", 2e-3), ("bf16-mixed", 2e-2)])
def test_evaluation(folders: tuple[Path, Path], precision: str, nats: float) -> None:
    run, cache = folders
    options = EvaluateOptions(str(run), str(cache), maps=0, device="cpu")
    wanted = evaluate(options)
    found = evaluate(replace(options, device="cuda", precision=precision))  # type: ignore[arg-type]
    assert found["targets"] == wanted["targets"] and found["target_bytes"] == wanted["target_bytes"]
    for name in ("student_cross_entropy", "teacher_cross_entropy", "unigram_cross_entropy", "kl_k1"):
        assert found[name] == pytest.approx(wanted[name], abs=nats), name
    for row, other in zip(found["by_position"], wanted["by_position"], strict=True):
        assert row["targets"] == other["targets"]
        assert row["student_cross_entropy"] == pytest.approx(other["student_cross_entropy"], abs=5 * nats)
    again = evaluate(replace(options, device="cuda", precision=precision))  # type: ignore[arg-type]
    assert {**again, "seconds": 0} == {**found, "seconds": 0}  # to the bit


@pytest.mark.parametrize("kind", ["student", "hugging face"])
def test_log_likelihoods(folders: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    toy_tokenizer(200).save(str(make_teacher(tmp_path / "hf") / "tokenizer.json"))

    def on(device: str) -> LanguageModel:
        if kind == "student":
            return student_of(folders[0], "last", torch.device(device))
        return hugging_face(str(tmp_path / "hf"), "--model", torch.device(device))

    words = "the people were called by their first words and it is one of many".split()
    pairs = [(" ".join(words[:n]), " " + " ".join(words[n : n + 1 + n % 3])) for n in range(1, len(words) - 1)]
    scores = []
    for device in ("cpu", "cuda"):
        model = on(device)
        found = dict(log_likelihoods(model, [as_request(model, *pair) for pair in pairs], 256))
        scores.append([found[i].nats for i in range(len(pairs))])
    assert scores[1] == pytest.approx(scores[0], abs=2e-2)


def test_attention_distances(folders: tuple[Path, Path]) -> None:
    run, cache = folders
    options = AttentionDistanceOptions(str(run), str(cache), untrained=1, device="cpu")
    wanted, found = (attention_distance(replace(options, device=device))["mean"] for device in ("cpu", "cuda"))
    for sinks in ("keep", "drop"):
        for whose, value in wanted[sinks]["jensen_shannon"].items():
            assert found[sinks]["jensen_shannon"][whose] == pytest.approx(value, abs=5e-3), whose
