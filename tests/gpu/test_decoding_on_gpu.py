"""A step that is launched as a CUDA graph gives the logits of one that is not."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers_decoding import decoding_student

from student.decoding import Decoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(600),
]


@pytest.mark.parametrize("kind", ["package", "transformer"])
@pytest.mark.parametrize("rows", [1, 5])
def test_logits_of_a_recorded_step(kind: str, rows: int) -> None:
    model = decoding_student(kind).cuda()
    recorded, plain = Decoder(model), Decoder(model, graphs=False)
    generator = torch.Generator("cuda").manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="a step cannot be recorded")
        for prompt in (9, 4):  # one text after another
            prompt_1T = torch.randint(97, (1, prompt), generator=generator, device="cuda")
            for decoder in (recorded, plain):
                decoder.prefill(prompt_1T)
                decoder.repeat(rows)
            for _ in range(20):
                ids_B = torch.randint(97, (rows,), generator=generator, device="cuda")
                torch.testing.assert_close(recorded.step(ids_B), plain.step(ids_B), rtol=1e-5, atol=1e-5)
            assert recorded.graph is not None and plain.graph is None
