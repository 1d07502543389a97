"""Log-likelihoods of batches against one text at a time, and tokens cut where lm-evaluation-harness cuts them.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_cache import toy_tokenizer, write_toy_cache
from helpers_run import write_run
from helpers_teacher import make_teacher
from torch import Tensor

from pipeline.errors import UserError
from student.evaluation.language_model import LanguageModel, hugging_face, student_of
from student.evaluation.log_likelihood import Request, as_request, encode_pair, log_likelihoods, padded_length

CPU = torch.device("cpu")
PAIRS = [
    ("the people were", " called by their first words"),
    ("the people were", " made"),
    ("the people were", " many"),
    ("it is", " one"),
    ("how many of these would you", " like to make some time?"),
    ("a", "n"),
]


@pytest.fixture(scope="module", params=["student", "hugging face"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder = tmp_path_factory.mktemp("model")
    if request.param == "student":
        cache = write_toy_cache(folder / "cache", units=1, rows=2, length=16, block=8)
        return student_of(write_run(folder / "run", cache), "last", CPU)
    toy_tokenizer(200).save(str(make_teacher(folder / "hf", head_scale=3.0) / "tokenizer.json"))
    return hugging_face(str(folder / "hf"), "--model", CPU)


def alone(model: LanguageModel, context: str, continuation: str) -> tuple[float, bool]:
    """Log-probability and greediness of one continuation, token by token, nothing beside it."""
    before, after = encode_pair(model.encode, context, continuation)
    nats, greedy, before = 0.0, True, before or [model.start_id]
    for token in after:
        with torch.no_grad():
            logits_V = model.logits(model.hidden(torch.tensor([before]))[:, -1])[0]
        nats += float(logits_V.log_softmax(0)[token])
        greedy &= int(logits_V.argmax()) == token
        before = [*before, token]
    return nats, greedy


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_batches_score_as_one_text_at_a_time(
    model: LanguageModel, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("student.evaluation.device.CPU_ROWS", 5)
    requests = [as_request(model, *pair) for pair in PAIRS]
    found = dict(log_likelihoods(model, requests, batch_tokens))
    assert sorted(found) == list(range(len(PAIRS)))
    for index, pair in enumerate(PAIRS):
        nats, greedy = alone(model, *pair)
        assert found[index].nats == pytest.approx(nats, abs=1e-4)
        assert found[index].greedy == greedy
        assert found[index].tokens == len(encode_pair(model.encode, *pair)[1])


def test_a_continuation_that_the_model_would_write_is_greedy(model: LanguageModel) -> None:
    ids = model.encode("the people")
    best = int(model.logits(model.hidden(torch.tensor([ids]))[:, -1].detach())[0].argmax())
    requests = [Request(tuple(ids), len(ids) - 1, (token,)) for token in (best, best - 1 if best else 1)]
    found = dict(log_likelihoods(model, requests, 4096))
    assert (found[0].greedy, found[1].greedy) == (True, False)
    assert found[0].nats > found[1].nats


def test_requests_that_differ_in_their_last_token_are_read_once(model: LanguageModel) -> None:
    read: list[tuple[int, ...]] = []

    def hidden(ids_BT: Tensor) -> Tensor:
        read.extend(tuple(row) for row in ids_BT.tolist())
        return model.hidden(ids_BT)

    ids = tuple(model.encode("it is"))
    requests = [Request(ids, len(ids) - 1, (token,)) for token in range(3, 13)]
    found = dict(log_likelihoods(replace(model, hidden=hidden), requests, 4096))
    assert read == [ids]
    total = sum(torch.tensor(score.nats).exp().item() for score in found.values())
    assert 0 < total < 1 and len({score.nats for score in found.values()}) == 10


def test_spaces_at_the_end_of_a_context_belong_to_the_continuation() -> None:
    encode = lambda text: toy_tokenizer().encode(text).ids  # noqa: E731
    assert encode_pair(encode, "it is ", "one") == encode_pair(encode, "it is", " one")
    before, after = encode_pair(encode, "it is", " one")
    assert before + after == encode("it is one") and before == encode("it is")
    assert encode_pair(encode, "a", "n") == ([], encode("an"))  # one token


def test_what_the_model_cannot_read_is_cut_from_the_left(model: LanguageModel) -> None:
    whole = as_request(model, *PAIRS[4])
    short = as_request(replace(model, max_length=len(whole.targets) + 2), *PAIRS[4])
    assert short.targets == whole.targets
    assert short.read == whole.read[-len(whole.targets) - 2 :]
    assert whole.read[whole.first :] == short.read[short.first :]
    assert len(short.read) - short.first == len(short.targets)
    with pytest.raises(UserError, match="the model reads 1 to 3: it cannot be asked this task"):
        as_request(replace(model, max_length=3), *PAIRS[4])
    with pytest.raises(UserError, match="has 0 tokens"):
        as_request(model, "", "")


def test_a_text_without_context_begins_with_the_start_token(model: LanguageModel) -> None:
    request = as_request(model, "", "it is")
    assert request.read[0] == model.start_id and request.first == 0
    assert request.targets == tuple(model.encode("it is"))
    with_bos = as_request(model, "it", " is", (model.start_id,))
    assert with_bos.read[0] == model.start_id and with_bos.first == as_request(model, "it", " is").first + 1


def test_few_lengths_on_a_gpu() -> None:
    lengths = range(1, 1025)
    padded = [padded_length(length, torch.device("cuda")) for length in lengths]
    assert all(p >= length for p, length in zip(padded, lengths, strict=True))
    assert set(padded) == {32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024}
    assert padded_length(37, CPU) == 37


def test_folders_that_cannot_be_scored_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--model .* there is no such folder"):
        hugging_face(str(tmp_path / "none"), "--model", CPU)
    make_teacher(tmp_path / "bare")
    with pytest.raises(UserError, match=r"tokenizer.json is missing: a fast tokenizer is needed"):
        hugging_face(str(tmp_path / "bare"), "--model", CPU)
    (tmp_path / "bare" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer.json is damaged"):
        hugging_face(str(tmp_path / "bare"), "--model", CPU)
    toy_tokenizer(700).save(str(tmp_path / "bare" / "tokenizer.json"))
    model = hugging_face(str(tmp_path / "bare"), "--model", CPU)
    with pytest.raises(UserError, match=r"gives id \d+, but the model's vocabulary has 517"):
        model.encode("zzyxwvutzyzxzwzvzuzt")
