"""An exported folder on a GPU: the logits and the text of the same folder on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers_export import write_toy_run
from helpers_transformer import student_of
from transformers import AutoModelForCausalLM

from student.export import ExportOptions, export
from student.model import StudentConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]


@pytest.mark.parametrize("kind", ["package", "transformer"])
def test_logits_and_text_are_those_of_a_cpu(kind: str, tmp_path: Path) -> None:
    shape = StudentConfig(blocks=2, heads=4) if kind == "package" else student_of()
    folder = export(ExportOptions(write_toy_run(tmp_path, shape), tmp_path / "out")).folder
    on_cpu = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    on_gpu = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval().cuda()
    ids_BT = torch.arange(2 * 100).view(2, 100) * 7 % on_cpu.config.vocab_size
    with torch.no_grad():
        expected_BTV, found_BTV = on_cpu(ids_BT).logits, on_gpu(ids_BT.cuda()).logits.cpu()
    assert (found_BTV - expected_BTV).abs().max() < 1e-4 * expected_BTV.abs().max()
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, :40] = 0  # a shorter text, padded on the left
    options = {"max_new_tokens": 12, "do_sample": False}
    texts = [
        model.generate(ids_BT.to(model.device), attention_mask=mask_BT.to(model.device), **options).cpu()
        for model in (on_cpu, on_gpu)
    ]
    assert torch.equal(*texts)
