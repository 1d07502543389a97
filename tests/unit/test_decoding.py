"""Token after token: what a recorded step does in place is what `DistilXLSTM.step` gives."""

from __future__ import annotations

import pytest
import torch
from helpers_decoding import decoding_student
from torch import Tensor

from student.decoding import Decoder
from student.model import DistilXLSTM

PROMPT_1T = torch.tensor([[5, 3, 8, 1]])
NEXT = [7, 2, 2, 9]


@pytest.fixture(params=["package", "transformer"])
def model(request: pytest.FixtureRequest) -> DistilXLSTM:
    return decoding_student(request.param)


@torch.inference_mode()
def plain(model: DistilXLSTM, prompt_BT: Tensor) -> list[Tensor]:
    h_BD, state = model.prefill(prompt_BT)
    found = [model.logits(h_BD)]
    for token in NEXT:
        h_BD, state = model.step(torch.full((len(prompt_BT),), token), state)
        found.append(model.logits(h_BD))
    return found


def test_a_prompt_and_steps(model: DistilXLSTM) -> None:
    decoder = Decoder(model)
    for prompt_BT in (PROMPT_1T, torch.tensor([[1, 2], [3, 4]])):  # one after another
        rows = len(prompt_BT)
        found = [decoder.prefill(prompt_BT), *(decoder.step(torch.full((rows,), token)) for token in NEXT)]
        for logits_BV, expected_BV in zip(found, plain(model, prompt_BT), strict=True):
            assert torch.equal(logits_BV, expected_BV)
    assert decoder.graph is None


def test_the_next_state_is_left_where_the_present_one_lay(model: DistilXLSTM) -> None:
    decoder = Decoder(model)
    found = [decoder.prefill(PROMPT_1T)]
    assert decoder.state is not None
    with torch.inference_mode():
        decoder.state = decoder.state.changed(lambda _, t: t.clone())
        lies = [t.data_ptr() for t in decoder.state.tensors()]
        decoder.ids_B = torch.zeros(1, dtype=torch.int64)
        for token in NEXT:
            decoder.ids_B.fill_(token)
            found.append(decoder.advance())
    assert [t.data_ptr() for t in decoder.state.tensors()] == lies
    for logits_BV, expected_BV in zip(found, plain(model, PROMPT_1T), strict=True):
        assert torch.equal(logits_BV, expected_BV)


def test_one_rows_state_for_many(model: DistilXLSTM) -> None:
    decoder = Decoder(model)
    decoder.prefill(PROMPT_1T)
    decoder.repeat(3)
    many_BV = decoder.step(torch.tensor([7, 2, 7]))
    assert torch.equal(many_BV[0], many_BV[2]) and not torch.allclose(many_BV[0], many_BV[1])
    torch.testing.assert_close(many_BV[:1], plain(model, PROMPT_1T)[1])
