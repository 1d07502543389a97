"""The embedded teacher: GGUF to Hugging Face, and the known answers of the converted model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from pipeline.errors import UserError
from teacher_dump.embedded import resolve_embedded
from teacher_dump.embedded.gguf_model import GgufModel, hugging_face_name, rotary_order
from teacher_dump.embedded.teacher import TOKENIZER_SHA256, WEIGHTS_SHA256, prepare_teacher, teacher_ready
from teacher_dump.embedded.teacher_check import KNOWN_TEXT, check_teacher

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = REPOSITORY / "data"


@pytest.fixture(scope="module")
def folder() -> Path:
    return prepare_teacher(DATA)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A folder of the same content whose small files may be changed."""
    made = tmp_path / folder.name
    made.mkdir()
    for path in folder.iterdir():
        os.link(path, made / path.name) if path.suffix == ".safetensors" else shutil.copy(path, made / path.name)
    return made


@pytest.mark.parametrize(("heads", "size"), [(1, 4), (3, 8), (2, 64)])
def test_rotary_order_turns_side_by_side_pairs_into_halves(heads: int, size: int) -> None:
    """Coordinate 2i of a head in GGUF's order is coordinate i, and 2i + 1 is i + size/2."""
    rows = np.arange(heads * size * 2, dtype=np.float32).reshape(heads * size, 2)
    out = rotary_order(rows, heads).reshape(heads, size, 2)
    gguf = rows.reshape(heads, size, 2)
    for i in range(size // 2):
        np.testing.assert_array_equal(out[:, i], gguf[:, 2 * i])
        np.testing.assert_array_equal(out[:, i + size // 2], gguf[:, 2 * i + 1])


def test_names() -> None:
    assert hugging_face_name("token_embd.weight") == "model.embed_tokens.weight"
    assert hugging_face_name("blk.29.ffn_down.weight") == "model.layers.29.mlp.down_proj.weight"


def test_a_small_gguf_file(tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import dequantize, quantize

    rng = np.random.default_rng(0)
    query, embedding = rng.standard_normal((8, 32), np.float32), rng.standard_normal((6, 32), np.float32)
    writer = GGUFWriter(tmp_path / "small.gguf", "llama")
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_token_list(["<|end|>", "a", "b", "ab", "1", "Ġ"])
    writer.add_token_types([3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    packed = quantize(query, GGMLQuantizationType.Q4_1)
    writer.add_tensor("blk.0.attn_q.weight", packed, raw_dtype=GGMLQuantizationType.Q4_1)
    writer.add_tensor("token_embd.weight", embedding)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = GgufModel(tmp_path / "small.gguf")
    tensors = dict(model.tensors())
    expected = torch.from_numpy(rotary_order(dequantize(packed, GGMLQuantizationType.Q4_1), 2)).bfloat16()
    assert torch.equal(tensors["model.layers.0.self_attn.q_proj.weight"], expected)
    assert torch.equal(tensors["model.embed_tokens.weight"], torch.from_numpy(embedding).bfloat16())
    tokenizer = model.tokenizer()
    assert [token["content"] for token in tokenizer["added_tokens"]] == ["<|end|>"]
    assert tokenizer["model"]["vocab"]["ab"] == 3
    assert tokenizer["model"]["merges"] == [["a", "b"]]
    with pytest.raises(ValueError, match="general.nothing is missing"):
        model.field("general.nothing")


def test_the_known_answers(folder: Path) -> None:
    check_teacher(folder)


def test_weights_are_bfloat16_and_the_embedding_is_stored_once(folder: Path) -> None:
    with safe_open(str(folder / "model.safetensors"), framework="pt") as file:
        names = list(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert len(names) == 272
    assert "lm_head.weight" not in names


def test_no_token_is_put_before_a_text_and_digits_stand_alone(folder: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("2024").tokens == ["2", "0", "2", "4"]
    assert tokenizer.encode("").ids == []
    assert tokenizer.decode(tokenizer.encode(KNOWN_TEXT).ids, skip_special_tokens=False) == KNOWN_TEXT


def test_a_wrong_tokenizer_is_found(copy: Path) -> None:
    tokenizer = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["pre_tokenizer"] = tokenizer["pre_tokenizer"]["pretokenizers"][1]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(UserError, match="the converted teacher's token ids are"):
        check_teacher(copy)


def test_a_wrong_configuration_is_found(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = config["rope_theta"] = 10000.0
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="most likely ids|logits differ"):
        check_teacher(copy)


@pytest.mark.parametrize("fault", ["cut", "missing", "extra", "unrecorded", "other version"])
def test_a_damaged_folder_is_not_taken_for_ready(copy: Path, fault: str) -> None:
    assert teacher_ready(copy.parent)
    record = (copy / "conversion.json").read_text()
    assert WEIGHTS_SHA256 in record and TOKENIZER_SHA256 in record
    if fault == "cut":
        (copy / "tokenizer.json").write_text("{")
    elif fault == "missing":
        (copy / "model.safetensors").unlink()
    elif fault == "extra":
        (copy / "source.gguf").touch()
    elif fault == "unrecorded":
        (copy / "conversion.json").unlink()
    else:
        (copy / "conversion.json").write_text(record.replace(WEIGHTS_SHA256, "0" * 64))
    assert not teacher_ready(copy.parent)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(UserError, match="embedded:llama is no .* embedded:enwik8, .*, embedded:smollm2-135m"):
        resolve_embedded("embedded:llama", DATA)


def test_a_second_preparation_says_so_and_loads_nothing_large(folder: Path) -> None:
    resolve_embedded("embedded:enwik8", DATA)
    code = (
        "import sys; from teacher_dump.embedded.__main__ import main; assert main(['--data', sys.argv[1]]) == 0;"
        "print(sorted({'torch', 'transformers', 'numpy', 'gguf', 'zstandard'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(DATA)], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["teacher: ready", "corpus: ready", "[]"], done.stderr
